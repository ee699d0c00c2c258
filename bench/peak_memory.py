"""Peak memory of training steps as the operating system sees it: `python bench/peak_memory.py` (Linux).

The benchmark's own figure counts PyTorch's allocations; this one also counts what kernels take beside them. Each
implementation runs in a process of its own, after a small step has loaded what it needs.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import test_factored
import test_lift_by_image
import test_pose_guided_attention
from workload import CENTRAL, SMOKE, TRAINING, Implementation, Setting, Step, Workload, build, draw, draw_weights

SETTING, SMALL = Setting(8, direction=TRAINING, **CENTRAL), Setting(1, direction=TRAINING, **SMOKE)
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")

WORKS: dict[str, tuple[Callable[[Setting], Workload], Sequence[Implementation]]] = {
    "pose_guided_attention": (test_pose_guided_attention.workload, test_pose_guided_attention.IMPLEMENTATIONS),
    "image side of stage 1": (
        test_factored.image_side_workload,
        test_factored.implementations(test_factored.TextbookImageSide, test_factored.FactoredImageSide),
    ),
    "lift_by_image stage 1": (test_lift_by_image.workload, test_lift_by_image.IMPLEMENTATIONS),
}


def kibibytes(field: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))


def step(make: Callable[[Setting], Workload], implementation: Implementation, setting: Setting) -> Callable[[], object]:
    workload = make(setting)
    call, module = draw(workload, seed=1), build(workload, implementation.build, draw_weights(workload))
    timed = Step(workload, module)
    return lambda: timed(call)


def measure(work: str, implementation: Implementation) -> float:
    """Megabytes above inputs, weights and incoming gradients at the peak of forward + backward, results included."""
    make = WORKS[work][0]
    step(make, implementation, SMALL)()
    run = step(make, implementation, SETTING)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the small step freed must not hide what this one takes
    CLEAR_REFS.write_text("5")  # the peak starts again from here
    before = kibibytes("VmRSS")
    run()
    return (kibibytes("VmHWM") - before) * 1024 / 1e6


def main() -> None:
    if len(sys.argv) == 3:
        work, name = sys.argv[1:]
        implementation = next(i for i in WORKS[work][1] if i.name == name)
        print(f"{name:28} {measure(work, implementation):6.0f} MB")
        return
    for work, (_, implementations) in WORKS.items():
        print(f"{work} {SETTING}", flush=True)
        for implementation in implementations:
            if not implementation.compiled and implementation.why_not(SETTING) is None:
                subprocess.run([sys.executable, __file__, work, implementation.name], check=True)


if __name__ == "__main__":
    main()
