"""What joints make of their contexts: output projection, feed-forward and both layer norms: five launches.

    unfold, head by head                 attended [B, J, D]; without one, a copy
    output projection, residual          X + branch [B, J, D]
    layer norm, first layer, gelu        X' [B, J, D], hidden [B, J, F]
    second layer, residual               X' + branch [B, J, D]
    layer norm                           joints_out [B, J, D], by PyTorch

Backward differentiates the reference by recomputation, on every device.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ._common import without_autocast
from ._heads import multiply_heads
from ._linear import Norm, Residual, linear


def forward(
    joints: Tensor,  # [B, J, D]
    context: Tensor,  # [B, H, J, W]
    unfold: Tensor | None,  # [H, W, D/H]
    value_bias: Tensor | None,  # [D]
    out_proj_weight: Tensor,  # [D, D]
    out_proj_bias: Tensor,  # [D]
    norm1_weight: Tensor,  # [D]
    norm1_bias: Tensor,  # [D]
    linear1_weight: Tensor,  # [F, D]
    linear1_bias: Tensor,  # [F]
    linear2_weight: Tensor,  # [D, F]
    linear2_bias: Tensor,  # [D]
    norm2_weight: Tensor,  # [D]
    norm2_bias: Tensor,  # [D]
    eps: float,
) -> Tensor:
    """joints_out [B,J,D]."""
    count, dim = joints.shape[1:]
    rows = joints.contiguous().flatten(0, 1)
    attended = merged_heads(context, unfold, value_bias).flatten(0, 1)
    summed = linear(attended, out_proj_weight, out_proj_bias, residual=Residual(rows, None, count))
    middle = rows.new_empty(rows.shape)
    norm = Norm(norm1_weight, norm1_bias, eps, normalized=middle)
    hidden = linear(summed, linear1_weight, linear1_bias, norm=norm, gelu=True)
    summed = linear(hidden, linear2_weight, linear2_bias, residual=Residual(middle, None, count))
    with without_autocast(joints):
        return F.layer_norm(summed.view(joints.shape), (dim,), norm2_weight, norm2_bias, eps)


def merged_heads(context: Tensor, unfold: Tensor | None, value_bias: Tensor | None) -> Tensor:
    """[B, J, D]: each head's context, unfolded, side by side with the others', and the value bias."""
    if unfold is None:
        merged = context.transpose(1, 2).flatten(2)
        return merged.contiguous() if value_bias is None else merged + value_bias
    batch, heads, count, _ = context.shape
    by_head = context.new_empty(batch, count, heads, unfold.shape[2])
    multiply_heads(context, unfold, value_bias, by_head.transpose(1, 2))
    return by_head.flatten(2)
