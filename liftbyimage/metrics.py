"""Pose errors and background attention. Poses are [..., J, 3] in metres, and errors come out in metres.

Half-precision poses are measured in float32, float64 stays float64. ``reduction="mean"`` gives one scalar,
``reduction="none"`` one value per pose [...].
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "none"]

AUC_THRESHOLDS = tuple(step * 5 / 1000 for step in range(31))  # metres: 0, 5, …, 150 mm


def _poses(function: str, predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    for name, pose in (("predicted", predicted), ("target", target)):
        if not isinstance(pose, Tensor) or not pose.is_floating_point():
            got = pose.dtype if isinstance(pose, Tensor) else type(pose).__name__
            raise TypeError(f"{function}: {name} must be a floating tensor, got {got}")
        if pose.ndim < 2 or pose.shape[-1] != 3 or pose.shape[-2] == 0:
            raise ValueError(f"{function}: {name} must be [..., J, 3], got {list(pose.shape)}")
    if predicted.shape != target.shape:
        raise ValueError(
            f"{function}: target must have the shape of predicted, {list(predicted.shape)}, got {list(target.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(predicted.dtype, target.dtype), torch.float32)
    return predicted.to(dtype), target.to(dtype)


def _reduce(function: str, per_pose: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f"{function}: reduction must be 'mean' or 'none', got {reduction!r}")
    return per_pose.mean() if reduction == "mean" else per_pose


def _joint_errors(predicted: Tensor, target: Tensor) -> Tensor:
    return torch.linalg.vector_norm(predicted - target, dim=-1)  # [..., J]


def root_relative(pose: Tensor, root: int = 0) -> Tensor:
    """Subtract the root joint from a pose [..., J, 3] (the root alignment of protocol 1)."""
    return pose - pose[..., root : root + 1, :]


def mpjpe(predicted: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Mean per-joint position error, protocol 1: the mean Euclidean distance of joints.

    No alignment is made: pass root-relative poses (``root_relative``). Differentiable; the gradient of a
    joint with zero error is zero.

    Args:
        predicted, target: [..., J, 3], metres.
        reduction: ``"mean"`` or ``"none"``.

    Returns:
        Metres, scalar or [...].
    """
    predicted, target = _poses("mpjpe", predicted, target)
    return _reduce("mpjpe", _joint_errors(predicted, target).mean(dim=-1), reduction)


def p_mpjpe(predicted: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """MPJPE after the best similarity transform (rotation, scale, translation; no reflection), protocol 2.

    The transform minimises squared distances (orthogonal Procrustes; Umeyama, 1991), and the remaining
    distances are averaged. Differentiable except where the cross-covariance has repeated or zero singular
    values, as it does for planar poses. A prediction whose joints all coincide is placed at the target's
    centre.

    Args, returns: as ``mpjpe``.
    """
    predicted, target = _poses("p_mpjpe", predicted, target)
    predicted = predicted - predicted.mean(dim=-2, keepdim=True)
    target = target - target.mean(dim=-2, keepdim=True)
    covariance = target.mT @ predicted  # [..., 3, 3]
    # The decomposition refuses NaN; such a pose keeps its NaN through its own coordinates.
    finite = covariance.isfinite().all(dim=-1).all(dim=-1)[..., None, None]
    u, singular, vh = torch.linalg.svd(torch.where(finite, covariance, torch.zeros_like(covariance)))
    sign = torch.where(torch.linalg.det(u @ vh) < 0, -1.0, 1.0).to(singular.dtype)
    signs = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], dim=-1)  # [..., 3]
    rotation = (u * signs[..., None, :]) @ vh  # [..., 3, 3]
    energy = predicted.square().sum(dim=(-2, -1)).clamp_min(torch.finfo(predicted.dtype).tiny)
    scale = (singular * signs).sum(dim=-1) / energy  # [...]
    aligned = scale[..., None, None] * (predicted @ rotation.mT)
    return _reduce("p_mpjpe", _joint_errors(aligned, target).mean(dim=-1), reduction)


