from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from converted_dataset import K, render_people, write_mpi_inf_3dhp, write_mpi_inf_3dhp_test, write_pickle
from torch.utils.data import DataLoader

from liftbyimage.data import JOINT_NAMES, box_to_crop_matrix, read_image, warp_crop
from liftbyimage.data.mpi_inf_3dhp import MpiInf3dhp
from liftbyimage.data.mpi_inf_3dhp_test import MpiInf3dhpTest
from liftbyimage.data.skeleton import H36M_TO_MPI_INF_3DHP, MPI_INF_3DHP_FLIP_PERMUTATION, MPI_INF_3DHP_ROOT
from liftbyimage.data.source import CorruptRecord, open_source

SIZE = (64, 48)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 records: 3 of S1 Seq1, 3 of S2 Seq2."""
    return write_mpi_inf_3dhp(tmp_path_factory.mktemp("3dhp"))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 records: frames 1, 3 and 4 of TS1 and TS2."""
    return write_mpi_inf_3dhp_test(tmp_path_factory.mktemp("3dhp-test"))


def _same(record: dict[str, Any], expected: dict[str, Any]) -> None:
    assert record.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(record[name], value)


def _refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def _root_relative(joints_3d: np.ndarray) -> np.ndarray:
    return (joints_3d - joints_3d[:1]).astype(np.float32)


