"""Self-attention over joints, residual and layer norm, and the joints' queries to the patches: five launches.

    query, key and value        packed projection [B, J, 3D]
    `attend_tokens`             attended [B, J, D]
    output projection           joints + branch [B, J, D]
    layer norm, query           joints_out [B, J, D], query [B, J, D]
    fold, head by head          query [B, H, J, W]; without one, a copy

Backward differentiates the reference by recomputation, on every device.
"""

from __future__ import annotations

from torch import Tensor

from . import attend_tokens
from ._heads import multiply_heads
from ._linear import Norm, Residual, linear


def forward(
    joints: Tensor,  # [B, J, D]
    in_proj_weight: Tensor,  # [3D, D]
    in_proj_bias: Tensor,  # [3D]
    out_proj_weight: Tensor,  # [D, D]
    out_proj_bias: Tensor,  # [D]
    norm_weight: Tensor,  # [D]
    norm_bias: Tensor,  # [D]
    query_weight: Tensor,  # [D, D]
    query_bias: Tensor,  # [D]
    fold: Tensor | None,  # [H, D/H, W]
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """joints_out [B,J,D], query [B,H,J,W]."""
    batch, count, dim = joints.shape
    rows = joints.contiguous().flatten(0, 1)
    projected = linear(rows, in_proj_weight, in_proj_bias).view(batch, count, 3 * dim)
    attended = attend_tokens.forward(projected, heads, (dim // heads) ** -0.5).flatten(0, 1)
    summed = linear(attended, out_proj_weight, out_proj_bias, residual=Residual(rows, None, count))
    joints_out = joints.new_empty(joints.shape)
    plain = linear(summed, query_weight, query_bias, norm=Norm(norm_weight, norm_bias, eps, normalized=joints_out))
    plain = plain.view(batch, count, heads, dim // heads).transpose(1, 2)  # [B, H, J, D / H]
    if fold is None:
        return joints_out, plain.contiguous()
    query = joints.new_empty(batch, heads, count, fold.shape[2])
    multiply_heads(plain, fold, None, query)
    return joints_out, query
