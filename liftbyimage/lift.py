"""Lifting a person's own pictures: images and 2D poses in, 3D poses and pictures of them out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liftbyimage._files import write_atomically
from liftbyimage.data.crop import (
    CROP_SIZE,
    apply_affine,
    box_to_crop_matrix,
    normalise_image,
    normalise_keypoints,
    read_image,
    warp_crop,
)
from liftbyimage.data.pose_file import ImagePose
from liftbyimage.data.skeleton import JOINT_NAMES
from liftbyimage.models import Pipeline

RESULTS_NAME = "poses.json"
SMALLEST_PERSON = 8.0  # px


@dataclass(frozen=True, eq=False)
class LiftedImage:
    """The person of one image, lifted."""

    image: Path
    crop: np.ndarray  # uint8 [256, 192, 3] RGB
    crop_matrix: np.ndarray  # float64 [2, 3]: crop px = M·[x, y, 1] of the image
    keypoints: np.ndarray  # float64 [17, 2], crop px
    pose_3d: np.ndarray  # float32 [17, 3], metres, root-relative, camera axes
    coarse_pose_3d: np.ndarray  # float32 [17, 3], the same, of stage 1
    importance: np.ndarray  # float32 [P], sums to 1
    index: np.ndarray  # int64 [K], the patches kept
    grid: tuple[int, int]  # (Hf, Wf), P = Hf·Wf


def lift_images(
    pipeline: Pipeline,
    images: Iterable[str | os.PathLike[str]],
    poses: Mapping[str, ImagePose],
    device: str | torch.device = "cpu",
    batch_size: int = 8,
) -> list[LiftedImage]:
    """Crop the person out of every image and lift it to 3D.

    All images are read before the first is lifted. The pipeline is moved to `device` and evaluation mode.

    Args:
        images: image files.
        poses: the pose of each image by `str(image)`, as `read_pose_file(path, images)` gives them.
        device: where to compute.
        batch_size: crops per pass, at least 1.

    Returns:
        One LiftedImage per image, in their order.

    Raises:
        ValueError: an image cannot be read or has no pose; its keypoints are not pixels of it; the pipeline is for
            another skeleton or crop; or what it predicts is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"lift_images: batch_size must be at least 1, got {batch_size}")
    joints = pipeline.lifter.config.num_joints
    if joints != len(JOINT_NAMES):
        raise ValueError(f"lift_images: pipeline must lift {len(JOINT_NAMES)} joints, got one for {joints}")
    paths = [Path(image) for image in images]
    unposed = [str(path) for path in paths if str(path) not in poses]
    if unposed:
        raise ValueError(f"lift_images: poses must hold every image, got none for {', '.join(unposed)}")
    inputs = [_crop(path, poses[str(path)]) for path in paths]
    pipeline = pipeline.to(device).eval()
    lifted: list[LiftedImage] = []
    for start in range(0, len(inputs), batch_size):
        lifted += _lift_batch(pipeline, inputs[start : start + batch_size], device)
    return lifted


@dataclass(frozen=True, eq=False)
class _Crop:
    image: Path
    pixels: np.ndarray  # uint8 [256, 192, 3]
    matrix: np.ndarray  # [2, 3]
    keypoints: np.ndarray  # [17, 2] crop px


def _crop(path: Path, pose: ImagePose) -> _Crop:
    image = read_image(path)
    height, width = image.shape[:2]
    if not ((pose.keypoints >= 0) & (pose.keypoints < (width, height))).all(axis=1).any():
        raise ValueError(
            f"image {path}: none of its keypoints lies inside its {width}×{height} px; are they pixels of this picture?"
        )
    # Normalised coordinates lie inside the picture too, all of them in its first pixels.
    size = np.ptp(pose.keypoints, axis=0)
    if size.max() < SMALLEST_PERSON:
        raise ValueError(
            f"image {path}: its keypoints span {size[0]:.1f}×{size[1]:.1f} px: are they pixels of this picture?"
        )
    matrix = box_to_crop_matrix(pose.box, CROP_SIZE)
    return _Crop(path, warp_crop(image, matrix), matrix, apply_affine(matrix, pose.keypoints))


def _lift_batch(pipeline: Pipeline, crops: Sequence[_Crop], device: str | torch.device) -> list[LiftedImage]:
    images = normalise_image(np.stack([crop.pixels for crop in crops])).to(device)  # [B, 3, 256, 192]
    keypoints = normalise_keypoints(np.stack([crop.keypoints for crop in crops]))
    pose_2d = torch.from_numpy(keypoints).float().to(device)  # [B, 17, 2]
    with torch.inference_mode():
        out = pipeline(images, pose_2d)
    pose, coarse, importance, index = (value.cpu().numpy() for value in out)
    for row, crop in enumerate(crops):
        if not (np.isfinite(pose[row]).all() and np.isfinite(coarse[row]).all()):
            raise ValueError(f"lift_images: the pose of {crop.image} is not finite: the weights are broken")
    return [
        LiftedImage(
            crop.image,
            crop.pixels,
            crop.matrix,
            crop.keypoints,
            pose[row],
            coarse[row],
            importance[row],
            index[row],
            pipeline.lifter.config.grid,
        )
        for row, crop in enumerate(crops)
    ]


def write_results(results: Sequence[LiftedImage], out_dir: str | os.PathLike[str], pictures: bool = True) -> Path:
    """Write `poses.json` and, per person, a picture `<stem>.png`; every file atomically, `poses.json` last.

    A second image of the same stem gets `<stem>-2.png`, and no picture takes the place of a lifted image.

    Returns:
        The path of `poses.json`.
    """
    out_dir = Path(out_dir)
    names = _picture_names(results, out_dir) if pictures else [None] * len(results)
    for result, name in zip(results, names, strict=True):
        if name is not None:
            _write_picture(result, out_dir / name)
    document = {
        "units": "metres",
        "axes": "camera: x right, y down, z forward; relative to the pelvis",
        "joint_names": list(JOINT_NAMES),
        "images": [_entry(result, name) for result, name in zip(results, names, strict=True)],
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(out_dir / RESULTS_NAME, lambda file: file.write(text.encode()))
    return out_dir / RESULTS_NAME


def _entry(result: LiftedImage, picture: str | None) -> dict[str, Any]:
    return {
        "image": str(result.image),
        "picture": picture,
        "pose_3d": result.pose_3d.tolist(),
        "coarse_pose_3d": result.coarse_pose_3d.tolist(),
        "kept_patches": len(result.index),
        "patches": len(result.importance),
        "crop_matrix": result.crop_matrix.tolist(),
    }


def _picture_names(results: Sequence[LiftedImage], out_dir: Path) -> list[str]:
    # Casefolded: on some file systems A.png and a.png are one file.
    taken = {r.image.name.casefold() for r in results if r.image.resolve().parent == out_dir.resolve()}
    names = []
    for result in results:
        name, number = f"{result.image.stem}.png", 2
        while name.casefold() in taken:
            name, number = f"{result.image.stem}-{number}.png", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def _write_picture(result: LiftedImage, path: Path) -> None:
    from liftbyimage import draw  # matplotlib, which a caller without pictures need not load

    figure = draw.picture_of_person(
        result.crop,
        result.keypoints,
        result.importance,
        result.index,
        result.grid,
        result.pose_3d,
        result.coarse_pose_3d,
        title=result.image.name,
    )
    draw.save_figure(figure, path)
