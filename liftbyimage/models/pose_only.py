"""A lifter that sees only the 2D pose: what image-guided lifting is compared against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liftbyimage.metrics import root_relative


class PoseOnlyLifter(nn.Module):
    """Self-attention and feed-forward over the 2D joints, then a linear head; no image at all.

    Args:
        dim, heads, mlp_ratio, dropout: as `TransformerLayer`.
        layers: 8 such layers have about as many parameters as LiftByImage's six with cross-attention at the same width.
        num_joints: J.
    """

    def __init__(
        self,
        dim: int = 256,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        layers: int = 8,
        num_joints: int = 17,
    ) -> None:
        super().__init__()
        self.num_joints = num_joints
        self.pose_embed = nn.Linear(2, dim)
        self.joint_embedding = nn.Parameter(torch.randn(num_joints, dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, int(dim * mlp_ratio), dropout, activation="gelu", batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 3)

    def forward(self, pose_2d: Tensor) -> Tensor:
        """pose_2d [B, J, 2] in [-1, 1] → pose [B, J, 3], metres, root-relative, camera axes."""
        if pose_2d.dim() != 3 or tuple(pose_2d.shape[1:]) != (self.num_joints, 2):
            raise ValueError(
                f"PoseOnlyLifter: pose_2d must have shape [B, {self.num_joints}, 2], got {list(pose_2d.shape)}"
            )
        return root_relative(self.head(self.layers(self.pose_embed(pose_2d) + self.joint_embedding)))
