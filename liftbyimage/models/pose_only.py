"""A lifter that sees only the 2D pose: what image-guided lifting is compared against."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liftbyimage.data.crop import CROP_SIZE, flip_normalised, flip_pose, normalised_pose
from liftbyimage.metrics import root_relative


@dataclass(frozen=True)
class PoseOnlyConfig:
    """Sizes of a PoseOnlyLifter: dim, heads, mlp_ratio and dropout as `TransformerLayer`, layers, joints J.

    Eight layers have about as many parameters as LiftByImage's six with cross-attention at the same width.
    """

    dim: int = 256
    heads: int = 8
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    layers: int = 8
    num_joints: int = 17

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "layers", "num_joints"):
            if getattr(self, name) < 1:
                raise ValueError(f"PoseOnlyConfig: {name} must be >= 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"PoseOnlyConfig: dim must be a multiple of heads, got {self.dim} and {self.heads}")
        if not self.mlp_ratio > 0:
            raise ValueError(f"PoseOnlyConfig: mlp_ratio must be more than 0, got {self.mlp_ratio}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"PoseOnlyConfig: dropout must be in [0, 1), got {self.dropout}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class PoseOnlyLifter(nn.Module):
    """Self-attention and feed-forward over the 2D joints, then a linear head; no image at all.

    In a `Pipeline` it has no encoder: `Pipeline(None, lifter)`.

    Args:
        config: sizes.
    """

    name, config_type = "pose-only", PoseOnlyConfig
    reads = None  # nothing of an encoder
    encoder_is_frozen = False

    def __init__(self, config: PoseOnlyConfig | None = None) -> None:
        super().__init__()
        if config is not None and not isinstance(config, PoseOnlyConfig):
            raise TypeError(f"PoseOnlyLifter: config must be a PoseOnlyConfig, got {type(config).__name__}")
        self.config = config = config or PoseOnlyConfig()
        self.pose_embed = nn.Linear(2, config.dim)
        self.joint_embedding = nn.Parameter(torch.randn(config.num_joints, config.dim))
        hidden = int(config.dim * config.mlp_ratio)
        layer = nn.TransformerEncoderLayer(
            config.dim, config.heads, hidden, config.dropout, activation="gelu", batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.head = nn.Linear(config.dim, 3)

    def forward(self, pose_2d: Tensor) -> Tensor:
        """pose_2d [B, J, 2] in [-1, 1] → pose [B, J, 3], metres, root-relative, camera axes."""
        if pose_2d.dim() != 3 or tuple(pose_2d.shape[1:]) != (self.config.num_joints, 2):
            raise ValueError(
                f"PoseOnlyLifter: pose_2d must have shape [B, {self.config.num_joints}, 2], got {list(pose_2d.shape)}"
            )
        return root_relative(self.head(self.layers(self.pose_embed(pose_2d) + self.joint_embedding)))

    @staticmethod
    def sizes(encoder: None, crop_size: tuple[int, int]) -> dict[str, Any]:
        """Nothing of the configuration depends on images."""
        return {}

    def check_encoder(self, encoder: nn.Module | None) -> None:
        if encoder is not None:
            raise ValueError(f"Pipeline: encoder must be None for a PoseOnlyLifter, got {type(encoder).__name__}")

    def pose_inputs(
        self,
        keypoints: np.ndarray,
        crop_matrix: np.ndarray,
        image_size: np.ndarray,
        crop_size: tuple[int, int] = CROP_SIZE,
    ) -> tuple[Tensor, ...]:
        """As `LiftByImage.pose_inputs`."""
        return (normalised_pose(keypoints, crop_matrix, crop_size),)

    def flip_inputs(self, pose_2d: Tensor, crop_width: int = CROP_SIZE[1]) -> tuple[Tensor, ...]:
        """pose_2d [B, 17, 2] of the mirrored crop."""
        return (flip_normalised(pose_2d),)

    def flip_output(self, pose_3d: Tensor) -> Tensor:
        """A pose [B, 17, 3] of the mirrored crop, mirrored back."""
        return flip_pose(pose_3d)
