"""Image context about joints: feature maps of several levels, read by bilinear sampling at learned places.

    place_s = reference + offset_s                                   per level, joint and head    [B, L, J, H, S, 2]
    context_l = Σ_s weights_s · bilinear(F_l, place_s)                                            [B, J, H, C_l]

B batch, L levels, J joints, H heads, S samples per head, C_l channels of level l. Places are (x, y) in [-1, 1]: the
centres of a map's first and last column and row (align_corners=True). Semantics and gradients are those of
torch.nn.functional.grid_sample, except that every place has a meaning:

    padding "border"   a place at or beyond the border counts as on it, and there its gradient is zero
    padding "zeros"    of the four corners about a place those outside the map count 0
    infinite places    are far outside; on an axis of one pixel every place is that pixel
    NaN places         make the row (b, l, j, h) NaN; that row hands on no gradient

Samples are summed before any projection: with weights that sum to 1 a linear layer of the sum is the sum of the linear
layer's results, for S times fewer products. 16-bit types: places and sums in float32.

Source: Q. Zhao, C. Zheng, M. Liu, C. Chen, "A Single 2D Pose with Context is Worth Hundreds for 3D Human Pose
Estimation", NeurIPS 2023, deformable context extraction; the sampling is that of Deformable DETR.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from liftbyimage.ops._checks import check_like, check_positive, check_sizes, check_tensor
from liftbyimage.ops._dispatch import (
    Backend,
    autocast_to_float32,
    count_flops,
    native_op,
    needs_graph,
    never,
    no_autocast,
    select,
    triton_op,
    why_not_cpu,
    why_not_cuda_of_any_width,
    why_not_triton_of_any_width,
)

OP = "sample_context"
PADDINGS = ("border", "zeros")
# In grid units: outside any map of more than one pixel, and nothing overflows.
FAR_OUTSIDE = 4.0
CUDA_LEVEL_LIMIT = 8  # kMaxLevels of csrc/cuda/sample_context.h


def check_maps(op: str, first: str, like: Tensor, feature_maps: Sequence[Tensor]) -> None:
    """A map [B, C, Hf, Wf] for each level of the argument `first`, which is `like` [B, L, …]; its dtype and device."""
    if not isinstance(feature_maps, (list, tuple)):
        raise TypeError(f"{op}: feature_maps must be a list of L tensors, got {type(feature_maps).__name__}")
    batch, levels = like.shape[:2]
    if len(feature_maps) != levels:
        raise ValueError(f"{op}: feature_maps must hold L = {levels} maps as {first} does, got {len(feature_maps)}")
    for level, feature_map in enumerate(feature_maps):
        name = f"feature_maps[{level}]"
        check_tensor(op, name, feature_map, "B C Hf Wf")
        check_positive(op, name, feature_map, "B C Hf Wf", "C", "Hf", "Wf")
        check_like(op, first, like, name, feature_map, (batch, *feature_map.shape[1:]), "B C Hf Wf")


def _check(
    feature_maps: Sequence[Tensor], reference: Tensor, offsets: Tensor, weights: Tensor, *, padding: str
) -> None:
    check_tensor(OP, "offsets", offsets, "B L J H S 2")
    check_sizes(OP, "offsets", offsets, (*offsets.shape[:5], 2), "B L J H S 2")
    check_positive(OP, "offsets", offsets, "B L J H S 2", "L", "J", "H", "S")
    batch, levels, joints, heads, samples, _ = offsets.shape
    check_maps(OP, "offsets", offsets, feature_maps)
    check_like(OP, "offsets", offsets, "reference", reference, (batch, joints, 2), "B J 2")
    check_like(OP, "offsets", offsets, "weights", weights, (batch, levels, joints, heads, samples), "B L J H S")
    if padding not in PADDINGS:
        raise ValueError(f"{OP}: padding must be one of {', '.join(PADDINGS)}, got {padding!r}")


def reference(
    feature_maps: Sequence[Tensor], reference: Tensor, offsets: Tensor, weights: Tensor, *, padding: str = "border"
) -> list[Tensor]:
    """The definition, in plain PyTorch, for any device and dtype; gradients are PyTorch's own."""
    dtype = torch.promote_types(offsets.dtype, torch.float32)
    places = reference.to(dtype)[:, None, :, None, None] + offsets.to(dtype)  # [B, L, J, H, S, 2]
    unknown = places.isnan().flatten(4).any(4)  # [B, L, J, H]
    reach = 1.0 if padding == "border" else FAR_OUTSIDE
    outside = places.detach().nan_to_num(0.0).clamp(-reach, reach)
    places = torch.where(places.abs() < reach, places, outside).flatten(3, 4)  # [B, L, J, H · S, 2]
    contexts = []
    for level, feature_map in enumerate(feature_maps):
        read = F.grid_sample(feature_map.to(dtype), places[:, level], padding_mode=padding, align_corners=True)
        samples = read.permute(0, 2, 3, 1).unflatten(2, offsets.shape[3:5])  # [B, J, H, S, C]
        context = (weights[:, level, :, :, None].to(dtype) @ samples).squeeze(3)  # [B, J, H, C]
        contexts.append(context.masked_fill(unknown[:, level, :, :, None], torch.nan).to(offsets.dtype))
    return contexts


