"""Lifting a person's own pictures: images and 2D poses in, 3D poses and pictures of them out."""

from __future__ import annotations

import json
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from liftbyimage._files import check_several, write_atomically
from liftbyimage.batches import check_crop_size
from liftbyimage.data.crop import (
    CROP_SIZE,
    apply_affine,
    box_to_crop_matrix,
    normalise_image,
    read_image,
    warp_crop,
)
from liftbyimage.data.pose_file import ImagePose, check_pixels
from liftbyimage.data.skeleton import JOINT_NAMES
from liftbyimage.metrics import root_relative
from liftbyimage.models import LiftedPose, Pipeline

SKELETON = "human3.6m"
FORMATS = ("json", "npz")
UNITS, AXES = "metres", "camera: x right, y down, z forward; relative to the pelvis"
HEAD = {"units": UNITS, "axes": AXES, "joint_names": list(JOINT_NAMES)}  # of every file with poses


@dataclass(frozen=True, eq=False)
class LiftedImage:
    """The person of one image, lifted. What only a lifter with patches has is None for one without."""

    image: Path
    pose_2d: np.ndarray  # float64 [17, 2], px of the image
    box: np.ndarray  # float64 [4], x0, y0, x1, y1 px of the image
    crop: np.ndarray  # uint8 [256, 192, 3] RGB
    crop_matrix: np.ndarray  # float64 [2, 3]: crop px = M·[x, y, 1] of the image
    keypoints: np.ndarray  # float64 [17, 2], crop px
    pose_3d: np.ndarray  # float32 [17, 3], metres, root-relative, camera axes
    coarse_pose_3d: np.ndarray | None  # float32 [17, 3], the same, of stage 1
    importance: np.ndarray | None  # float32 [P], sums to 1
    index: np.ndarray | None  # int64 [K], the patches kept
    grid: tuple[int, int] | None  # (Hf, Wf), P = Hf·Wf
    image_size: tuple[int, int]  # (width, height) of the image, px


@dataclass(frozen=True, eq=False)
class PersonCrop:
    """A person cut out of a picture: what a pipeline lifts."""

    source: str  # what an error names
    pose: ImagePose
    pixels: np.ndarray  # uint8 [256, 192, 3] RGB
    matrix: np.ndarray  # float64 [2, 3], picture px to crop px
    image_size: tuple[int, int]  # (width, height) of the picture, px


class LiftedCrops(NamedTuple):
    """What a pipeline makes of N crops; None where its lifter gives no such thing."""

    pose_3d: np.ndarray  # float32 [N, 17, 3]
    coarse_pose_3d: np.ndarray | None = None  # float32 [N, 17, 3]
    importance: np.ndarray | None = None  # float32 [N, P]
    index: np.ndarray | None = None  # int64 [N, K]


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
        TypeError: `images` is one file, or `batch_size` no whole number.
        ValueError: an image cannot be read or has no pose; its keypoints are not pixels of it; the pipeline is for
            another skeleton or crop; or what it predicts is not finite.
    """
    check_batch_size("lift_images", batch_size)
    check_several("lift_images", images)
    check_pipeline("lift_images", pipeline)
    images = list(images)
    unposed = [str(image) for image in images if str(image) not in poses]
    if unposed:
        raise ValueError(f"lift_images: poses must hold every image, got none for {', '.join(unposed)}")
    paths = [Path(image) for image in images]
    crops = [_crop(path, poses[str(image)]) for path, image in zip(paths, images, strict=True)]
    pipeline = pipeline.to(device).eval()
    lifted: list[LiftedImage] = []
    for start in range(0, len(crops), batch_size):
        batch = slice(start, start + batch_size)
        results = lift_crops("lift_images", pipeline, crops[batch], device)
        lifted += map(_lifted_image, paths[batch], crops[batch], _rows(results), repeat(_grid(pipeline)))
    return lifted


def check_batch_size(function: str, batch_size: int, name: str = "batch_size") -> None:
    if not isinstance(batch_size, numbers.Integral):
        raise TypeError(f"{function}: {name} must be a whole number, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"{function}: {name} must be at least 1, got {batch_size}")


def check_pipeline(function: str, pipeline: Pipeline) -> None:
    """Refuse a lifter of another skeleton, or of crops of another size, than pictures are cut to."""
    check_crop_size(f"{function}: pictures", pipeline, CROP_SIZE)
    joints = pipeline.lifter.config.num_joints
    if joints != len(JOINT_NAMES):
        raise ValueError(f"{function}: pipeline must lift {len(JOINT_NAMES)} joints, got one for {joints}")
    skeleton = getattr(pipeline.lifter.config, "skeleton", SKELETON)
    if skeleton != SKELETON:
        raise ValueError(f"{function}: pipeline must lift the skeleton {SKELETON}, got one for {skeleton}")


def _crop(path: Path, pose: ImagePose) -> PersonCrop:
    image = read_image(path)
    check_pixels(path, pose, image)
    return crop_person(image, pose, str(path))


def crop_person(image: np.ndarray, pose: ImagePose, source: str) -> PersonCrop:
    """Cut the pose's box out of a picture [H, W, 3], enlarged as `box_to_crop_matrix` does."""
    matrix = box_to_crop_matrix(pose.box, CROP_SIZE)
    return PersonCrop(source, pose, warp_crop(image, matrix), matrix, (image.shape[1], image.shape[0]))


def lift_crops(
    function: str, pipeline: Pipeline, crops: Sequence[PersonCrop], device: str | torch.device
) -> LiftedCrops:
    """Lift one batch, at least one crop, with a pipeline on `device` in evaluation mode; `function` is for errors."""
    images, poses = pipeline_inputs(pipeline, crops, device)
    with torch.inference_mode():
        out = pipeline(images, *poses)
    return lifted_crops(function, out, crops)


