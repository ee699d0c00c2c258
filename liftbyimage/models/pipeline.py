"""From an image crop and a 2D pose to a 3D pose: an encoder and a lifter in one module."""

from __future__ import annotations

from torch import Tensor, nn

from liftbyimage.models.lift_by_image import LiftByImage, LiftedPose


class Pipeline(nn.Module):
    """`encoder.features(images)` followed by the lifter.

    Args:
        encoder: a module with `features([B, 3, H, W]) -> [B, C, Hf, Wf]` and `channels` (HRNet, TinyEncoder, your own).
        lifter: a LiftByImage whose `image_channels` is the encoder's `channels`.
    """

    def __init__(self, encoder: nn.Module, lifter: LiftByImage) -> None:
        super().__init__()
        channels = getattr(encoder, "channels", None)
        if channels != lifter.config.image_channels:
            raise ValueError(
                f"Pipeline: encoder must give the lifter's {lifter.config.image_channels} channels, got {channels}"
            )
        self.encoder = encoder
        self.lifter = lifter

    def forward(self, images: Tensor, pose_2d: Tensor) -> LiftedPose:
        """images [B, 3, H, W] (RGB, ImageNet-normalised), pose_2d [B, J, 2] in [-1, 1] → LiftedPose in metres."""
        return self.lifter(self.encoder.features(images), pose_2d)
