"""Joints query patches.

    A = softmax(scale · Q Kᵀ)            over patches, per head            [B, H, J, P]
    context = A V                                                         [B, H, J, F]
    importance = mean of A over heads and joints                          [B, P]

B batch, H heads, J joints, P patches, E key width, F value width; R = H·J query rows, row r = h·J + j. `key` and
`value` have Hk = H heads, or Hk = 1: one set shared by all heads. With one shared set and `value is key` the tokens
are read once; that is how a layer attends without ever forming its keys and values (the absorbed formulation,
docs/kernels).

Source: F. Zhou, J. Yin, P. Li, "Lifting by Image", AAAI 2024, Eq. 1 and the importance of Adaptive Feature Selection.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from liftbyimage.ops import _tensor_cores
from liftbyimage.ops._checks import check_attention, check_scale
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

OP = "attend_patches"


class AttendedPatches(NamedTuple):
    context: Tensor  # [B, H, J, F]
    importance: Tensor | None  # [B, P]
    attention: Tensor | None  # [B, H, J, P], patch-major memory [B, P, H·J]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of importance and of the log-sum-exp: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ) as [B, Hk, R / Hk, P]: the rows of one key set together, so that no key is copied."""
    batch, heads, joints, width = query.shape
    key_heads = key.shape[1]
    rows = query.reshape(batch, key_heads, heads * joints // key_heads, width)  # [B, Hk, R / Hk, E]
    return torch.softmax(scale * (rows @ key.transpose(-1, -2)), dim=-1)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    need_attention: bool = False,
    need_importance: bool = True,
) -> AttendedPatches:
    """The definition, in plain PyTorch, for any device and dtype; gradients are PyTorch's own."""
    batch, heads, joints, width = query.shape
    patches = key.shape[2]
    attention = reference_attention(query, key, width**-0.5 if scale is None else scale)  # [B, Hk, R / Hk, P]
    context = (attention @ value).reshape(batch, heads, joints, value.shape[3])
    importance = attention.mean((1, 2), dtype=statistics_dtype(query.dtype)) if need_importance else None  # [B, P]
    if not need_attention:
        return AttendedPatches(context, importance, None)
    patch_major = attention.reshape(batch, heads * joints, patches).transpose(1, 2).contiguous()  # [B, P, R]
    return AttendedPatches(context, importance, patch_major.transpose(1, 2).unflatten(1, (heads, joints)))


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_attention(OP, query, key, value)


_FORWARD_SCHEMA = (
    "(Tensor query, Tensor key, Tensor? value, float scale, bool need_attention, bool need_importance)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor? grad_context, Tensor? grad_importance, Tensor? grad_attention, Tensor query, Tensor key, Tensor? value,"
    " Tensor context, Tensor lse, float scale, bool need_token_grads) -> (Tensor, Tensor, Tensor)"
)


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float, need_attention: bool, need_importance: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, joints, _ = query.shape
    patches = key.shape[2]
    statistics = statistics_dtype(query.dtype)
    context = query.new_empty(batch, heads, joints, (key if value is None else value).shape[3])
    importance = query.new_empty((batch, patches) if need_importance else (0,), dtype=statistics)
    if need_attention:
        patch_major = query.new_empty(batch, patches, heads * joints)
        attention = patch_major.transpose(1, 2).unflatten(1, (heads, joints))
    else:
        attention = query.new_empty(0)
    return context, importance, attention, query.new_empty(batch, heads, joints, dtype=statistics)


