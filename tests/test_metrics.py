from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from liftbyimage.metrics import (
    auc,
    background_attention,
    hull_mask,
    mpjpe,
    n_mpjpe,
    p_mpjpe,
    pck,
    root_relative,
)

Metric = Callable[..., Tensor]
POSE_METRICS = [mpjpe, p_mpjpe, n_mpjpe, pck, auc]


def _poses(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = 0.4 * torch.randn(*shape, 3, generator=generator, dtype=dtype)
    return target + 0.08 * torch.randn(*shape, 3, generator=generator, dtype=dtype), target


def _offset(target: Tensor, millimetres: list[float]) -> Tensor:
    """Move joint j by the j-th distance along some axis."""
    moved = target.clone()
    for joint, distance in enumerate(millimetres):
        moved[..., joint, joint % 3] += distance / 1000
    return moved


def test_mpjpe_of_known_distances() -> None:
    target = torch.zeros(2, 4, 3, dtype=torch.float64)
    predicted = _offset(target, [10, 20, 30, 100])
    predicted[1] = 0.0
    torch.testing.assert_close(mpjpe(predicted, target, "none"), torch.tensor([0.040, 0.0], dtype=torch.float64))
    torch.testing.assert_close(mpjpe(predicted, target), torch.tensor(0.020, dtype=torch.float64))


def test_mpjpe_gradient_is_finite_where_a_joint_is_exact() -> None:
    predicted, target = _poses(2, 5)
    predicted[0, 0] = target[0, 0]
    predicted.requires_grad_()
    mpjpe(predicted, target).backward()
    assert predicted.grad is not None and predicted.grad.isfinite().all()
    assert not predicted.grad[0, 0].any() and predicted.grad[0, 1].any()


def test_p_mpjpe_ignores_every_similarity_transform() -> None:
    _, target = _poses(6, 17)
    rotations = torch.from_numpy(Rotation.random(6, rng=np.random.default_rng(0)).as_matrix())
    predicted = 1.7 * target @ rotations.mT + torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64)
    assert mpjpe(predicted, target, "none").min() > 0.5
    assert p_mpjpe(predicted, target, "none").max() < 1e-12


def test_p_mpjpe_does_not_reflect() -> None:
    _, target = _poses(6, 17)
    mirrored = target * torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
    assert p_mpjpe(mirrored, target, "none").min() > 0.05


@pytest.mark.parametrize("mirrored", [False, True])
def test_p_mpjpe_equals_scipy(mirrored: bool) -> None:
    predicted, target = _poses(8, 17, seed=3)
    if mirrored:
        predicted = predicted * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    expected = []
    for p, t in zip(predicted.numpy(), target.numpy(), strict=True):
        p, t = p - p.mean(0), t - t.mean(0)
        rotation, _ = Rotation.align_vectors(t, p)
        turned = rotation.apply(p)
        scale = (turned * t).sum() / (turned**2).sum()
        expected.append(np.linalg.norm(scale * turned - t, axis=-1).mean())
    np.testing.assert_allclose(p_mpjpe(predicted, target, "none").numpy(), expected, rtol=1e-10)


def test_p_mpjpe_of_coinciding_joints_and_of_nan() -> None:
    _, target = _poses(3, 17)
    predicted = torch.zeros_like(target)
    predicted[1] = target[1]
    predicted[2, 4] = torch.nan
    errors = p_mpjpe(predicted, target, "none")
    spread = (target[0] - target[0].mean(dim=0)).norm(dim=-1).mean()
    torch.testing.assert_close(errors[0], spread)
    assert errors[1] < 1e-12 and errors[2].isnan()


def test_n_mpjpe_finds_the_best_scale() -> None:
    predicted, target = _poses(4, 17)
    assert n_mpjpe(0.3 * target, target).item() < 1e-12
    torch.testing.assert_close(n_mpjpe(5.0 * predicted, target, "none"), n_mpjpe(predicted, target, "none"))
    p, t = predicted[0].numpy(), target[0].numpy()
    scale = np.linalg.lstsq(p.reshape(-1, 1), t.reshape(-1), rcond=None)[0][0]
    expected = np.linalg.norm(scale * p - t, axis=-1).mean()
    np.testing.assert_allclose(n_mpjpe(predicted, target, "none")[0].item(), expected, rtol=1e-12)


