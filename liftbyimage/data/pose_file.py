"""JSON files with 2D poses for a person's own pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liftbyimage._files import check_several, require_file
from liftbyimage.data.skeleton import COCO_NAMES, JOINT_NAMES, coco_to_h36m

EVERY_IMAGE = "*"
BOX_MARGIN = 0.10
SMALLEST_PERSON = 8.0  # px
FIELDS = {"keypoints", "order", "box"}


@dataclass(frozen=True, eq=False)
class ImagePose:
    """The 2D pose of the person in one image.

    Attributes:
        keypoints: float64 [17, 2], Human3.6M order, px of the full image.
        confidence: float64 [17], or None if the file gives none.
        box: float64 [4], x0, y0, x1, y1 px.
    """

    keypoints: np.ndarray
    confidence: np.ndarray | None
    box: np.ndarray


def read_pose_file(path: str | Path, images: Iterable[str | Path] | None = None) -> dict[str, ImagePose]:
    """Read 2D poses, one person per image.

    The file maps image file names to entries, or is one entry that holds for every image::

        {"a.jpg": {"keypoints": [[x, y], …], "order": "h36m", "box": [x0, y0, x1, y1]}, …}

    ``keypoints`` are 17 points [x, y] or [x, y, confidence] in px of the full image; ``order`` is ``"h36m"``
    (default) or ``"coco"``; ``box`` is optional: by default the joints' bounding box (those of confidence 0
    left out) with a margin of 10 % of its longer side on every side.

    Args:
        path: the JSON file.
        images: the images that need a pose, found by path as written, then by file name.

    Returns:
        With ``images``, one pose per image, by ``str(image)``. Without, the file's entries by name; the
        single entry of a whole file is named ``"*"``.

    Raises:
        TypeError: `images` is one file.
        ValueError: one sentence on what is wrong with the file, or an image without an entry.
    """
    check_several("read_pose_file", images)
    data = _read_json(path)
    if "keypoints" in data:
        poses = {EVERY_IMAGE: _parse_entry(f"pose file {path}: the pose", data)}
    else:
        poses = {name: _parse_entry(f"pose file {path}: '{name}'", entry) for name, entry in data.items()}
    if images is None:
        return poses
    found = {str(image): _find(path, poses, image) for image in images}
    _refuse_shared_entries(path, found)
    return {image: poses[name] for image, name in found.items()}


def joints_box(keypoints: np.ndarray) -> np.ndarray:
    """The box of a person of whom only joints [N, 2] are known: their extent, and 10 % of its longer side all round.

    Returns:
        [4], x0, y0, x1, y1 in the joints' unit.
    """
    low, high = keypoints.min(axis=0), keypoints.max(axis=0)
    margin = BOX_MARGIN * (high - low).max()
    return np.concatenate([low - margin, high + margin])


def check_pixels(path: str | Path, pose: ImagePose, image: np.ndarray) -> None:
    """Refuse a pose that cannot be pixels of the picture [H, W, 3], read from `path`.

    Raises:
        ValueError: no keypoint lies inside the picture, or all of them in a few of its pixels.
    """
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


def _read_json(path: str | Path) -> dict[str, Any]:
    require_file(f"pose file {path}", Path(path))
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"pose file {path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"pose file {path}: expected an object by image file name, got {_kind(data)}")
    return data


def _find(path: str | Path, poses: dict[str, ImagePose], image: str | Path) -> str:
    """The name of an image's entry."""
    file = Path(image)  # of "./a.jpg" it makes "a.jpg"
    for name in (str(image), str(file), file.name, EVERY_IMAGE):
        if name in poses:
            return name
    raise ValueError(f"pose file {path}: no entry for image '{file.name}'")


def _refuse_shared_entries(path: str | Path, found: dict[str, str]) -> None:
    """Pictures of one file name in several folders must not silently get one pose."""
    first: dict[str, str] = {}
    for image, name in found.items():
        if name != EVERY_IMAGE and first.setdefault(name, image) != image:
            raise ValueError(
                f"pose file {path}: {first[name]} and {image} share entry '{name}', expected one each, named by path"
            )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def _parse_entry(label: str, entry: Any) -> ImagePose:
    if not isinstance(entry, dict):
        raise ValueError(f'{label} must be an object with "keypoints", got {_kind(entry)}')
    if "keypoints" not in entry:
        raise ValueError(f'{label} has no "keypoints"')
    unknown = sorted(set(entry) - FIELDS)
    if unknown:
        raise ValueError(f'{label} has unknown "{unknown[0]}", expected "keypoints", "order" and "box"')
    order = entry.get("order", "h36m")
    if order not in ("h36m", "coco"):
        raise ValueError(f'{label} has order {json.dumps(order)}, expected "h36m" or "coco"')
    names = COCO_NAMES if order == "coco" else JOINT_NAMES
    keypoints = _parse_keypoints(label, entry["keypoints"], names)
    if order == "coco":
        keypoints = coco_to_h36m(keypoints)
    confidence = keypoints[:, 2] if keypoints.shape[1] == 3 else None
    keypoints = keypoints[:, :2]
    if entry.get("box") is not None:
        box = _parse_box(label, entry["box"])
    else:
        box = _default_box(label, keypoints if confidence is None else keypoints[confidence > 0])
    return ImagePose(keypoints, confidence, box)


def _parse_keypoints(label: str, keypoints: Any, names: tuple[str, ...]) -> np.ndarray:
    if not isinstance(keypoints, list):
        raise ValueError(f"{label} has keypoints that are {_kind(keypoints)}, expected a list of 17 points")
    if len(keypoints) != len(names):
        raise ValueError(f"{label} has {len(keypoints)} keypoints, expected {len(names)}")
    for index, (name, point) in enumerate(zip(names, keypoints, strict=True)):
        if not (isinstance(point, list) and len(point) in (2, 3) and all(map(_is_number, point))):
            raise ValueError(f"{label} keypoint {index} ({name}) must be [x, y] or [x, y, confidence]")
        if len(point) != len(keypoints[0]):
            raise ValueError(f"{label} has some keypoints with a confidence and some without")
        if not all(map(_is_finite, point)):
            raise ValueError(f"{label} keypoint {index} ({name}) is not finite")
    return np.array(keypoints, dtype=np.float64)  # [17, 2 or 3]


def _parse_box(label: str, box: Any) -> np.ndarray:
    numbers = isinstance(box, list) and len(box) == 4 and all(_is_number(v) and _is_finite(v) for v in box)
    if not (numbers and box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"{label} has box {json.dumps(box)}, expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return np.array(box, dtype=np.float64)


def _default_box(label: str, keypoints: np.ndarray) -> np.ndarray:
    if not len(keypoints):
        raise ValueError(f'{label} needs a "box": the confidence of every keypoint is 0')
    if not np.ptp(keypoints, axis=0).max() > 0:
        raise ValueError(f'{label} needs a "box": its keypoints span no area to derive one from')
    return joints_box(keypoints)
