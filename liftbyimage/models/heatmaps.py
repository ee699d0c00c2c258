"""From the heatmaps of a 2D pose network to keypoints (K. Sun et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HEATMAP_STRIDE = 4


def decode_heatmaps(heatmaps: Tensor, crop_matrix: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Locate the peak of every heatmap to a quarter of a heatmap pixel.

    The highest pixel (the lowest row-major index among equals) moves by 0.25 along each axis towards its
    larger neighbour; along an axis where a neighbour is outside the map or NaN, or both are equal, it stays.
    Heatmap pixel u is crop pixel 4u, as in the official code. Unlike there, a low or negative peak is still
    located and a peak one pixel from the edge is still refined.

    Args:
        heatmaps: [B, J, H, W], floating point, H and W at least 1.
        crop_matrix: [B, 2, 3], affine from image to crop pixels; given, the keypoints are image pixels.

    Returns:
        keypoints [B, J, 2] (x, y) in crop pixels, or image pixels with `crop_matrix`, and scores [B, J] = the
        peak values; both float32 (float64 for float64). NaN pixels count as the lowest; a map of NaN only
        gives NaN. Only `scores` and `crop_matrix` are differentiable.

    Raises:
        TypeError, ValueError: wrong type, shape or device; a `crop_matrix` that cannot be inverted.
    """
    _check_heatmaps("decode_heatmaps", "heatmaps", heatmaps)
    if heatmaps.shape[2] == 0 or heatmaps.shape[3] == 0:
        raise ValueError(f"decode_heatmaps: heatmaps must have at least one pixel, got {list(heatmaps.shape)}")
    if crop_matrix is not None:
        _check_crop_matrix(crop_matrix, heatmaps)

    maps = heatmaps.to(torch.promote_types(heatmaps.dtype, torch.float32))
    width = maps.shape[3]
    comparable = maps.flatten(2).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    index = comparable.argmax(2)  # [B, J]
    x, y = index % width, index // width
    scores = maps.flatten(2).gather(2, index[..., None])[..., 0]  # [B, J]
    row = maps.gather(2, y[..., None, None].expand(-1, -1, 1, width))[:, :, 0]  # [B, J, W]
    column = maps.gather(3, x[..., None, None].expand(-1, -1, maps.shape[2], 1))[..., 0]  # [B, J, H]
    peak = torch.stack((x + _quarter_shift(row, x), y + _quarter_shift(column, y)), dim=2)  # [B, J, 2]
    # Every pixel was NaN: index 0 is no peak.
    peak = torch.where(maps.isnan().flatten(2).all(2)[..., None], torch.nan, peak)
    keypoints = HEATMAP_STRIDE * peak
    if crop_matrix is not None:
        keypoints = _invert_crop(keypoints, crop_matrix)
    return keypoints, scores


def flip_average(
    heatmaps: Tensor,
    flipped_heatmaps: Tensor,
    flip_permutation: Sequence[int] | Tensor,
    *,
    shift: bool = False,
) -> Tensor:
    """Average the heatmaps of images with those of the mirrored images (flip test).

    The second pass is mirrored back along the width, its left and right joints swapped, then averaged with
    the first.

    Args:
        heatmaps: [B, J, H, W] of the images, floating point.
        flipped_heatmaps: the same of the images mirrored left to right.
        flip_permutation: J indices that swap left and right joints, its own inverse: joint j of the result
            takes joint `flip_permutation[j]` of the mirrored pass.
        shift: move the mirrored-back maps one pixel to the right first (column 0 stays), because heatmap
            pixel u is crop pixel 4u and mirroring the crop is not exactly mirroring the map. The official
            evaluation does so.

    Returns:
        [B, J, H, W] in the input dtype, differentiable in both passes.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or device, or a permutation that is not its own
        inverse.
    """
    _check_heatmaps("flip_average", "heatmaps", heatmaps)
    _check_heatmaps("flip_average", "flipped_heatmaps", flipped_heatmaps)
    if flipped_heatmaps.shape != heatmaps.shape:
        raise ValueError(
            f"flip_average: flipped_heatmaps must have the shape of heatmaps {list(heatmaps.shape)}, "
            f"got {list(flipped_heatmaps.shape)}"
        )
    if flipped_heatmaps.dtype != heatmaps.dtype or flipped_heatmaps.device != heatmaps.device:
        raise TypeError(
            f"flip_average: flipped_heatmaps must be {heatmaps.dtype} on {heatmaps.device} like heatmaps, "
            f"got {flipped_heatmaps.dtype} on {flipped_heatmaps.device}"
        )
    permutation = _check_permutation(flip_permutation, heatmaps.shape[1])
    mirrored = flipped_heatmaps[:, permutation].flip(3)
    if shift:
        mirrored = torch.cat((mirrored[..., :1], mirrored[..., :-1]), dim=3)
    return (heatmaps + mirrored) * 0.5


