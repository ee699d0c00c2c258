"""The machine of this run: its device and dtype, and what it can do at best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from liftbyimage.profile import machine
from liftbyimage.profile.machine import Ceilings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
DEFAULT_LAST_LEVEL_CACHE = 32 * 2**20


def seconds_of(function: Callable[[], Any]) -> float:
    return machine.seconds_of(function, DEVICE)


def synchronise() -> None:
    machine.synchronise(DEVICE)


def measure_ceilings(small: bool = False) -> Ceilings:
    return machine.measure_ceilings(DEVICE, DTYPE, small)


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


def description(ceilings: Ceilings) -> dict[str, Any]:
    """What every row says about where it was measured."""
    return {
        "device": DEVICE,
        "device_name": machine.device_name(DEVICE),
        "threads": torch.get_num_threads(),
        "versions": machine.versions(DEVICE),
        **asdict(ceilings),
    }