# The order of the test set's arrays and of MMPose's files, in the dataset's own names.
THEIRS = (
    *("head_top", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist"),
    *("right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "root", "spine", "head"),
)
RENAMED = {"head_top": "head", "neck": "thorax", "root": "pelvis", "head": "nose"}


def test_joints_are_matched_by_name() -> None:
    ours = [RENAMED.get(name, name) for name in THEIRS]
    assert [ours[joint] for joint in MpiInf3dhp.joint_order] == list(JOINT_NAMES)
    assert [JOINT_NAMES[joint] for joint in H36M_TO_MPI_INF_3DHP] == ours
    assert THEIRS[MPI_INF_3DHP_ROOT] == "root"


def test_the_order_agrees_with_the_mirror() -> None:
    other = {"left": "right", "right": "left"}
    for joint, name in enumerate(THEIRS):
        side, _, part = name.partition("_")
        mirrored = f"{other[side]}_{part}" if side in other else name
        assert THEIRS[MPI_INF_3DHP_FLIP_PERMUTATION[joint]] == mirrored


def test_a_training_record_is_in_human36m_order(root: Path) -> None:
    source, people = MpiInf3dhp(root, size=SIZE), render_people(6)
    assert len(source) == 6 and source.groups == ("S1 Seq1", "S2 Seq2")
    for index in range(6):
        record, joints = source[index], people.joints_2d[index]
        np.testing.assert_array_equal(record["keypoints"], joints.astype(np.float32))
        np.testing.assert_array_equal(record["pose_3d"], _root_relative(people.joints_3d[index]))
        matrix = box_to_crop_matrix([*joints.min(axis=0), *joints.max(axis=0)], SIZE)
        np.testing.assert_array_equal(record["crop_matrix"], matrix)
        picture = read_image(root / "images" / f"S{index // 3 + 1}_Seq{index // 3 + 1}_Cam0_{index % 3 + 1:06d}.jpg")
        np.testing.assert_array_equal(record["image"], warp_crop(picture, matrix, SIZE))
        assert record["group"] == index // 3 and record["image_size"].tolist() == [160, 128]


def test_training_cameras(root: Path) -> None:
    source, people = MpiInf3dhp(root, size=SIZE), render_people(6)
    assert list(source.cameras) == ["S1_Seq1_Cam0", "S2_Seq2_Cam0"]
    camera = source.cameras["S1_Seq1_Cam0"]
    pixels = camera.project(source[0]["pose_3d"] + people.joints_3d[0, 0])
    np.testing.assert_allclose(pixels, source[0]["keypoints"], rtol=0, atol=1e-3)
    # The calibration's extrinsics take the world to the camera's axes.
    np.testing.assert_allclose(camera.world_to_camera([1.0, 2.0, 3.0]), [1.1, 3.2, 2.0], rtol=0, atol=1e-12)
    assert camera.image_size == (160, 128) and not camera.distortion.any()


def test_subjects_and_every_nth_frame(root: Path) -> None:
    assert MpiInf3dhp(root, subjects="S2").groups == ("S2 Seq2",)
    assert len(MpiInf3dhp(root, subjects=["S1"])) == 3
    every = MpiInf3dhp(root, every=2, size=SIZE)
    assert len(every) == 4
    for index, row in enumerate((0, 2, 3, 5)):
        _same(every[index], MpiInf3dhp(root, size=SIZE)[row])
    assert _refusal(lambda: MpiInf3dhp(root, every=0)) == "every must be an integer, 1 or more, got 0"
    assert _refusal(lambda: MpiInf3dhp(root, split="val")) == "split must be one of train, test, got 'val'"
    assert _refusal(lambda: MpiInf3dhp(root, subjects="TS1")) == (
        "subjects must be some of S1, S2, S3, S4, S5, S6, S7, S8, got TS1"
    )


def test_the_converted_test_set_and_the_other_folder_name(tmp_path: Path) -> None:
    write_mpi_inf_3dhp(tmp_path, frames=2)
    (tmp_path / "annotations").rename(tmp_path / "annotation_body3d")
    assert len(MpiInf3dhp(tmp_path)) == 4
    with np.load(tmp_path / "annotation_body3d" / "mpi_inf_3dhp_train.npz") as arrays:
        rows = dict(arrays)
    names = [f"TS{1 + row // 2}_{1 + row % 2:06d}.jpg" for row in range(4)]
    for old, new in zip(rows["imgname"], names, strict=True):
        (tmp_path / "images" / old).rename(tmp_path / "images" / new)
    np.savez(tmp_path / "annotation_body3d" / "mpi_inf_3dhp_test_valid.npz", **{**rows, "imgname": np.array(names)})
    entry = {"c": K[:2, 2:], "f": np.diag(K)[:2, None], "w": 160, "h": 128, "name": "test_cam_1"}
    write_pickle(tmp_path / "annotation_body3d" / "cameras_test.pkl", {"TS1": entry})
    source = MpiInf3dhp(tmp_path, split="test", size=SIZE)
    assert source.groups == ("TS1", "TS2") and [source[index]["group"] for index in range(4)] == [0, 0, 1, 1]
    pixels = source.cameras["TS1"].project(source[0]["pose_3d"] + rows["S"][0, MPI_INF_3DHP_ROOT, :3])
    np.testing.assert_allclose(pixels, source[0]["keypoints"], rtol=0, atol=1e-3)


def test_missing_training_files_name_the_layout(tmp_path: Path) -> None:
    file, images = tmp_path / "annotations" / "mpi_inf_3dhp_train.npz", tmp_path / "images"
    assert _refusal(lambda: MpiInf3dhp(tmp_path)) == (
        f"root {tmp_path}: expected a folder with annotations/mpi_inf_3dhp_train.npz and mpi_inf_3dhp_test_valid.npz, "
        f"and images/S1_Seq1_Cam0_000001.jpg, …, missing {file}, {images}"
    )


def test_a_test_record(shipped: Path) -> None:
    source = MpiInf3dhpTest(shipped, sequences="TS1+TS2", size=SIZE)
    assert len(source) == 6 and source.groups == ("TS1", "TS2")
    true_size = MpiInf3dhpTest(shipped, sequences=["TS1", "TS2"], universal=False, size=SIZE)
    for index in range(6):
        group, frame = index // 3, (0, 2, 3)[index % 3]
        people, record = render_people(4, seed=group), source[index]
        joints, joints_3d = people.joints_2d[frame], people.joints_3d[frame]
        np.testing.assert_array_equal(record["keypoints"], joints.astype(np.float32))
        np.testing.assert_allclose(record["pose_3d"], 1.25 * _root_relative(joints_3d), rtol=0, atol=1e-6)
        np.testing.assert_allclose(true_size[index]["pose_3d"], _root_relative(joints_3d), rtol=0, atol=1e-6)
        matrix = box_to_crop_matrix([*joints.min(axis=0), *joints.max(axis=0)], SIZE)
        np.testing.assert_array_equal(record["crop_matrix"], matrix)
        picture = read_image(shipped / f"TS{group + 1}" / "imageSequence" / f"img_{frame + 1:06d}.jpg")
        np.testing.assert_array_equal(record["image"], warp_crop(picture, matrix, SIZE))
        assert record["group"] == group and record["image_size"].tolist() == [160, 128]
    _same(source[-1], source[5])
    with pytest.raises(IndexError):
        source[6]


def test_the_evaluated_joints() -> None:
    left_out = {"pelvis", "spine", "nose"}
    names = [JOINT_NAMES[joint] for joint in MpiInf3dhpTest.evaluated_joints]
    assert names == [name for name in JOINT_NAMES if name not in left_out] and len(names) == 14


def test_valid_frames_as_a_row_or_a_column(tmp_path: Path) -> None:
    write_mpi_inf_3dhp_test(tmp_path, ("TS5",), frames=5, invalid=(1, 4))
    file = tmp_path / "TS5" / "annot_data.mat"
    column = MpiInf3dhpTest(tmp_path, sequences="TS5", size=SIZE)
    assert column._frame.tolist() == [2, 3, 5]
    with h5py.File(file, "r+") as annotations:
        valid = annotations["valid_frame"][()]
        del annotations["valid_frame"]
        annotations["valid_frame"] = valid.T.astype(np.uint8)
    row = MpiInf3dhpTest(tmp_path, sequences="TS5", size=SIZE)
    for index in range(3):
        _same(row[index], column[index])


def test_test_set_descriptions_tell_record_sets_apart(shipped: Path) -> None:
    options: list[dict[str, Any]] = [
        {"sequences": "TS1"},
        {"sequences": "TS2"},
        {"sequences": "TS1+TS2"},
        {"sequences": "TS1", "universal": False},
        {"sequences": "TS1", "size": (32, 24)},
    ]
    descriptions = [MpiInf3dhpTest(shipped, **chosen).description for chosen in options]
    assert all(a != b for number, a in enumerate(descriptions) for b in descriptions[:number])
    assert MpiInf3dhpTest(shipped, sequences=["TS1"]).description == descriptions[0]


def test_a_missing_part_of_the_test_set_names_the_layout(shipped: Path, tmp_path: Path) -> None:
    layout = "expected a folder with TS1/annot_data.mat, TS1/imageSequence/img_000001.jpg, … to TS6, missing "
    folder = tmp_path / "TS3"
    assert _refusal(lambda: MpiInf3dhpTest(tmp_path, sequences="TS3")) == (
        f"root {tmp_path}: {layout}{folder / 'annot_data.mat'}, {folder / 'imageSequence'}"
    )
    assert _refusal(lambda: MpiInf3dhpTest(shipped)).startswith(f"root {shipped}: {layout}{shipped / 'TS3'}")
    assert _refusal(lambda: MpiInf3dhpTest(shipped, sequences="TS7")) == (
        "sequences must be some of TS1, TS2, TS3, TS4, TS5, TS6, got TS7"
    )
    assert _refusal(lambda: MpiInf3dhpTest(shipped, universal="no")) == "universal must be true or false, got 'no'"


def test_strange_test_annotations_are_refused(tmp_path: Path) -> None:
    file = write_mpi_inf_3dhp_test(tmp_path, ("TS1",)) / "TS1" / "annot_data.mat"
    with h5py.File(file, "r+") as annotations:
        joints = annotations["annot2"][()]
        del annotations["annot2"]
        annotations["annot2"] = joints[:, :, :16]
    assert _refusal(lambda: MpiInf3dhpTest(tmp_path, sequences="TS1")) == (
        f"{file}: annot2 must be [4, 1, 17, 2], got [4, 1, 16, 2]"
    )
    with h5py.File(file, "r+") as annotations:
        del annotations["annot2"]
    assert _refusal(lambda: MpiInf3dhpTest(tmp_path, sequences="TS1")).startswith(
        f"{file}: not an annotation file of the test set ("
    )
    file.write_text("MATLAB 5.0 MAT-file")
    assert _refusal(lambda: MpiInf3dhpTest(tmp_path, sequences="TS1")).startswith(
        f"{file}: not an annotation file of the test set ("
    )


def test_without_h5py_one_sentence(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert _refusal(lambda: MpiInf3dhpTest(shipped, sequences="TS1")) == (
        'the test set of MPI-INF-3DHP needs h5py: pip install -e ".[data]"'
    )


def test_corrupt_test_records(tmp_path: Path) -> None:
    file = write_mpi_inf_3dhp_test(tmp_path, ("TS2",)) / "TS2" / "annot_data.mat"
    with h5py.File(file, "r+") as annotations:
        annotations["univ_annot3"][2, 0, 5, 1] = np.nan
    picture = tmp_path / "TS2" / "imageSequence" / "img_000004.jpg"
    picture.unlink()
    source = MpiInf3dhpTest(tmp_path, sequences="TS2", size=SIZE)
    for index, problem in (
        (1, f"{file}: frame 3: the 3D joints are not finite"),
        (2, f"image {picture}: no such file"),
    ):
        with pytest.raises(CorruptRecord) as error:
            source[index]
        assert str(error.value) == problem
    assert source[0]["group"] == 0


@pytest.mark.parametrize("kind", ["train", "test"])
def test_workers_read_the_same_records(root: Path, shipped: Path, kind: str) -> None:
    line = f"mpi-inf-3dhp:{root}" if kind == "train" else f"mpi-inf-3dhp-test:{shipped},sequences=TS1+TS2"
    source = open_source(f"{line},size=64x48")
    expected = [source[index] for index in range(len(source))]
    sent = pickle.loads(pickle.dumps(source))  # as to a spawned worker
    loaded = list(DataLoader(source, batch_size=None, num_workers=2))
    assert len(loaded) == len(sent) == len(expected) == 6
    for index, record in enumerate(expected):
        _same(sent[index], record)
        _same(loaded[index], record)
