"""Joints guide factored patches: they gather from the channels, and their attention becomes channels itself.

    A = softmax(scale · Q Xᵀ)            over patches, per head            [B, H, J, P]
    context = A X                                                         [B, H, J, W]
    channels_out = [X | Aᵀ]              row r = h·J + j of A is channel W + r   [B, P, W + H·J]

It is the pose-guided attention of tokens that are kept as channels X and an embedding: T = X W_in + b becomes
`T + Aᵀ U = [X | Aᵀ] [W_in ; U] + b`, so nothing of width D is formed (docs/kernels/factored.md). A is written once,
beside the channels that the next layer reads with it.

Source: F. Zhou, J. Yin, P. Li, "Lifting by Image", AAAI 2024, Eq. 2, with the update left factored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from liftbyimage.ops import _tensor_cores
from liftbyimage.ops._checks import check_like, check_positive, check_scale, check_tensor
from liftbyimage.ops._dispatch import (
    Backend,
    autocast,
    count_flops,
    native_op,
    needs_graph,
    never,
    no_autocast,
    python_op,
    select,
    triton_op,
    why_not_cpu,
    why_not_tensor_cores,
    why_not_triton,
)
from liftbyimage.ops.attend_patches import reference_attention, statistics_dtype

OP = "guide_patches"


class GuidedPatches(NamedTuple):
    context: Tensor  # [B, H, J, W]
    channels: Tensor  # [B, P, W + H·J]


def _check(query: Tensor, channels: Tensor) -> None:
    check_tensor(OP, "query", query, "B H J W")
    check_tensor(OP, "channels", channels, "B P W")
    check_positive(OP, "query", query, "B H J W", "H", "J", "W")
    check_positive(OP, "channels", channels, "B P W", "P")
    sizes = (query.shape[0], channels.shape[1], query.shape[3])
    check_like(OP, "query", query, "channels", channels, sizes, "B P W")


def reference(query: Tensor, channels: Tensor, *, scale: float | None = None) -> GuidedPatches:
    """The definition, in plain PyTorch, for any device and dtype; gradients are PyTorch's own."""
    batch, heads, joints, width = query.shape
    scale = width**-0.5 if scale is None else scale
    attention = reference_attention(query, channels[:, None], scale)[:, 0]  # [B, R, P]
    context = (attention @ channels).reshape(batch, heads, joints, width)
    return GuidedPatches(context, torch.cat([channels, attention.transpose(1, 2)], dim=2))


_FORWARD_SCHEMA = "(Tensor query, Tensor channels, float scale) -> (Tensor, Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    "(Tensor? grad_context, Tensor? grad_guided, Tensor query, Tensor channels, Tensor context, Tensor lse,"
    " float scale, bool need_channel_grads) -> (Tensor, Tensor)"
)


