"""Batches of records as a lifter takes them: normalised crops, its own 2D inputs, and the true poses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liftbyimage.data.crop import normalise_image
from liftbyimage.data.skeleton import H36M_TO_MPI_INF_3DHP, JOINT_NAMES
from liftbyimage.models.pipeline import Lifter, Pipeline


class Batch(NamedTuple):
    images: Tensor  # [B, 3, H, W] RGB, ImageNet-normalised
    poses: tuple[Tensor, ...]  # what the lifter takes beside the image, [B, J, 2] each
    pose_3d: Tensor | None  # [B, J, 3] metres, relative to the pelvis, camera axes, in the lifter's order of joints


def make_batch(lifter: Lifter, records: Mapping[str, Any], device: str | torch.device = "cpu") -> Batch:
    """Collated records (`data.source.Source`, with a leading B) as `lifter` takes them, on `device`."""
    order = joint_order(lifter)
    poses = lifter.pose_inputs(
        records["keypoints"][:, order].numpy(),
        records["crop_matrix"].numpy(),
        records["image_size"].numpy(),
        tuple(records["image"].shape[1:3]),
    )
    truth = records.get("pose_3d")
    return Batch(
        normalise_image(records["image"].to(device)),
        tuple(pose.to(device) for pose in poses),
        None if truth is None else truth[:, order].to(device),
    )


def joint_order(lifter: Lifter) -> list[int]:
    """For every joint of the lifter its number in the Human3.6M order of records."""
    if lifter.config.num_joints != len(JOINT_NAMES):
        raise ValueError(f"lifter must lift {len(JOINT_NAMES)} joints, got one for {lifter.config.num_joints}")
    if getattr(lifter.config, "skeleton", None) == "mpi-inf-3dhp":
        return list(H36M_TO_MPI_INF_3DHP)
    return list(range(len(JOINT_NAMES)))


def check_crop_size(what: str, pipeline: Pipeline, size: tuple[int, int]) -> None:
    """Refuse crops of another size than a LiftByImage was trained on; other lifters take any.

    Args:
        what: what gives the crops, the first words of the refusal.
        size: (height, width), px.
    """
    grid, stride = getattr(pipeline.lifter.config, "grid", None), getattr(pipeline.encoder, "stride", None)
    if grid is None or stride is None:
        return
    trained = [stride * side for side in grid]
    if list(size) != trained:
        raise ValueError(
            f"{what} must be crops of {trained[0]}x{trained[1]} px, as this lifter was trained on, "
            f"got {size[0]}x{size[1]}"
        )


def mirror(lifter: Lifter, batch: Batch, mirrored: Tensor) -> Batch:
    """The batch with the samples that `mirrored` [B] (bool) marks seen in a mirror, targets too."""

    def choose(straight: Tensor, other: Tensor) -> Tensor:
        return torch.where(mirrored.view(-1, *[1] * (straight.dim() - 1)), other, straight)

    other = lifter.flip_inputs(*batch.poses, crop_width=batch.images.shape[3])
    return Batch(
        choose(batch.images, batch.images.flip(3)),
        tuple(choose(straight, flipped) for straight, flipped in zip(batch.poses, other, strict=True)),
        None if batch.pose_3d is None else choose(batch.pose_3d, lifter.flip_output(batch.pose_3d)),
    )
