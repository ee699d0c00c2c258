"""A record of a person (`data.source.Source`) out of a picture file and the person's joints in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from liftbyimage.data.crop import box_to_crop_matrix, read_image, warp_crop
from liftbyimage.data.source import CorruptRecord


def bounding_box(joints: np.ndarray) -> np.ndarray:
    """The smallest box [4] (x0, y0, x1, y1) of joints [J, 2]."""
    return np.concatenate([joints.min(axis=0), joints.max(axis=0)])


def picture_record(
    picture: Path,
    keypoints: np.ndarray,
    box: np.ndarray,
    joints_3d: np.ndarray,
    group: int,
    size: tuple[int, int],
    label: str,
) -> dict[str, Any]:
    """Read the picture, cut the crop round the box, and put the record together.

    Args:
        picture: the image file.
        keypoints: [17, 2], px of the picture.
        box: [4], x0, y0, x1, y1 px; `box_to_crop_matrix` enlarges it.
        joints_3d: [17, 3], metres, camera axes; the record's pose is relative to the first joint.
        group: number of the group.
        size: crop (height, width), px.
        label: what errors about the values begin with.

    Raises:
        CorruptRecord: a value that is not finite, an empty box, or a picture that cannot be read.
    """
    for name, values in (("2D joints", keypoints), ("corners of the box", box), ("3D joints", joints_3d)):
        if not np.isfinite(values).all():
            raise CorruptRecord(f"{label}: the {name} are not finite")
    if not (box[:2] < box[2:]).all():
        raise CorruptRecord(f"{label}: the box {box.tolist()} is empty")
    try:
        image = read_image(picture)
    except (OSError, ValueError) as error:
        raise CorruptRecord(str(error)) from None
    matrix = box_to_crop_matrix(box, size)
    return {
        "image": warp_crop(image, matrix, size),
        "keypoints": keypoints.astype(np.float32),
        "crop_matrix": matrix,
        "image_size": np.array(image.shape[1::-1], dtype=np.float32),
        "pose_3d": (joints_3d - joints_3d[:1]).astype(np.float32),
        "group": group,
    }