def n_mpjpe(predicted: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """MPJPE after the best scale of each predicted pose (H. Rhodin et al., CVPR 2018), about the origin.

    The scale is Σ predicted·target / Σ predicted². Differentiable. Args, returns: as ``mpjpe``.
    """
    predicted, target = _poses("n_mpjpe", predicted, target)
    energy = predicted.square().sum(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(predicted.dtype).tiny)
    scale = (predicted * target).sum(dim=(-2, -1), keepdim=True) / energy
    return _reduce("n_mpjpe", _joint_errors(scale * predicted, target).mean(dim=-1), reduction)


def pck(predicted: Tensor, target: Tensor, threshold: float = 0.150, reduction: Reduction = "mean") -> Tensor:
    """Share of joints, 0 … 1, whose error is below ``threshold`` metres (strict).

    A NaN joint counts as wrong. Not differentiable. Args, returns: as ``mpjpe``, but a share instead of
    metres.
    """
    predicted, target = _poses("pck", predicted, target)
    correct = (_joint_errors(predicted, target) < threshold).to(predicted.dtype)
    return _reduce("pck", correct.mean(dim=-1), reduction)


def auc(predicted: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Mean PCK, 0 … 1, over the 31 thresholds 0, 5, …, 150 mm (D. Mehta et al., 3DV 2017; strict <).

    The threshold 0 is never met, so a perfect pose has 30/31. Not differentiable. Args, returns: as ``pck``.
    """
    predicted, target = _poses("auc", predicted, target)
    errors = _joint_errors(predicted, target)[..., None]  # [..., J, 1]
    correct = (errors < errors.new_tensor(AUC_THRESHOLDS)).to(predicted.dtype)  # [..., J, 31]
    return _reduce("auc", correct.mean(dim=(-2, -1)), reduction)


def background_attention(
    importance: Tensor, mask: Tensor, grid: tuple[int, int], reduction: Reduction = "mean"
) -> Tensor:
    """Share of attention, 0 … 1, that falls outside the person's mask.

    A mask finer than the grid is averaged over each patch, so a patch half covered counts half.
    Differentiable in ``importance``. A sample whose importance sums to 0 gives NaN.

    Args:
        importance: [B, P], not negative; P = Hf·Wf patches, row major. It need not sum to 1.
        mask: bool, True on the person: [B, H, W] in crop pixels, or [B, Hf, Wf]. A floating mask is taken
            as coverage, 0 … 1.
        grid: (Hf, Wf).
        reduction: ``"mean"`` or ``"none"``.

    Returns:
        Scalar or [B].
    """
    height, width = grid
    if importance.ndim != 2 or importance.shape[1] != height * width:
        raise ValueError(
            f"background_attention: importance must be [B, {height * width}] for grid {height}×{width}, "
            f"got {list(importance.shape)}"
        )
    batch = importance.shape[0]
    if mask.ndim != 3 or mask.shape[0] != batch or mask.shape[1] < height or mask.shape[2] < width:
        raise ValueError(
            f"background_attention: mask must be [{batch}, H, W] with H ≥ {height} and W ≥ {width}, "
            f"got {list(mask.shape)}"
        )
    importance = importance.to(torch.promote_types(importance.dtype, torch.float32))
    coverage = F.adaptive_avg_pool2d(mask.to(importance)[:, None], grid).flatten(1)  # [B, P]
    outside = (importance * (1 - coverage)).sum(dim=1)
    return _reduce("background_attention", outside / importance.sum(dim=1), reduction)


def hull_mask(
    keypoints_px: Tensor | np.ndarray,
    size: tuple[int, int] = (256, 192),
    box_height: float | None = None,
    dilation: float = 0.10,
) -> Tensor:
    """A stand-in for a person's mask: the convex hull of the 2D joints, dilated.

    A pixel belongs to it if its centre lies within ``dilation · box_height`` px of the hull.

    Args:
        keypoints_px: [J, 2], crop px, pixel centres at whole numbers.
        size: (height, width) of the mask, px.
        box_height: height of the person's box, px; by default the vertical extent of the joints.
        dilation: share of the box height.

    Returns:
        bool [height, width] on the CPU.
    """
    points = torch.as_tensor(keypoints_px).detach().cpu().float().numpy()
    if points.ndim != 2 or points.shape[1] != 2 or points.shape[0] == 0:
        raise ValueError(f"hull_mask: keypoints_px must be [J, 2], got {list(points.shape)}")
    if not np.isfinite(points).all():
        raise ValueError("hull_mask: keypoints_px must be finite, got NaN or infinity")
    radius = dilation * (np.ptp(points[:, 1]) if box_height is None else box_height)
    import cv2  # heavy, and wanted here alone: models import this module

    corners = cv2.convexHull(points)[:, 0].astype(np.float64)  # [N, 2], in order around the hull
    return torch.from_numpy(_within(corners, radius, size))


_BLOCK = 8  # px


def _within(corners: np.ndarray, radius: float, size: tuple[int, int]) -> np.ndarray:
    """Which pixels of a mask lie in a hull or within `radius` of it, bool [height, width].

    The distance to the hull changes by no more than the way one goes, so that most blocks of pixels lie inside or
    outside as their centre does, with room to spare; the pixels of the others are looked at one by one.
    """
    rows, columns = (-(-side // _BLOCK) for side in size)
    centre, half_diagonal = (_BLOCK - 1) / 2, (_BLOCK - 1) / 2**0.5
    y, x = (axis.ravel() * _BLOCK + centre for axis in np.mgrid[:rows, :columns])  # [blocks]
    inside, distance = _to_hull(corners, x, y)
    beyond = np.where(inside, -distance, distance) - max(radius, 0.0)
    decided = np.abs(beyond) > half_diagonal + 0.1  # a tenth of a pixel for rounding
    mask = np.kron((beyond <= 0).reshape(rows, columns), np.ones((_BLOCK, _BLOCK), dtype=bool))[: size[0], : size[1]]
    open_ = np.kron(~decided.reshape(rows, columns), np.ones((_BLOCK, _BLOCK), dtype=bool))[: size[0], : size[1]]
    y, x = np.nonzero(open_)
    inside, distance = _to_hull(corners, x, y)
    mask[y, x] = inside | (distance <= radius)
    return mask


def _to_hull(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of points [M] in px, whether each lies in the hull of `corners` [N, 2], and its distance to the outline."""
    (corner_x, corner_y), (edge_x, edge_y) = corners.T[..., None], (np.roll(corners, -1, axis=0) - corners).T[..., None]
    length = np.maximum(edge_x**2 + edge_y**2, np.finfo(np.float64).tiny)  # [N, 1], squared
    to_x, to_y = x - corner_x, y - corner_y  # [N, M]
    along = np.clip((to_x * edge_x + to_y * edge_y) / length, 0.0, 1.0)
    distance = np.sqrt(((to_x - along * edge_x) ** 2 + (to_y - along * edge_y) ** 2).min(axis=0))  # [M]
    side = edge_x * to_y - edge_y * to_x  # [N, M]
    inside = ((side >= 0).all(axis=0) | (side <= 0).all(axis=0)) & (len(corners) > 2)
    return inside, distance
