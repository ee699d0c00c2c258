"""The ends of tokens + branch_scale · branch(LayerNorm(tokens)) that both residual ops share in their backward pass.

Large products are PyTorch's (cuBLAS, under its setting of TF32); what stands between them is one launch each.
A sample whose branch is dropped adds nothing to any sum, whatever its tokens hold: what is kept of it is taken as
zero, for 0 · NaN would spoil the weights' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _layer_norm


def kept(values: Tensor, branch_scale: Tensor | None) -> Tensor:
    """values [B, …], zero in samples whose branch is dropped."""
    if branch_scale is None:
        return values
    return torch.where((branch_scale == 0).view(-1, 1, 1), 0, values)


def branch_gradient(grad_updated: Tensor, branch_scale: Tensor | None) -> Tensor:
    """The gradient of the branch's result [B, T, D]."""
    if branch_scale is None:
        return grad_updated
    return kept(grad_updated * branch_scale.view(-1, 1, 1), branch_scale)


def gradients(
    grad_updated: Tensor,  # [B, T, D]
    tokens: Tensor,  # [B, T, D]
    norm_weight: Tensor,  # [D]
    norm_bias: Tensor,  # [D]
    statistics: Tensor,  # [B, T, 2]
    branch_scale: Tensor | None,  # [B]
    first_weight: Tensor,  # [N, D]
    grad_first: Tensor,  # [B, T, N], of the first linear layer's result
    grad_branch: Tensor,  # [B, T, D], of the second one's
    second_input: Callable[[], Tensor],  # [B, T, M]
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Those wanted of tokens, norm weight and bias, and weight and bias of both linear layers."""
    grad_first, grad_branch = grad_first.flatten(0, 1), grad_branch.flatten(0, 1)
    grads: list[Tensor | None] = [None] * 7
    if any(wanted[:4]):
        grad_normalized = (grad_first @ first_weight).view(tokens.shape)
        norm = _layer_norm.backward(
            grad_updated, grad_normalized, tokens, statistics, norm_weight, norm_bias, branch_scale
        )
        grads[:3] = norm.tokens, norm.weight, norm.bias
        if wanted[3]:
            grads[3] = grad_first.T @ norm.normalized.flatten(0, 1)
    if wanted[4]:
        grads[4] = grad_first.sum(0)
    if wanted[5]:
        grads[5] = grad_branch.T @ second_input().flatten(0, 1)
    if wanted[6]:
        grads[6] = grad_branch.sum(0)
    return [grad for grad, want in zip(grads, wanted, strict=False) if want and grad is not None]
