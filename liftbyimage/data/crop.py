"""Person crops: box to affine, keypoints with it, mirroring, and image normalisation.

Pixel coordinates put (0, 0) at the centre of the first pixel, as OpenCV's warps do; an image of width W thus
spans −0.5 … W − 0.5. Normalised coordinates span that full width and height: −1 is the left (top) edge of the
first pixel and 1 the right (bottom) edge of the last, so that a mirrored image negates x exactly and the
values serve ``torch.nn.functional.grid_sample(..., align_corners=False)`` unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from liftbyimage.data.skeleton import FLIP_PERMUTATION

CROP_SIZE = (256, 192)  # height, width

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def _row(values: Sequence[float], like: Array) -> Array:
    """A row of constants of the kind, dtype and device of ``like``."""
    if isinstance(like, torch.Tensor):
        return like.new_tensor(values)
    return np.asarray(values, dtype=like.dtype)


def _floating(values: Array, function: str, name: str, last: Sequence[int], joints: int | None = None) -> Array:
    shape = list(values.shape)
    expected = ([joints] if joints else []) + [" or ".join(map(str, last))]
    fits = len(shape) >= len(expected) and shape[-1] in last and (joints is None or shape[-2] == joints)
    if not fits:
        raise ValueError(f"{function}: {name} must be [..., {', '.join(map(str, expected))}], got {shape}")
    if isinstance(values, torch.Tensor):
        return values if values.is_floating_point() else values.to(torch.get_default_dtype())
    return values if np.issubdtype(values.dtype, np.floating) else values.astype(np.float64)


def crop_size(size: Sequence[int] | str) -> tuple[int, int]:
    """(height, width) in px of two integers, or of text such as "256x192".

    Raises:
        ValueError: for anything else, and for a side of less than 8 px.
    """
    sides = [int(side) if side.isdecimal() else 0 for side in size.split("x")] if isinstance(size, str) else size
    if (
        not isinstance(sides, Sequence)
        or len(sides) != 2
        or not all(isinstance(side, (int, np.integer)) and side >= 8 for side in sides)
    ):
        raise ValueError(f"size: expected (height, width), each an integer of at least 8, got {size!r}")
    return int(sides[0]), int(sides[1])


def box_to_crop_matrix(box: ArrayLike, size: tuple[int, int] = CROP_SIZE, padding: float = 1.25) -> np.ndarray:
    """The affine map from full-image pixels to crop pixels.

    The box is enlarged about its centre, first to the crop's aspect, then by ``padding``; its centre lands on
    the crop's centre ((W − 1)/2, (H − 1)/2).

    Args:
        box: [..., 4], x0, y0, x1, y1 in px.
        size: crop (height, width) in px.
        padding: factor on the box, more than 0.

    Returns:
        float64 [..., 2, 3] with ``crop px = M @ [x, y, 1]``.
    """
    box = np.asarray(box, dtype=np.float64)
    if box.ndim < 1 or box.shape[-1] != 4:
        raise ValueError(f"box_to_crop_matrix: box must be [..., 4] (x0, y0, x1, y1), got {list(box.shape)}")
    extent = box[..., 2:] - box[..., :2]  # [..., 2] width, height
    if not (np.isfinite(box).all() and (extent > 0).all()):
        raise ValueError(f"box_to_crop_matrix: box must be finite with x0 < x1 and y0 < y1, got {box.tolist()}")
    if not padding > 0:
        raise ValueError(f"box_to_crop_matrix: padding must be more than 0, got {padding}")
    crop_extent = np.array([size[1], size[0]], dtype=np.float64)
    scale = (crop_extent / (padding * extent)).min(axis=-1)  # [...]
    centre = (box[..., :2] + box[..., 2:]) / 2
    matrix = np.zeros((*box.shape[:-1], 2, 3))
    matrix[..., 0, 0] = matrix[..., 1, 1] = scale
    matrix[..., 2] = (crop_extent - 1) / 2 - scale[..., None] * centre
    return matrix


def apply_affine(matrix: ArrayLike, points: ArrayLike) -> np.ndarray:
    """Map points [..., 2] by a matrix [2, 3], or points [..., N, 2] by matrices [..., 2, 3]; float64."""
    matrix, points = _affine(matrix, "apply_affine"), np.asarray(points, dtype=np.float64)
    if points.ndim < 1 or points.shape[-1] != 2:
        raise ValueError(f"apply_affine: points must be [..., 2], got {list(points.shape)}")
    offset = matrix[..., 2] if matrix.ndim == 2 else matrix[..., None, :, 2]
    return points @ np.swapaxes(matrix[..., :2], -1, -2) + offset


def invert_affine(matrix: ArrayLike) -> np.ndarray:
    """The inverse [..., 2, 3] of an affine map [..., 2, 3]; float64."""
    matrix = _affine(matrix, "invert_affine")
    inverse = np.linalg.inv(matrix[..., :2])
    return np.concatenate([inverse, -inverse @ matrix[..., 2:]], axis=-1)


def _affine(matrix: ArrayLike, function: str) -> np.ndarray:
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape[-2:] != (2, 3):
        raise ValueError(f"{function}: matrix must be [..., 2, 3], got {list(matrix.shape)}")
    return matrix


def warp_crop(image: np.ndarray, matrix: ArrayLike, size: tuple[int, int] = CROP_SIZE) -> np.ndarray:
    """Cut a crop out of an image, bilinear, black outside the image.

    Args:
        image: uint8 [H, W, 3].
        matrix: [2, 3], image px to crop px (``box_to_crop_matrix``).
        size: crop (height, width) in px.

    Returns:
        uint8 [height, width, 3].
    """
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(f"warp_crop: image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    import cv2  # where a picture is cut: models need this file's formulas alone

    matrix = _affine(matrix, "warp_crop")
    return cv2.warpAffine(image, matrix, (size[1], size[0]), flags=cv2.INTER_LINEAR)


def normalise_keypoints(crop_px: Array, size: tuple[int, int] = CROP_SIZE) -> Array:
    """Crop pixels to [-1, 1]: ``2 (x + 0.5) / width − 1``, ``2 (y + 0.5) / height − 1``.

    Args:
        crop_px: array or tensor [..., 2], px; keypoints outside the crop go beyond ±1.
        size: crop (height, width) in px.

    Returns:
        The same kind and shape, differentiable for tensors.
    """
    crop_px = _floating(crop_px, "normalise_keypoints", "crop_px", (2,))
    return (crop_px + 0.5) * _row((2 / size[1], 2 / size[0]), crop_px) - 1


def denormalise_keypoints(keypoints: Array, size: tuple[int, int] = CROP_SIZE) -> Array:
    """The inverse of ``normalise_keypoints``: [-1, 1] to crop pixels, array or tensor [..., 2]."""
    keypoints = _floating(keypoints, "denormalise_keypoints", "keypoints", (2,))
    return (keypoints + 1) * _row((size[1] / 2, size[0] / 2), keypoints) - 0.5


def normalised_pose(keypoints: np.ndarray, crop_matrix: ArrayLike, size: tuple[int, int] = CROP_SIZE) -> torch.Tensor:
    """Keypoints [N, J, 2] in px of pictures, which crop_matrix [N, 2, 3] maps to px of crops: float32, normalised."""
    return torch.from_numpy(normalise_keypoints(apply_affine(crop_matrix, keypoints), size)).float()


def flip_normalised(pose_2d: Array) -> Array:
    """Normalised keypoints [..., 17, 2] of the mirrored crop: negate x, exchange left and right joints."""
    pose_2d = _floating(pose_2d, "flip_normalised", "pose_2d", (2,), joints=17)
    return pose_2d[..., list(FLIP_PERMUTATION), :] * _row((-1, 1), pose_2d)


def flip_crop(image: np.ndarray) -> np.ndarray:
    """Mirror images [..., H, W, 3] left to right (contiguous copy)."""
    return np.ascontiguousarray(image[..., ::-1, :])


def flip_keypoints(crop_px: Array, width: int = CROP_SIZE[1]) -> Array:
    """Keypoints of the mirrored crop: x becomes ``width − 1 − x``, left and right joints change places.

    Args:
        crop_px: array or tensor [..., 17, 2], or [..., 17, 3] with confidence; Human3.6M order, px.
        width: crop width in px.
    """
    crop_px = _floating(crop_px, "flip_keypoints", "crop_px", (2, 3), joints=17)
    swapped = crop_px[..., list(FLIP_PERMUTATION), :]
    columns = crop_px.shape[-1]
    return swapped * _row((-1, 1, 1)[:columns], swapped) + _row((width - 1, 0, 0)[:columns], swapped)


def flip_pose(pose_3d: Array) -> Array:
    """Mirror a pose, array or tensor [..., 17, 3]: negate x, exchange left and right joints."""
    pose_3d = _floating(pose_3d, "flip_pose", "pose_3d", (3,), joints=17)
    return pose_3d[..., list(FLIP_PERMUTATION), :] * _row((-1, 1, 1), pose_3d)


def normalise_image(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    """RGB images to the input of an ImageNet-pretrained encoder: ``(image / 255 − mean) / std``.

    Args:
        image: uint8 [..., H, W, 3], RGB, array or tensor.

    Returns:
        float32 tensor [..., 3, H, W] on the tensor's device.
    """
    pixels = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(image))
    if pixels.dtype != torch.uint8 or pixels.ndim < 3 or pixels.shape[-1] != 3:
        raise ValueError(
            f"normalise_image: image must be uint8 [..., H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device)
    std = torch.tensor(IMAGENET_STD, device=pixels.device)
    return ((pixels.float() / 255 - mean) / std).movedim(-1, -3).contiguous()


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as RGB uint8 [H, W, 3], turned upright by its EXIF orientation.

    Raises:
        ValueError: if there is no such file, or if it is not an image that OpenCV can read.
    """
    if not Path(path).is_file():
        raise ValueError(f"image {path}: no such file")
    import cv2

    try:
        # From memory, since `cv2.imread` takes a JPEG file that is cut short and fills the rest with grey.
        image = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is None:
        raise ValueError(f"image {path}: not an image that OpenCV can read")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
