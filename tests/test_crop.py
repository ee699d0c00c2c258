from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from liftbyimage.data import (
    CROP_SIZE,
    FLIP_PERMUTATION,
    IMAGENET_MEAN,
    IMAGENET_STD,
    JOINT_NAMES,
    apply_affine,
    box_to_crop_matrix,
    denormalise_keypoints,
    flip_crop,
    flip_keypoints,
    flip_pose,
    invert_affine,
    normalise_image,
    normalise_keypoints,
    read_image,
    warp_crop,
)


@pytest.fixture
def keypoints() -> np.ndarray:
    return np.random.default_rng(1).uniform([0, 0], [191, 255], size=(5, 17, 2))


@pytest.mark.parametrize(
    ("box", "half_extent"),
    [([100, 50, 200, 450], (1.25 * 150, 1.25 * 200)), ([100, 50, 500, 150], (1.25 * 200, 1.25 * 800 / 3))],
    ids=["tall", "wide"],
)
def test_box_is_enlarged_to_the_crop_and_centred(box: list[float], half_extent: tuple[float, float]) -> None:
    matrix = box_to_crop_matrix(box)
    centre = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
    np.testing.assert_allclose(apply_affine(matrix, centre), [95.5, 127.5], rtol=1e-13)
    # The enlarged box's corners are the crop's outer edges.
    np.testing.assert_allclose(apply_affine(matrix, centre - half_extent), [-0.5, -0.5], atol=1e-12)
    np.testing.assert_allclose(apply_affine(matrix, centre + half_extent), [191.5, 255.5], rtol=1e-13)


def test_batched_boxes_and_inverse(keypoints: np.ndarray) -> None:
    boxes = np.array([[10, 20, 110, 320], [5, 5, 300, 90], [-40, -30, 60, 80], [0, 0, 1, 1], [7, 8, 9, 10.5]])
    matrices = box_to_crop_matrix(boxes)
    for matrix, box in zip(matrices, boxes, strict=True):
        np.testing.assert_array_equal(matrix, box_to_crop_matrix(box))
    crop_px = apply_affine(matrices, keypoints)
    np.testing.assert_allclose(crop_px[3], apply_affine(matrices[3], keypoints[3]), rtol=1e-13)
    np.testing.assert_allclose(apply_affine(invert_affine(matrices), crop_px), keypoints, rtol=0, atol=1e-10)


def test_warp_carries_pixels_where_the_matrix_carries_points() -> None:
    """The centroid of a warped blob is the mapped centre of the blob."""
    rows, columns = np.mgrid[:400, :600]
    centre = np.array([333.3, 170.8])
    blob = np.exp(-((columns - centre[0]) ** 2 + (rows - centre[1]) ** 2) / (2 * 9.0**2))
    image = np.repeat(np.round(255 * blob)[..., None], 3, axis=-1).astype(np.uint8)
    matrix = box_to_crop_matrix([250, 60, 420, 340])
    crop = warp_crop(image, matrix)
    assert crop.shape == (*CROP_SIZE, 3) and crop.dtype == np.uint8
    weights = crop[..., 0].astype(np.float64)
    rows, columns = np.mgrid[: CROP_SIZE[0], : CROP_SIZE[1]]
    centroid = np.array([(columns * weights).sum(), (rows * weights).sum()]) / weights.sum()
    np.testing.assert_allclose(centroid, apply_affine(matrix, centre), atol=0.05)


def test_warp_is_black_outside_the_image() -> None:
    crop = warp_crop(np.full((40, 30, 3), 200, np.uint8), box_to_crop_matrix([100, 100, 130, 140]))
    assert not crop.any()


def test_normalised_edges_and_round_trip(keypoints: np.ndarray) -> None:
    corners = np.array([[-0.5, -0.5], [191.5, 255.5], [95.5, 127.5]])
    np.testing.assert_allclose(normalise_keypoints(corners), [[-1, -1], [1, 1], [0, 0]], atol=1e-15)
    np.testing.assert_allclose(denormalise_keypoints(normalise_keypoints(keypoints)), keypoints, rtol=0, atol=1e-12)
    tensor = torch.from_numpy(keypoints).float()
    normalised = normalise_keypoints(tensor, (128, 96))
    assert normalised.dtype == torch.float32
    np.testing.assert_allclose(normalised.numpy(), normalise_keypoints(keypoints, (128, 96)), atol=1e-5)


