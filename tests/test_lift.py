from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from marked_person import ContextPipeline

from liftbyimage import models
from liftbyimage.data import (
    JOINT_NAMES,
    box_to_crop_matrix,
    normalise_image,
    normalise_keypoints,
    read_image,
    warp_crop,
)
from liftbyimage.data.crop import apply_affine
from liftbyimage.data.pose2sim import Pose2SimDataset
from liftbyimage.data.pose_file import ImagePose, read_pose_file
from liftbyimage.data.synthetic import generate
from liftbyimage.lift import LiftedImage, lift_images, write_results

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "pose2sim"
KEPT = 921  # floor(0.3 · 64 · 48)


@pytest.fixture(scope="module")
def pipeline() -> models.Pipeline:
    torch.manual_seed(1)
    lifter = models.LiftByImage(models.LiftByImageConfig(dim=32, heads=4))
    return models.Pipeline(models.TinyEncoder(), lifter).eval()


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[list[Path], dict[str, ImagePose]]:
    """Three pictures with a synthetic person each and their poses, two of the same stem."""
    scenes = generate(3, seed=11)
    paths = [tmp_path / "in" / name for name in ("a.png", "b/a.jpg", "c.png")]
    entries = {}
    for path, image, pose in zip(paths, scenes.image.numpy(), scenes.pose_2d.tolist(), strict=True):
        path.parent.mkdir(exist_ok=True, parents=True)
        assert cv2.imwrite(str(path), image[..., ::-1])
        entries[str(path)] = {"keypoints": pose}
    pose_file = tmp_path / "in" / "poses.json"
    pose_file.write_text(json.dumps(entries), encoding="utf-8")
    return paths, read_pose_file(pose_file, paths)


def _check_lifted(lifted: LiftedImage) -> None:
    for pose in (lifted.pose_3d, lifted.coarse_pose_3d):
        assert pose.shape == (17, 3)
        assert np.isfinite(pose).all()
        assert (pose[0] == 0).all()
        assert np.abs(pose).max() > 0
    assert lifted.importance.shape == (64 * 48,)
    assert lifted.importance.sum() == pytest.approx(1, abs=1e-5)
    assert lifted.index.shape == (KEPT,)
    assert (np.diff(lifted.index) > 0).all()
    assert lifted.grid == (64, 48)


def test_lifts_what_the_pipeline_lifts(pipeline, inputs) -> None:
    paths, poses = inputs
    lifted = lift_images(pipeline, paths, poses, batch_size=2)
    assert [result.image for result in lifted] == paths
    for path, result in zip(paths, lifted, strict=True):
        _check_lifted(result)
        pose = poses[str(path)]
        matrix = box_to_crop_matrix(pose.box)
        crop = warp_crop(read_image(path), matrix)
        keypoints = apply_affine(matrix, pose.keypoints)
        np.testing.assert_array_equal(result.crop, crop)
        np.testing.assert_array_equal(result.crop_matrix, matrix)
        np.testing.assert_array_equal(result.keypoints, keypoints)
        pose_2d = torch.from_numpy(normalise_keypoints(keypoints)).float()
        with torch.inference_mode():
            expected = pipeline(normalise_image(crop)[None], pose_2d[None])
        np.testing.assert_allclose(result.pose_3d, expected.pose_3d[0], atol=1e-5)
        np.testing.assert_allclose(result.coarse_pose_3d, expected.coarse_pose_3d[0], atol=1e-5)
        np.testing.assert_allclose(result.importance, expected.importance[0], atol=1e-6)


def test_a_training_pipeline_is_evaluated(pipeline, inputs) -> None:
    paths, poses = inputs
    expected = lift_images(pipeline, paths, poses)
    actual = lift_images(pipeline.train(), paths, poses)
    assert not pipeline.training
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a.pose_3d, b.pose_3d)


