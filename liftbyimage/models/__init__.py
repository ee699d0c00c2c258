"""Whole systems: encoders, lifters and the pipeline from image to pose."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from liftbyimage.models.capture import CapturedModule, capture
from liftbyimage.models.context_aware_poseformer import ContextAwarePoseFormer, ContextAwarePoseFormerConfig
from liftbyimage.models.folding import fold_batch_norm
from liftbyimage.models.heatmaps import decode_heatmaps, flip_average
from liftbyimage.models.hrnet import HRNet, hrnet_w32, hrnet_w48
from liftbyimage.models.lift_by_image import LiftByImage, LiftByImageConfig, LiftedPose
from liftbyimage.models.optimize import OptimizationReport
from liftbyimage.models.pipeline import Lifter, Pipeline
from liftbyimage.models.pose_only import PoseOnlyConfig, PoseOnlyLifter
from liftbyimage.models.tiny_encoder import TinyEncoder

__all__ = [
    "ContextAwarePoseFormer",
    "ContextAwarePoseFormerConfig",
    "CapturedModule",
    "HRNet",
    "LiftByImage",
    "LiftByImageConfig",
    "LiftedPose",
    "OptimizationReport",
    "Pipeline",
    "PoseOnlyConfig",
    "PoseOnlyLifter",
    "TinyEncoder",
    "build",
    "build_encoder",
    "capture",
    "decode_heatmaps",
    "flip_average",
    "fold_batch_norm",
    "hrnet_w32",
    "hrnet_w48",
]


LIFTERS: dict[str, type[Lifter]] = {kind.name: kind for kind in (LiftByImage, ContextAwarePoseFormer, PoseOnlyLifter)}
ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "hrnet-w32": hrnet_w32,
    "hrnet-w48": hrnet_w48,
    "tiny": TinyEncoder,
}


def build(name: str, **config: Any) -> Lifter:
    """A lifter by its name, "lift-by-image", "context-aware-poseformer" or "pose-only", with its configuration as
    keyword arguments."""
    _check_name("lifter", LIFTERS, name)
    kind = LIFTERS[name]
    return kind(kind.config_type(**config))


def build_encoder(name: str, **config: Any) -> nn.Module:
    """An encoder by its name, "hrnet-w32", "hrnet-w48" or "tiny"."""
    _check_name("encoder", ENCODERS, name)
    return ENCODERS[name](**config)


def _check_name(kind: str, known: Collection[str], name: str) -> None:
    if name not in known:
        raise ValueError(f"{kind} must be one of {', '.join(known)}, got {name!r}")
