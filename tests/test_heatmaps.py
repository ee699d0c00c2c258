from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from liftbyimage.models.heatmaps import decode_heatmaps, flip_average


def slow_decode(heatmap: list[list[float]]) -> tuple[float, float, float]:
    """x, y in crop pixels and score of one map, by the words of the contract."""
    height, width = len(heatmap), len(heatmap[0])
    best_x, best_y, best = 0, 0, -math.inf
    for y in range(height):
        for x in range(width):
            if heatmap[y][x] > best:
                best_x, best_y, best = x, y, heatmap[y][x]
    if all(math.isnan(value) for row in heatmap for value in row):
        return math.nan, math.nan, math.nan
    x, y = float(best_x), float(best_y)
    if 0 < best_x < width - 1:
        left, right = heatmap[best_y][best_x - 1], heatmap[best_y][best_x + 1]
        x += 0.25 if right > left else -0.25 if right < left else 0.0
    if 0 < best_y < height - 1:
        above, below = heatmap[best_y - 1][best_x], heatmap[best_y + 1][best_x]
        y += 0.25 if below > above else -0.25 if below < above else 0.0
    return 4 * x, 4 * y, best


def assert_equals_slow(heatmaps: Tensor) -> None:
    keypoints, scores = decode_heatmaps(heatmaps)
    expected = torch.tensor(
        [[slow_decode(heatmap.tolist()) for heatmap in sample] for sample in heatmaps.double()],
        dtype=torch.float64,
    )
    torch.testing.assert_close(keypoints.double(), expected[..., :2], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scores.double(), expected[..., 2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 48), (1, 1), (1, 7), (5, 1), (2, 2), (3, 3), (17, 5)])
def test_decode_equals_slow_loop(size: tuple[int, int], dtype: torch.dtype) -> None:
    heatmaps = torch.randn(3, 5, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    assert_equals_slow(heatmaps)
    keypoints, scores = decode_heatmaps(heatmaps)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert keypoints.dtype == scores.dtype == expected
    assert keypoints.shape == (3, 5, 2) and scores.shape == (3, 5)


def test_decode_ties_everywhere() -> None:
    generator = torch.Generator().manual_seed(1)
    assert_equals_slow(torch.randint(0, 3, (16, 4, 6, 5), generator=generator).float())
    keypoints, scores = decode_heatmaps(torch.full((1, 1, 4, 3), -2.0))
    assert keypoints.tolist() == [[[0.0, 0.0]]] and scores.tolist() == [[-2.0]]


def test_decode_peak_at_every_pixel_including_edges() -> None:
    generator = torch.Generator().manual_seed(2)
    heatmaps = torch.rand(1, 20, 5, 4, generator=generator)
    heatmaps.view(20, 20).diagonal().add_(1.0)
    assert_equals_slow(heatmaps)


def test_decode_reads_strided_maps() -> None:
    generator = torch.Generator().manual_seed(3)
    heatmaps = torch.randn(2, 9, 7, 5, generator=generator).permute(0, 3, 1, 2)
    torch.testing.assert_close(decode_heatmaps(heatmaps), decode_heatmaps(heatmaps.contiguous()), rtol=0, atol=0)
    assert_equals_slow(heatmaps)


def test_decode_nan_and_infinity() -> None:
    generator = torch.Generator().manual_seed(4)
    heatmaps = torch.randn(40, 2, 6, 5, generator=generator)
    heatmaps[torch.rand(heatmaps.shape, generator=generator) < 0.4] = torch.nan
    heatmaps[0] = torch.nan
    heatmaps[1, 0, 3, 2] = torch.inf
    heatmaps[2, 0, 3, 1:4] = torch.inf
    heatmaps[3, 0, 2, 2:4] = -torch.inf
    assert_equals_slow(heatmaps)
    keypoints, scores = decode_heatmaps(heatmaps)
    assert keypoints[0].isnan().all() and scores[0].isnan().all()
    assert keypoints[1:].isfinite().all()


def test_decode_quarter_pixel_by_hand() -> None:
    heatmaps = torch.zeros(1, 1, 64, 48)
    heatmaps[0, 0, 10, 20] = 0.9
    heatmaps[0, 0, 10, 21] = 0.5
    heatmaps[0, 0, 9, 20] = 0.3
    keypoints, scores = decode_heatmaps(heatmaps)
    assert keypoints.tolist() == [[[81.0, 39.0]]]
    assert scores[0, 0] == torch.tensor(0.9)


def test_decode_goes_back_through_the_crop() -> None:
    generator = torch.Generator().manual_seed(5)
    heatmaps = torch.randn(3, 17, 64, 48, generator=generator)
    angles = torch.tensor([0.0, 0.4, -1.2], dtype=torch.float64)
    scales = torch.tensor([0.3, 1.7, 0.05], dtype=torch.float64)
    rotation = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), dim=1).view(3, 2, 2)
    translation = torch.tensor([[-800.0, 12.0], [30.5, -2000.0], [96.0, 128.0]], dtype=torch.float64)
    crop_matrix = torch.cat((scales[:, None, None] * rotation, translation[:, :, None]), dim=2)
    crop, crop_scores = decode_heatmaps(heatmaps)
    image, scores = decode_heatmaps(heatmaps, crop_matrix)
    assert image.dtype == torch.float32 and torch.equal(scores, crop_scores)
    back = torch.einsum("bij,bkj->bki", crop_matrix[:, :, :2], image.double()) + crop_matrix[:, None, :, 2]
    torch.testing.assert_close(back, crop.double(), rtol=0, atol=1e-3)
    identity = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).expand(3, 2, 3)
    torch.testing.assert_close(decode_heatmaps(heatmaps, identity)[0], crop, rtol=0, atol=0)


