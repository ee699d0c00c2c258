"""What a machine can do at best, measured in the same run as everything compared against it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import liftbyimage


@dataclass(frozen=True)
class Ceilings:
    """Rates that bound every row: products of two large square matrices, and a copy far larger than any cache."""

    matmul_gflops: float
    copy_gbytes: float  # bytes read plus bytes written, per second


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], Any], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def measure_ceilings(device: str, dtype: torch.dtype, small: bool = False) -> Ceilings:
    """The best of several attempts on "cpu" or "cuda"; `small` only proves that the code runs."""
    size = 256 if small else 2048 if device == "cpu" else 8192
    length = 2**20 if small else 2**26 if device == "cpu" else 2**30
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(length, device=device, dtype=torch.float32)
    target = torch.zeros_like(source)
    matmul = min(seconds_of(lambda: torch.mm(left, right, out=product), device) for _ in range(8))
    copy = min(seconds_of(lambda: target.copy_(source), device) for _ in range(8))
    return Ceilings(2 * size**3 / matmul / 1e9, 2 * 4 * length / copy / 1e9)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(device: str) -> dict[str, str]:
    named = {"liftbyimage": liftbyimage.__version__, "python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        named |= {"cuda": str(torch.version.cuda), "triton": metadata.version("triton")}
    return named
