"""Every op with a CUDA kernel, forward and backward, on small shapes: what `make gpu` runs under compute-sanitizer.

Without PyTorch's caching of memory (PYTORCH_NO_CUDA_MEMORY_CACHING=1) every tensor is an allocation of its own, so that
memcheck sees an access beyond any of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from liftbyimage.ops._explain import OPS, backends_of
from liftbyimage.testing import Case, differentiable, make_inputs, run

BACKEND = "cuda"
DTYPES = (torch.float32, torch.bfloat16)
TENSOR_CORES_ALONE = ("attend_patches", "guide_patches")  # whose CUDA kernels serve no float32 and no odd width
CASES = (
    Case("ragged tiles", B=2, H=8, J=17, P=131, E=48, F=48, D=64, K=39, value_is_key=True),
    Case("one token tensor", B=2, H=8, J=17, P=131, E=64, F=64, D=64, K=39, value_is_key=True, patches_is_key=True),
    Case("odd widths", B=1, H=4, J=5, P=33, E=5, F=3, D=7, K=9, maps=((3, 4, 5), (5, 2, 3))),
)


def ops_to_check() -> list[str]:
    return [op for op in OPS if any(backend.name == BACKEND for backend in backends_of(op))]


def calls() -> Iterator[tuple[str, Case, torch.dtype]]:
    for op, case, dtype in itertools.product(ops_to_check(), CASES, DTYPES):
        if served(op, case, dtype):
            yield op, case, dtype


def served(op: str, case: Case, dtype: torch.dtype) -> bool:
    """Whether an attention's CUDA kernel serves the case on Hopper; every other op's does."""
    one_tensor = case.value_is_key and (case.patches_is_key or op != "pose_guided_attention")
    on_tensor_cores = one_tensor and dtype == torch.bfloat16 and case.E % 8 == 0
    if op in TENSOR_CORES_ALONE:
        return on_tensor_cores
    return op != "pose_guided_attention" or dtype == torch.float32 or on_tensor_cores


def check(op: str, case: Case, dtype: torch.dtype, device: str = "cuda", backend: str = BACKEND) -> None:
    """One call and its backward, or RuntimeError on a result that is not finite."""
    inputs = differentiable(make_inputs(op, case, dtype, device), dtype)
    for results in run(op, inputs, backend):
        for name, value in results.items():
            if not value.cpu().isfinite().all():
                raise RuntimeError(f"{op}, {case}, {dtype}: {name} is not finite")


def main() -> None:
    for op, case, dtype in calls():
        check(op, case, dtype)
        torch.cuda.synchronize()
        print(f"ran {op}, {case}, {dtype}, forward and backward", flush=True)


if __name__ == "__main__":
    main()
