"""The feed-forward half of a pre-norm transformer block: two launches forward.

forward     norm, first linear layer, gelu      activated [B, T, F]; for training also hidden, before its gelu
            second linear layer, residual       updated [B, T, D]
backward    gelu again and its gradient, the layer norm's gradient; the five products are PyTorch's
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import without_autocast
from ._linear import Norm, Residual, linear
from ._residual_branch import branch_gradient, gradients, kept


def forward(
    tokens: Tensor,  # [B, T, D]
    norm_weight: Tensor,  # [D]
    norm_bias: Tensor,  # [D]
    linear1_weight: Tensor,  # [F, D]
    linear1_bias: Tensor,  # [F]
    linear2_weight: Tensor,  # [D, F]
    linear2_bias: Tensor,  # [D]
    branch_scale: Tensor | None,  # [B]
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """updated [B,T,D]; hidden [B,T,F] before its gelu and statistics [B,T,2] float32, empty unless kept."""
    (batch, count, _), width = tokens.shape, linear1_weight.shape[0]
    rows = tokens.contiguous().flatten(0, 1)
    hidden = tokens.new_empty((batch, count, width) if keep else 0)
    statistics = tokens.new_empty((batch, count, 2) if keep else 0, dtype=torch.float32)
    norm = Norm(norm_weight, norm_bias, eps, statistics if keep else None)
    activated = linear(rows, linear1_weight, linear1_bias, norm=norm, gelu=True, before_gelu=hidden if keep else None)
    residual = Residual(rows, branch_scale, count)
    updated = linear(activated, linear2_weight, linear2_bias, residual=residual)
    return updated.view(tokens.shape), hidden, statistics


def backward(
    grad_updated: Tensor,
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    linear1_weight: Tensor,
    linear1_bias: Tensor,
    linear2_weight: Tensor,
    linear2_bias: Tensor,
    branch_scale: Tensor | None,
    hidden: Tensor,
    statistics: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of the wanted among the forward's tensors, in their order; branch_scale has none."""
    with without_autocast(tokens):
        grad_branch = branch_gradient(grad_updated, branch_scale)  # [B, T, D]
        hidden = kept(hidden, branch_scale)
        grad_activated = (grad_branch.flatten(0, 1) @ linear2_weight).view(hidden.shape)
        grad_hidden = torch.ops.aten.gelu_backward(grad_activated, hidden)
        return gradients(
            grad_updated, tokens, norm_weight, norm_bias, statistics, branch_scale, linear1_weight, grad_hidden,
            grad_branch, lambda: F.gelu(hidden), wanted,
        )  # fmt: skip
