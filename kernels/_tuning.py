"""The fastest of several plans, timed on the GPU where LIFTBYIMAGE_AUTOTUNE=1 asks for it.

Without it nothing is timed: what the fastest is may differ from run to run, and with it the last bits of a result.
`triton.autotune` would not do: plans decide the grid and the sizes of what is allocated, two kernels share one, and
a plan that does not fit must be an error of the resource model instead of being left out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import triton

ENVIRONMENT_VARIABLE = "LIFTBYIMAGE_AUTOTUNE"
Plan = TypeVar("Plan")


def asked_for() -> bool:
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be 1, 0 or unset, got {value!r}")
    return value == "1"


def bucket(count: int) -> int:
    """Counts up to the next power of two are timed as one."""
    return int(triton.next_power_of_2(count))


def milliseconds(launch: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median"))


class Tuner:
    """Keeps the fastest plan of every key for the life of the process."""

    def __init__(self, time: Callable[[Callable[[], object]], float] = milliseconds) -> None:
        self._time = time
        self._fastest: dict[Hashable, object] = {}
        self._lock = threading.Lock()  # autograd calls from threads of its own

    def choose(self, key: Hashable, plans: Sequence[Plan], launch: Callable[[Plan], object], capturing: bool) -> Plan:
        """The fastest of `plans`, each timed once; while a CUDA graph is captured, the first unless one is known."""
        with self._lock:
            if key not in self._fastest:
                if capturing:
                    return plans[0]
                self._fastest[key] = min(plans, key=lambda plan: self._time(lambda: launch(plan)))
            return self._fastest[key]  # type: ignore[return-value]
