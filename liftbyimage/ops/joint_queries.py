"""What joints do among themselves before they look at the image: self-attention, then the question they ask.

    A_h = softmax((X W_q,h + b_q,h)(X W_k,h + b_k,h)ᵀ / √(D / H))                     over joints      [B, H, J, J]
    joints_out = LayerNorm(X + [A_1 (X W_v,1 + b_v,1) … A_H (X W_v,H + b_v,H)] W_o + b_o)              [B, J, D]
    query_h = (joints_out W_query,h + b_query,h) fold_h                                                [B, H, J, W]

B batch, J joints, D model width, H heads, W key width of the attention to patches that follows. All weights are used
transposed, as torch.nn.Linear stores them. `fold` [H, D / H, W] takes each head's query to the width of the keys: in
the absorbed formulation it is the key projection, in the factored one also the embedding (docs/kernels). Without it
the plain queries come out, W = D / H.

Source: torch.nn.TransformerDecoderLayer (norm_first=False), its self-attention block and the query projection of its
cross-attention; a layer of F. Zhou, J. Yin, P. Li, "Lifting by Image", AAAI 2024.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from liftbyimage.ops._checks import check_eps, check_heads, check_like, check_positive, check_tensor
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
    why_not_cpu_in_full_precision,
)
from liftbyimage.ops._recompute import gradients, spread, wanted_of
from liftbyimage.ops.attend_tokens import why_not_triton_of_few_tokens

OP = "joint_queries"


class JointQueries(NamedTuple):
    joints: Tensor  # [B, J, D]
    query: Tensor  # [B, H, J, W]


def _check(
    joints: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    fold: Tensor | None,
    *,
    heads: int,
    eps: float,
) -> None:
    check_tensor(OP, "joints", joints, "B J D")
    check_positive(OP, "joints", joints, "B J D", "J", "D")
    dim = joints.shape[2]
    check_heads(OP, heads, dim)
    check_eps(OP, eps)
    check_like(OP, "joints", joints, "in_proj_weight", in_proj_weight, (3 * dim, dim), "3D D")
    check_like(OP, "joints", joints, "in_proj_bias", in_proj_bias, (3 * dim,), "3D")
    check_like(OP, "joints", joints, "out_proj_weight", out_proj_weight, (dim, dim), "D D")
    check_like(OP, "joints", joints, "out_proj_bias", out_proj_bias, (dim,), "D")
    check_like(OP, "joints", joints, "norm_weight", norm_weight, (dim,), "D")
    check_like(OP, "joints", joints, "norm_bias", norm_bias, (dim,), "D")
    check_like(OP, "joints", joints, "query_weight", query_weight, (dim, dim), "D D")
    check_like(OP, "joints", joints, "query_bias", query_bias, (dim,), "D")
    if fold is not None:
        check_tensor(OP, "fold", fold, "H D/H W")
        check_positive(OP, "fold", fold, "H D/H W", "W")
        check_like(OP, "joints", joints, "fold", fold, (heads, dim // heads, fold.shape[2]), "H D/H W")


def reference(
    joints: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    fold: Tensor | None = None,
    *,
    heads: int,
    eps: float = 1e-5,
) -> JointQueries:
    """The definition, in plain PyTorch, for any device and dtype; gradients are PyTorch's own."""
    dim = joints.shape[2]
    projected = F.linear(joints, in_proj_weight, in_proj_bias)  # [B, J, 3D]
    query, key, value = (split_heads(part, heads) for part in projected.chunk(3, dim=2))  # [B, H, J, D / H]
    attention = torch.softmax((dim // heads) ** -0.5 * (query @ key.transpose(2, 3)), dim=3)  # [B, H, J, J]
    attended = F.linear((attention @ value).transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    joints = F.layer_norm(joints + attended, (dim,), norm_weight, norm_bias, eps)
    asked = split_heads(F.linear(joints, query_weight, query_bias), heads)  # [B, H, J, D / H]
    return JointQueries(joints, asked.contiguous() if fold is None else asked @ fold)


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, J, D] → [B, H, J, D / H]"""
    by_head: Tensor = tokens.unflatten(2, (heads, -1))
    return by_head.transpose(1, 2)


_FORWARD_SCHEMA = (
    "(Tensor joints, Tensor in_proj_weight, Tensor in_proj_bias, Tensor out_proj_weight, Tensor out_proj_bias,"
    " Tensor norm_weight, Tensor norm_bias, Tensor query_weight, Tensor query_bias, Tensor? fold, int heads,"
    " float eps) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor? grad_joints, Tensor? grad_query, Tensor joints, Tensor in_proj_weight, Tensor in_proj_bias,"
    " Tensor out_proj_weight, Tensor out_proj_bias, Tensor norm_weight, Tensor norm_bias, Tensor query_weight,"
    " Tensor query_bias, Tensor? fold, int heads, float eps, bool[] wanted) -> Tensor[]"
)


def _fake_forward(joints: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    fold, heads, _ = rest[-3:]
    batch, num_joints, dim = joints.shape
    width = dim // heads if fold is None else fold.shape[2]
    return joints.new_empty(batch, num_joints, dim), joints.new_empty(batch, heads, num_joints, width)


def _recompute(grad_joints: Tensor | None, grad_query: Tensor | None, *rest: Any) -> list[Tensor]:
    *inputs, heads, eps, wanted = rest

    def function(*leaves: Tensor) -> JointQueries:
        return reference(*leaves, heads=heads, eps=eps)

    return gradients(function, inputs, (grad_joints, grad_query), wanted)


def _fake_backward(grad_joints: Tensor | None, grad_query: Tensor | None, *rest: Any) -> list[Tensor]:
    *inputs, _, _, wanted = rest
    return [tensor.new_empty(tensor.shape) for tensor in wanted_of(inputs, wanted)]


_native_forward = native_op(f"{OP}_forward", _fake_forward)
_triton_forward = triton_op(f"{OP}_forward", _FORWARD_SCHEMA, _fake_forward)
_backward = python_op(f"{OP}_backward", _BACKWARD_SCHEMA, _recompute, _fake_backward)


def _flops(joints: Any, fold: Any) -> int:
    """Multiply-adds, counted as 2: in-projection, Q·Kᵀ and A·V, out-projection, query and fold."""
    batch, num_joints, dim = joints
    width = 0 if fold is None else fold[2]
    return int(2 * batch * num_joints * dim * (3 * dim + 2 * num_joints + dim + dim + width))


def _forward_flops(joints: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _flops(joints, rest[8])


def _backward_flops(
    grad_joints: Any, grad_query: Any, joints: Any, *rest: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return 3 * _flops(joints, rest[8])  # forward again, and two products for each of its own


count_flops((_native_forward, _triton_forward), _forward_flops)
count_flops((_backward,), _backward_flops)

# Triton stands behind the reference, on demand only, until a run on a GPU shows it ahead and as exact.
BACKENDS = (
    Backend("cpu", why_not_cpu_in_full_precision, _native_forward, _backward, batch_independent=True),
    Backend("reference", never),
    Backend("triton", why_not_triton_of_few_tokens, _triton_forward, _backward),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def _run(heads: int, eps: float, backend: str, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    forward = _BY_NAME[backend].forward
    assert forward is not None
    joints, query = forward(*inputs, heads, eps)
    return joints, query


class _JointQueries(torch.autograd.Function):
    """Saves its inputs only; backward differentiates the reference by recomputation."""

    @staticmethod
    def forward(ctx: Any, heads: int, eps: float, backend: str, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.heads, ctx.eps, ctx.backend = heads, eps, backend
        return _run(heads, eps, backend, *inputs)

    @staticmethod
    def backward(ctx: Any, grad_joints: Tensor | None, grad_query: Tensor | None) -> tuple[Tensor | None, ...]:
        backward = _BY_NAME[ctx.backend].backward
        assert backward is not None
        wanted = list(ctx.needs_input_grad[3:])
        grads = backward(grad_joints, grad_query, *ctx.saved_tensors, ctx.heads, ctx.eps, wanted)
        return None, None, None, *spread(grads, wanted)


def joint_queries(
    joints: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    fold: Tensor | None = None,
    *,
    heads: int,
    eps: float = 1e-5,
    backend: str | None = None,
) -> JointQueries:
    """Self-attention over joints with residual and layer norm, and the queries that joints then put to the patches.

    Args:
        joints: [B, J, D], float32, float16, bfloat16 or float64; every other tensor has its dtype and device.
        in_proj_weight, in_proj_bias: [3D, D] and [3D], query, key and value as torch.nn.MultiheadAttention stores them.
        out_proj_weight, out_proj_bias: [D, D] and [D].
        norm_weight, norm_bias: [D] each, of the layer norm after the residual.
        query_weight, query_bias: [D, D] and [D], of the attention to patches.
        fold: [H, D / H, W], applied to each head's query; None for the plain queries, W = D / H.
        heads: H, a divisor of D.
        eps: added to the variance in the layer norm.
        backend: "cpu" (float32 and float64), "triton" (float32, float16 and bfloat16, up to 64 joints) or "reference";
            None chooses (`liftbyimage.ops.explain` says how).

    Returns:
        JointQueries: `joints` [B, J, D] after the layer norm and `query` [B, H, J, W] without any softmax scale, in the
        input dtype. Both are differentiable with respect to every tensor argument: the inputs alone are kept, and the
        backward pass differentiates the reference by recomputation, in float32 for half precision. A NaN in a
        sample's joints gives NaN in all of that sample's results.

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes differ, or heads is no int, or eps no float.
        ValueError: ranks, sizes or devices do not fit, heads does not divide D, eps is negative or not finite, or the
            backend is unknown or cannot serve.
    """
    inputs: tuple[Any, ...] = autocast(
        joints,
        in_proj_weight,
        in_proj_bias,
        out_proj_weight,
        out_proj_bias,
        norm_weight,
        norm_bias,
        query_weight,
        query_bias,
        fold,
    )
    _check(*inputs, heads=heads, eps=eps)
    chosen = select(OP, BACKENDS, backend, inputs[0])
    if chosen.forward is None:
        with no_autocast(inputs[0]):
            return reference(*inputs, heads=heads, eps=eps)
    run = _JointQueries.apply if needs_graph(inputs) else _run
    return JointQueries(*run(heads, eps, chosen.name, *inputs))
