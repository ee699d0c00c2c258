"""From an image crop and a 2D pose to a 3D pose: an encoder and a lifter in one module."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from liftbyimage.models.lift_by_image import LiftByImage, LiftedPose
from liftbyimage.models.optimize import OptimizationReport, optimize_encoder


class Pipeline(nn.Module):
    """`encoder.features(images)` followed by the lifter.

    Args:
        encoder: a module with `features([B, 3, H, W]) -> [B, C, Hf, Wf]` and `channels` (HRNet, TinyEncoder, your own).
        lifter: a LiftByImage whose `image_channels` is the encoder's `channels`.

    Attributes:
        report: how `optimize` made this pipeline; None for one it did not make.
    """

    report: OptimizationReport | None = None

    def __init__(self, encoder: nn.Module, lifter: LiftByImage) -> None:
        super().__init__()
        if not isinstance(lifter, LiftByImage):
            raise TypeError(f"Pipeline: lifter must be a LiftByImage, got {type(lifter).__name__}")
        channels = getattr(encoder, "channels", None)
        if channels != lifter.config.image_channels:
            raise ValueError(
                f"Pipeline: encoder must give the lifter's {lifter.config.image_channels} channels, got {channels}"
            )
        self.encoder = encoder
        self.lifter = lifter

    def forward(self, images: Tensor, pose_2d: Tensor) -> LiftedPose:
        """images [B, 3, H, W] (RGB, ImageNet-normalised), pose_2d [B, J, 2] in [-1, 1] → LiftedPose in metres.

        The encoder may compute in another dtype than the lifter, whose dtype is that of `pose_2d`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.report is None):
            return self.lifter(self.encoder.features(images).to(pose_2d.dtype), pose_2d)

    def optimize(self, images: Tensor, *, dtype: torch.dtype | None = None, compile: bool = False) -> Pipeline:
        """A copy for inference whose encoder runs in the fastest way found by a few timed calls on this machine.

        Every way is first compared with the encoder as it is, on `images`; one whose largest error exceeds 1e-4 of the
        output's RMS (float32; 0.2 in bfloat16) is never chosen. Other batches and sizes work as before, timed or not.
        Takes some twenty encoder calls and, while it lasts, a few copies of the encoder's weights.

        Args:
            images: [B, 3, H, W], an example of what will come, in dtype and device of the encoder's weights.
            dtype: torch.bfloat16 allows the encoder to compute in it; None keeps it in its own dtype.
            compile: whether torch.compile is tried too (a large encoder takes it minutes).

        Returns:
            A new pipeline in evaluation mode, `report` saying what was tried; `self` is untouched and shares nothing
            with it. It gives no gradients, cannot be trained, and `torch.save` does not take its traced encoder: save
            `self`, and optimise again where it is loaded.

        Raises:
            TypeError, ValueError: `images` or `dtype` of another kind than said; features that are not finite; a
                pipeline in training mode, or optimised already.
        """
        if any(module.training for module in self.modules()):
            raise ValueError("Pipeline.optimize: pipeline must be in evaluation mode, got training mode; call eval()")
        if self.report is not None:
            raise ValueError("Pipeline.optimize: pipeline must not be optimised yet, got one that optimize() made")
        encoder, report = optimize_encoder(self.encoder, images, dtype=dtype, compile=compile)
        optimised = Pipeline(encoder, copy.deepcopy(self.lifter).requires_grad_(False)).eval()
        optimised.report = report
        return optimised