def test_paths_are_keys_as_written(pipeline, inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    (path, *_), poses = inputs
    monkeypatch.chdir(path.parent)
    [lifted] = lift_images(pipeline, (name for name in ["./a.png"]), {"./a.png": poses[str(path)]})
    assert lifted.image == Path("a.png")
    with pytest.raises(ValueError, match=r"^lift_images: poses must hold every image, got none for \./a\.png$"):
        lift_images(pipeline, ["./a.png"], {"a.png": poses[str(path)]})


def test_no_images(pipeline) -> None:
    assert lift_images(pipeline, [], {}) == []


def test_results_on_disk(pipeline, inputs, tmp_path: Path) -> None:
    paths, poses = inputs
    lifted = lift_images(pipeline, paths, poses)
    out = tmp_path / "new" / "out"
    assert write_results(lifted, out) == out / "poses.json"
    document = json.loads((out / "poses.json").read_text(encoding="utf-8"))
    assert document["units"] == "metres"
    assert document["axes"] == "camera: x right, y down, z forward; relative to the pelvis"
    assert document["joint_names"] == list(JOINT_NAMES)
    assert [entry["image"] for entry in document["images"]] == [str(path) for path in paths]
    assert [entry["picture"] for entry in document["images"]] == ["a.png", "a-2.png", "c.png"]
    for entry, result in zip(document["images"], lifted, strict=True):
        np.testing.assert_array_equal(np.float32(entry["pose_3d"]), result.pose_3d)
        np.testing.assert_array_equal(np.float32(entry["coarse_pose_3d"]), result.coarse_pose_3d)
        np.testing.assert_array_equal(entry["crop_matrix"], result.crop_matrix)
        assert (entry["kept_patches"], entry["patches"]) == (KEPT, 3072)
    assert sorted(path.name for path in out.iterdir()) == ["a-2.png", "a.png", "c.png", "poses.json"]
    pictures = [read_image(out / name) for name in ("a.png", "a-2.png", "c.png")]
    assert not np.array_equal(pictures[0], pictures[1])


def test_without_pictures(pipeline, inputs, tmp_path: Path) -> None:
    paths, poses = inputs
    out = tmp_path / "out"
    write_results(lift_images(pipeline, paths[:1], poses), out, pictures=False)
    assert [path.name for path in out.iterdir()] == ["poses.json"]
    assert json.loads((out / "poses.json").read_text(encoding="utf-8"))["images"][0]["picture"] is None


def test_a_picture_never_replaces_an_input(pipeline, inputs) -> None:
    paths, poses = inputs
    before = paths[0].read_bytes()
    write_results(lift_images(pipeline, paths[:1], poses), paths[0].parent)
    assert paths[0].read_bytes() == before
    assert (paths[0].parent / "a-2.png").is_file()


def test_bad_input(pipeline, inputs, tmp_path: Path) -> None:
    paths, poses = inputs
    with pytest.raises(ValueError, match="^lift_images: batch_size must be at least 1, got 0$"):
        lift_images(pipeline, paths, poses, batch_size=0)
    message = f"lift_images: poses must hold every image, got none for {tmp_path / 'x.png'}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lift_images(pipeline, [*paths, tmp_path / "x.png"], poses)
    with pytest.raises(TypeError, match=r"^lift_images: batch_size must be a whole number, got 1\.5$"):
        lift_images(pipeline, paths, poses, batch_size=1.5)
    for image in ("a.jpg", Path("a.jpg")):
        with pytest.raises(TypeError, match=r"^lift_images: images must be several files, got one: a\.jpg$"):
            lift_images(pipeline, image, poses)
    torn = tmp_path / "torn.png"
    torn.write_bytes(paths[0].read_bytes()[:20])
    message = f"image {torn}: not an image that OpenCV can read"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lift_images(pipeline, [paths[0], torn], {**poses, str(torn): poses[str(paths[0])]})


def test_pipeline_of_another_skeleton(inputs) -> None:
    lifter = models.LiftByImage(models.LiftByImageConfig(dim=32, heads=4, num_joints=16))
    with pytest.raises(ValueError, match="^lift_images: pipeline must lift 17 joints, got one for 16$"):
        lift_images(models.Pipeline(models.TinyEncoder(), lifter), *inputs)

    other = ContextPipeline()
    other.lifter.config.skeleton = "mpi-inf-3dhp"
    with pytest.raises(
        ValueError, match=r"^lift_images: pipeline must lift the skeleton human3\.6m, got one for mpi-inf-3dhp$"
    ):
        lift_images(other, *inputs)


def test_broken_weights(inputs) -> None:
    paths, poses = inputs
    lifter = models.LiftByImage(models.LiftByImageConfig(dim=32, heads=4))
    torch.nn.init.constant_(lifter.refined_head.bias, float("nan"))
    message = f"lift_images: the pose of {paths[0]} is not finite: the weights are broken"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lift_images(models.Pipeline(models.TinyEncoder(), lifter), paths, poses)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real crops at {DATA}")
def test_real_crops(pipeline, tmp_path: Path) -> None:
    dataset = Pose2SimDataset(DATA)
    chosen = (0, 40, 95)
    entries = {}
    for i in chosen:
        keypoints = apply_affine(dataset.arrays["crop_matrix"][i], dataset.arrays["keypoints_coco"][i, :, :2])
        entries[f"{i:03d}.jpg"] = {"keypoints": keypoints.tolist(), "order": "coco"}
    pose_file = tmp_path / "detections.json"
    pose_file.write_text(json.dumps(entries), encoding="utf-8")
    paths = [DATA / "crops" / f"{i:03d}.jpg" for i in chosen]
    lifted = lift_images(pipeline, paths, read_pose_file(pose_file, paths))
    for i, result in zip(chosen, lifted, strict=True):
        _check_lifted(result)
        # The joints lie in the crop cut here, where the data's own mapping and this crop's put them.
        in_given_crop = apply_affine(dataset.arrays["crop_matrix"][i], dataset.arrays["keypoints_h36m"][i, :, :2])
        np.testing.assert_allclose(result.keypoints, apply_affine(result.crop_matrix, in_given_crop), atol=1e-3)
        assert (result.keypoints >= 0).all()
        assert (result.keypoints < [192, 256]).all()
    write_results(lifted, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "000.png",
        "040.png",
        "095.png",
        "poses.json",
    ]


def test_keypoints_of_another_picture_are_refused(
    pipeline: models.Pipeline, inputs: tuple[list[Path], dict[str, ImagePose]]
) -> None:
    (image, *_), poses = inputs
    pose = poses[str(image)]
    height, width = cv2.imread(str(image)).shape[:2]
    elsewhere = ImagePose(pose.keypoints + 3000, pose.confidence, pose.box + 3000)
    expected = (
        f"image {image}: none of its keypoints lies inside its {width}×{height} px; are they pixels of this picture?"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        lift_images(pipeline, [image], {str(image): elsewhere})


def test_normalised_keypoints_are_refused(
    pipeline: models.Pipeline, inputs: tuple[list[Path], dict[str, ImagePose]]
) -> None:
    (image, *_), poses = inputs
    pose = poses[str(image)]
    low, span = pose.keypoints.min(axis=0), np.ptp(pose.keypoints, axis=0)
    normalised = ImagePose((pose.keypoints - low) / span, pose.confidence, pose.box)
    expected = f"image {image}: its keypoints span 1.0×1.0 px: are they pixels of this picture?"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        lift_images(pipeline, [image], {str(image): normalised})


def test_a_lifter_without_patches(inputs, tmp_path: Path) -> None:
    """The same path for a lifter with other pose inputs and a tensor for a pose, as Context-Aware PoseFormer."""
    paths, poses = inputs
    pipeline = ContextPipeline()
    lifted = lift_images(pipeline, paths, poses, batch_size=2)
    assert pipeline.batches == [2, 1]
    for path, result in zip(paths, lifted, strict=True):
        pose, image = poses[str(path)], read_image(path)
        assert (result.coarse_pose_3d, result.importance, result.index, result.grid) == (None,) * 4
        np.testing.assert_array_equal(result.pose_2d, pose.keypoints)
        np.testing.assert_array_equal(result.box, pose.box)
        size = np.array([image.shape[1::-1]])
        inputs_2d = pipeline.lifter.pose_inputs(pose.keypoints[None], result.crop_matrix[None], size)
        [expected] = pipeline(normalise_image(result.crop)[None], *inputs_2d).numpy()
        np.testing.assert_allclose(result.pose_3d, expected - expected[0], atol=1e-5)
    write_results(lifted, tmp_path / "out")
    [entry, *_] = json.loads((tmp_path / "out" / "poses.json").read_text(encoding="utf-8"))["images"]
    assert [entry[name] for name in ("coarse_pose_3d", "kept_patches", "patches")] == [None] * 3
    assert entry["pose_2d"] == lifted[0].pose_2d.tolist()
    assert entry["box"] == lifted[0].box.tolist()
    height, width = read_image(tmp_path / "out" / "a.png").shape[:2]
    assert width < 1.5 * height  # two panels, not four


def test_arrays_on_disk(pipeline, inputs, tmp_path: Path) -> None:
    paths, poses = inputs
    lifted = lift_images(pipeline, paths, poses)
    assert write_results(lifted, tmp_path / "out", pictures=False, format="npz") == tmp_path / "out" / "poses.npz"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["poses.npz"]
    with np.load(tmp_path / "out" / "poses.npz", allow_pickle=False) as file:
        arrays = dict(file)
    assert arrays["image"].tolist() == [str(path) for path in paths]
    assert arrays["joint_names"].tolist() == list(JOINT_NAMES)
    for name in ("pose_2d", "box", "crop_matrix", "pose_3d", "coarse_pose_3d"):
        np.testing.assert_array_equal(arrays[name], [getattr(result, name) for result in lifted])
    assert arrays["units"].item() == "metres"
    assert arrays["axes"].item() == "camera: x right, y down, z forward; relative to the pelvis"
    assert arrays["picture"].tolist() == ["", "", ""]
    assert arrays["kept_patches"].tolist() == [KEPT] * 3
    assert arrays["patches"].tolist() == [3072] * 3
    write_results(lifted[:2], tmp_path / "drawn", format="npz")
    with np.load(tmp_path / "drawn" / "poses.npz", allow_pickle=False) as file:
        assert file["picture"].tolist() == ["a.png", "a-2.png"]
    write_results(lift_images(ContextPipeline(), paths, poses), tmp_path, pictures=False, format="npz")
    with np.load(tmp_path / "poses.npz", allow_pickle=False) as file:
        assert not {"coarse_pose_3d", "kept_patches", "patches"} & set(file)
    write_results([], tmp_path / "none", format="npz")
    with np.load(tmp_path / "none" / "poses.npz", allow_pickle=False) as file:
        assert file["pose_3d"].shape == (0, 17, 3)
    with pytest.raises(ValueError, match="^write_results: format must be one of json, npz, got 'csv'$"):
        write_results(lifted, tmp_path, format="csv")
