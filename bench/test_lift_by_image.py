"""The whole lifter: both stages in inference, and stage 1's training step (forward and every gradient, no optimiser).

The reference is liftbyimage.reference with the same state dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from machine import DEVICE, DTYPE
from measurement import Measurement
from torch import Tensor, nn
from workload import FORWARD, TRAINING, Implementation, Setting, Workload, textbook_memory

from liftbyimage.metrics import root_relative
from liftbyimage.models import CapturedModule, LiftByImage, LiftByImageConfig, LiftedPose, capture
from liftbyimage.reference import ReferenceLiftByImage

CHANNELS = 32
# Largest error over six layers beyond twice the reference's, relative to the output's RMS. Rounding may also swap
# patches of all but equal importance among the kept ones, which moves the refined pose by less than that.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
STAGE_2 = ("stage2.", "refined_head.")


class ReferenceStage1(ReferenceLiftByImage):
    def forward(self, features: Tensor, pose_2d: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        channels = self.feature_norm(features).flatten(2).transpose(1, 2)  # [B, P, C]
        patches = self.embed(torch.cat([channels, self.positions.expand(len(channels), -1, -1)], dim=2))
        joints = self.stage1[0](self.pose_embed(pose_2d) + self.joint_embedding, patches)
        joints, patches = self.stage1[1](joints, patches)
        joints, _ = self.stage1[2](joints, patches, need_importance=True)
        return (root_relative(self.coarse_head(joints)),)


class Stage1(LiftByImage):
    def forward(self, features: Tensor, pose_2d: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        joints, _, _ = self.broad_query(features, pose_2d)
        return (root_relative(self.coarse_head(joints)),)


def _config(setting: Setting) -> LiftByImageConfig:
    """A grid of 4 to 3 as of a 256×192 crop; without dropout, so that training steps can be compared."""
    side = math.isqrt(setting.P // 12)
    return LiftByImageConfig(image_channels=CHANNELS, grid=(4 * side, 3 * side), dim=setting.D, dropout=0.0)


def _lifter(setting: Setting) -> nn.Module:
    return (LiftByImage if setting.direction == FORWARD else Stage1)(_config(setting))


def _reference(setting: Setting) -> nn.Module:
    config = _config(setting)
    positions = LiftByImage(config).positions
    return (ReferenceLiftByImage if setting.direction == FORWARD else ReferenceStage1)(config, positions)


class HalfPrecision(LiftByImage):
    """The same weights in bfloat16, from float32 inputs on."""

    def __init__(self, config: LiftByImageConfig) -> None:
        super().__init__(config)
        self.cast: LiftByImage | None = None

    def forward(self, features: Tensor, pose_2d: Tensor) -> LiftedPose:
        if self.cast is None:
            cast = LiftByImage(self.config).eval()
            cast.load_state_dict(self.state_dict())
            self.cast = cast.bfloat16()
        return self.cast(features.bfloat16(), pose_2d.bfloat16())


class _Direct(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


class _Replayed:
    """Before a lifter's class: its forward is recorded as a CUDA graph by the first call, and replayed from then on."""

    captured: CapturedModule | None = None

    def forward(self, *inputs: Tensor) -> Any:
        if self.captured is None:
            self.captured = capture(_Direct(super().forward).eval(), *inputs)  # type: ignore[misc]
        return self.captured(*inputs)


class ReplayedReference(_Replayed, ReferenceLiftByImage):  # type: ignore[misc]
    pass


class ReplayedLifter(_Replayed, LiftByImage):  # type: ignore[misc]
    pass


def _replayed_reference(setting: Setting) -> nn.Module:
    config = _config(setting)
    return ReplayedReference(config, LiftByImage(config).positions)


def _why_no_graph(setting: Setting) -> str | None:
    if DEVICE != "cuda":
        return "a CUDA graph needs a GPU"
    return None if setting.direction == FORWARD else "inference only"


def _why_no_half_precision(setting: Setting) -> str | None:
    if DTYPE.itemsize == torch.bfloat16.itemsize:
        return "every row is in half precision"
    return None if setting.direction == FORWARD else "inference only"


IMPLEMENTATIONS = [
    Implementation("reference", _reference),
    Implementation("torch.compile", _reference, compiled=True),
    Implementation("reference, CUDA graph", _replayed_reference, why_not=_why_no_graph),
    Implementation("liftbyimage", _lifter),
    Implementation("liftbyimage, CUDA graph", lambda s: ReplayedLifter(_config(s)), why_not=_why_no_graph),
    Implementation(
        "liftbyimage bfloat16",
        lambda setting: HalfPrecision(_config(setting)),
        why_not=_why_no_half_precision,
        dtype=torch.bfloat16,
    ),
]


def workload(setting: Setting) -> Workload:
    config = _config(setting)
    batch, joints = setting.B, config.num_joints

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        features = torch.randn(batch, CHANNELS, *config.grid, generator=generator)
        pose_2d = torch.rand(batch, joints, 2, generator=generator) * 2 - 1
        return features.to(dtype), pose_2d.to(dtype)

    training = setting.direction == TRAINING
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in LiftByImage(config).parameters())
    features = batch * CHANNELS * setting.P
    return Workload(
        op="lift_by_image" if not training else "lift_by_image stage 1",
        setting=setting,
        reference=_reference,
        inputs=inputs,
        outputs=("coarse_pose_3d",) if training else ("pose_3d", "coarse_pose_3d", "importance", "index"),
        cotangents={"coarse_pose_3d": (batch, joints, 3)},
        compulsory_bytes=(3 if training else 1) * (features + weights) * DTYPE.itemsize,
        needed_bytes=textbook_memory(setting) * (6 if training else 2),
        bounds=BOUNDS,
        trained=lambda name: not name.startswith(STAGE_2),
        coupled=training,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_lift_by_image(measure: Measurement, setting: Setting, implementation: Implementation) -> None:
    measure(workload(setting), implementation)
