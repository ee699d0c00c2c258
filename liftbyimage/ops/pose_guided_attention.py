"""Pose-guided attention: one attention map used both ways.

    A = softmax(scale · Q Kᵀ)                          over patches, per head          [B, H, J, P]
    context = A V                                      joints gather from patches      [B, H, J, F]
    patches_out = patches + Σ_h A_hᵀ pose_value_h      patches receive from joints     [B, P, D]
    importance = mean of A over heads and joints                                       [B, P]

Each patch receives in proportion to the attention the joints paid it, so unimportant patches are hardly updated.
Each head writes the full width D: the head's slice of the output projection is folded into `pose_value`. Eq. 2's
concatenation of heads is the case where pose_value_h is zero outside head h's slice.

Source: F. Zhou, J. Yin, P. Li, "Lifting by Image", AAAI 2024, Eq. 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from liftbyimage.ops import _tensor_cores
from liftbyimage.ops._checks import check_attention, check_like, check_positive, check_scale, check_tensor
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
    why_not_cuda,
    why_not_tensor_cores,
    why_not_triton,
)
from liftbyimage.ops.attend_patches import attention_flops, reference_attention, statistics_dtype

OP = "pose_guided_attention"


class PoseGuidedAttention(NamedTuple):
    context: Tensor  # [B, H, J, F]
    patches: Tensor  # [B, P, D]
    importance: Tensor  # [B, P]


def _check(query: Tensor, key: Tensor, value: Tensor, pose_value: Tensor, patches: Tensor) -> None:
    check_attention(OP, query, key, value)
    batch, heads, joints, _ = query.shape
    if patches is key:
        if key.shape[1] != 1:
            raise ValueError(f"{OP}: patches may be key itself only where Hk = 1, got Hk = {key.shape[1]}")
    else:
        check_tensor(OP, "patches", patches, "B P D")
        check_positive(OP, "patches", patches, "B P D", "D")
        check_like(OP, "query", query, "patches", patches, (batch, key.shape[2], patches.shape[2]), "B P D")
    check_like(OP, "query", query, "pose_value", pose_value, (batch, heads, joints, patches.shape[-1]), "B H J D")


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pose_value: Tensor,
    patches: Tensor,
    *,
    scale: float | None = None,
) -> PoseGuidedAttention:
    """The definition, in plain PyTorch, for any device and dtype; gradients are PyTorch's own."""
    batch, heads, joints, width = query.shape
    num_patches = key.shape[2]
    patches = key[:, 0] if patches is key else patches
    attention = reference_attention(query, key, width**-0.5 if scale is None else scale)  # [B, Hk, R / Hk, P]
    context = (attention @ value).reshape(batch, heads, joints, value.shape[3])
    importance = attention.mean((1, 2), dtype=statistics_dtype(query.dtype))  # [B, P]
    rows = attention.reshape(batch, heads * joints, num_patches)  # [B, R, P]
    update = rows.transpose(1, 2) @ pose_value.reshape(batch, heads * joints, pose_value.shape[3])  # [B, P, D]
    return PoseGuidedAttention(context, patches + update, importance)


