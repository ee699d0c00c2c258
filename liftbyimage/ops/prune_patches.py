"""Adaptive feature selection: keep the most important patches of each sample.

    index = the `keep` patches of largest importance, ascending                    [B, K]
    patches_out = patches[b, index[b]]                                              [B, K, D]

Ties go to the lower index (−0 ties with +0) and NaN counts as the lowest importance, so the choice is unique.
Selection and gather are one pass over memory. Gradient flows to `patches` only: selection is a truncation.

Source: F. Zhou, J. Yin, P. Li, "Lifting by Image", AAAI 2024, Adaptive Feature Selection (retention r = 0.3).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liftbyimage.ops._checks import check_positive, check_same_device, check_sizes, check_tensor
from liftbyimage.ops._dispatch import (
    Backend,
    autocast,
    count_flops,
    native_op,
    needs_graph,
    never,
    select,
    triton_op,
    why_not_cpu,
    why_not_cuda,
    why_not_triton,
)

OP = "prune_patches"


class PrunedPatches(NamedTuple):
    patches: Tensor  # [B, K, D]
    index: Tensor  # type: ignore[assignment]  # [B, K] int64, ascending


def keep_count(num_patches: int, retention: float) -> int:
    """How many of `num_patches` patches a retention r keeps: max(1, floor(r · P)), for 0 < r ≤ 1."""
    if isinstance(num_patches, bool) or not isinstance(num_patches, int):
        raise TypeError(f"keep_count: num_patches must be an int >= 1, got {type(num_patches).__name__}")
    if num_patches < 1:
        raise ValueError(f"keep_count: num_patches must be an int >= 1, got {num_patches}")
    if not 0 < retention <= 1:  # NaN fails too
        raise ValueError(f"keep_count: retention must satisfy 0 < retention <= 1, got {retention}")
    return max(1, math.floor(retention * num_patches))


def _check(patches: Tensor, importance: Tensor, keep: int) -> None:
    check_tensor(OP, "patches", patches, "B P D")
    check_tensor(OP, "importance", importance, "B P")
    check_positive(OP, "patches", patches, "B P D", "P", "D")
    check_sizes(OP, "importance", importance, patches.shape[:2], "B P")
    check_same_device(OP, "patches", {"patches": patches, "importance": importance})
    if isinstance(keep, bool) or not isinstance(keep, (int, torch.SymInt)):
        raise TypeError(f"{OP}: keep must be an int, got {type(keep).__name__}")
    if not 1 <= keep <= patches.shape[1]:
        raise ValueError(f"{OP}: keep must satisfy 1 <= keep <= P = {patches.shape[1]}, got {keep}")


def reference(patches: Tensor, importance: Tensor, keep: int) -> PrunedPatches:
    """The definition, in plain PyTorch, for any device and dtype; gradients are PyTorch's own."""
    # NaN sorts first in a descending sort: rank it below −Inf by ordering "is a number" last (both sorts are stable).
    by_value = torch.sort(importance.detach(), dim=1, descending=True, stable=True).indices  # [B, P]
    is_nan = torch.gather(importance.detach(), 1, by_value).isnan()
    numbers_first = torch.sort(is_nan.to(torch.uint8), dim=1, stable=True).indices
    index = torch.gather(by_value, 1, numbers_first)[:, :keep].sort(dim=1).values  # [B, K]
    return PrunedPatches(torch.gather(patches, 1, index[:, :, None].expand(-1, -1, patches.shape[2])), index)


_FORWARD_SCHEMA = "(Tensor patches, Tensor importance, int keep) -> (Tensor, Tensor)"
_BACKWARD_SCHEMA = "(Tensor grad_kept, Tensor index, int num_patches) -> Tensor"


def _fake_forward(patches: Tensor, importance: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    batch, _, width = patches.shape
    return patches.new_empty(batch, keep, width), patches.new_empty(batch, keep, dtype=torch.int64)


def _fake_backward(grad_kept: Tensor, index: Tensor, num_patches: int) -> Tensor:
    return grad_kept.new_empty(grad_kept.shape[0], num_patches, grad_kept.shape[2])


_native_forward = native_op(f"{OP}_forward", _fake_forward)
_native_backward = native_op(f"{OP}_backward", _fake_backward)
_triton_forward = triton_op(f"{OP}_forward", _FORWARD_SCHEMA, _fake_forward)
_triton_backward = triton_op(f"{OP}_backward", _BACKWARD_SCHEMA, _fake_backward)


def _no_flops(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 0


count_flops((_native_forward, _triton_forward, _native_backward, _triton_backward), _no_flops)

BACKENDS = (
    Backend("cpu", why_not_cpu, _native_forward, _native_backward, batch_independent=True),
    Backend("cuda", why_not_cuda, _native_forward, _native_backward, batch_independent=True),
    Backend("triton", why_not_triton, _triton_forward, _triton_backward, batch_independent=True),
    Backend("reference", never),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def _run(patches: Tensor, importance: Tensor, keep: int, backend: str) -> tuple[Tensor, Tensor]:
    """kept patches, index"""
    forward = _BY_NAME[backend].forward
    assert forward is not None
    outputs: tuple[Tensor, Tensor] = forward(patches, importance, keep)
    return outputs


class _PrunePatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, patches: Tensor, importance: Tensor, keep: int, backend: str) -> tuple[Tensor, Tensor]:
        kept, index = _run(patches, importance, keep, backend)
        ctx.save_for_backward(index)
        ctx.mark_non_differentiable(index)
        ctx.num_patches, ctx.backend = patches.shape[1], backend
        return kept, index

    @staticmethod
    def backward(ctx: Any, grad_kept: Tensor, grad_index: None) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        backward = _BY_NAME[ctx.backend].backward
        assert backward is not None
        return backward(grad_kept, index, ctx.num_patches), None, None, None


def prune_patches(patches: Tensor, importance: Tensor, keep: int, *, backend: str | None = None) -> PrunedPatches:
    """Keep the `keep` most important patches of each sample, in their original order.

    Args:
        patches: [B, P, D], float32, float16, bfloat16 or float64.
        importance: [B, P], any of those dtypes, on the same device.
        keep: how many to keep, 1 ≤ keep ≤ P; `keep_count(P, retention)` gives the paper's number.
        backend: "cpu", "cuda", "triton" or "reference"; None chooses (`liftbyimage.ops.explain` says how).

    Returns:
        PrunedPatches: `patches` [B, keep, D] in the dtype of `patches`, differentiable with respect to `patches` (rows
        scattered back; `importance` gets no gradient), and `index` [B, keep] int64, ascending. Ties go to the lower
        index; NaN counts as the lowest importance.

    Raises:
        TypeError: an argument is no floating-point tensor, or `keep` is no int.
        ValueError: ranks, sizes or devices do not fit, keep is out of range, or the backend is unknown or cannot serve.
    """
    if isinstance(patches, Tensor):
        (patches,) = autocast(patches)
    _check(patches, importance, keep)
    chosen = select(OP, BACKENDS, backend, patches, importance)
    if chosen.forward is None:
        return reference(patches, importance, keep)
    run = _PrunePatches.apply if needs_graph((patches,)) else _run
    return PrunedPatches(*run(patches, importance, keep, chosen.name))
