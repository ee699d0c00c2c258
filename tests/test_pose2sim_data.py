from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from liftbyimage.data import (
    apply_affine,
    box_to_crop_matrix,
    denormalise_keypoints,
    normalise_image,
    read_image,
)
from liftbyimage.data.pose2sim import Pose2SimDataset, load

ROOT = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "pose2sim"
needs_data = pytest.mark.skipif(not ROOT.is_dir(), reason="shared/data/pose2sim is missing")


@pytest.fixture(scope="module")
def dataset() -> Pose2SimDataset:
    return Pose2SimDataset(ROOT)


def _reprojection_errors(dataset: Pose2SimDataset) -> np.ndarray:
    arrays = dataset.arrays
    projected = np.stack(
        [
            dataset.cameras[camera].project(joints)
            for camera, joints in zip(arrays["camera"], arrays["joints_3d"], strict=True)
        ]
    )
    return np.linalg.norm(projected - arrays["keypoints_h36m"][..., :2], axis=-1)  # [96, 17] px


@needs_data
def test_items(dataset: Pose2SimDataset) -> None:
    assert len(dataset) == 96
    item = dataset[37]
    assert item["features"].shape == (40, 64, 48) and item["features"].dtype == torch.float32
    assert item["pose_2d"].shape == (17, 2) and item["pose_2d"].dtype == torch.float32
    assert item["pose_3d"].shape == (17, 3) and item["pose_3d"].dtype == torch.float32
    assert not item["pose_3d"][0].any()
    assert (item["camera"], item["frame"]) == (1, 54)
    assert torch.equal(dataset[-1]["pose_2d"], dataset[95]["pose_2d"])
    with pytest.raises(IndexError):
        dataset[96]


@needs_data
def test_items_collate(dataset: Pose2SimDataset) -> None:
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    assert batch["features"].shape == (4, 40, 64, 48) and batch["pose_3d"].shape == (4, 17, 3)
    assert batch["camera"].tolist() == [0, 0, 0, 0] and batch["frame"].tolist() == [0, 4, 8, 12]
    assert [Path(path).name for path in batch["image_path"]] == ["000.jpg", "001.jpg", "002.jpg", "003.jpg"]


@needs_data
@pytest.mark.parametrize(("level", "shape"), [(1, (80, 32, 24)), (2, (160, 16, 12)), (3, (320, 8, 6))])
def test_other_feature_levels(level: int, shape: tuple[int, ...]) -> None:
    assert Pose2SimDataset(ROOT, level=level)[5]["features"].shape == shape


@needs_data
def test_images_are_crops(dataset: Pose2SimDataset) -> None:
    image = read_image(dataset[95]["image_path"])
    assert image.shape == (256, 192, 3) and image.std() > 10
    assert normalise_image(image).shape == (3, 256, 192)


@needs_data
def test_boxes_give_the_recorded_crop_matrices(dataset: Pose2SimDataset) -> None:
    matrices = box_to_crop_matrix(dataset.arrays["bbox"])
    # The boxes are stored as float32 of about 1000 px.
    np.testing.assert_allclose(matrices, dataset.arrays["crop_matrix"], rtol=0, atol=5e-5)


@needs_data
def test_keypoints_fall_inside_their_crops(dataset: Pose2SimDataset) -> None:
    for index in range(len(dataset)):
        item = dataset[index]
        crop_px = denormalise_keypoints(item["pose_2d"])
        expected = apply_affine(dataset.arrays["crop_matrix"][index], item["keypoints_px"].numpy())
        np.testing.assert_allclose(crop_px.numpy(), expected, rtol=0, atol=1e-3)
        assert item["pose_2d"].abs().max() < 1
        assert (crop_px >= 0).all() and (crop_px <= torch.tensor([191, 255])).all()


@needs_data
def test_projected_joints_land_on_the_keypoints(dataset: Pose2SimDataset) -> None:
    """The data's README: median about 13 px in the full frame, limbs 10–16 px."""
    errors = _reprojection_errors(dataset)
    assert 12 < np.median(errors) < 14
    for limb in ([1, 2, 3], [4, 5, 6], [11, 12, 13], [14, 15, 16]):
        assert 10 < np.median(errors[:, limb]) < 16


@needs_data
def test_views_agree_on_the_world(dataset: Pose2SimDataset) -> None:
    """Every view's joints, taken to the world, are one and the same person at the same instant."""
    arrays = dataset.arrays
    world = np.stack(
        [
            dataset.cameras[camera].camera_to_world(joints)
            for camera, joints in zip(arrays["camera"], arrays["joints_3d"], strict=True)
        ]
    ).reshape(4, 24, 17, 3)
    np.testing.assert_allclose(world, np.broadcast_to(world[:1], world.shape), rtol=0, atol=1e-5)


@needs_data
def test_even_and_odd_instants_split_every_camera(dataset: Pose2SimDataset) -> None:
    even, odd = dataset.split_even_odd()
    assert len(even) == len(odd) == 48
    assert sorted([*even, *odd]) == list(range(96))
    assert even[:3].tolist() == [0, 2, 4] and odd[:3].tolist() == [1, 3, 5]
    one_even, one_odd = dataset.split_even_odd(camera=2)
    assert one_even.tolist() == list(range(48, 72, 2)) and one_odd.tolist() == list(range(49, 72, 2))


@needs_data
def test_cameras_carry_size_and_coefficients(dataset: Pose2SimDataset) -> None:
    assert [camera.image_size for camera in dataset.cameras] == [(1080, 1920)] * 2 + [(1088, 1920)] * 2
    for camera, coefficients in zip(dataset.cameras, dataset.arrays["cam_dist"], strict=True):
        np.testing.assert_array_equal(camera.distortion, [*coefficients, 0.0])
        np.testing.assert_allclose(camera.R @ camera.R.T, np.eye(3), rtol=0, atol=1e-9)


@needs_data
def test_bad_level_and_camera(dataset: Pose2SimDataset) -> None:
    with pytest.raises(ValueError) as error:
        Pose2SimDataset(ROOT, level=4)
    assert str(error.value) == "level must be 0, 1, 2 or 3, got 4"
    with pytest.raises(ValueError) as error:
        dataset.split_even_odd(camera=4)
    assert str(error.value) == "camera must be 0 to 3, got 4"


def test_missing_folder_names_the_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load(tmp_path / "nowhere")
    assert str(error.value) == (
        f"root {tmp_path / 'nowhere'}: expected a folder with poses.npz, features.npz and crops/000.jpg, "
        "001.jpg, …, missing poses.npz, features.npz, crops"
    )
    (tmp_path / "poses.npz").touch()
    (tmp_path / "crops").mkdir()
    with pytest.raises(ValueError, match=r"missing features\.npz$"):
        Pose2SimDataset(tmp_path)