def test_normalised_keypoints_serve_grid_sample() -> None:
    image = torch.rand(1, 1, 256, 192, generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor([[3.0, 7.0], [191.0, 255.0], [0.0, 0.0]])
    grid = normalise_keypoints(pixels)[None, None]
    sampled = F.grid_sample(image, grid, align_corners=False)[0, 0, 0]
    torch.testing.assert_close(sampled, image[0, 0, [7, 255, 0], [3, 191, 0]], rtol=0, atol=1e-4)


def test_flip_follows_the_pixels(keypoints: np.ndarray) -> None:
    crop = np.zeros((256, 192, 3), np.uint8)
    crop[40, 17] = 255
    pixel = np.tile([17.0, 40.0], (17, 1))
    mirrored = flip_keypoints(pixel)[0].astype(int)
    assert flip_crop(crop)[mirrored[1], mirrored[0]].tolist() == [255, 255, 255]
    assert flip_crop(crop).flags.c_contiguous
    np.testing.assert_allclose(flip_keypoints(flip_keypoints(keypoints)), keypoints, rtol=1e-13)


def test_flip_swaps_sides_and_negates_normalised_x(keypoints: np.ndarray) -> None:
    left, right = JOINT_NAMES.index("left_wrist"), JOINT_NAMES.index("right_wrist")
    flipped = flip_keypoints(keypoints)
    np.testing.assert_array_equal(flipped[:, left, 1], keypoints[:, right, 1])
    np.testing.assert_allclose(flipped[:, left, 0], 191 - keypoints[:, right, 0])
    expected = normalise_keypoints(keypoints)[:, list(FLIP_PERMUTATION)] * [-1, 1]
    np.testing.assert_allclose(normalise_keypoints(flipped), expected, rtol=0, atol=1e-14)


def test_flip_keeps_confidence_with_its_joint() -> None:
    keypoints = np.random.default_rng(2).uniform(size=(17, 3))
    flipped = flip_keypoints(torch.from_numpy(keypoints), width=100)
    np.testing.assert_array_equal(flipped[:, 2].numpy(), keypoints[list(FLIP_PERMUTATION), 2])
    np.testing.assert_allclose(flipped[:, 0].numpy(), 99 - keypoints[list(FLIP_PERMUTATION), 0])


def test_flip_pose_mirrors_array_and_tensor_alike() -> None:
    pose = np.random.default_rng(4).normal(size=(3, 17, 3))
    expected = pose[:, list(FLIP_PERMUTATION)] * [-1, 1, 1]
    np.testing.assert_array_equal(flip_pose(pose), expected)
    np.testing.assert_array_equal(flip_pose(torch.from_numpy(pose)).numpy(), expected)
    np.testing.assert_array_equal(flip_pose(flip_pose(pose)), pose)


def test_normalise_image_of_arrays_and_tensors() -> None:
    image = np.random.default_rng(5).integers(0, 256, size=(2, 8, 6, 3), dtype=np.uint8)
    result = normalise_image(image)
    assert result.shape == (2, 3, 8, 6) and result.dtype == torch.float32 and result.is_contiguous()
    expected = ((image / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(normalise_image(torch.from_numpy(image)), result, rtol=0, atol=0)
    torch.testing.assert_close(normalise_image(image[0, :, ::-1]), result[0].flip(-1), rtol=0, atol=0)


def test_read_image_is_rgb(tmp_path: Path) -> None:
    image = np.zeros((5, 4, 3), np.uint8)
    image[..., 0] = 250
    cv2.imwrite(str(tmp_path / "red.png"), image[..., ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "red.png"), image)


def test_read_image_tells_missing_from_unreadable(tmp_path: Path) -> None:
    missing, text, empty = tmp_path / "no.jpg", tmp_path / "text.jpg", tmp_path / "empty.png"
    text.write_text("not an image")
    empty.touch()
    for path, reason in (
        (missing, "no such file"),
        (tmp_path, "no such file"),
        (text, "not an image that OpenCV can read"),
        (empty, "not an image that OpenCV can read"),
    ):
        with pytest.raises(ValueError) as error:
            read_image(path)
        assert str(error.value) == f"image {path}: {reason}"


def test_bad_arguments_say_what_came() -> None:
    cases = {
        "box_to_crop_matrix: box must be [..., 4] (x0, y0, x1, y1), got [3]": lambda: box_to_crop_matrix([1, 2, 3]),
        "box_to_crop_matrix: box must be finite with x0 < x1 and y0 < y1, got [3.0, 0.0, 3.0, 5.0]": lambda: (
            box_to_crop_matrix([3, 0, 3, 5])
        ),
        "box_to_crop_matrix: padding must be more than 0, got 0": lambda: box_to_crop_matrix([0, 0, 1, 1], padding=0),
        "apply_affine: matrix must be [..., 2, 3], got [3, 3]": lambda: apply_affine(np.eye(3), np.zeros(2)),
        "apply_affine: points must be [..., 2], got [3]": lambda: apply_affine(np.zeros((2, 3)), np.zeros(3)),
        "warp_crop: image must be uint8 [H, W, 3], got float64 [4, 4, 3]": lambda: warp_crop(
            np.zeros((4, 4, 3)), np.zeros((2, 3))
        ),
        "normalise_keypoints: crop_px must be [..., 2], got [17, 3]": lambda: normalise_keypoints(np.zeros((17, 3))),
        "flip_keypoints: crop_px must be [..., 17, 2 or 3], got [16, 2]": lambda: flip_keypoints(np.zeros((16, 2))),
        "flip_pose: pose_3d must be [..., 17, 3], got [17, 2]": lambda: flip_pose(torch.zeros(17, 2)),
        "normalise_image: image must be uint8 [..., H, W, 3], got torch.float32 [3, 8, 8]": lambda: normalise_image(
            torch.zeros(3, 8, 8)
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message
