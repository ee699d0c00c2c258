"""Peak memory of one training step as the operating system sees it: `python bench/peak_memory.py` (Linux).

The benchmark's own figure counts PyTorch's allocations; this one also counts what kernels take beside them. Each
implementation of pose-guided attention runs in a process of its own, after a small step has loaded what it needs.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import torch
from test_pose_guided_attention import IMPLEMENTATIONS
from workload import TRAINING, Implementation, Setting

SETTING = Setting(8, 3072, 256, TRAINING)
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def kibibytes(field: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))


def measure(implementation: Implementation) -> float:
    """Megabytes above inputs, weights and incoming gradients at the peak of forward + backward."""
    module = implementation.build(SETTING)
    shapes = (SETTING.B, 17, SETTING.D), (SETTING.B, SETTING.P, SETTING.D)
    inputs = [torch.randn(shape) for shape in shapes]
    cotangents = [torch.randn(shape) for shape in shapes]

    def step(inputs: list[torch.Tensor], cotangents: list[torch.Tensor]) -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        torch.autograd.backward(module(*leaves)[:2], cotangents)

    step([tensor[:1, :64] for tensor in inputs], [tensor[:1, :64] for tensor in cotangents])
    module.zero_grad()
    gc.collect()
    CLEAR_REFS.write_text("5")  # the peak starts again from here
    before = kibibytes("VmRSS")
    step(inputs, cotangents)
    return (kibibytes("VmHWM") - before) * 1024 / 1e6


def main() -> None:
    names = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
    if len(sys.argv) > 1:
        print(f"{sys.argv[1]:28} {measure(names[sys.argv[1]]):6.0f} MB")
        return
    print(f"pose_guided_attention {SETTING}", flush=True)
    for name, implementation in names.items():
        if not implementation.compiled and implementation.why_not(SETTING) is None:
            subprocess.run([sys.executable, __file__, name], check=True)


if __name__ == "__main__":
    main()