_definition = reference  # which the arguments of this name hide

_FORWARD_SCHEMA = "(Tensor[] feature_maps, Tensor reference, Tensor offsets, Tensor weights, bool zeros) -> Tensor[]"
_BACKWARD_SCHEMA = (
    "(Tensor[] grad_contexts, Tensor[] feature_maps, Tensor reference, Tensor offsets, Tensor weights, bool zeros,"
    " bool need_places, bool need_weights, bool[] need_maps) -> (Tensor, Tensor, Tensor[])"
)


def _fake_forward(
    feature_maps: Sequence[Tensor], reference: Tensor, offsets: Tensor, weights: Tensor, zeros: bool
) -> list[Tensor]:
    batch, _, joints, heads, _, _ = offsets.shape
    return [offsets.new_empty(batch, joints, heads, feature_map.shape[1]) for feature_map in feature_maps]


def _fake_backward(
    grad_contexts: Sequence[Tensor],
    feature_maps: Sequence[Tensor],
    reference: Tensor,
    offsets: Tensor,
    weights: Tensor,
    zeros: bool,
    need_places: bool,
    need_weights: bool,
    need_maps: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of maps are channels-last in memory, whatever the maps are; unwanted ones are [0]."""
    return (
        offsets.new_empty(offsets.shape if need_places else (0,)),
        weights.new_empty(weights.shape if need_weights else (0,)),
        [
            channels_last(feature_map) if need else feature_map.new_empty(0)
            for feature_map, need in zip(feature_maps, need_maps, strict=True)
        ],
    )


def channels_last(feature_map: Tensor) -> Tensor:
    """Memory for a tensor like `feature_map` [B, C, Hf, Wf] whose channels are contiguous."""
    batch, channels, height, width = feature_map.shape
    return feature_map.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


_native_forward = native_op(f"{OP}_forward", _fake_forward)
_native_backward = native_op(f"{OP}_backward", _fake_backward)
_triton_forward = triton_op(f"{OP}_forward", _FORWARD_SCHEMA, _fake_forward)
_triton_backward = triton_op(f"{OP}_backward", _BACKWARD_SCHEMA, _fake_backward)


def _flops(feature_maps: Any, offsets: Any) -> int:
    """Multiply-adds of the weighted sums, counted as 2; interpolation is no product, here as in grid_sample."""
    batch, _, joints, heads, samples, _ = offsets
    return int(2 * batch * joints * heads * samples * sum(shape[1] for shape in feature_maps))


def _forward_flops(
    feature_maps: Any, reference: Any, offsets: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return _flops(feature_maps, offsets)


def _backward_flops(
    grad_contexts: Any,
    feature_maps: Any,
    reference: Any,
    offsets: Any,
    weights: Any,
    zeros: bool,
    need_places: bool,
    need_weights: bool,
    need_maps: Sequence[bool],
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    # Σ_c of gradient and sample; and each map's own share of the gradient.
    wanted = [shape for shape, need in zip(feature_maps, need_maps, strict=True) if need]
    return (need_places or need_weights) * _flops(feature_maps, offsets) + _flops(wanted, offsets)


count_flops((_native_forward, _triton_forward), _forward_flops)
count_flops((_native_backward, _triton_backward), _backward_flops)


def _why_not_cuda(offsets: Tensor, *tensors: Tensor) -> str | None:
    reason = why_not_cuda_of_any_width(offsets, *tensors)
    if reason is None and offsets.shape[1] > CUDA_LEVEL_LIMIT:
        return f"serves up to {CUDA_LEVEL_LIMIT} levels, got {offsets.shape[1]}"
    return reason


# CUDA stands behind Triton until a run on a GPU shows it ahead: it is so far verified by emulation and compilation
# only.
BACKENDS = (
    Backend("cpu", why_not_cpu, _native_forward, _native_backward, batch_independent=True),
    Backend("triton", why_not_triton_of_any_width, _triton_forward, _triton_backward, batch_independent=True),
    Backend("cuda", _why_not_cuda, _native_forward, _native_backward, batch_independent=True),
    Backend("reference", never),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def _run(
    zeros: bool, backend: str, reference: Tensor, offsets: Tensor, weights: Tensor, *feature_maps: Tensor
) -> tuple[Tensor, ...]:
    forward = _BY_NAME[backend].forward
    assert forward is not None
    return tuple(forward(feature_maps, reference, offsets, weights, zeros))


class _SampleContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, zeros: bool, backend: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        ctx.zeros, ctx.backend = zeros, backend
        return _run(zeros, backend, *inputs)

    @staticmethod
    def backward(ctx: Any, *grad_contexts: Tensor) -> tuple[Tensor | None, ...]:
        reference, offsets, weights, *feature_maps = ctx.saved_tensors
        need_reference, need_offsets, need_weights, *need_maps = ctx.needs_input_grad[2:]
        backward = _BY_NAME[ctx.backend].backward
        assert backward is not None
        grad_offsets, grad_weights, grad_maps = backward(
            *(list(grad_contexts), feature_maps, reference, offsets, weights),
            *(ctx.zeros, need_reference or need_offsets, need_weights, need_maps),
        )
        return (
            *(None, None),
            grad_offsets.sum((1, 3, 4)) if need_reference else None,
            grad_offsets if need_offsets else None,
            grad_weights if need_weights else None,
            *(grad if need else None for grad, need in zip(grad_maps, need_maps, strict=True)),
        )


def sample_context(
    feature_maps: Sequence[Tensor],
    reference: Tensor,
    offsets: Tensor,
    weights: Tensor,
    *,
    padding: str = "border",
    backend: str | None = None,
) -> list[Tensor]:
    """Weighted sums of what each joint's heads read from every level's feature map.

    Args:
        feature_maps: L maps [B, C_l, Hf_l, Wf_l], each of its own channels and size; any strides, channels-last is
            fastest.
        reference: [B, J, 2], (x, y) of the joints in [-1, 1], the same in every level.
        offsets: [B, L, J, H, S, 2], added to the reference, float32, float16, bfloat16 or float64; every other tensor
            has its dtype and device.
        weights: [B, L, J, H, S], of the samples; they need not sum to 1.
        padding: "border" or "zeros", what a place outside the map reads.
        backend: "cpu", "triton", "cuda" or "reference"; None chooses (`liftbyimage.ops.explain` says how).

    Returns:
        L contexts [B, J, H, C_l] in the input dtype, differentiable with respect to reference, offsets and weights, and
        to those maps that require gradients; the others cost nothing. A NaN place gives NaN in its row (b, l, j, h),
        which hands on no gradient; a place at or beyond the border of padding "border" has a zero gradient. Under
        autocast all becomes float32, as for torch.nn.functional.grid_sample: a place needs its digits.

    Raises:
        TypeError: an argument is no floating-point tensor or list of such, or dtypes differ.
        ValueError: ranks, sizes, numbers of levels or devices do not fit, the padding is unknown, or the backend is
            unknown or cannot serve.
    """
    if isinstance(feature_maps, (list, tuple)):
        reference, offsets, weights, *feature_maps = autocast_to_float32(reference, offsets, weights, *feature_maps)
    _check(feature_maps, reference, offsets, weights, padding=padding)
    chosen = select(OP, BACKENDS, backend, offsets, reference, weights, *feature_maps)
    if chosen.forward is None:
        with no_autocast(offsets):
            return _definition(feature_maps, reference, offsets, weights, padding=padding)
    inputs = (reference, offsets, weights, *feature_maps)
    run = _SampleContext.apply if needs_graph(inputs) else _run
    return list(run(padding == "zeros", chosen.name, *inputs))
