from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liftbyimage.data import coco_to_h36m
from liftbyimage.data.pose_file import EVERY_IMAGE, read_pose_file

POINTS = np.random.default_rng(0).uniform([100, 50], [300, 650], size=(17, 2)).round(1).tolist()


def _write(folder: Path, content: Any) -> Path:
    path = folder / "poses.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_entries_by_image_name(tmp_path: Path) -> None:
    scored = [[x, y, 0.5] for x, y in POINTS]
    path = _write(tmp_path, {"a.jpg": {"keypoints": POINTS}, "b.jpg": {"keypoints": scored, "box": [1, 2, 3.5, 4]}})
    poses = read_pose_file(path)
    assert list(poses) == ["a.jpg", "b.jpg"]
    np.testing.assert_array_equal(poses["a.jpg"].keypoints, POINTS)
    assert poses["a.jpg"].confidence is None
    np.testing.assert_array_equal(poses["b.jpg"].keypoints, POINTS)
    np.testing.assert_array_equal(poses["b.jpg"].confidence, np.full(17, 0.5))
    np.testing.assert_array_equal(poses["b.jpg"].box, [1, 2, 3.5, 4])


def test_images_are_found_by_path_then_name(tmp_path: Path) -> None:
    moved = (np.array(POINTS) + 7).tolist()
    path = _write(tmp_path, {"a.jpg": {"keypoints": POINTS}, "other/a.jpg": {"keypoints": moved}})
    poses = read_pose_file(path, ["first/a.jpg", Path("other/a.jpg")])
    np.testing.assert_array_equal(poses["first/a.jpg"].keypoints, POINTS)
    np.testing.assert_array_equal(poses["other/a.jpg"].keypoints, moved)


def test_one_entry_serves_every_image(tmp_path: Path) -> None:
    path = _write(tmp_path, {"keypoints": POINTS})
    assert list(read_pose_file(path)) == [EVERY_IMAGE]
    poses = read_pose_file(path, ["x.png", "y.png"])
    assert list(poses) == ["x.png", "y.png"]
    np.testing.assert_array_equal(poses["y.png"].keypoints, POINTS)


def test_coco_order_is_mapped(tmp_path: Path) -> None:
    scored = [[x, y, index / 17] for index, (x, y) in enumerate(POINTS)]
    pose = read_pose_file(_write(tmp_path, {"keypoints": scored, "order": "coco"}))[EVERY_IMAGE]
    expected = coco_to_h36m(np.array(scored))
    np.testing.assert_array_equal(pose.keypoints, expected[:, :2])
    np.testing.assert_array_equal(pose.confidence, expected[:, 2])


def test_default_box_is_the_joints_with_a_margin(tmp_path: Path) -> None:
    points = [[100.0, 50.0]] * 16 + [[200.0, 450.0]]
    box = read_pose_file(_write(tmp_path, {"keypoints": points}))[EVERY_IMAGE].box
    np.testing.assert_allclose(box, [60, 10, 240, 490])
    unseen = [[x, y, 0.9] for x, y in points]
    unseen[3] = [0.0, 0.0, 0.0]
    box = read_pose_file(_write(tmp_path, {"keypoints": unseen}))[EVERY_IMAGE].box
    np.testing.assert_allclose(box, [60, 10, 240, 490])