def _fake_backward(
    grad_context: Tensor | None,
    grad_importance: Tensor | None,
    grad_attention: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    context: Tensor,
    lse: Tensor,
    scale: float,
    need_token_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_key = key.new_empty(key.shape) if need_token_grads else key.new_empty(0)
    separate = need_token_grads and value is not None
    grad_value = key.new_empty(value.shape) if separate and value is not None else key.new_empty(0)
    return query.new_empty(query.shape), grad_key, grad_value


_native_forward = native_op(f"{OP}_forward", _fake_forward)
_native_backward = native_op(f"{OP}_backward", _fake_backward)
_triton_forward = triton_op(f"{OP}_forward", _FORWARD_SCHEMA, _fake_forward)
_triton_backward = triton_op(f"{OP}_backward", _BACKWARD_SCHEMA, _fake_backward)


def attention_flops(query: Any, key: Any, value: Any) -> int:
    """Multiply-adds, counted as 2, of the two products every pass over the tokens makes: Q·Kᵀ and A·V."""
    batch, heads, joints, width = query
    patches = key[2]
    value_width = (key if value is None else value)[3]
    return int(2 * batch * heads * joints * patches * (width + value_width))


def _forward_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return attention_flops(query, key, value)


def _backward_flops(
    grad_context: Any,
    grad_importance: Any,
    grad_attention: Any,
    query: Any,
    key: Any,
    value: Any,
    context: Any,
    lse: Any,
    scale: float,
    need_token_grads: bool,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    # scores again and dA = dO Vᵀ, then dQ = dS K (as wide as the keys); for the tokens also dK = dSᵀ Q and dV = Aᵀ dO.
    again = attention_flops(query, key, value)
    per_width = 2 * query[0] * query[1] * query[2] * key[2]
    return int(again + per_width * query[3] + (again if need_token_grads else 0))


count_flops((_native_forward, _triton_forward), _forward_flops)
count_flops((_native_backward, _triton_backward), _backward_flops)


def _run_tensor_backward(
    grad_context: Tensor | None,
    grad_importance: Tensor | None,
    grad_attention: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    context: Tensor,
    lse: Tensor,
    scale: float,
    need_token_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_attention is not None:
        grad_attention = grad_attention.flatten(1, 2).transpose(1, 2)  # [B, P, R]
    incoming = _tensor_cores.Incoming(grad_context, None, grad_importance, grad_attention)
    gradients = _tensor_cores.backward(incoming, query, key[:, 0], None, context, lse, scale, need_token_grads)
    empty = key.new_empty(0)
    return gradients.query, empty if gradients.tokens is None else gradients.tokens[:, None], empty.clone()


_tensor_backward = python_op(f"{OP}_tensor_backward", _BACKWARD_SCHEMA, _run_tensor_backward, _fake_backward)
count_flops((_tensor_backward,), _backward_flops)


def _why_not_cuda(query: Tensor, *key_and_value: Tensor) -> str | None:
    tokens = key_and_value[0] if key_and_value else query
    if tokens.shape[1] != 1 or any(tensor is not tokens for tensor in key_and_value):
        return "serves one head of tokens that are key and value"
    return why_not_tensor_cores(query)


# The compiled CPU kernel and Triton never serve the same tensor, except that Triton's interpreter can.
BACKENDS = (
    Backend("cpu", why_not_cpu, _native_forward, _native_backward, batch_independent=True),
    Backend("cuda", _why_not_cuda, _native_forward, _tensor_backward),
    Backend("triton", why_not_triton, _triton_forward, _triton_backward, batch_independent=True),
    Backend("reference", never),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    need_attention: bool,
    need_importance: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """context, importance, attention, log-sum-exp; what is not wanted has shape [0]."""
    forward = _BY_NAME[backend].forward
    assert forward is not None
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = forward(query, key, value, scale, need_attention, need_importance)
    return outputs


class _AttendPatches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        scale: float,
        need_attention: bool,
        need_importance: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        context, importance, attention, lse = _run(query, key, value, scale, need_attention, need_importance, backend)
        ctx.save_for_backward(query, key, value, context, lse)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.backend = scale, backend
        ctx.need_attention, ctx.need_importance = need_attention, need_importance
        wanted = ((importance, need_importance), (attention, need_attention))
        ctx.mark_non_differentiable(*(output for output, needed in wanted if not needed))
        return context, importance, attention

    @staticmethod
    def backward(
        ctx: Any, grad_context: Tensor | None, grad_importance: Tensor | None, grad_attention: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, key, value, context, lse = ctx.saved_tensors
        need_token_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        # torch.compile gives zeros, of shape [0], for outputs that nobody asked for.
        grad_attention = grad_attention if ctx.need_attention else None
        grad_importance = grad_importance if ctx.need_importance else None
        backward = _BY_NAME[ctx.backend].backward
        assert backward is not None
        grad_query, grad_key, grad_value = backward(
            grad_context,
            grad_importance,
            grad_attention,
            query,
            key,
            value,
            context,
            lse,
            ctx.scale,
            need_token_grads,
        )
        if not need_token_grads:
            return grad_query, None, None, None, None, None, None
        return grad_query, grad_key, None if value is None else grad_value, None, None, None, None


def attend_patches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    need_attention: bool = False,
    need_importance: bool = True,
    backend: str | None = None,
) -> AttendedPatches:
    """Joints query image patches: context = softmax(scale · Q Kᵀ) V, and each patch's mean attention.

    Args:
        query: [B, H, J, E], float32, float16, bfloat16 or float64.
        key: [B, Hk, P, E] with Hk = H, or Hk = 1 (shared by all heads), query's dtype and device.
        value: [B, Hk, P, F]; may be `key` itself, whose tokens are then read once.
        scale: factor on the scores before the softmax; E ** -0.5 if None.
        need_attention: also return A, stored patch-major (memory [B, P, H·J]) so that it can serve as feature channels.
        need_importance: return the importance; False where nobody reads it spares a pass over the scores.
        backend: "cpu", "cuda", "triton" or "reference"; None chooses (`liftbyimage.ops.explain` says how).

    Returns:
        AttendedPatches: `context` [B, H, J, F] and `attention` [B, H, J, P] (or None) in the input dtype,
        `importance` [B, P] (or None) in float32 (float64 for float64), summing to 1 over P. All are differentiable with
        respect to query, key and value. A NaN in an input gives NaN in every output that depends on it.

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes differ.
        ValueError: ranks, sizes or devices do not fit, Hk is neither 1 nor H, or the backend is unknown or cannot
            serve.
    """
    shared = value is key
    query, key, value = autocast(query, key, value)
    _check(query, key, value)
    scale = check_scale(OP, scale, query.shape[-1])
    chosen = select(OP, BACKENDS, backend, query, key, value)
    if chosen.forward is None:
        with no_autocast(query):
            return reference(
                query, key, value, scale=scale, need_attention=need_attention, need_importance=need_importance
            )
    run = _AttendPatches.apply if needs_graph((query, key, value)) else _run
    context, importance, attention, *_ = run(
        query, key, None if shared else value, scale, bool(need_attention), bool(need_importance), chosen.name
    )
    return AttendedPatches(context, importance if need_importance else None, attention if need_attention else None)