def test_decode_nan_crop_gives_nan() -> None:
    crop_matrix = torch.tensor([[[1.0, 0.0, 5.0], [0.0, 1.0, 5.0]], [[1.0, 0.0, torch.nan], [0.0, 1.0, 0.0]]])
    keypoints, scores = decode_heatmaps(torch.ones(2, 1, 3, 3), crop_matrix)
    assert keypoints[0].tolist() == [[-5.0, -5.0]] and keypoints[1, 0, 0].isnan() and scores.isfinite().all()
    crop_matrix[1] = torch.nan
    assert decode_heatmaps(torch.ones(2, 1, 3, 3), crop_matrix)[0][1].isnan().all()


def test_decode_scores_are_differentiable() -> None:
    heatmaps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(6)).requires_grad_()
    decode_heatmaps(heatmaps)[1].sum().backward()
    peaks = heatmaps.detach().flatten(2) == heatmaps.detach().flatten(2).amax(2, keepdim=True)
    assert torch.equal(heatmaps.grad.flatten(2), peaks.float())


def test_decode_empty_batch() -> None:
    keypoints, scores = decode_heatmaps(torch.zeros(0, 17, 64, 48), torch.zeros(0, 2, 3))
    assert keypoints.shape == (0, 17, 2) and scores.shape == (0, 17)


@pytest.mark.parametrize(
    ("heatmaps", "crop_matrix", "error", "message"),
    [
        (np.zeros((1, 1, 2, 2)), None, TypeError, "heatmaps must be a torch.Tensor, got ndarray"),
        (
            torch.zeros(1, 1, 2, 2, dtype=torch.int64),
            None,
            TypeError,
            "heatmaps must be a floating-point tensor, got torch.int64",
        ),
        (
            torch.zeros(17, 64, 48),
            None,
            ValueError,
            "heatmaps must have shape [B, J, H, W], got [17, 64, 48]",
        ),
        (
            torch.zeros(1, 17, 0, 48),
            None,
            ValueError,
            "heatmaps must have at least one pixel, got [1, 17, 0, 48]",
        ),
        (torch.zeros(1, 1, 2, 2), [[1.0]], TypeError, "crop_matrix must be a torch.Tensor, got list"),
        (
            torch.zeros(1, 1, 2, 2),
            torch.zeros(1, 2, 3, dtype=torch.int32),
            TypeError,
            "crop_matrix must be a floating-point tensor, got torch.int32",
        ),
        (
            torch.zeros(1, 1, 2, 2),
            torch.zeros(2, 3),
            ValueError,
            "crop_matrix must have shape [B, 2, 3] = [1, 2, 3], got [2, 3]",
        ),
        (
            torch.zeros(1, 1, 2, 2),
            torch.zeros(1, 2, 3, device="meta"),
            ValueError,
            "crop_matrix must be on the heatmaps' device cpu, got meta",
        ),
        (
            torch.zeros(2, 1, 2, 2),
            torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]]]),
            ValueError,
            "crop_matrix must be invertible, got a singular one at 1",
        ),
    ],
)
def test_decode_bad_input(heatmaps, crop_matrix, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape('decode_heatmaps: ' + message)}$"):
        decode_heatmaps(heatmaps, crop_matrix)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("width", [1, 2, 6])