def _with(index: int, point: Any) -> dict[str, Any]:
    return {"a.jpg": {"keypoints": [*POINTS[:index], point, *POINTS[index + 1 :]]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.jpg": {"keypoints": POINTS[:16]}}, "'a.jpg' has 16 keypoints, expected 17"),
        ({"keypoints": [*POINTS, POINTS[0]]}, "the pose has 18 keypoints, expected 17"),
        ({"keypoints": []}, "the pose has 0 keypoints, expected 17"),
        (_with(3, [float("nan"), 1.0]), "'a.jpg' keypoint 3 (right_ankle) is not finite"),
        (_with(16, [1.0, float("-inf")]), "'a.jpg' keypoint 16 (right_wrist) is not finite"),
        (_with(0, [10**400, 1]), "'a.jpg' keypoint 0 (pelvis) is not finite"),
        (_with(2, [1.0]), "'a.jpg' keypoint 2 (right_knee) must be [x, y] or [x, y, confidence]"),
        (_with(2, [1.0, None]), "'a.jpg' keypoint 2 (right_knee) must be [x, y] or [x, y, confidence]"),
        (_with(2, [True, 1]), "'a.jpg' keypoint 2 (right_knee) must be [x, y] or [x, y, confidence]"),
        (_with(2, 5), "'a.jpg' keypoint 2 (right_knee) must be [x, y] or [x, y, confidence]"),
        (_with(5, [1.0, 2.0, 0.5]), "'a.jpg' has some keypoints with a confidence and some without"),
        (
            {"a.jpg": {"keypoints": "none"}},
            "'a.jpg' has keypoints that are a string, expected a list of 17 points",
        ),
        ({"a.jpg": POINTS}, "'a.jpg' must be an object with \"keypoints\", got a list"),
        ({"a.jpg": {"joints": POINTS}}, "'a.jpg' has no \"keypoints\""),
        (
            {"a.jpg": {"keypoints": POINTS, "order": "mpii"}},
            '\'a.jpg\' has order "mpii", expected "h36m" or "coco"',
        ),
        (
            {"a.jpg": {"keypoints": POINTS, "box": [5, 0, 5, 9]}},
            "'a.jpg' has box [5, 0, 5, 9], expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1",
        ),
        (
            {"a.jpg": {"keypoints": POINTS, "box": [0, 0, 9]}},
            "'a.jpg' has box [0, 0, 9], expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1",
        ),
        (
            {"a.jpg": {"keypoints": [[3, 4]] * 17}},
            "'a.jpg' needs a \"box\": its keypoints span no area to derive one from",
        ),
        (
            {"a.jpg": {"keypoints": [[3 * i, 4, 0] for i in range(17)]}},
            "'a.jpg' needs a \"box\": the confidence of every keypoint is 0",
        ),
        ([1, 2], "expected an object by image file name, got a list"),
        (
            "{oops",
            "not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        ),
        ("[" * 100_000, "not valid JSON (maximum recursion depth exceeded"),
    ],
)
def test_wrong_content_says_what_came(tmp_path: Path, content: Any, message: str) -> None:
    path = _write(tmp_path, content)
    with pytest.raises(ValueError) as error:
        read_pose_file(path)
    if "recursion" in message:  # the wording after this differs between Python versions
        assert str(error.value).startswith(f"pose file {path}: {message}")
    else:
        assert str(error.value) == f"pose file {path}: {message}"


def test_missing_entry_and_missing_file(tmp_path: Path) -> None:
    path = _write(tmp_path, {"a.jpg": {"keypoints": POINTS}})
    with pytest.raises(ValueError) as error:
        read_pose_file(path, ["a.jpg", "pictures/b.jpg"])
    assert str(error.value) == f"pose file {path}: no entry for image 'b.jpg'"
    with pytest.raises(ValueError) as error:
        read_pose_file(tmp_path / "no.json")
    assert str(error.value) == f"pose file {tmp_path / 'no.json'}: no such file"


def test_a_binary_file_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "poses.json"
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match=r"poses\.json: not valid JSON \('utf-8' codec can't decode"):
        read_pose_file(path)


def test_a_misspelled_field_is_refused(tmp_path):
    path = tmp_path / "p.json"
    points = [[float(i), float(i % 5)] for i in range(17)]
    path.write_text(json.dumps({"a.jpg": {"keypoints": points, "ordr": "coco"}}))
    expected = f"""pose file {path}: 'a.jpg' has unknown "ordr", expected "keypoints", "order" and "box\""""
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        read_pose_file(path)


def test_two_pictures_of_one_name_need_an_entry_each(tmp_path):
    path = tmp_path / "p.json"
    entry = {"keypoints": [[float(i), float(i % 5)] for i in range(17)]}
    path.write_text(json.dumps({"a.jpg": entry}))
    expected = f"pose file {path}: one/a.jpg and two/a.jpg share entry 'a.jpg', expected one each, named by path"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        read_pose_file(path, ["one/a.jpg", "two/a.jpg"])
    path.write_text(json.dumps({"one/a.jpg": entry, "two/a.jpg": entry}))
    assert set(read_pose_file(path, ["one/a.jpg", "two/a.jpg"])) == {"one/a.jpg", "two/a.jpg"}


def test_paths_as_written(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    entry = {"keypoints": [[float(i), float(i % 5)] for i in range(17)]}
    for name in ("./a.jpg", "a.jpg"):
        path.write_text(json.dumps({name: entry}))
        assert set(read_pose_file(path, ["./a.jpg"])) == {"./a.jpg"}
    with pytest.raises(TypeError, match=r"^read_pose_file: images must be several files, got one: a\.jpg$"):
        read_pose_file(path, "a.jpg")