@pytest.mark.parametrize("metric", [mpjpe, p_mpjpe, n_mpjpe])
def test_gradients(metric: Metric) -> None:
    predicted, target = _poses(2, 6, seed=5)
    assert torch.autograd.gradcheck(
        lambda p, t: metric(p, t, "none"), (predicted.requires_grad_(), target.requires_grad_())
    )


def test_pck_is_strict() -> None:
    target = torch.zeros(4, 3)
    predicted = _offset(target, [0, 149.9, 150, 150.1])
    assert pck(predicted, target).item() == 0.5
    assert pck(predicted, target, threshold=0.1501).item() == 1.0 - 0.25
    assert pck(predicted, target, threshold=0.0).item() == 0.0


def test_auc_counts_thresholds_strictly_above_the_error() -> None:
    target = torch.zeros(1, 1, 3, dtype=torch.float64)
    for millimetres, thresholds_met in ((0, 30), (5, 29), (5.1, 29), (4.9, 30), (75, 15), (149, 1), (150, 0)):
        predicted = _offset(target, [millimetres])
        assert auc(predicted, target).item() == pytest.approx(thresholds_met / 31, abs=1e-15)


def test_auc_is_the_mean_of_pck() -> None:
    predicted, target = _poses(7, 17)
    curve = [pck(predicted, target, threshold=step / 200) for step in range(31)]
    torch.testing.assert_close(auc(predicted, target), torch.stack(curve).mean())


@pytest.mark.parametrize("metric", POSE_METRICS)
def test_reductions_and_leading_dimensions(metric: Metric) -> None:
    predicted, target = _poses(2, 3, 17, dtype=torch.float32)
    each = metric(predicted, target, reduction="none")
    assert each.shape == (2, 3) and each.dtype == torch.float32
    torch.testing.assert_close(metric(predicted, target), each.mean())
    torch.testing.assert_close(metric(predicted[1, 2], target[1, 2]), each[1, 2])
    assert metric(predicted.double(), target.double()).dtype == torch.float64
    assert metric(predicted.bfloat16(), target.bfloat16()).dtype == torch.float32
    assert metric(predicted[:0], target[:0], reduction="none").shape == (0, 3)


def test_root_relative_moves_the_root_to_the_origin() -> None:
    predicted, _ = _poses(2, 17)
    moved = root_relative(predicted)
    assert not moved[:, 0].any()
    torch.testing.assert_close(moved[:, 5], predicted[:, 5] - predicted[:, 0])


def test_background_attention_of_masks_at_both_resolutions() -> None:
    importance = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 1.0, 0.0, 2.0]])
    coarse = torch.tensor([[[True, False], [False, True]], [[False, False], [True, False]]])
    expected = torch.tensor([0.5, 1.0])
    torch.testing.assert_close(background_attention(importance, coarse, (2, 2), "none"), expected)
    fine = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(background_attention(importance, fine, (2, 2), "none"), expected)
    torch.testing.assert_close(background_attention(importance, fine, (2, 2)), expected.mean())


def test_background_attention_weighs_patches_by_coverage() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :, :2] = True  # half of each left patch
    importance = torch.tensor([[3.0, 1.0, 3.0, 1.0]])
    torch.testing.assert_close(background_attention(importance, mask, (2, 2)), torch.tensor(5.0 / 8.0))


def test_hull_mask_of_a_square_grows_by_a_share_of_the_box_height() -> None:
    square = np.array([[50.0, 60.0], [90.0, 60.0], [90.0, 100.0], [50.0, 100.0], [70.0, 80.0]])
    plain = hull_mask(square, dilation=0.0)
    expected = torch.zeros(256, 192, dtype=torch.bool)
    expected[60:101, 50:91] = True
    assert torch.equal(plain, expected)
    dilated = hull_mask(torch.from_numpy(square), box_height=200)  # 20 px
    assert dilated[80, 30] and not dilated[80, 29] and dilated[120, 70] and not dilated[121, 70]
    assert dilated[60 - 14, 50 - 14] and not dilated[60 - 15, 50 - 15]  # rounded corners
    assert torch.equal(hull_mask(square), hull_mask(square, box_height=40))