def _quarter_shift(line: Tensor, index: Tensor) -> Tensor:
    """0.25 towards the larger neighbour of `index` [B, J] in `line` [B, J, N]; 0 if one is missing or NaN."""
    last = line.shape[2] - 1
    before = line.gather(2, (index - 1).clamp(min=0)[..., None])[..., 0]
    after = line.gather(2, (index + 1).clamp(max=last)[..., None])[..., 0]
    interior = (index > 0) & (index < last)
    return 0.25 * (interior * ((after > before).to(line.dtype) - (after < before).to(line.dtype)))


def _invert_crop(keypoints: Tensor, crop_matrix: Tensor) -> Tensor:
    # float64: a crop near an image border has a translation of thousands of pixels, cancelled here.
    matrix = crop_matrix.double()
    offset = keypoints.double() - matrix[:, None, :, 2]  # [B, J, 2]
    return torch.linalg.solve(matrix[:, :, :2], offset.mT).mT.to(keypoints.dtype)


def _check_heatmaps(op: str, name: str, heatmaps: Tensor) -> None:
    if not isinstance(heatmaps, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(heatmaps).__name__}")
    if not heatmaps.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {heatmaps.dtype}")
    if heatmaps.ndim != 4:
        raise ValueError(f"{op}: {name} must have shape [B, J, H, W], got {list(heatmaps.shape)}")


def _check_crop_matrix(crop_matrix: Tensor, heatmaps: Tensor) -> None:
    if not isinstance(crop_matrix, Tensor):
        raise TypeError(f"decode_heatmaps: crop_matrix must be a torch.Tensor, got {type(crop_matrix).__name__}")
    if not crop_matrix.is_floating_point():
        raise TypeError(f"decode_heatmaps: crop_matrix must be a floating-point tensor, got {crop_matrix.dtype}")
    expected = [heatmaps.shape[0], 2, 3]
    if list(crop_matrix.shape) != expected:
        raise ValueError(
            f"decode_heatmaps: crop_matrix must have shape [B, 2, 3] = {expected}, got {list(crop_matrix.shape)}"
        )
    if crop_matrix.device != heatmaps.device:
        raise ValueError(
            f"decode_heatmaps: crop_matrix must be on the heatmaps' device {heatmaps.device}, got {crop_matrix.device}"
        )
    determinant = torch.linalg.det(crop_matrix[:, :, :2].detach().double())
    singular = (determinant == 0).nonzero()
    if singular.numel():
        raise ValueError(f"decode_heatmaps: crop_matrix must be invertible, got a singular one at {int(singular[0])}")


def _check_permutation(flip_permutation: Sequence[int] | Tensor, joints: int) -> list[int]:
    values = torch.atleast_1d(torch.as_tensor(flip_permutation)).tolist()
    valid = (
        len(values) == joints
        and all(isinstance(value, int) and 0 <= value < joints for value in values)
        and all(values[value] == joint for joint, value in enumerate(values))
    )
    if not valid:
        raise ValueError(
            f"flip_average: flip_permutation must be {joints} joint indices that swap in pairs, got {values}"
        )
    return values
