"""What a pipeline says of a batch, in one form whatever its lifter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from liftbyimage.batches import Batch, joint_order
from liftbyimage.metrics import root_relative
from liftbyimage.models import LiftedPose, Pipeline

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Prediction(NamedTuple):
    """Poses of a batch: metres, relative to the pelvis, camera axes, joints in Human3.6M's order."""

    pose_3d: Tensor  # float32 [B, 17, 3]
    coarse_pose_3d: Tensor | None = None  # float32 [B, 17, 3], of stage 1, if the lifter has two stages
    importance: Tensor | None = None  # float32 [B, P], if the lifter has such


def chosen_device(function: str, device: str | torch.device, precision: str = "float32") -> torch.device:
    """The device of a name, "auto" being the GPU where there is one.

    Raises:
        ValueError: no such device here, no such precision, or one in which the device cannot compute.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"{function}: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"{function}: device must be auto, cpu or cuda, got {str(device)!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{function}: device {str(device)!r} does not exist: PyTorch finds {torch.cuda.device_count()} GPUs here"
        )
    if chosen.type == "cpu" and precision == "float16":
        raise ValueError(f"{function}: precision float16 needs a GPU, got device 'cpu'; bfloat16 serves there")
    return chosen


@contextmanager
def evaluating(pipeline: Pipeline) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's own again."""
    modes = {module: module.training for module in pipeline.modules()}
    pipeline.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def mixed_precision(device: str | torch.device, precision: str) -> torch.autocast:
    """A context in which modules compute in one of `PRECISIONS`, by autocast; nothing for float32."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "float32")


@torch.no_grad()
def predict(pipeline: Pipeline, batch: Batch, *, flip_test: bool = False, precision: str = "float32") -> Prediction:
    """Lift a batch (`batches.make_batch`) with a pipeline in evaluation mode and on the batch's device.

    Args:
        flip_test: average every pose with that of the mirrored batch, mirrored back; importance is that of the batch
            as it is.
        precision: "float32", or "bfloat16" or "float16" by automatic mixed precision.
    """
    lifter = pipeline.lifter
    with mixed_precision(batch.images.device, precision):
        out = pipeline(batch.images, *batch.poses)
        poses = _poses(out)
        if flip_test:
            inputs = lifter.flip_inputs(*batch.poses, crop_width=batch.images.shape[3])
            mirrored = _poses(pipeline(batch.images.flip(3), *inputs))
            poses = [(pose + lifter.flip_output(other)) / 2 for pose, other in zip(poses, mirrored, strict=True)]
    order = joint_order(lifter)
    back = sorted(range(len(order)), key=order.__getitem__)  # for every joint of Human3.6M its number in the lifter
    poses = [root_relative(pose[:, back]) for pose in poses]
    return Prediction(*poses, importance=out.importance.float() if isinstance(out, LiftedPose) else None)


def _poses(out: LiftedPose | Tensor) -> list[Tensor]:
    poses = (out.pose_3d, out.coarse_pose_3d) if isinstance(out, LiftedPose) else (out,)
    return [pose.float() for pose in poses]