_FORWARD_SCHEMA = (
    "(Tensor query, Tensor key, Tensor? value, Tensor pose_value, Tensor? patches, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor? grad_context, Tensor? grad_patches, Tensor? grad_importance, Tensor query, Tensor key, Tensor? value,"
    " Tensor pose_value, Tensor context, Tensor lse, float scale, bool need_token_grads, bool patches_is_key)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor | None, pose_value: Tensor, patches: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, joints, _ = query.shape
    num_patches = key.shape[2]
    statistics = statistics_dtype(query.dtype)
    return (
        query.new_empty(batch, heads, joints, (key if value is None else value).shape[3]),
        query.new_empty(batch, num_patches, pose_value.shape[3]),
        query.new_empty(batch, num_patches, dtype=statistics),
        query.new_empty(batch, heads, joints, dtype=statistics),
    )


def _fake_backward(
    grad_context: Tensor | None,
    grad_patches: Tensor | None,
    grad_importance: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pose_value: Tensor,
    context: Tensor,
    lse: Tensor,
    scale: float,
    need_token_grads: bool,
    patches_is_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_key = key.new_empty(key.shape) if need_token_grads else key.new_empty(0)
    separate = need_token_grads and value is not None
    grad_value = key.new_empty(value.shape) if separate and value is not None else key.new_empty(0)
    return query.new_empty(query.shape), grad_key, grad_value, pose_value.new_empty(pose_value.shape)


_native_forward = native_op(f"{OP}_forward", _fake_forward)
_native_backward = native_op(f"{OP}_backward", _fake_backward)
_triton_forward = triton_op(f"{OP}_forward", _FORWARD_SCHEMA, _fake_forward)
_triton_backward = triton_op(f"{OP}_backward", _BACKWARD_SCHEMA, _fake_backward)


def _update_flops(query: Any, key: Any, pose_value: Any) -> int:
    """Multiply-adds, counted as 2, of one product between the attention map and rows of width D."""
    return int(2 * query[0] * query[1] * query[2] * key[2] * pose_value[3])


def _forward_flops(
    query: Any,
    key: Any,
    value: Any,
    pose_value: Any,
    patches: Any,
    scale: float,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return attention_flops(query, key, value) + _update_flops(query, key, pose_value)


def _backward_flops(
    grad_context: Any,
    grad_patches: Any,
    grad_importance: Any,
    query: Any,
    key: Any,
    value: Any,
    pose_value: Any,
    context: Any,
    lse: Any,
    scale: float,
    need_token_grads: bool,
    patches_is_key: bool,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    # scores again and dA (dO Vᵀ and U dXᵀ), dQ = dS K, dU = A dX; for the tokens also dK = dSᵀ Q and dV = Aᵀ dO.
    again = attention_flops(query, key, value)
    per_width = 2 * query[0] * query[1] * query[2] * key[2]
    rows = per_width * query[3] + 2 * _update_flops(query, key, pose_value)
    return int(again + rows + (again if need_token_grads else 0))


count_flops((_native_forward, _triton_forward), _forward_flops)
count_flops((_native_backward, _triton_backward), _backward_flops)


def _run_cuda_backward(
    grad_context: Tensor | None,
    grad_patches: Tensor | None,
    grad_importance: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pose_value: Tensor,
    context: Tensor,
    lse: Tensor,
    scale: float,
    need_token_grads: bool,
    patches_is_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """On tensor cores what the forward computes there; the rest by the plain kernels."""
    one_tensor = value is None and patches_is_key
    if not one_tensor or why_not_tensor_cores(query, held=2) is not None:
        incoming = (grad_context, grad_patches, grad_importance)
        saved = (query, key, value, pose_value, context, lse, scale, need_token_grads, patches_is_key)
        assert _native_backward is not None
        plain: tuple[Tensor, Tensor, Tensor, Tensor] = _native_backward(*incoming, *saved)
        return plain
    arrived = _tensor_cores.Incoming(grad_context, grad_patches, grad_importance)
    gradients = _tensor_cores.backward(arrived, query, key[:, 0], pose_value, context, lse, scale, need_token_grads)
    empty = key.new_empty(0)
    assert gradients.pose_value is not None
    grad_key = empty if gradients.tokens is None else gradients.tokens[:, None]
    return gradients.query, grad_key, empty.clone(), gradients.pose_value


_cuda_backward = python_op(f"{OP}_cuda_backward", _BACKWARD_SCHEMA, _run_cuda_backward, _fake_backward)
count_flops((_cuda_backward,), _backward_flops)


def _why_not_cuda(query: Tensor, *others: Tensor) -> str | None:
    """Plain arithmetic for float32; in half precision, where that would be far behind Triton, tensor cores alone."""
    reason = why_not_cuda(query, *others)
    if reason is not None or query.dtype == torch.float32:
        return reason
    key, value, _, patches = others or (query,) * 4
    if value is not key or patches is not key:
        return "serves one token tensor that is key, value and patches in half precision"
    return why_not_tensor_cores(query, held=2)


def _slower(query: Tensor, *others: Tensor) -> bool:
    """In float32 on an H200, B 8, width 256: CUDA 2.2 ms, Triton 4.1 ms, PyTorch's products 0.34 ms."""
    return query.is_cuda and query.dtype == torch.float32


BACKENDS = (
    Backend("cpu", why_not_cpu, _native_forward, _native_backward, batch_independent=True),
    Backend("cuda", _why_not_cuda, _native_forward, _cuda_backward, slower=_slower),
    Backend("triton", why_not_triton, _triton_forward, _triton_backward, batch_independent=True, slower=_slower),
    Backend("reference", never),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pose_value: Tensor,
    patches: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """context, patches, importance, log-sum-exp"""
    forward = _BY_NAME[backend].forward
    assert forward is not None
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = forward(query, key, value, pose_value, patches, scale)
    return outputs


class _PoseGuidedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        pose_value: Tensor,
        patches: Tensor | None,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        context, patches_out, importance, lse = _run(query, key, value, pose_value, patches, scale, backend)
        ctx.save_for_backward(query, key, value, pose_value, context, lse)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.backend, ctx.patches_is_key = scale, backend, patches is None
        return context, patches_out, importance

    @staticmethod
    def backward(
        ctx: Any, grad_context: Tensor | None, grad_patches: Tensor | None, grad_importance: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, key, value, pose_value, context, lse = ctx.saved_tensors
        need_token_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        backward = _BY_NAME[ctx.backend].backward
        assert backward is not None
        grad_query, grad_key, grad_value, grad_pose_value = backward(
            grad_context,
            grad_patches,
            grad_importance,
            query,
            key,
            value,
            pose_value,
            context,
            lse,
            ctx.scale,
            need_token_grads,
            ctx.patches_is_key,
        )
        if not need_token_grads:
            grad_key = grad_value = None
        elif value is None:
            grad_value = None
        grad_patches_in = None if ctx.patches_is_key else grad_patches
        return grad_query, grad_key, grad_value, grad_pose_value, grad_patches_in, None, None


def pose_guided_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pose_value: Tensor,
    patches: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> PoseGuidedAttention:
    """Joints gather from patches and patches receive from joints, through one attention map (Lifting by Image, Eq. 2).

    Args:
        query: [B, H, J, E], float32, float16, bfloat16 or float64.
        key: [B, Hk, P, E] with Hk = H, or Hk = 1 (shared by all heads), query's dtype and device.
        value: [B, Hk, P, F]; may be `key` itself, whose tokens are then read once.
        pose_value: [B, H, J, D], what each joint gives through each head, already projected to the width of patches.
        patches: [B, P, D]; or, where Hk = 1, the very object `key` [B, 1, P, D], whose tokens are then read once and
            whose gradient comes in one piece.
        scale: factor on the scores before the softmax; E ** -0.5 if None.
        backend: "cpu", "cuda", "triton" or "reference"; None chooses (`liftbyimage.ops.explain` says how).

    Returns:
        PoseGuidedAttention: `context` [B, H, J, F] and `patches` [B, P, D] in the input dtype, `importance` [B, P] in
        float32 (float64 for float64). All are differentiable with respect to every tensor argument. A NaN in an input
        gives NaN in every output that depends on it.

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes differ.
        ValueError: ranks, sizes or devices do not fit, Hk is neither 1 nor H, or the backend is unknown or cannot
            serve.
    """
    value_is_key, patches_is_key = value is key, patches is key
    query, key, value, pose_value, patches = autocast(query, key, value, pose_value, patches)
    _check(query, key, value, pose_value, patches)
    scale = check_scale(OP, scale, query.shape[-1])
    chosen = select(OP, BACKENDS, backend, query, key, value, pose_value, patches)
    if chosen.forward is None:
        with no_autocast(query):
            return reference(query, key, value, pose_value, patches, scale=scale)
    separate_value = None if value_is_key else value
    separate_patches = None if patches_is_key else patches
    run = _PoseGuidedAttention.apply if needs_graph((query, key, value, pose_value, patches)) else _run
    outputs = run(query, key, separate_value, pose_value, separate_patches, scale, chosen.name)
    return PoseGuidedAttention(*outputs[:3])
