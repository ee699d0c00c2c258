"""The attention half of a pre-norm transformer block over a few tokens per sample.

    branch = attend_tokens(LayerNorm(tokens) W_in + b_in) W_out + b_out                                [B, T, D]
    updated = tokens + branch_scale · branch                                                           [B, T, D]

B samples, T tokens, D model width; attend_tokens is softmax(Q Kᵀ / √(D / H)) V for each of H heads. The weights are
used transposed, as torch.nn.MultiheadAttention stores them. `branch_scale` [B] is stochastic depth (drop path): the
caller draws 0, or 1 / probability of keeping, for each sample; the branch of a sample at 0 is not computed.

Source: torch.nn.TransformerEncoderLayer (norm_first=True), its self-attention block; the level and joint blocks of
Q. Zhao, C. Zheng, M. Liu, C. Chen, "A Single 2D Pose with Context is Worth Hundreds for 3D Human Pose Estimation",
NeurIPS 2023. Stochastic depth: G. Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.
"""

from __future__ import annotations

from typing import Any

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
    select,
    triton_op,
    why_not_cpu_but_half,
)
from liftbyimage.ops._recompute import spread, wanted_of
from liftbyimage.ops._residual import add_branch
from liftbyimage.ops.attend_tokens import reference as attend
from liftbyimage.ops.attend_tokens import why_not_triton_of_few_tokens

OP = "residual_attention"


def _check(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    branch_scale: Tensor | None,
    *,
    heads: int,
    eps: float,
) -> None:
    check_tensor(OP, "tokens", tokens, "B T D")
    check_positive(OP, "tokens", tokens, "B T D", "T", "D")
    batch, _, dim = tokens.shape
    check_heads(OP, heads, dim)
    check_eps(OP, eps)
    check_like(OP, "tokens", tokens, "norm_weight", norm_weight, (dim,), "D")
    check_like(OP, "tokens", tokens, "norm_bias", norm_bias, (dim,), "D")
    check_like(OP, "tokens", tokens, "in_proj_weight", in_proj_weight, (3 * dim, dim), "3D D")
    check_like(OP, "tokens", tokens, "in_proj_bias", in_proj_bias, (3 * dim,), "3D")
    check_like(OP, "tokens", tokens, "out_proj_weight", out_proj_weight, (dim, dim), "D D")
    check_like(OP, "tokens", tokens, "out_proj_bias", out_proj_bias, (dim,), "D")
    if branch_scale is not None:
        check_like(OP, "tokens", tokens, "branch_scale", branch_scale, (batch,), "B")


def reference(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    branch_scale: Tensor | None = None,
    *,
    heads: int,
    eps: float = 1e-5,
) -> Tensor:
    """The definition, in plain PyTorch, for any device and dtype; gradients are PyTorch's own."""
    normalized = F.layer_norm(tokens, tokens.shape[2:], norm_weight, norm_bias, eps)
    attended = attend(F.linear(normalized, in_proj_weight, in_proj_bias), heads=heads)  # [B, T, D]
    branch = F.linear(attended, out_proj_weight, out_proj_bias)  # [B, T, D]
    return add_branch(tokens, branch, branch_scale)


_INPUTS = (
    "Tensor tokens, Tensor norm_weight, Tensor norm_bias, Tensor in_proj_weight, Tensor in_proj_bias,"
    " Tensor out_proj_weight, Tensor out_proj_bias, Tensor? branch_scale"
)
_FORWARD_SCHEMA = f"({_INPUTS}, int heads, float eps, bool keep) -> (Tensor, Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    f"(Tensor grad_updated, {_INPUTS}, Tensor projected, Tensor statistics, int heads, bool[] wanted) -> Tensor[]"
)


