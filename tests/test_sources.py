"""The contract of every source that needs no download, `open_source`, and records that cannot be read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from acclaim_files import write_mocap
from torch.utils.data import DataLoader

from liftbyimage.data import apply_affine
from liftbyimage.data.pose2sim import Pose2SimPeople
from liftbyimage.data.source import CorruptRecord, ReadableRecords, Source, check_source, open_source

POSE2SIM = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "pose2sim"
needs_pose2sim = pytest.mark.skipif(not POSE2SIM.is_dir(), reason="shared/data/pose2sim is missing")

LINES = {
    "synthetic": "synthetic,count=70,seed=3,noise=0,size=64x48",
    "laboratory": "synthetic,count=9,noise=0,background=laboratory,size=48x64",
    "mocap": "mocap:{mocap},clips=07_02,views=3,noise=0,size=64x48",
    "pose2sim": f"pose2sim:{POSE2SIM},instants=odd,cameras=1+3",
}
ALL = ["synthetic", "laboratory", "mocap", pytest.param("pose2sim", marks=needs_pose2sim)]
RENDERED = ALL[:3]


@pytest.fixture(scope="module")
def mocap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mocap(tmp_path_factory.mktemp("mocap"), {"07_01": 30, "07_02": 25})


@pytest.fixture
def line(request: pytest.FixtureRequest, mocap: Path) -> str:
    return LINES[request.param].format(mocap=mocap)


def assert_equal_records(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# --- the contract


@pytest.mark.parametrize("line", ALL, indirect=True)
def test_records_have_the_contracts_form(line: str) -> None:
    source = open_source(line)
    assert isinstance(source, Source)
    height, width = source.size
    expected = {
        "image": ((height, width, 3), np.uint8),
        "keypoints": ((17, 2), np.float32),
        "crop_matrix": ((2, 3), np.float64),
        "image_size": ((2,), np.float32),
        "pose_3d": ((17, 3), np.float32),
    }
    if "pose2sim" not in line:
        expected["mask"] = ((height, width), np.bool_)
    seen = set()
    for index in range(len(source)):
        record = dict(source[index])
        group = record.pop("group")
        assert type(group) is int and 0 <= group < len(source.groups)
        seen.add(group)
        assert {name: (value.shape, value.dtype) for name, value in record.items()} == expected
        assert not record["pose_3d"][0].any() and 0.5 < np.ptp(record["pose_3d"], axis=0).max() < 2.5
        assert record["image"].std() > 2
    assert len(seen) > 1 or len(source.groups) == 1
    assert all(isinstance(name, str) for name in source.groups) and len(set(source.groups)) == len(source.groups)


@pytest.mark.parametrize("line", ALL, indirect=True)
def test_crop_matrix_maps_the_keypoints_onto_the_crop(line: str) -> None:
    source = open_source(line)
    height, width = source.size
    for index in range(0, len(source), 3):
        record = source[index]
        x, y = apply_affine(record["crop_matrix"], record["keypoints"]).T
        assert (x > -0.5).all() and (x < width - 0.5).all() and (y > -0.5).all() and (y < height - 0.5).all()
        assert np.ptp(y) > 0.3 * height or np.ptp(x) > 0.3 * width
        assert (record["keypoints"] < record["image_size"]).all()
        if "mask" in record:
            on_body = record["mask"][np.rint(y).astype(int), np.rint(x).astype(int)]
            assert on_body.mean() > 0.75  # wrists and the nose are a pixel or two wide


@pytest.mark.parametrize("line", RENDERED, indirect=True)
def test_one_camera_with_a_centred_axis_projects_the_pose_to_the_keypoints(line: str) -> None:
    """From x (Z + c) = f X + a and y (Z + c) = f Y + b: linear in f, a, b, c, and solved by no other pose."""
    source = open_source(line)
    for index in range(0, len(source), 2):
        record = source[index]
        x, y = (record["keypoints"] - (record["image_size"].astype(np.float64) - 1) / 2).T
        X, Y, Z = record["pose_3d"].astype(np.float64).T
        none, one = np.zeros(17), np.ones(17)
        rows = np.concatenate([np.stack([X, one, none, -x], 1), np.stack([Y, none, one, -y], 1)])
        solution, *_ = np.linalg.lstsq(rows, np.concatenate([x * Z, y * Z]), rcond=None)
        focal, a, b, depth = solution
        assert 900 < focal < 1600 and 2.5 < depth < 6.5
        projected = np.stack([focal * X + a, focal * Y + b], 1) / (Z + depth)[:, None]
        np.testing.assert_allclose(projected, np.stack([x, y], 1), rtol=0, atol=0.02)


@pytest.mark.parametrize("line", ALL, indirect=True)
def test_an_index_gives_the_same_record_whenever_and_wherever(line: str) -> None:
    source = open_source(line)
    last = len(source) - 1
    expected = {index: source[index] for index in (0, 5, last)}
    again = open_source(line)
    copied = pickle.loads(pickle.dumps(source))
    for index in (last, 5, 0):
        assert_equal_records(again[index], expected[index])
        assert_equal_records(copied[index], expected[index])
    assert_equal_records(source[-1], expected[last])
    assert again.description == source.description and copied.groups == source.groups and copied.size == source.size
    with pytest.raises(IndexError):
        source[len(source)]


@pytest.mark.parametrize("line", ALL, indirect=True)
def test_a_record_belongs_to_its_reader(line: str) -> None:
    source = open_source(line)
    for value in source[1].values():
        if isinstance(value, np.ndarray):
            value[...] = 0
    assert source[1]["image"].any() and source[1]["keypoints"].any() and source[1]["crop_matrix"].any()
    assert_equal_records(source[1], open_source(line)[1])


@pytest.mark.parametrize("line", RENDERED, indirect=True)
def test_without_a_cache_the_same_records(line: str) -> None:
    source = open_source(line)
    for index in (0, 4, len(source) - 1):
        assert_equal_records(open_source(f"{line},cache=false")[index], source[index])


@pytest.mark.parametrize("line", RENDERED, indirect=True)
def test_what_was_rendered_is_not_sent_along(line: str) -> None:
    source = open_source(line)
    before = len(pickle.dumps(source))
    source[0]
    assert len(pickle.dumps(source)) == before


@pytest.mark.parametrize("line", ALL, indirect=True)
def test_workers_give_the_same_batches(line: str) -> None:
    source = open_source(line)
    alone, workers = (list(DataLoader(ReadableRecords(source), batch_size=8, num_workers=count)) for count in (0, 2))
    assert len(alone) == len(workers) == -(-len(source) // 8)
    for one, other in zip(alone, workers, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            same = one[name] == other[name] if name == "problem" else torch.equal(one[name], other[name])
            assert same, name
    assert torch.cat([batch["index"] for batch in workers]).tolist() == list(range(len(source)))
    assert workers[0]["image"].dtype == torch.uint8 and workers[0]["pose_3d"].shape[1:] == (17, 3)
    assert workers[0]["crop_matrix"].dtype == torch.float64 and workers[0]["group"].dtype == torch.int64


@pytest.mark.parametrize("line", ALL, indirect=True)
def test_descriptions_are_plain_and_complete(line: str, mocap: Path) -> None:
    description = open_source(line).description
    assert json.loads(json.dumps(description)) == description
    same = {"size": "64x48"} if "64x48" in line else {}
    assert open_source(line, **same, **({} if "pose2sim" in line else {"cache": False})).description == description


@pytest.mark.parametrize(
    "change",
    ["count=71", "seed=4", "noise=1", "swap_rate=0.1", "size=48x48", "motion=walking", "background=laboratory"],
)
def test_other_synthetic_people_have_other_descriptions(change: str) -> None:
    assert open_source(f"{LINES['synthetic']},{change}").description != open_source(LINES["synthetic"]).description


@pytest.mark.parametrize(
    "change",
    [
        "clips=07_01",
        "clips=07_02+07_01",
        "fps=20",
        "views=2",
        "seed=1",
        "noise=1",
        "size=48x48",
        "background=laboratory",
    ],
)
def test_other_captured_people_have_other_descriptions(change: str, mocap: Path) -> None:
    line = LINES["mocap"].format(mocap=mocap)
    assert open_source(f"{line},{change}").description != open_source(line).description


def test_other_clips_under_the_same_name_have_another_description(tmp_path: Path) -> None:
    line = f"mocap:{write_mocap(tmp_path, {'07_01': 13})},size=8x8"
    before = open_source(line).description
    write_mocap(tmp_path, {"07_01": 14})
    assert open_source(line).description != before


# --- the Pose2Sim crops


@needs_pose2sim
def test_pose2sim_records_by_instant_and_camera() -> None:
    everything = Pose2SimPeople(POSE2SIM)
    assert len(everything) == 96 and everything.groups == ("cam01", "cam02", "cam03", "cam04")
    assert [everything[i]["group"] for i in (0, 23, 24, 95)] == [0, 0, 1, 3]
    assert everything[0]["image_size"].tolist() == [1080, 1920] and everything[95]["image_size"].tolist() == [
        1088,
        1920,
    ]
    even, odd = (Pose2SimPeople(POSE2SIM, instants=instants, cameras=[2]) for instants in ("even", "odd"))
    assert even.groups == odd.groups == ("cam03",) and len(even) == len(odd) == 12
    for i in range(12):
        assert_equal_records({**everything[48 + 2 * i], "group": 0}, even[i])
        assert_equal_records({**everything[49 + 2 * i], "group": 0}, odd[i])
    assert open_source(f"pose2sim:{POSE2SIM},cameras=0").groups == ("cam01",)
    described = [source.description for source in (everything, even, odd)]
    assert all(described.count(description) == 1 for description in described)


@needs_pose2sim
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("instants=third", "instants: expected one of all, even, odd, got 'third'"),
        ("cameras=4", "cameras: expected different numbers from 0 to 3, such as 0+1, got 4"),
        ("cameras=0+0", "cameras: expected different numbers from 0 to 3, such as 0+1, got '0+0'"),
        ("cameras=", "cameras: expected different numbers from 0 to 3, such as 0+1, got ''"),
    ],
)
def test_pose2sim_bad_options(options: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        open_source(f"pose2sim:{POSE2SIM},{options}")
    assert str(error.value) == message


@needs_pose2sim
def test_pose2sim_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("poses.npz", "features.npz"):
        (tmp_path / name).symlink_to(POSE2SIM / name)
    crops = tmp_path / "crops"
    crops.mkdir()
    (crops / "001.jpg").write_bytes(b"not a picture")
    cv2.imwrite(str(crops / "002.jpg"), np.zeros((20, 30, 3), np.uint8))
    (crops / "003.jpg").symlink_to(POSE2SIM / "crops" / "003.jpg")
    source = Pose2SimPeople(tmp_path)
    problems = [
        f"image {crops / '000.jpg'}: no such file",
        f"image {crops / '001.jpg'}: not an image that OpenCV can read",
        f"image {crops / '002.jpg'}: expected 192 px wide and 256 px high, got 30 and 20",
    ]
    for index, problem in enumerate(problems):
        with pytest.raises(CorruptRecord) as error:
            source[index]
        assert str(error.value) == problem
        stand_in = ReadableRecords(source)[index]
        assert stand_in["problem"] == problem
        np.testing.assert_array_equal(stand_in["image"], source[3]["image"])


def test_pose2sim_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        open_source(f"pose2sim:{tmp_path / 'nowhere'}")
    assert str(error.value) == (
        f"root {tmp_path / 'nowhere'}: expected a folder with poses.npz, features.npz and crops/000.jpg, "
        "001.jpg, …, missing poses.npz, features.npz, crops"
    )


# --- lines


def test_lines_give_options_of_their_own_kind(mocap: Path) -> None:
    source = open_source("synthetic,count=5,noise=0.5,background=laboratory", size=(16, 24), count=99)
    assert len(source) == 5 and source.size == (16, 24)
    assert source.description["noise"] == 0.5 and source.description["background"] == "laboratory"
    assert open_source(f"mocap:{mocap},clips=07_01").groups == ("07_01",)
    assert open_source(f"mocap:{mocap},clips=null").groups == ("07_01", "07_02")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "imagenet",
            "source must be one of synthetic, mocap, pose2sim, human3.6m, mpi-inf-3dhp, mpi-inf-3dhp-test, "
            "pictures, got 'imagenet'",
        ),
        (
            "",
            "source must be one of synthetic, mocap, pose2sim, human3.6m, mpi-inf-3dhp, mpi-inf-3dhp-test, "
            "pictures, got ''",
        ),
        (
            "synthetic:/data",
            "source 'synthetic:/data': synthetic reads no folder, got '/data'",
        ),
        ("mocap", "source 'mocap': mocap needs its folder, as in mocap:FOLDER"),
        ("pose2sim:,cameras=0", "source 'pose2sim:,cameras=0': pose2sim needs its folder, as in pose2sim:FOLDER"),
        ("synthetic,count", "source 'synthetic,count': options must be OPTION=VALUE, got 'count'"),
        ("synthetic,=3", "source 'synthetic,=3': options must be OPTION=VALUE, got '=3'"),
        ("synthetic,count=3,", "source 'synthetic,count=3,': options must be OPTION=VALUE, got ''"),
        (
            "synthetic,colour=red",
            "source 'synthetic,colour=red': synthetic has no option 'colour', "
            "only count, seed, background, motion, noise, swap_rate, size, cache",
        ),
        (
            "pose2sim:a,root=b",
            "source 'pose2sim:a,root=b': pose2sim has no option 'root', only instants, cameras",
        ),
        ("synthetic,count=many", "source 'synthetic,count=many': count: expected an integer, got str"),
        ("synthetic,count=0", "count: expected at least 1, got 0"),
        ("synthetic,cache=maybe", "source 'synthetic,cache=maybe': cache: expected true or false, got 'maybe'"),
        ("synthetic,noise=loud", "noise: expected a finite number, 0 or more, got 'loud'"),
        ("synthetic,size=128", "size: expected (height, width), each an integer of at least 8, got 128"),
        ("synthetic,size=128x", "size: expected (height, width), each an integer of at least 8, got '128x'"),
        ("synthetic,size=4x128", "size: expected (height, width), each an integer of at least 8, got '4x128'"),
    ],
)
def test_refused_lines(line: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        open_source(line)
    assert str(error.value) == message


# --- records that cannot be read


class Numbers(Source):
    """Records 0, 1, …, some of them corrupt."""

    groups, size, description = ("all",), (8, 8), {}

    def __init__(self, count: int, corrupt: set[int]) -> None:
        self.count, self.corrupt = count, corrupt

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.corrupt:
            raise CorruptRecord(f"record {index} is torn")
        return {"value": index}


def test_the_next_readable_record_stands_in() -> None:
    records = ReadableRecords(Numbers(6, {1, 2, 5}))
    assert [records[i] for i in range(6)] == [
        {"value": 0, "index": 0, "problem": ""},
        {"value": 3, "index": 1, "problem": "record 1 is torn"},
        {"value": 3, "index": 2, "problem": "record 2 is torn"},
        {"value": 3, "index": 3, "problem": ""},
        {"value": 4, "index": 4, "problem": ""},
        {"value": 0, "index": 5, "problem": "record 5 is torn"},
    ]
    assert len(records) == 6


def test_strict_reading_raises() -> None:
    records = ReadableRecords(Numbers(3, {1}), strict=True)
    assert records[0] == {"value": 0, "index": 0, "problem": ""}
    with pytest.raises(CorruptRecord, match="^record 1 is torn$"):
        records[1]


def test_nothing_readable_is_an_error() -> None:
    with pytest.raises(ValueError, match="^none of the 3 records can be read: record 2 is torn$"):
        ReadableRecords(Numbers(3, {0, 1, 2}))[2]


def test_other_errors_are_not_hidden() -> None:
    class Broken(Numbers):
        def __getitem__(self, index: int) -> dict[str, Any]:
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        ReadableRecords(Broken(3, set()))[0]


class Given(Source):
    """One record, put together by a test."""

    def __init__(self, groups=("all",), size=(64, 48), **changes):
        self.groups, self.size, self.description = groups, size, {}
        self.changes = changes

    def __len__(self):
        return 1

    def __getitem__(self, index):
        record = {
            "image": np.zeros((64, 48, 3), np.uint8),
            "keypoints": np.zeros((17, 2), np.float32),
            "crop_matrix": np.zeros((2, 3)),
            "image_size": np.ones(2, np.float32),
            "pose_3d": np.zeros((17, 3), np.float32),
            "mask": np.zeros((64, 48), bool),
            "group": 0,
        }
        return {name: value for name, value in {**record, **self.changes}.items() if value is not None}


def test_a_source_as_it_must_be_is_taken():
    assert check_source("data", Given())["group"] == 0
    assert "pose_3d" not in check_source("data", Given(pose_3d=None, mask=None))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (Given(size=(128, 96)), "data: image must be uint8 [128, 96, 3], got uint8 [64, 48, 3]"),
        (Given(image=np.zeros((64, 48, 3))), "data: image must be uint8 [64, 48, 3], got float64 [64, 48, 3]"),
        (
            Given(keypoints=np.zeros((16, 2), np.float32)),
            "data: keypoints must be float32 [17, 2], got float32 [16, 2]",
        ),
        (
            Given(image_size=None),
            "data: records must hold image_size, "
            "got image, keypoints, crop_matrix, pose_3d, mask, group, index, problem",
        ),
        (Given(group="all"), "data: group must be a number below 1, got 'all'"),
        (Given(group=1), "data: group must be a number below 1, got 1"),
        (Given(group=None), "data: group must be a number below 1, got None"),
        (
            Given(pose_3d=np.full((17, 3), 900, np.float32)),
            "data: pose_3d must be metres from the pelvis, got a joint at 900",
        ),
    ],
)
def test_a_source_that_breaks_the_contract_is_refused(source, text):
    with pytest.raises(ValueError) as caught:
        check_source("data", source)
    assert str(caught.value) == text


def test_a_source_without_groups_is_refused():
    class Bare(Given):
        def __init__(self):
            self.size, self.description, self.changes = (64, 48), {}, {}

    with pytest.raises(ValueError) as caught:
        check_source("data", Bare())
    assert str(caught.value) == "data must have groups, as a data.source.Source has, got a Bare"
