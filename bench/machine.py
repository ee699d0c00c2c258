"""What the machine can do at best, measured in the same run as everything compared against it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import liftbyimage

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
DEFAULT_LAST_LEVEL_CACHE = 32 * 2**20


@dataclass(frozen=True)
class Ceilings:
    """Rates that bound every row: products of two large square matrices, and a copy far larger than any cache."""

    matmul_gflops: float
    copy_gbytes: float  # bytes read plus bytes written, per second


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], Any]) -> float:
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


def measure_ceilings(small: bool = False) -> Ceilings:
    """The best of several attempts; `small` only proves that the code runs."""
    size = 256 if small else 2048 if DEVICE == "cpu" else 8192
    length = 2**20 if small else 2**26 if DEVICE == "cpu" else 2**30
    left, right = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(length, device=DEVICE, dtype=torch.float32)
    target = torch.zeros_like(source)
    matmul = min(seconds_of(lambda: torch.mm(left, right, out=product)) for _ in range(8))
    copy = min(seconds_of(lambda: target.copy_(source)) for _ in range(8))
    return Ceilings(2 * size**3 / matmul / 1e9, 2 * 4 * length / copy / 1e9)


def last_level_cache() -> int:
    """Bytes of the largest cache."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    found = [int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units]
    return max(found, default=DEFAULT_LAST_LEVEL_CACHE)


def available_memory() -> int:
    """Bytes that an allocation can still have."""
    if DEVICE == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo states no MemAvailable")


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def description(ceilings: Ceilings) -> dict[str, Any]:
    """What every row says about where it was measured."""
    versions = {"liftbyimage": liftbyimage.__version__, "python": platform.python_version()}
    versions["torch"] = torch.__version__
    if DEVICE == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "triton": metadata.version("triton")}
    return {
        "device": DEVICE,
        "device_name": device_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        **asdict(ceilings),
    }