def test_flip_average_equals_slow_loop(width: int, shift: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    first, second = torch.randn(2, 2, 3, 4, width, generator=generator)
    permutation = [0, 2, 1]
    result = flip_average(first, second, permutation, shift=shift)
    for joint in range(3):
        for x in range(width):
            source = max(x - 1, 0) if shift else x
            mirrored = second[:, permutation[joint], :, width - 1 - source]
            assert torch.equal(result[:, joint, :, x], (first[:, joint, :, x] + mirrored) * 0.5)


def test_flip_average_of_a_mirrored_pass_changes_nothing() -> None:
    heatmaps = torch.randn(2, 5, 8, 6, generator=torch.Generator().manual_seed(8))
    swap = torch.tensor([0, 2, 1, 4, 3])
    torch.testing.assert_close(flip_average(heatmaps, heatmaps[:, swap].flip(3), swap), heatmaps, rtol=0, atol=0)
    torch.testing.assert_close(
        flip_average(heatmaps, heatmaps[:, swap].flip(3), swap.numpy()), heatmaps, rtol=0, atol=0
    )


def test_flip_average_keeps_dtype_and_differentiates() -> None:
    generator = torch.Generator().manual_seed(9)
    first, second = (torch.randn(1, 2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    for shift in (False, True):
        assert torch.autograd.gradcheck(
            lambda a, b, shift=shift: flip_average(a, b, [1, 0], shift=shift),
            (first.requires_grad_(), second.requires_grad_()),
        )
    assert flip_average(first.half(), second.half(), [1, 0]).dtype == torch.float16


MAPS = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("flipped", "permutation", "error", "message"),
    [
        (None, [1, 0], TypeError, "flipped_heatmaps must be a torch.Tensor, got NoneType"),
        (
            torch.zeros(1, 2, 3, 5),
            [1, 0],
            ValueError,
            "flipped_heatmaps must have the shape of heatmaps [1, 2, 3, 4], got [1, 2, 3, 5]",
        ),
        (
            MAPS.double(),
            [1, 0],
            TypeError,
            "flipped_heatmaps must be torch.float32 on cpu like heatmaps, got torch.float64 on cpu",
        ),
        (MAPS, [1], ValueError, "flip_permutation must be 2 joint indices that swap in pairs, got [1]"),
        (MAPS, [0, 2], ValueError, "flip_permutation must be 2 joint indices that swap in pairs, got [0, 2]"),
        (MAPS, [0, 0], ValueError, "flip_permutation must be 2 joint indices that swap in pairs, got [0, 0]"),
        (
            MAPS,
            [-1, 0],
            ValueError,
            "flip_permutation must be 2 joint indices that swap in pairs, got [-1, 0]",
        ),
        (MAPS, 1, ValueError, "flip_permutation must be 2 joint indices that swap in pairs, got [1]"),
        (
            MAPS,
            [1.0, 0.0],
            ValueError,
            "flip_permutation must be 2 joint indices that swap in pairs, got [1.0, 0.0]",
        ),
    ],
)
def test_flip_average_bad_input(flipped, permutation, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape('flip_average: ' + message)}$"):
        flip_average(MAPS, flipped, permutation)
