"""From an image crop and a 2D pose to a 3D pose: an encoder and a lifter in one module."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from liftbyimage.models.context_aware_poseformer import ContextAwarePoseFormer
from liftbyimage.models.lift_by_image import LiftByImage, LiftedPose
from liftbyimage.models.optimize import OptimizationReport, optimize_encoder
from liftbyimage.models.pose_only import PoseOnlyLifter

Lifter = LiftByImage | ContextAwarePoseFormer | PoseOnlyLifter


class Pipeline(nn.Module):
    """An encoder and the lifter that reads what it makes of images.

    Args:
        encoder: for a LiftByImage a module with `features([B, 3, H, W]) -> [B, C, Hf, Wf]` and `channels`, for a
            ContextAwarePoseFormer one with `branches([B, 3, H, W]) -> list of maps` and `branch_channels` (HRNet has
            both, TinyEncoder the former; or your own); None for a PoseOnlyLifter, which reads no image.
        lifter: a LiftByImage or ContextAwarePoseFormer for maps of those channels, or a PoseOnlyLifter.

    Attributes:
        report: how `optimize` made this pipeline; None for one it did not make.
    """

    report: OptimizationReport | None = None

    def __init__(self, encoder: nn.Module | None, lifter: Lifter) -> None:
        super().__init__()
        if not isinstance(lifter, Lifter):
            raise TypeError(
                "Pipeline: lifter must be a LiftByImage, ContextAwarePoseFormer or PoseOnlyLifter, "
                f"got {type(lifter).__name__}"
            )
        lifter.check_encoder(encoder)
        self.encoder = encoder
        self.lifter = lifter

    def forward(self, images: Tensor, *poses: Tensor) -> LiftedPose | Tensor:
        """images [B, 3, H, W] (RGB, ImageNet-normalised) and the lifter's 2D poses → what the lifter returns.

        A LiftByImage takes pose_2d [B, J, 2], a ContextAwarePoseFormer pose_2d and pose_crop [B, J, 2]
        (`lifter.pose_inputs` makes them of pixels). The encoder may compute in another dtype than the lifter.
        """
        if not poses or not all(isinstance(pose, Tensor) for pose in poses):
            got = ", ".join(type(pose).__name__ for pose in poses) or "none"
            raise TypeError(f"Pipeline: the lifter's 2D poses must follow the images as tensors, got {got}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.report is None):
            if self.encoder is None:
                return self.lifter(*poses)
            return self.lifter(self.read(images), *poses)

    def read(self, images: Tensor) -> Tensor | list[Tensor]:
        """What the lifter reads of images, in the lifter's dtype."""
        dtype = next(self.lifter.parameters()).dtype
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.lifter.encoder_is_frozen):
            maps = getattr(self.encoder, self.lifter.reads)(images)
        return maps.to(dtype) if isinstance(maps, Tensor) else [one.to(dtype) for one in maps]

    def flip_test(self, images: Tensor, *poses: Tensor) -> Tensor:
        """The mean of the pose [B, J, 3] of images and that of the mirrored images, mirrored back (arguments as
        `forward`)."""
        straight = self(images, *poses)
        mirrored = self(images.flip(3), *self.lifter.flip_inputs(*poses, crop_width=images.shape[3]))
        final = [out if isinstance(out, Tensor) else out.pose_3d for out in (straight, mirrored)]
        return (final[0] + self.lifter.flip_output(final[1])) / 2

    def train(self, mode: bool = True) -> Pipeline:
        """Training mode, but for an encoder that the lifter wants frozen: it stays in evaluation mode."""
        super().train(mode)
        if self.lifter.encoder_is_frozen:
            self.encoder.eval()
        return self

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
                pipeline in training mode, optimised already, or without an encoder.
        """
        if self.encoder is None:
            raise ValueError("Pipeline.optimize: pipeline must have an encoder, got one that reads no image")
        if any(module.training for module in self.modules()):
            raise ValueError("Pipeline.optimize: pipeline must be in evaluation mode, got training mode; call eval()")
        if self.report is not None:
            raise ValueError("Pipeline.optimize: pipeline must not be optimised yet, got one that optimize() made")
        encoder, report = optimize_encoder(self.encoder, images, self.lifter.reads, dtype=dtype, compile=compile)
        optimised = Pipeline(encoder, copy.deepcopy(self.lifter).requires_grad_(False)).eval()
        optimised.report = report
        return optimised
