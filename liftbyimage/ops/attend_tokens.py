"""Self-attention of few tokens, straight from their packed projection.

    [Q_1 … Q_H K_1 … K_H V_1 … V_H] = query_key_value                                              [B, T, 3D]
    attended_h = softmax(scale · Q_h K_hᵀ) V_h, heads side by side                                 [B, T, D]

B batch, T tokens, D model width, H heads of width E = D / H. The packed projection is what one product with the
in-projection of torch.nn.MultiheadAttention gives; it is read where it lies, without a copy of query, key or value,
and every head writes its own columns of the result. Any T is served; the op is built for T up to about 64.

Source: A. Vaswani et al., "Attention Is All You Need", NeurIPS 2017, Section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liftbyimage.ops._checks import check_heads, check_positive, check_scale, check_tensor, shape_of
from liftbyimage.ops._dispatch import (
    Backend,
    autocast,
    count_flops,
    native_op,
    needs_graph,
    never,
    no_autocast,
    select,
    triton_op,
    why_not_cpu,
    why_not_triton_of_any_width,
)

OP = "attend_tokens"
TRITON_TOKEN_LIMIT = 64  # one program holds a head's whole attention


def _check(query_key_value: Tensor, *, heads: int) -> None:
    check_tensor(OP, "query_key_value", query_key_value, "B T 3D")
    check_positive(OP, "query_key_value", query_key_value, "B T 3D", "T", "3D")
    if query_key_value.shape[2] % 3:
        raise ValueError(f"{OP}: query_key_value must have a width 3D, got {shape_of(query_key_value)}")
    check_heads(OP, heads, query_key_value.shape[2] // 3)


def reference(query_key_value: Tensor, *, heads: int, scale: float | None = None) -> Tensor:
    """The definition, in plain PyTorch, for any device and dtype; gradients are PyTorch's own."""
    query, key, value = query_key_value.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, E]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    attention = torch.softmax(scale * (query @ key.transpose(2, 3)), dim=3)  # [B, H, T, T]
    attended: Tensor = (attention @ value).transpose(1, 2).flatten(2)
    return attended


_FORWARD_SCHEMA = "(Tensor query_key_value, int heads, float scale) -> Tensor"
_BACKWARD_SCHEMA = "(Tensor grad, Tensor query_key_value, int heads, float scale) -> Tensor"


def _fake_forward(query_key_value: Tensor, heads: int, scale: float) -> Tensor:
    batch, tokens, packed = query_key_value.shape
    return query_key_value.new_empty(batch, tokens, packed // 3)


def _fake_backward(grad: Tensor, query_key_value: Tensor, heads: int, scale: float) -> Tensor:
    return query_key_value.new_empty(query_key_value.shape)


_native_forward = native_op(f"{OP}_forward", _fake_forward)
_native_backward = native_op(f"{OP}_backward", _fake_backward)
_triton_forward = triton_op(f"{OP}_forward", _FORWARD_SCHEMA, _fake_forward)
_triton_backward = triton_op(f"{OP}_backward", _BACKWARD_SCHEMA, _fake_backward)


def _forward_flops(query_key_value: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Multiply-adds, counted as 2: Q·Kᵀ and A·V."""
    batch, tokens, packed = query_key_value
    return int(2 * batch * tokens * tokens * 2 * (packed // 3))


def _backward_flops(grad: Any, query_key_value: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Q·Kᵀ again, the gradient of A, and those of query, key and value."""
    return 5 * _forward_flops(query_key_value) // 2


count_flops((_native_forward, _triton_forward), _forward_flops)
count_flops((_native_backward, _triton_backward), _backward_flops)


def why_not_triton_of_few_tokens(tokens: Tensor, *rest: Tensor) -> str | None:
    reason = why_not_triton_of_any_width(tokens)
    if reason is None and tokens.shape[1] > TRITON_TOKEN_LIMIT:
        return f"serves up to {TRITON_TOKEN_LIMIT} tokens, got {tokens.shape[1]}"
    return reason


BACKENDS = (
    Backend("cpu", why_not_cpu, _native_forward, _native_backward, batch_independent=True),
    Backend("triton", why_not_triton_of_few_tokens, _triton_forward, _triton_backward, batch_independent=True),
    Backend("reference", never),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def _run(query_key_value: Tensor, heads: int, scale: float, backend: str) -> Tensor:
    forward = _BY_NAME[backend].forward
    assert forward is not None
    attended: Tensor = forward(query_key_value, heads, scale)
    return attended


class _AttendTokens(torch.autograd.Function):
    """Saves its input only: the softmax of few tokens is cheaper to repeat than to store and read."""

    @staticmethod
    def forward(ctx: Any, query_key_value: Tensor, heads: int, scale: float, backend: str) -> Tensor:
        ctx.save_for_backward(query_key_value)
        ctx.heads, ctx.scale, ctx.backend = heads, scale, backend
        return _run(query_key_value, heads, scale, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (query_key_value,) = ctx.saved_tensors
        backward = _BY_NAME[ctx.backend].backward
        assert backward is not None
        return backward(grad, query_key_value, ctx.heads, ctx.scale), None, None, None


def attend_tokens(
    query_key_value: Tensor, *, heads: int, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Multi-head self-attention of few tokens from their packed projection: softmax(scale · Q Kᵀ) V per head.

    Args:
        query_key_value: [B, T, 3D], float32, float16, bfloat16 or float64: all queries, then all keys, then all values,
            each with its heads side by side.
        heads: H, a divisor of D.
        scale: factor on the scores before the softmax; (D / H) ** -0.5 if None.
        backend: "cpu", "triton" or "reference"; None chooses (`liftbyimage.ops.explain` says how).

    Returns:
        [B, T, D] in the input dtype, heads side by side, differentiable; the backward pass repeats the softmax from the
        input, which alone is kept. A NaN reaches what depends on it, never another sample or head.

    Raises:
        TypeError: query_key_value is no floating-point tensor, or heads is no int, or scale no float.
        ValueError: the shape does not fit, heads does not divide D, scale is not finite, or the backend is unknown or
            cannot serve.
    """
    if isinstance(query_key_value, Tensor):
        (query_key_value,) = autocast(query_key_value)
    _check(query_key_value, heads=heads)
    scale = check_scale(OP, scale, query_key_value.shape[2] // (3 * heads))
    chosen = select(OP, BACKENDS, backend, query_key_value)
    if chosen.forward is None:
        with no_autocast(query_key_value):
            return reference(query_key_value, heads=heads, scale=scale)
    run = _AttendTokens.apply if needs_graph((query_key_value,)) else _run
    attended: Tensor = run(query_key_value, heads, scale, chosen.name)
    return attended