def test_hull_mask_equals_opencv_distance() -> None:
    points = np.random.default_rng(0).uniform([10, 10], [50, 60], size=(17, 2)).astype(np.float32)
    hull = cv2.convexHull(points)
    expected = np.array([[cv2.pointPolygonTest(hull, (x, y), True) >= -5.0 for x in range(64)] for y in range(70)])
    assert 500 < expected.sum() < expected.size
    np.testing.assert_array_equal(hull_mask(points, (70, 64), box_height=50).numpy(), expected)


def _hull_by_definition(points: np.ndarray, size: tuple[int, int], radius: float) -> np.ndarray:
    """The distance of every pixel to every edge of the hull, with no block of pixels taken together."""
    corners = cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64)  # [N, 2]
    edges = np.roll(corners, -1, axis=0) - corners
    offset = np.stack(np.mgrid[: size[0], : size[1]][::-1], axis=-1)[:, :, None] - corners  # [H, W, N, 2]
    length = np.maximum((edges**2).sum(axis=-1), np.finfo(np.float64).tiny)
    along = np.clip((offset * edges).sum(axis=-1) / length, 0, 1)
    distance = np.linalg.norm(offset - along[..., None] * edges, axis=-1).min(axis=-1)
    side = edges[:, 0] * offset[..., 1] - edges[:, 1] * offset[..., 0]
    inside = len(corners) > 2 and ((side >= 0).all(axis=-1) | (side <= 0).all(axis=-1))
    return inside | (distance <= radius)


@pytest.mark.parametrize("size", [(256, 192), (64, 48), (70, 61), (5, 9), (1, 1)])
def test_hull_mask_equals_its_definition_pixel_by_pixel(size: tuple[int, int]) -> None:
    random = np.random.default_rng(sum(size))
    seen = set()
    for joints, spread, whole in ((1, 0.3, True), (2, 0.3, False), (3, 1.0, True), (17, 0.1, True), (17, 0.6, False)):
        points = (0.5 + spread * random.normal(size=(joints, 2))) * size[::-1]
        points = np.round(points) if whole else points  # whole pixels lie on edges exactly
        for radius in (0.0, 1.0, 7.3):
            expected = _hull_by_definition(points, size, radius)
            ours = hull_mask(points, size, box_height=radius, dilation=1.0)
            np.testing.assert_array_equal(ours.numpy(), expected)
            seen |= set(expected.ravel())
    assert seen == {True, False} or size == (1, 1)


def test_hull_mask_of_joints_on_a_line_and_at_a_point() -> None:
    line = hull_mask(np.array([[10.0, 20.0], [30.0, 20.0], [20.0, 20.0]]), (40, 40), box_height=20)
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[18:23, 10:31] = True
    assert torch.equal(line[:, 10:31], expected[:, 10:31]) and line[20, 8] and not line[20, 7]
    point = hull_mask(np.full((17, 2), 12.0), (40, 40), box_height=10)
    assert point.sum() == 5


def test_bad_input_says_what_came() -> None:
    pose = torch.zeros(2, 17, 3)
    cases = {
        "mpjpe: predicted must be [..., J, 3], got [2, 17, 2]": lambda: mpjpe(pose[..., :2], pose),
        "p_mpjpe: target must have the shape of predicted, [2, 17, 3], got [1, 17, 3]": lambda: p_mpjpe(pose, pose[:1]),
        "n_mpjpe: reduction must be 'mean' or 'none', got 'sum'": lambda: n_mpjpe(pose, pose, "sum"),
        "pck: target must be [..., J, 3], got [3]": lambda: pck(pose, torch.zeros(3)),
        "background_attention: importance must be [B, 6] for grid 2×3, got [2, 5]": lambda: background_attention(
            torch.ones(2, 5), torch.ones(2, 2, 3), (2, 3)
        ),
        "background_attention: mask must be [2, H, W] with H ≥ 2 and W ≥ 3, got [2, 1, 3]": lambda: (
            background_attention(torch.ones(2, 6), torch.ones(2, 1, 3), (2, 3))
        ),
        "hull_mask: keypoints_px must be [J, 2], got [17, 3]": lambda: hull_mask(np.zeros((17, 3))),
        "hull_mask: keypoints_px must be finite, got NaN or infinity": lambda: hull_mask(np.full((17, 2), np.nan)),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message
    with pytest.raises(TypeError) as error:
        auc(pose.long(), pose)
    assert str(error.value) == "auc: predicted must be a floating tensor, got torch.int64"