def _fake_forward(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    branch_scale: Tensor | None,
    heads: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, dim = tokens.shape
    statistics = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    return (
        tokens.new_empty(tokens.shape),
        tokens.new_empty((batch, count, 3 * dim) if keep else 0),
        tokens.new_empty((batch, count, 2) if keep else 0, dtype=statistics),
    )


def _fake_backward(grad_updated: Tensor, *rest: Any) -> list[Tensor]:
    *inputs, _, _, _, wanted = rest
    return [tensor.new_empty(tensor.shape) for tensor in wanted_of(inputs, wanted)]


_native_forward = native_op(f"{OP}_forward", _fake_forward)
_native_backward = native_op(f"{OP}_backward", _fake_backward)
_triton_forward = triton_op(f"{OP}_forward", _FORWARD_SCHEMA, _fake_forward)
_triton_backward = triton_op(f"{OP}_backward", _BACKWARD_SCHEMA, _fake_backward)


def _forward_flops(tokens: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Multiply-adds, counted as 2: in-projection, Q·Kᵀ and A·V, out-projection."""
    batch, count, dim = tokens
    return int(2 * batch * count * dim * (3 * dim + 2 * count + dim))


def _backward_flops(grad_updated: Any, tokens: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products for each of the forward's, and its Q·Kᵀ and A·V again."""
    batch, count, dim = tokens
    return int(2 * batch * count * dim * (2 * 4 * dim + 6 * count))


count_flops((_native_forward, _triton_forward), _forward_flops)
count_flops((_native_backward, _triton_backward), _backward_flops)

# Triton stands behind the reference, on demand only, until a run on a GPU shows it ahead and as exact.
BACKENDS = (
    Backend("cpu", why_not_cpu_but_half, _native_forward, _native_backward, batch_independent=True),
    Backend("reference", never),
    Backend("triton", why_not_triton_of_few_tokens, _triton_forward, _triton_backward),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def _run(heads: int, eps: float, keep: bool, backend: str, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """updated, packed projection, mean and reciprocal deviation of each token; the latter two empty unless kept"""
    forward = _BY_NAME[backend].forward
    assert forward is not None
    outputs: tuple[Tensor, Tensor, Tensor] = forward(*inputs, heads, eps, keep)
    return outputs


class _ResidualAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: int, eps: float, backend: str, *inputs: Tensor | None) -> Tensor:
        updated, projected, statistics = _run(heads, eps, True, backend, *inputs)
        ctx.save_for_backward(*inputs, projected, statistics)
        ctx.heads, ctx.backend = heads, backend
        return updated

    @staticmethod
    def backward(ctx: Any, grad_updated: Tensor) -> tuple[Tensor | None, ...]:
        backward = _BY_NAME[ctx.backend].backward
        assert backward is not None
        wanted = [*ctx.needs_input_grad[3:-1], False]  # branch_scale is given, not learned
        grads = backward(grad_updated, *ctx.saved_tensors, ctx.heads, wanted)
        return None, None, None, *spread(grads, wanted)


def residual_attention(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    branch_scale: Tensor | None = None,
    *,
    heads: int,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """The self-attention of a pre-norm transformer block, with its layer norm, residual and stochastic depth.

    Args:
        tokens: [B, T, D], float32, float16, bfloat16 or float64; every other tensor has its dtype and device.
        norm_weight, norm_bias: [D] each.
        in_proj_weight, in_proj_bias: [3D, D] and [3D], query, key and value as torch.nn.MultiheadAttention stores them.
        out_proj_weight, out_proj_bias: [D, D] and [D].
        branch_scale: [B], the factor on each sample's branch; a sample at 0 keeps its tokens and its branch is not
            computed. None for 1 everywhere. It is taken as a constant and gets no gradient.
        heads: H, a divisor of D.
        eps: added to the variance in the layer norm.
        backend: "cpu" (float32, float64 and bfloat16), "triton" (float32, float16 and bfloat16, up to 64 tokens) or
            "reference"; None chooses (`liftbyimage.ops.explain` says how).

    Returns:
        tokens [B, T, D] in the input dtype, differentiable with respect to every tensor argument but branch_scale. A
        NaN in a sample's tokens gives NaN in all of that sample, unless its branch_scale is 0 and the NaN merely passes
        through.

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes differ, or heads is no int, or eps no float.
        ValueError: ranks, sizes or devices do not fit, heads does not divide D, eps is negative or not finite, or the
            backend is unknown or cannot serve.
    """
    inputs: tuple[Any, ...] = autocast(
        tokens, norm_weight, norm_bias, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, branch_scale
    )
    _check(*inputs, heads=heads, eps=eps)
    chosen = select(OP, BACKENDS, backend, inputs[0])
    if chosen.forward is None:
        with no_autocast(inputs[0]):
            return reference(*inputs, heads=heads, eps=eps)
    if needs_graph(inputs):
        updated: Tensor = _ResidualAttention.apply(heads, eps, chosen.name, *inputs)
        return updated
    return _run(heads, eps, False, chosen.name, *inputs)[0]
