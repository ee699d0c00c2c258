"""Records as each lifter takes them, and as they look in a mirror."""

import numpy as np
import pytest
import torch

from liftbyimage import models
from liftbyimage.batches import check_crop_size, joint_order, make_batch, mirror
from liftbyimage.checkpoint import load_pipeline, save_pipeline
from liftbyimage.data.crop import flip_crop, flip_keypoints, flip_pose, normalise_image, normalise_keypoints
from liftbyimage.data.skeleton import JOINT_NAMES, MPI_INF_3DHP_NAMES, MPI_INF_3DHP_TO_H36M

SIZE = (64, 48)
LIFTERS = {
    "lift-by-image": {"dim": 16, "heads": 2, "image_channels": 8, "grid": (16, 12)},
    "context-aware-poseformer": {"channels": (8, 8), "dim": 16, "heads": 2, "depth": 1},
    "pose-only": {"dim": 16, "heads": 2, "layers": 1},
}


def records(count=3):
    draw = np.random.default_rng(0)
    crop_px = draw.uniform(4, 44, (count, 17, 2))
    return {
        "image": torch.from_numpy(draw.integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)),
        "keypoints": torch.from_numpy(2 * crop_px + 100).float(),
        "crop_matrix": torch.tensor([[0.5, 0, -50], [0, 0.5, -50]], dtype=torch.float64).expand(count, 2, 3),
        "image_size": torch.tensor([[400.0, 300.0]]).expand(count, 2),
        "pose_3d": torch.from_numpy(draw.standard_normal((count, 17, 3))).float(),
    }


@pytest.mark.parametrize("name", LIFTERS)
def test_the_2d_inputs_are_those_of_the_crop(name):
    lifter = models.build(name, **LIFTERS[name])
    batch = make_batch(lifter, records())
    crop_px = (records()["keypoints"] - 100) / 2
    assert batch.images.shape == (3, 3, *SIZE) and torch.equal(batch.images, normalise_image(records()["image"]))
    if name == "context-aware-poseformer":
        pose_2d, pose_crop = batch.poses
        torch.testing.assert_close(pose_crop, crop_px / torch.tensor([24.0, 32.0]) - 1)
        x, y = records()["keypoints"].unbind(2)
        torch.testing.assert_close(pose_2d, torch.stack([x / 200 - 1, y / 200 - 0.75], dim=2))
    else:
        torch.testing.assert_close(batch.poses[0], normalise_keypoints(crop_px, SIZE))
    assert torch.equal(batch.pose_3d, records()["pose_3d"])


@pytest.mark.parametrize("name", LIFTERS)
def test_a_mirrored_batch_is_that_of_the_mirrored_picture(name):
    lifter = models.build(name, **LIFTERS[name])
    straight = records()
    crop_px = flip_keypoints((straight["keypoints"] - 100) / 2, SIZE[1])
    other = {
        **straight,
        "image": torch.from_numpy(flip_crop(straight["image"].numpy())),
        "keypoints": 2 * crop_px + 100,
        "pose_3d": flip_pose(straight["pose_3d"]),
    }
    mirrored = torch.tensor([True, False, True])
    got = mirror(lifter, make_batch(lifter, straight), mirrored)
    plain, seen = make_batch(lifter, straight), make_batch(lifter, other)
    for actual, expected, unchanged in (
        (got.images, seen.images, plain.images),
        (got.poses[-1], seen.poses[-1], plain.poses[-1]),
        (got.pose_3d, seen.pose_3d, plain.pose_3d),
    ):
        torch.testing.assert_close(actual[mirrored], expected[mirrored])
        assert torch.equal(actual[~mirrored], unchanged[~mirrored])


def test_a_lifter_of_another_skeleton_gets_its_own_order_of_joints():
    lifter = models.build(
        "context-aware-poseformer", channels=(8,), dim=16, heads=2, depth=1, context=False, skeleton="mpi-inf-3dhp"
    )
    assert [JOINT_NAMES[joint] for joint in joint_order(lifter)] == list(MPI_INF_3DHP_NAMES)
    batch = make_batch(lifter, records())
    assert torch.equal(batch.pose_3d[:, list(MPI_INF_3DHP_TO_H36M)], records()["pose_3d"])
    straight = make_batch(models.build("context-aware-poseformer", **LIFTERS["context-aware-poseformer"]), records())
    assert torch.equal(batch.poses[1][:, list(MPI_INF_3DHP_TO_H36M)], straight.poses[1])


def test_crops_of_another_size_than_the_lifter_was_trained_on_are_refused():
    lifter = models.build("lift-by-image", **LIFTERS["lift-by-image"])
    pipeline = models.Pipeline(models.TinyEncoder(8), lifter)
    check_crop_size("records", pipeline, SIZE)
    check_crop_size("records", models.Pipeline(None, models.build("pose-only")), (7, 5))
    with pytest.raises(ValueError) as caught:
        check_crop_size("records", pipeline, (256, 192))
    assert str(caught.value) == "records must be crops of 64x48 px, as this lifter was trained on, got 256x192"


def test_a_lifter_of_other_joints_is_refused():
    with pytest.raises(ValueError, match="^lifter must lift 17 joints, got one for 19$"):
        joint_order(models.build("pose-only", dim=16, heads=2, num_joints=19))


def test_a_pipeline_without_an_encoder_is_saved_and_loaded(tmp_path):
    pipeline = models.Pipeline(None, models.build("pose-only", **LIFTERS["pose-only"])).eval()
    save_pipeline(pipeline, tmp_path / "lifter.pt", encoder=None)
    again = load_pipeline(tmp_path / "lifter.pt", model="pose-only")
    assert again.encoder is None and not again.training
    batch = make_batch(pipeline.lifter, records())
    assert torch.equal(again(batch.images, *batch.poses), pipeline(batch.images, *batch.poses))
