"""The attention half of a pre-norm transformer block: three launches forward.

forward     norm, query, key and value      packed projection [B, T, 3D]
            `attend_tokens`                 attended [B, T, D]
            output projection, residual     updated [B, T, D]
backward    attention again and its gradient (`attend_tokens`), the layer norm's gradient; the four products are
            PyTorch's
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import attend_tokens
from ._common import without_autocast
from ._linear import Norm, Residual, linear
from ._residual_branch import branch_gradient, gradients, kept


def softmax_scale(tokens: Tensor, heads: int) -> float:
    return float((tokens.shape[2] // heads) ** -0.5)


def forward(
    tokens: Tensor,  # [B, T, D]
    norm_weight: Tensor,  # [D]
    norm_bias: Tensor,  # [D]
    in_proj_weight: Tensor,  # [3D, D]
    in_proj_bias: Tensor,  # [3D]
    out_proj_weight: Tensor,  # [D, D]
    out_proj_bias: Tensor,  # [D]
    branch_scale: Tensor | None,  # [B]
    heads: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """updated [B,T,D]; packed projection [B,T,3D] and statistics [B,T,2] float32, empty unless kept."""
    batch, count, width = tokens.shape
    rows = tokens.contiguous().flatten(0, 1)
    statistics = tokens.new_empty((batch, count, 2) if keep else 0, dtype=torch.float32)
    norm = Norm(norm_weight, norm_bias, eps, statistics if keep else None)
    projected = linear(rows, in_proj_weight, in_proj_bias, norm=norm).view(batch, count, 3 * width)
    attended = attend_tokens.forward(projected, heads, softmax_scale(tokens, heads)).flatten(0, 1)
    residual = Residual(rows, branch_scale, count)
    updated = linear(attended, out_proj_weight, out_proj_bias, residual=residual)
    return updated.view(tokens.shape), projected if keep else projected.new_empty(0), statistics


def backward(
    grad_updated: Tensor,
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    branch_scale: Tensor | None,
    projected: Tensor,
    statistics: Tensor,
    heads: int,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of the wanted among the forward's tensors, in their order; branch_scale has none."""
    scale = softmax_scale(tokens, heads)
    with without_autocast(tokens):
        grad_branch = branch_gradient(grad_updated, branch_scale)  # [B, T, D]
        projected = kept(projected, branch_scale)
        grad_attended = (grad_branch.flatten(0, 1) @ out_proj_weight).view(tokens.shape)
        grad_projected = attend_tokens.backward(grad_attended, projected, heads, scale)
        return gradients(
            grad_updated, tokens, norm_weight, norm_bias, statistics, branch_scale, in_proj_weight, grad_projected,
            grad_branch, lambda: attend_tokens.forward(projected, heads, scale), wanted,
        )  # fmt: skip
