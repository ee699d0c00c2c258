from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converted_dataset import human36m_camera, write_human36m, write_pickle
from torch.utils.data import DataLoader

from liftbyimage.data import apply_affine, box_to_crop_matrix, read_image, warp_crop
from liftbyimage.data.human36m import ACTIONS, Human36M
from liftbyimage.data.source import CorruptRecord, ReadableRecords, open_source

SIZE = (64, 48)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 records to train (S1), 8 to test (S9, S11), 2 of each action and subject."""
    return write_human36m(tmp_path_factory.mktemp("h36m"), ("S1", "S9", "S11"))


def _annotations(root: Path, split: str = "train", fps: int = 10) -> dict[str, np.ndarray]:
    with np.load(root / "annotation_body3d" / f"fps{fps}" / f"h36m_{split}.npz") as arrays:
        return dict(arrays)


def _same(record: dict[str, Any], expected: dict[str, Any]) -> None:
    assert record.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(record[name], value)


def _refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def _frames(source: Human36M) -> list[int]:
    return [int(str(source._rows["imgname"][row]).split("_")[-1][:-4]) for row in source._chosen]


def test_a_record_is_its_row_and_its_picture(root: Path) -> None:
    source, rows = Human36M(root, size=SIZE), _annotations(root)
    assert len(source) == 4 and source.size == SIZE
    for index, row in enumerate((0, 2, 4, 6)):
        record, part = source[index], rows["part"][row, :, :2]
        assert {name: np.asarray(value).dtype for name, value in record.items()} == {
            "image": np.uint8,
            "keypoints": np.float32,
            "crop_matrix": np.float64,
            "image_size": np.float32,
            "pose_3d": np.float32,
            "group": np.int64,
        }
        np.testing.assert_array_equal(record["keypoints"], part.astype(np.float32))
        pose = rows["S"][row, :, :3] - rows["S"][row, 0, :3]
        np.testing.assert_array_equal(record["pose_3d"], pose.astype(np.float32))
        matrix = box_to_crop_matrix([*part.min(axis=0), *part.max(axis=0)], SIZE)
        np.testing.assert_array_equal(record["crop_matrix"], matrix)
        picture = read_image(root / "images" / rows["imgname"][row])
        np.testing.assert_array_equal(record["image"], warp_crop(picture, matrix, SIZE))
        assert record["image_size"].tolist() == [160, 128]
        assert source.groups[record["group"]] == ("Directions", "Directions", "WalkDog", "WalkDog")[index]
        inside = apply_affine(record["crop_matrix"], record["keypoints"])
        assert (inside >= -0.5).all() and (inside <= [47.5, 63.5]).all()
    _same(source[-1], source[3])
    with pytest.raises(IndexError):
        source[4]


def test_the_camera_sees_the_keypoints(root: Path) -> None:
    source, rows = Human36M(root, split="test", size=SIZE), _annotations(root, "test")
    for index in range(len(source)):
        row, record = source._chosen[index], source[index]
        subject, camera = str(rows["imgname"][row]).split("/")[0], "54138969"
        pixels = source.cameras[subject, camera].project(record["pose_3d"] + rows["S"][row, 0, :3])
        np.testing.assert_allclose(pixels, record["keypoints"], rtol=0, atol=1e-3)


def test_cameras_are_read_as_written(root: Path, tmp_path: Path) -> None:
    entry = human36m_camera("S5", "55011271")
    entry |= {"k": np.array([[-0.2], [0.25], [-0.003]]), "p": np.array([[-0.001], [0.0014]])}
    write_human36m(tmp_path, ("S5",), frames=1)
    write_pickle(tmp_path / "annotation_body3d" / "cameras.pkl", {("S5", "55011271"): entry})
    (camera,) = Human36M(tmp_path).cameras.values()
    assert camera.distortion.tolist() == [-0.2, 0.25, -0.001, 0.0014, -0.003] and camera.image_size == (160, 128)
    ahead = camera.camera_to_world([0.0, 0.0, 2.0])  # R takes camera axes to the world's, T is where the camera is
    np.testing.assert_allclose(ahead, entry["T"][:, 0] + 2 * entry["R"][:, 2], rtol=0, atol=1e-12)


def test_five_frames_a_second_whatever_the_file_has(tmp_path: Path) -> None:
    write_human36m(tmp_path, ("S1",), actions=("Eating",), frames=5, fps=10)
    slow = Human36M(tmp_path, size=SIZE)
    assert _frames(slow) == [1, 11, 21]
    assert _frames(Human36M(tmp_path, fps=10)) == [1, 6, 11, 16, 21]
    file = tmp_path / "annotation_body3d" / "fps10" / "h36m_train.npz"
    assert _refusal(lambda: Human36M(tmp_path, fps=25)) == f"fps 25: {file} has 10 frames a second"

    write_human36m(tmp_path, ("S1",), actions=("Eating",), frames=23, fps=50, seed=1)
    assert _frames(Human36M(tmp_path, fps=25)) == list(range(1, 24, 2))
    assert _frames(Human36M(tmp_path, fps=50)) == list(range(1, 24))
    full = Human36M(tmp_path, annotations=tmp_path / "annotation_body3d" / "fps50" / "h36m_train.npz")
    assert _frames(full) == [1, 11, 21]
    assert Human36M(tmp_path, size=SIZE).description == slow.description  # the file of 10 stays the first choice
    assert full.description["annotations"] != slow.description["annotations"]
    file.unlink()
    assert Human36M(tmp_path).description == full.description


def test_subjects_split_train_from_test(root: Path) -> None:
    def taken(**options: Any) -> set[str]:
        source = Human36M(root, **options)
        return {str(source._rows["imgname"][row]).split("/")[0] for row in source._chosen}

    assert taken() == taken(split="train") == {"S1"}
    assert taken(split="test") == {"S9", "S11"}
    assert taken(split="test", subjects="S11") == {"S11"} == taken(split="test", subjects=["S11"])
    assert taken(split="test", subjects="S11+S9") == {"S9", "S11"}
    assert len(Human36M(root, split="test", subjects="S9")) == 4
    assert _refusal(lambda: Human36M(root, subjects="S1+S9")) == "subjects must be some of S1, S5, S6, S7, S8, got S9"
    assert (
        _refusal(lambda: Human36M(root, subjects=9)) == "subjects must be some of S1, S5, S6, S7, S8, got 9"
    )  # of a line
    assert _refusal(lambda: Human36M(root, subjects=[])) == "subjects must be some of S1, S5, S6, S7, S8, got none"
    file = root / "annotation_body3d" / "fps10" / "h36m_train.npz"
    assert _refusal(lambda: Human36M(root, subjects="S7+S8")) == f"{file}: no rows of subjects S7, S8"


def test_actions_have_one_spelling_and_two_takes(tmp_path: Path) -> None:
    actions = ("TakingPhoto", "Photo_1", "Directions_2", "Directions", "WalkingTogether_1", "Walking")
    write_human36m(tmp_path, ("S9",), actions=actions, frames=1)
    source = Human36M(tmp_path, split="test", size=SIZE)
    assert source.groups == ("Directions", "Photo", "Walking", "WalkTogether")
    assert [source[index]["group"] for index in range(6)] == [1, 1, 0, 0, 3, 2]
    assert len(ACTIONS) == len(set(ACTIONS)) == 15


def test_the_annotated_box(root: Path) -> None:
    rows = _annotations(root)
    record = Human36M(root, box="annotation", size=SIZE)[1]
    half = 100 * rows["scale"][2]
    matrix = box_to_crop_matrix([*(rows["center"][2] - half), *(rows["center"][2] + half)], SIZE)
    np.testing.assert_allclose(record["crop_matrix"], matrix, rtol=0, atol=1e-12)
    assert not np.array_equal(record["crop_matrix"], Human36M(root, size=SIZE)[1]["crop_matrix"])
    assert _refusal(lambda: Human36M(root, box="both")) == "box must be one of joints, annotation, got 'both'"


@pytest.mark.parametrize("suffix", ["npy", "npz", "named.npz"])
def test_detections_take_the_place_of_the_truth(root: Path, tmp_path: Path, suffix: str) -> None:
    rows = _annotations(root)
    detected = rows["part"].astype(np.float32) + np.arange(8, dtype=np.float32)[:, None, None]
    path = tmp_path / f"cpn.{suffix}"
    if suffix == "npy":
        np.save(path, detected)
    elif suffix == "npz":
        np.savez_compressed(path, detected[..., :2])
    else:
        np.savez(path, keypoints=detected, scores=np.ones(8))
    source, truth = Human36M(root, keypoints=path, size=SIZE), Human36M(root, size=SIZE)
    for index, row in enumerate((0, 2, 4, 6)):
        record = source[index]
        np.testing.assert_array_equal(record.pop("keypoints"), detected[row, :, :2])
        expected = truth[index]
        del expected["keypoints"]
        _same(record, expected)
    assert source.description["keypoints"]["file"] == path.name and truth.description["keypoints"] is None


def test_detections_must_be_aligned(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "cpn.npy"
    for shape in ((7, 17, 2), (8, 16, 2), (8, 17)):
        np.save(path, np.zeros(shape))
        assert _refusal(lambda: Human36M(root, keypoints=path)) == (
            f"keypoints {path}: expected numbers [8, 17, 2 or 3], as many rows as the annotations, "
            f"got float64 {list(shape)}"  # noqa: B023
        )
    assert _refusal(lambda: Human36M(root, keypoints=tmp_path / "sh.npy")) == f"{tmp_path / 'sh.npy'}: no such file"
    np.savez(tmp_path / "two.npz", a=np.zeros((8, 17, 2)), b=np.zeros(8))
    assert _refusal(lambda: Human36M(root, keypoints=tmp_path / "two.npz")) == (
        f"keypoints {tmp_path / 'two.npz'}: expected one array or one called keypoints, got a, b"
    )


def test_a_compressed_file_gives_the_same_records(root: Path, tmp_path: Path) -> None:
    packed = write_human36m(tmp_path, ("S1", "S9", "S11"), save=np.savez_compressed)
    stored, source = Human36M(root, size=SIZE), Human36M(packed, size=SIZE)
    assert len(source) == len(stored)
    for index in range(len(source)):
        _same(source[index], stored[index])


def test_descriptions_tell_record_sets_apart(root: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "cpn.npy", np.zeros((8, 17, 2)))
    options: list[dict[str, Any]] = [
        {},
        {"split": "test"},
        {"split": "test", "subjects": "S9"},
        {"fps": 10},
        {"box": "annotation"},
        {"size": (32, 24)},
        {"keypoints": tmp_path / "cpn.npy"},
    ]
    descriptions = [Human36M(root, **chosen).description for chosen in options]
    assert all(a != b for number, a in enumerate(descriptions) for b in descriptions[:number])
    assert Human36M(root).description == descriptions[0]
    assert Human36M(root, subjects="S8+S1+S5+S6+S7").description == descriptions[0]
    os.utime(tmp_path / "cpn.npy", ns=(0, 0))
    assert Human36M(root, keypoints=tmp_path / "cpn.npy").description != descriptions[-1]


def test_a_missing_part_names_the_layout(tmp_path: Path) -> None:
    file, images = tmp_path / "annotation_body3d" / "fps10" / "h36m_test.npz", tmp_path / "images"
    layout = (
        f"root {tmp_path}: expected a folder with annotation_body3d/fps10/h36m_train.npz and h36m_test.npz "
        "(or fps50/), and images/S1/…, missing "
    )
    assert _refusal(lambda: Human36M(tmp_path, split="test")) == f"{layout}{file}, {images}"
    images.mkdir()
    assert _refusal(lambda: Human36M(tmp_path, split="test")) == f"{layout}{file}"
    assert _refusal(lambda: Human36M(tmp_path, split="val")) == "split must be one of train, test, got 'val'"
    for fps in (0, 3, "5"):
        assert _refusal(lambda: Human36M(tmp_path, fps=fps)) == f"fps must be a divisor of 50, got {fps!r}"  # noqa: B023
    other = tmp_path / "a.npz"
    assert _refusal(lambda: Human36M(tmp_path, split="test", annotations=other)) == f"{layout}{other}"


def test_strange_annotations_are_refused(tmp_path: Path) -> None:
    file = write_human36m(tmp_path, ("S1",)) / "annotation_body3d" / "fps10" / "h36m_train.npz"
    good = _annotations(tmp_path)

    def refusal(**arrays: Any) -> str:
        np.savez(file, **{**good, **arrays})
        return _refusal(lambda: Human36M(tmp_path))

    objects = np.array(good["imgname"], dtype=object)
    assert refusal(imgname=objects) == f"{file}: array 'imgname' holds Python objects, expected numbers or strings"
    assert refusal(S=good["S"][:-1]) == f"{file}: array 'S' must be [8, 17, 4], got [7, 17, 4]"
    assert refusal(part=good["part"][:, :16]) == f"{file}: array 'part' must be [8, 17, 3], got [8, 16, 3]"
    assert refusal(imgname=np.arange(8)) == f"{file}: array 'imgname' must hold text, got int64"
    assert refusal(S=good["S"] > 0) == f"{file}: array 'S' must hold numbers, got bool"
    for name in ("S1/picture.jpg", "S1_Dancing.54138969_000001.jpg"):
        names = np.array([*good["imgname"][:3], name, *good["imgname"][4:]])
        assert refusal(imgname=names) == f"{file}: row 3: '{name}' is not named as its pictures are"
    np.savez(file, part=good["part"])
    assert _refusal(lambda: Human36M(tmp_path)) == f"{file}: expected an array 'imgname', got part"
    np.savez(file, **{name: array[:0] for name, array in good.items()})
    assert _refusal(lambda: Human36M(tmp_path)) == f"{file}: no rows of subjects S1, S5, S6, S7, S8"


def test_names_as_bytes(tmp_path: Path) -> None:
    file = write_human36m(tmp_path, ("S1",)) / "annotation_body3d" / "fps10" / "h36m_train.npz"
    expected, good = Human36M(tmp_path, size=SIZE)[2], _annotations(tmp_path)
    np.savez(file, **{**good, "imgname": good["imgname"].astype("S")})
    _same(Human36M(tmp_path, size=SIZE)[2], expected)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_strange_cameras_are_refused_when_asked_for(tmp_path: Path) -> None:
    file = write_human36m(tmp_path, ("S1",)) / "annotation_body3d" / "cameras.pkl"

    def refusal(value: Any) -> str:
        write_pickle(file, value)
        source = Human36M(tmp_path, size=SIZE)
        assert source[0]["pose_3d"].shape == (17, 3)  # records need no cameras
        return _refusal(lambda: source.cameras)

    assert refusal({("S1", "1"): _Evil(tmp_path / "made")}) == (
        f"{file}: expected a pickle of plain values and arrays, it asks for {os.mkdir.__module__}.mkdir"
    )
    assert not (tmp_path / "made").exists()
    assert refusal([1]) == f"{file}: expected a dict of cameras, got list"
    entry = human36m_camera("S1", "1")
    assert refusal({("S1", "1"): {**entry, "R": np.eye(2)}}).startswith(f"{file}: camera ('S1', '1'): ")
    del entry["k"]
    assert refusal({("S1", "1"): entry}) == f"{file}: camera ('S1', '1') lacks 'k'"
    file.unlink()
    assert _refusal(lambda: Human36M(tmp_path).cameras) == f"{file}: no such file"


def test_a_picture_that_cannot_be_read_is_a_corrupt_record(tmp_path: Path) -> None:
    source = Human36M(write_human36m(tmp_path, ("S1",)), size=SIZE)
    pictures = [tmp_path / "images" / str(source._rows["imgname"][row]) for row in source._chosen]
    pictures[0].unlink()
    pictures[1].write_text("no picture")
    pictures[2].write_bytes(pictures[2].read_bytes()[:1000])
    unreadable = "not an image that OpenCV can read"
    for index, problem in enumerate(("no such file", unreadable, unreadable)):
        with pytest.raises(CorruptRecord) as error:
            source[index]
        assert str(error.value) == f"image {pictures[index]}: {problem}"
    stand_in = ReadableRecords(source)[0]
    assert stand_in["problem"] == f"image {pictures[0]}: no such file"
    np.testing.assert_array_equal(stand_in["keypoints"], source[3]["keypoints"])


def test_a_row_that_is_not_finite_is_a_corrupt_record(tmp_path: Path) -> None:
    file = write_human36m(tmp_path, ("S1",)) / "annotation_body3d" / "fps10" / "h36m_train.npz"
    rows = _annotations(tmp_path)
    rows["part"][0, 3, 1], rows["S"][2, 5, 2], rows["scale"][4], rows["part"][6, :, 0] = np.nan, np.inf, np.nan, 7
    np.savez(file, **rows)

    def problem(index: int, **options: Any) -> str:
        with pytest.raises(CorruptRecord) as error:
            Human36M(tmp_path, size=SIZE, **options)[index]
        return str(error.value)

    assert problem(0) == f"{file}: row 0: the 2D joints are not finite"
    assert problem(1) == f"{file}: row 2: the 3D joints are not finite"
    assert problem(2, box="annotation") == f"{file}: row 4: the corners of the box are not finite"
    assert problem(3).startswith(f"{file}: row 6: the box [7.0, ") and problem(3).endswith("] is empty")
    detected = np.zeros((8, 17, 2))
    detected[4, 0] = np.nan
    np.save(tmp_path / "cpn.npy", detected)
    assert problem(2, keypoints=tmp_path / "cpn.npy") == f"{file}: row 4: the 2D joints are not finite"


def test_a_file_cut_short_under_a_run_gives_corrupt_records(tmp_path: Path) -> None:
    file = write_human36m(tmp_path, ("S1",)) / "annotation_body3d" / "fps10" / "h36m_train.npz"
    source = Human36M(tmp_path, size=SIZE)
    file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(CorruptRecord, match="row 6 cannot be read"):
        source[3]
    file.unlink()
    with pytest.raises(CorruptRecord, match="row 0 cannot be read"):
        source[0]


def test_workers_read_the_same_records(root: Path, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "cpn.npz", _annotations(root, "test")["part"])
    source = Human36M(root, split="test", keypoints=tmp_path / "cpn.npz", size=SIZE)
    expected = [source[index] for index in range(len(source))]
    sent = pickle.loads(pickle.dumps(source))  # as to a spawned worker
    loaded = list(DataLoader(source, batch_size=None, num_workers=2))
    assert len(loaded) == len(sent) == len(expected) == 8
    for index, record in enumerate(expected):
        _same(sent[index], record)
        _same(loaded[index], record)


def test_a_line_opens_it(root: Path) -> None:
    source = open_source(f"human3.6m:{root},split=test,subjects=S9,fps=10,size=64x48")
    assert isinstance(source, Human36M) and len(source) == 8 and source.size == SIZE
    assert _refusal(lambda: Human36M(root, size=(4, 4))) == (
        "size: expected (height, width), each an integer of at least 8, got (4, 4)"
    )