def pipeline_inputs(
    pipeline: Pipeline, crops: Sequence[PersonCrop], device: str | torch.device
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a pipeline takes of N crops, at least one: images [N, 3, 256, 192] and the lifter's 2D poses."""
    images = normalise_image(np.stack([crop.pixels for crop in crops])).to(device)
    poses = pipeline.lifter.pose_inputs(
        np.stack([crop.pose.keypoints for crop in crops]),
        np.stack([crop.matrix for crop in crops]),
        np.array([crop.image_size for crop in crops], dtype=np.float64),
    )
    return images, [pose.to(device) for pose in poses]


def lifted_crops(function: str, out: LiftedPose | torch.Tensor, crops: Sequence[PersonCrop]) -> LiftedCrops:
    """What came out of a pipeline for crops, as arrays.

    Raises:
        ValueError: a pose is not finite; it names `function` and the crop's source.
    """
    if isinstance(out, torch.Tensor):
        out = (root_relative(out),)
    lifted = LiftedCrops(*((value.float() if value.is_floating_point() else value).cpu().numpy() for value in out))
    for row, crop in enumerate(crops):
        poses = (lifted.pose_3d, lifted.coarse_pose_3d)
        if not all(np.isfinite(pose[row]).all() for pose in poses if pose is not None):
            raise ValueError(f"{function}: the pose of {crop.source} is not finite: the weights are broken")
    return lifted


def _rows(lifted: LiftedCrops) -> Iterator[LiftedCrops]:
    """One person at a time, without the axis N."""
    for row in range(len(lifted.pose_3d)):
        yield LiftedCrops(*(None if values is None else values[row] for values in lifted))


def _grid(pipeline: Pipeline) -> tuple[int, int] | None:
    return getattr(pipeline.lifter.config, "grid", None)


def _lifted_image(path: Path, crop: PersonCrop, lifted: LiftedCrops, grid: tuple[int, int] | None) -> LiftedImage:
    keypoints = apply_affine(crop.matrix, crop.pose.keypoints)
    pose = crop.pose
    return LiftedImage(
        path, pose.keypoints, pose.box, crop.pixels, crop.matrix, keypoints, *lifted, grid, crop.image_size
    )


def write_results(
    results: Sequence[LiftedImage], out_dir: str | os.PathLike[str], pictures: bool = True, format: str = "json"
) -> Path:
    """Write the poses and, per person, a picture `<stem>.png`; every file atomically, the poses last.

    A second image of the same stem gets `<stem>-2.png`, and no picture takes the place of a lifted image; another file
    of its name is replaced.

    Args:
        format: "json" writes `poses.json`; "npz" writes `poses.npz`, arrays over the N images that
            `np.load(allow_pickle=False)` reads: image, picture ("" without), pose_2d, box, crop_matrix, pose_3d, and if
            the lifter gives them coarse_pose_3d, kept_patches, patches; also the strings units, axes and joint_names.

    Returns:
        The path of the file with the poses.
    """
    check_format("write_results", format)
    out_dir = Path(out_dir)
    names = picture_names(results, out_dir) if pictures else [None] * len(results)
    for result, name in zip(results, names, strict=True):
        if name is not None:
            _write_picture(result, out_dir / name)
    path = out_dir / results_name(format)
    if format == "npz":
        write_atomically(path, lambda file: np.savez(file, **_arrays(results, names)))
        return path
    document = {
        **HEAD,
        "images": [_entry(result, name) for result, name in zip(results, names, strict=True)],
    }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def check_format(function: str, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"{function}: format must be one of {', '.join(FORMATS)}, got {format!r}")


def results_name(format: str) -> str:
    return f"poses.{format}"


def _entry(result: LiftedImage, picture: str | None) -> dict[str, Any]:
    return {
        "image": str(result.image),
        "picture": picture,
        "pose_2d": result.pose_2d.tolist(),
        "box": result.box.tolist(),
        "pose_3d": result.pose_3d.tolist(),
        "coarse_pose_3d": None if result.coarse_pose_3d is None else result.coarse_pose_3d.tolist(),
        "kept_patches": None if result.index is None else len(result.index),
        "patches": None if result.importance is None else len(result.importance),
        "crop_matrix": result.crop_matrix.tolist(),
    }


def _arrays(results: Sequence[LiftedImage], pictures: Sequence[str | None]) -> dict[str, np.ndarray]:
    shapes = {"pose_2d": (17, 2), "box": (4,), "crop_matrix": (2, 3), "pose_3d": (17, 3), "coarse_pose_3d": (17, 3)}
    counts = {"kept_patches": "index", "patches": "importance"}
    arrays = {name: np.array(value) for name, value in HEAD.items()}
    arrays["image"] = np.array([str(result.image) for result in results], dtype=str)
    arrays["picture"] = np.array([name or "" for name in pictures], dtype=str)
    for name, shape in shapes.items():
        values = [getattr(result, name) for result in results]
        if not any(value is None for value in values):
            arrays[name] = np.array(values).reshape(-1, *shape)  # [0, …] too, of no images
    for name, source in counts.items():
        values = [getattr(result, source) for result in results]
        if not any(value is None for value in values):
            arrays[name] = np.array([len(value) for value in values], dtype=np.int64)
    return arrays


def picture_names(results: Sequence[LiftedImage], out_dir: Path) -> list[str]:
    """How `write_results` names the picture of each."""
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
