from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from liftbyimage.data import (
    BONES,
    COCO_NAMES,
    FLIP_PAIRS,
    FLIP_PERMUTATION,
    JOINT_NAMES,
    PARENTS,
    coco_to_h36m,
)

POSES = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "pose2sim" / "poses.npz"


def test_tree_reaches_the_pelvis_from_every_joint() -> None:
    assert len(JOINT_NAMES) == len(PARENTS) == len(set(JOINT_NAMES)) == 17
    assert [joint for joint, parent in enumerate(PARENTS) if parent < 0] == [0]
    for joint in range(17):
        steps = 0
        while joint != 0:
            joint, steps = PARENTS[joint], steps + 1
            assert steps <= 5
    assert len(BONES) == 16 and all(PARENTS[child] == parent for parent, child in BONES)


def test_limb_parents_by_name() -> None:
    parent_of = {JOINT_NAMES[child]: JOINT_NAMES[parent] for parent, child in BONES}
    assert parent_of["right_ankle"] == "right_knee" and parent_of["right_hip"] == "pelvis"
    assert parent_of["left_wrist"] == "left_elbow" and parent_of["left_shoulder"] == "thorax"
    assert parent_of["head"] == "nose" and parent_of["nose"] == "thorax" and parent_of["thorax"] == "spine"


def test_flip_pairs_are_left_and_right_of_the_same_joint() -> None:
    for left, right in FLIP_PAIRS:
        assert JOINT_NAMES[left].replace("left_", "right_") == JOINT_NAMES[right]
    assert len(FLIP_PAIRS) == 6
    assert [FLIP_PERMUTATION[joint] for joint in FLIP_PERMUTATION] == list(range(17))
    moved = {joint for joint in range(17) if FLIP_PERMUTATION[joint] != joint}
    assert moved == {joint for pair in FLIP_PAIRS for joint in pair}


def test_coco_map_by_name() -> None:
    coco = np.random.default_rng(0).normal(size=(2, 17, 3))
    h36m = coco_to_h36m(coco)
    by_name = {name: coco[:, index] for index, name in enumerate(COCO_NAMES)}
    got = {name: h36m[:, index] for index, name in enumerate(JOINT_NAMES)}
    for name in set(COCO_NAMES) & set(JOINT_NAMES):
        np.testing.assert_array_equal(got[name], by_name[name])
    np.testing.assert_allclose(got["pelvis"], (by_name["left_hip"] + by_name["right_hip"]) / 2, rtol=1e-14)
    np.testing.assert_allclose(got["thorax"], (by_name["left_shoulder"] + by_name["right_shoulder"]) / 2, rtol=1e-14)
    np.testing.assert_allclose(got["spine"], (got["pelvis"] + got["thorax"]) / 2, rtol=1e-12)
    np.testing.assert_allclose(got["head"], (by_name["left_ear"] + by_name["right_ear"]) / 2, rtol=1e-14)


def test_coco_map_keeps_floating_dtype_and_makes_integers_float64() -> None:
    assert coco_to_h36m(np.zeros((17, 2), np.float32)).dtype == np.float32
    assert coco_to_h36m(np.zeros((17, 2), np.int64)).dtype == np.float64


@pytest.mark.skipif(not POSES.is_file(), reason="shared/data/pose2sim is missing")
def test_coco_map_equals_the_recorded_one() -> None:
    with np.load(POSES, allow_pickle=False) as poses:
        coco, recorded = poses["keypoints_coco"], poses["keypoints_h36m"]
    mapped = coco_to_h36m(coco)
    midpoints = [JOINT_NAMES.index(name) for name in ("pelvis", "spine", "thorax", "head")]
    copied = [joint for joint in range(17) if joint not in midpoints]
    np.testing.assert_array_equal(mapped[:, copied], recorded[:, copied])
    np.testing.assert_array_equal(mapped[..., 2], recorded[..., 2])
    # The file's midpoints were taken before coordinates were rounded to float32: one unit in the last place.
    np.testing.assert_array_max_ulp(mapped[:, midpoints], recorded[:, midpoints], maxulp=1)


@pytest.mark.parametrize("shape", [(16, 2), (17, 4), (17,), (2, 17, 1)])
def test_coco_map_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as error:
        coco_to_h36m(np.zeros(shape))
    assert str(error.value) == (f"coco_to_h36m: keypoints must be [..., 17, 2] or [..., 17, 3], got {list(shape)}")