def _fake_forward(query: Tensor, channels: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, joints, width = query.shape
    guided = channels.new_empty(batch, channels.shape[1], width + heads * joints)
    lse = query.new_empty(batch, heads, joints, dtype=statistics_dtype(query.dtype))
    return query.new_empty(query.shape), guided, lse


def _fake_backward(
    grad_context: Tensor | None,
    grad_guided: Tensor | None,
    query: Tensor,
    channels: Tensor,
    context: Tensor,
    lse: Tensor,
    scale: float,
    need_channel_grads: bool,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), channels.new_empty(channels.shape if need_channel_grads else (0,))


_native_forward = native_op(f"{OP}_forward", _fake_forward)
_native_backward = native_op(f"{OP}_backward", _fake_backward)
_triton_forward = triton_op(f"{OP}_forward", _FORWARD_SCHEMA, _fake_forward)
_triton_backward = triton_op(f"{OP}_backward", _BACKWARD_SCHEMA, _fake_backward)


def _forward_flops(query: Any, channels: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, joints, width = query
    return int(4 * batch * heads * joints * channels[1] * width)


def _backward_flops(
    grad_context: Any,
    grad_guided: Any,
    query: Any,
    channels: Any,
    context: Any,
    lse: Any,
    scale: float,
    need_channel_grads: bool,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    # scores again, dA = dO Xᵀ and dQ = dS X; for the channels also dSᵀ Q and Aᵀ dO.
    product = _forward_flops(query, channels) // 2
    return product * (5 if need_channel_grads else 3)


count_flops((_native_forward, _triton_forward), _forward_flops)
count_flops((_native_backward, _triton_backward), _backward_flops)


def _run_tensor_backward(
    grad_context: Tensor | None,
    grad_guided: Tensor | None,
    query: Tensor,
    channels: Tensor,
    context: Tensor,
    lse: Tensor,
    scale: float,
    need_channel_grads: bool,
) -> tuple[Tensor, Tensor]:
    width = channels.shape[2]
    grad_channels, grad_attention = (
        (None, None) if grad_guided is None else (grad_guided[:, :, :width], grad_guided[:, :, width:])
    )
    incoming = _tensor_cores.Incoming(grad_context, None, None, grad_attention)
    gradients = _tensor_cores.backward(incoming, query, channels, None, context, lse, scale, need_channel_grads)
    if gradients.tokens is None:
        return gradients.query, channels.new_empty(0)
    return gradients.query, gradients.tokens if grad_channels is None else gradients.tokens + grad_channels


_tensor_backward = python_op(f"{OP}_tensor_backward", _BACKWARD_SCHEMA, _run_tensor_backward, _fake_backward)
count_flops((_tensor_backward,), _backward_flops)

# The compiled CPU kernel and Triton never serve the same tensor, except that Triton's interpreter can.
BACKENDS = (
    Backend("cpu", why_not_cpu, _native_forward, _native_backward, batch_independent=True),
    Backend("cuda", why_not_tensor_cores, _native_forward, _tensor_backward),
    Backend("triton", why_not_triton, _triton_forward, _triton_backward, batch_independent=True),
    Backend("reference", never),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def _run(query: Tensor, channels: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """context, guided channels, log-sum-exp"""
    forward = _BY_NAME[backend].forward
    assert forward is not None
    outputs: tuple[Tensor, Tensor, Tensor] = forward(query, channels, scale)
    return outputs


class _GuidePatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, channels: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
        context, guided, lse = _run(query, channels, scale, backend)
        ctx.save_for_backward(query, channels, context, lse)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.backend = scale, backend
        return context, guided

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor | None, grad_guided: Tensor | None) -> tuple[Tensor | None, ...]:
        query, channels, context, lse = ctx.saved_tensors
        need_channel_grads = ctx.needs_input_grad[1]
        backward = _BY_NAME[ctx.backend].backward
        assert backward is not None
        grad_query, grad_channels = backward(
            grad_context, grad_guided, query, channels, context, lse, ctx.scale, need_channel_grads
        )
        return grad_query, grad_channels if need_channel_grads else None, None, None


def guide_patches(
    query: Tensor, channels: Tensor, *, scale: float | None = None, backend: str | None = None
) -> GuidedPatches:
    """Joints gather from patch channels, and the attention they paid joins the channels.

    Args:
        query: [B, H, J, W], float32, float16, bfloat16 or float64; heads share the channels.
        channels: [B, P, W], query's dtype and device: key and value in one.
        scale: factor on the scores before the softmax; W ** -0.5 if None.
        backend: "cpu", "cuda", "triton" or "reference"; None chooses (`liftbyimage.ops.explain` says how).

    Returns:
        GuidedPatches: `context` [B, H, J, W] and `channels` [B, P, W + H·J], the given channels and then the attention
        of every head and joint (row h·J + j), in the input dtype. Both are differentiable with respect to query and
        channels. A NaN in an input gives NaN in every output that depends on it.

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes differ.
        ValueError: ranks, sizes or devices do not fit, or the backend is unknown or cannot serve.

    Source: Lifting by Image (AAAI 2024), Eq. 2 on factored tokens (docs/kernels/factored.md).
    """
    query, channels = autocast(query, channels)
    _check(query, channels)
    scale = check_scale(OP, scale, query.shape[-1])
    chosen = select(OP, BACKENDS, backend, query, channels)
    if chosen.forward is None:
        with no_autocast(query):
            return reference(query, channels, scale=scale)
    run = _GuidePatches.apply if needs_graph((query, channels)) else _run
    context, guided, *_ = run(query, channels, scale, chosen.name)
    return GuidedPatches(context, guided)
