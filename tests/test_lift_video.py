from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from marked_person import ContextPipeline, MarkerModel, expected_pose, picture, write_video

from liftbyimage import draw, lift_video, models
from liftbyimage.data import JOINT_NAMES
from liftbyimage.data.pose_file import ImagePose
from liftbyimage.draw_video import draw_frame
from liftbyimage.lift_video import (
    Frame,
    LiftedFrame,
    Video,
    is_video,
    open_video,
    read_frames,
    write_video_results,
)

# The person walks to the right, is away for two frames, and comes back elsewhere.
PLACES: list[tuple[int, int] | None] = [
    *((30 + 8 * step, 40) for step in range(7)),
    None,
    None,
    *((120 - 8 * step, 50) for step in range(4)),
]
SEEN = [at is not None for at in PLACES]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "walk.avi", PLACES)


@pytest.fixture(scope="module")
def lifted(clip: Path) -> list[LiftedFrame]:
    return list(lift_video.lift_video(ContextPipeline(), read_frames(clip), MarkerModel()))


def _refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def _is_seen(image: np.ndarray) -> bool:
    """Whether the person's squares are in a picture."""
    return bool((image[..., 1] > 150).any())


@pytest.mark.parametrize(("name", "fourcc"), [("a.avi", "MJPG"), ("a.mp4", "mp4v")])
def test_reads_frames_and_their_times(tmp_path: Path, name: str, fourcc: str) -> None:
    path = write_video(tmp_path / name, PLACES[:4], fourcc, fps=20)
    assert open_video(path) == Video(path, 20.0, 4)
    frames = list(read_frames(path))
    assert [frame.number for frame in frames] == [0, 1, 2, 3]
    np.testing.assert_allclose([frame.time for frame in frames], [0, 0.05, 0.1, 0.15], atol=1e-6)
    for frame, at in zip(frames, PLACES, strict=False):
        assert np.abs(frame.image.astype(int) - picture(at)).mean() < 8  # RGB, lossy
    [part] = read_frames(path, 2, 3)
    assert part.number == 2
    np.testing.assert_array_equal(part.image, frames[2].image)
    assert part.time == frames[2].time
    assert [frame.number for frame in read_frames(path, 3)] == [3]


def test_follows_the_person(clip: Path, lifted: list[LiftedFrame]) -> None:
    assert [each.pose is not None for each in lifted] == SEEN
    assert [each.pose_3d is not None for each in lifted] == SEEN
    for each, at in zip(lifted, PLACES, strict=True):
        if at is not None:
            np.testing.assert_allclose(each.pose.keypoints, expected_pose(at), atol=4)  # a heatmap pixel is 6 px here
            assert each.pose_3d.shape == (17, 3)
            assert each.pose_3d.dtype == np.float32
            assert (each.pose_3d[0] == 0).all()
            assert np.isfinite(each.pose_3d).all()


def test_where_it_looks(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[np.ndarray] = []
    find_pose = lift_video.find_pose

    def spy(model: Any, image: np.ndarray, box: Any) -> ImagePose | None:
        looked.append(np.asarray(box))
        return find_pose(model, image, box)

    monkeypatch.setattr(lift_video, "find_pose", spy)

    def lift(**options: Any) -> list[LiftedFrame]:
        looked.clear()
        return list(lift_video.lift_video(ContextPipeline(), read_frames(clip), MarkerModel(), **options))

    poses = [each.pose for each in lift()]
    for number, box in enumerate(looked):
        last = poses[number - 1] if number else None
        np.testing.assert_array_equal(box, [-0.5, -0.5, 239.5, 199.5] if last is None else last.box)
    start = [10, 20, 130, 180]
    poses = [each.pose for each in lift(box=start)]
    np.testing.assert_array_equal(looked[0], start)
    np.testing.assert_array_equal(looked[1], poses[0].box)
    np.testing.assert_array_equal(looked[8], start)  # lost in frame 7

    def detect(image: np.ndarray) -> list[list[float]]:
        return [[0, 0, 240, 190], [0, 0, 3, 3]] if _is_seen(image) else []

    assert [each.pose is not None for each in lift(detect=detect)] == SEEN
    assert len(looked) == sum(SEEN)  # where it detects nobody, nothing is looked into
    assert all(box.tolist() == [0, 0, 240, 190] for box in looked)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_boundaries_do_not_change_poses(clip: Path, lifted: list[LiftedFrame], batch_size: int) -> None:
    pipeline = ContextPipeline()
    again = list(lift_video.lift_video(pipeline, read_frames(clip), MarkerModel(), batch_size=batch_size))
    assert max(pipeline.batches) == min(batch_size, sum(SEEN))
    for a, b in zip(again, lifted, strict=True):
        assert a.frame.number == b.frame.number
        assert (a.pose_3d is None) == (b.pose_3d is None)
        if a.pose_3d is not None:
            np.testing.assert_allclose(a.pose_3d, b.pose_3d, rtol=0, atol=1e-6)


def test_holds_no_more_than_a_batch(clip: Path) -> None:
    """Frames are read as they are asked for, a batch at a time."""
    taken = 0

    def counted() -> Iterator[Frame]:
        nonlocal taken
        for frame in read_frames(clip):
            taken += 1
            yield frame

    stream = lift_video.lift_video(ContextPipeline(), counted(), MarkerModel(), batch_size=4)
    assert taken == 0
    next(stream)
    assert taken == 4
    for _ in range(4):
        next(stream)
    assert taken == 8


def test_numbers_are_kept_and_pictures_let_go(lifted: list[LiftedFrame], clip: Path, tmp_path: Path) -> None:
    kept: list[weakref.ref[np.ndarray]] = []

    def fresh() -> Iterator[LiftedFrame]:
        for each in lifted:
            image = each.frame.image.copy()
            kept.append(weakref.ref(image))
            frame = Frame(each.frame.number, each.frame.time, image)
            del image
            yield LiftedFrame(frame, each.pose, each.pose_3d)
            del frame
            assert sum(reference() is not None for reference in kept) <= 1

    write_video_results(fresh(), open_video(clip), tmp_path)
    assert len(kept) == len(lifted)


def test_lifting_by_image_serves_too(clip: Path) -> None:
    torch.manual_seed(1)
    lifter = models.LiftByImage(models.LiftByImageConfig(dim=32, heads=4))
    pipeline = models.Pipeline(models.TinyEncoder(), lifter)
    first, *_ = lift_video.lift_video(pipeline, read_frames(clip, 0, 2), MarkerModel())
    assert not pipeline.training
    assert first.pose_3d.shape == (17, 3)
    assert (first.pose_3d[0] == 0).all()


def test_json_and_drawing(clip: Path, lifted: list[LiftedFrame], tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    results = write_video_results(lifted, open_video(clip), out)
    assert results == lift_video.VideoResults(out / "poses.json", out / "walk.mp4", 13, 11)
    assert sorted(path.name for path in out.iterdir()) == ["poses.json", "walk.mp4"]
    document = json.loads((out / "poses.json").read_text(encoding="utf-8"))
    assert document["units"] == "metres"
    assert document["axes"] == "camera: x right, y down, z forward; relative to the pelvis"
    assert document["joint_names"] == list(JOINT_NAMES)
    assert document["video"] == str(clip)
    assert document["fps"] == 20
    assert document["drawing"] == "walk.mp4"
    for number, (entry, each) in enumerate(zip(document["frames"], lifted, strict=True)):
        assert list(entry) == ["number", "time", "box", "pose_2d", "confidence", "pose_3d"]
        assert entry["number"] == number
        assert entry["time"] == pytest.approx(number / 20)
        if each.pose is None:
            assert [entry[name] for name in ("box", "pose_2d", "confidence", "pose_3d")] == [None] * 4
        else:
            np.testing.assert_array_equal(np.float32(entry["pose_3d"]), each.pose_3d)
            np.testing.assert_array_equal(entry["pose_2d"], each.pose.keypoints)
            np.testing.assert_array_equal(entry["confidence"], each.pose.confidence)
            np.testing.assert_array_equal(entry["box"], each.pose.box)
    drawn = list(read_frames(out / "walk.mp4"))
    assert len(drawn) == len(lifted)
    assert open_video(out / "walk.mp4").fps == 20
    for frame, each in zip(drawn, lifted, strict=True):
        assert frame.image.shape == (200, 240 + 200, 3)
        pose_2d = None if each.pose is None else each.pose.keypoints
        wanted = draw_frame(each.frame.image, pose_2d, each.pose_3d)
        assert np.abs(frame.image.astype(int) - wanted).mean() < 8  # lossy


def test_npz(clip: Path, lifted: list[LiftedFrame], tmp_path: Path) -> None:
    results = write_video_results(lifted, open_video(clip), tmp_path, drawing=False, format="npz")
    assert results == lift_video.VideoResults(tmp_path / "poses.npz", None, 13, 11)
    assert [path.name for path in tmp_path.iterdir()] == ["poses.npz"]
    with np.load(tmp_path / "poses.npz", allow_pickle=False) as file:
        arrays = dict(file)
    assert {name: (value.shape, value.dtype.kind) for name, value in arrays.items()} == {
        "units": ((), "U"),
        "axes": ((), "U"),
        "joint_names": ((17,), "U"),
        "video": ((), "U"),
        "fps": ((), "f"),
        "drawing": ((), "U"),
        "number": ((13,), "i"),
        "time": ((13,), "f"),
        "box": ((13, 4), "f"),
        "pose_2d": ((13, 17, 2), "f"),
        "confidence": ((13, 17), "f"),
        "pose_3d": ((13, 17, 3), "f"),
    }
    head = [arrays[name].item() for name in ("units", "axes", "video", "fps", "drawing")]
    assert head == ["metres", "camera: x right, y down, z forward; relative to the pelvis", str(clip), 20, ""]
    np.testing.assert_array_equal(np.isfinite(arrays["pose_3d"]).all(axis=(1, 2)), SEEN)
    np.testing.assert_array_equal(np.isnan(arrays["box"]).all(axis=1), np.logical_not(SEEN))
    for row, each in enumerate(lifted):
        if each.pose is not None:
            np.testing.assert_array_equal(arrays["pose_3d"][row], each.pose_3d)
            np.testing.assert_array_equal(arrays["pose_2d"][row], each.pose.keypoints)
    write_video_results(lifted[:2], Video(clip, None, None), tmp_path, format="npz")
    with np.load(tmp_path / "poses.npz", allow_pickle=False) as file:
        assert np.isnan(file["fps"])
        assert file["drawing"].item() == "walk.mp4"


def test_a_failure_leaves_what_was_there(clip: Path, lifted: list[LiftedFrame], tmp_path: Path) -> None:
    for name in ("poses.json", "walk.mp4"):
        (tmp_path / name).write_bytes(b"old")

    def torn() -> Iterator[LiftedFrame]:
        yield from lifted[:5]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_video_results(torn(), open_video(clip), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poses.json", "walk.mp4"]
    assert all((tmp_path / name).read_bytes() == b"old" for name in ("poses.json", "walk.mp4"))


def test_a_drawing_that_cannot_be_written(
    clip: Path, lifted: list[LiftedFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lift_video, "MP4V", -2)
    with _refused(f"video {tmp_path / 'walk.mp4'}: OpenCV cannot write it"):
        write_video_results(lifted, open_video(clip), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_frames_of_several_sizes(clip: Path, lifted: list[LiftedFrame], tmp_path: Path) -> None:
    small = [LiftedFrame(Frame(7, 0.35, np.zeros((100, 80, 3), np.uint8)), None, None)]
    message = f"video {tmp_path / 'walk.mp4'}: frame 7 is drawn at 180×100 px, expected 440×200, as the first"
    with _refused(message):
        write_video_results([*lifted[:7], *small], open_video(clip), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert write_video_results([*lifted[:7], *small], open_video(clip), tmp_path, drawing=False).frames == 8


@pytest.mark.parametrize("room", [5, 0])
def test_a_drawing_that_ends_early(
    clip: Path, lifted: list[LiftedFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    class FullDisk:
        def __init__(self) -> None:
            self.file = writer()
            self.room = room

        def write(self, image: np.ndarray) -> None:
            if self.room:
                self.file.write(image)
                self.room -= 1

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    writer = cv2.VideoWriter
    monkeypatch.setattr(cv2, "VideoWriter", FullDisk)
    (tmp_path / "walk.mp4").write_bytes(b"old")
    with _refused(f"video {tmp_path / 'walk.mp4'}: only {room} of 13 frames could be written: is the disk full?"):
        write_video_results(lifted, open_video(clip), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["walk.mp4"]
    assert (tmp_path / "walk.mp4").read_bytes() == b"old"


def test_the_drawing_never_replaces_the_video(lifted: list[LiftedFrame], tmp_path: Path) -> None:
    own = write_video(tmp_path / "walk.mp4", PLACES[:2], "mp4v")
    before = own.read_bytes()
    results = write_video_results(lifted[:2], open_video(own), tmp_path)
    assert results.drawing == tmp_path / "walk-2.mp4"
    assert own.read_bytes() == before


def test_what_is_a_video(clip: Path, tmp_path: Path) -> None:
    assert is_video(clip)
    assert is_video(tmp_path / "missing.MP4")
    unnamed = tmp_path / "recording"
    unnamed.write_bytes(clip.read_bytes())
    assert is_video(unnamed)
    image, text = tmp_path / "a.png", tmp_path / "a.json"
    assert cv2.imwrite(str(image), picture(None))
    text.write_text("{}")
    assert not any(map(is_video, (image, text, tmp_path, tmp_path / "nowhere")))
    # FFmpeg plays these as a terminal, by their suffix or their contents.
    for name in ("notes.nfo", "notes.txt", "notes.mp4"):
        notes = tmp_path / name
        notes.write_bytes(b"\x1b[31m1 2 3\n4 5 6\x1b[0m\n" * 500)
        assert is_video(notes) == (name == "notes.mp4")
        with _refused(f"video {notes}: not a video that OpenCV can read"):
            open_video(notes)


def test_videos_that_do_not_serve(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    for read in (open_video, lambda path: list(read_frames(path))):
        path.unlink(missing_ok=True)
        with _refused(f"video {path}: no such file"):
            read(path)
        for contents in (b"", b"text" * 100):
            path.write_bytes(contents)
            with _refused(f"video {path}: not a video that OpenCV can read"):
                read(path)
    with _refused(f"video {clip}: has 13 frames, expected more than 13, the first one asked for"):
        list(read_frames(clip, 13, 20))


def test_a_video_torn_in_the_middle_gives_the_frames_before(clip: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.avi"
    torn.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    frames = list(read_frames(torn))
    assert 0 < len(frames) < len(PLACES)


def test_a_video_without_frames(tmp_path: Path) -> None:
    path = tmp_path / "empty.avi"
    whole = write_video(tmp_path / "whole.avi", PLACES[:2]).read_bytes()
    path.write_bytes(whole[: whole.index(b"movi") + 4])
    message = f"video {path}: (not a video that OpenCV can read|holds no frame that OpenCV can read)"
    with pytest.raises(ValueError, match=f"^{message}$"):
        list(read_frames(path))


def test_bad_arguments(clip: Path, lifted: list[LiftedFrame], tmp_path: Path) -> None:
    with _refused("lift_video: batch_size must be at least 1, got 0"):
        next(lift_video.lift_video(ContextPipeline(), [], MarkerModel(), batch_size=0))
    with pytest.raises(TypeError, match=r"^lift_video: batch_size must be a whole number, got 1\.5$"):
        next(lift_video.lift_video(ContextPipeline(), [], MarkerModel(), batch_size=1.5))
    pipeline = ContextPipeline()
    pipeline.lifter.config.num_joints = 16
    with _refused("lift_video: pipeline must lift 17 joints, got one for 16"):
        next(lift_video.lift_video(pipeline, [], MarkerModel()))
    with _refused("write_video_results: format must be one of json, npz, got 'csv'"):
        write_video_results(lifted, open_video(clip), tmp_path, format="csv")
    with _refused("write_video_results: lifted must hold at least one frame, got none"):
        write_video_results([], open_video(clip), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_broken_weights(clip: Path) -> None:
    class Broken(ContextPipeline):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            out = super().forward(*inputs)
            out[1, 5] = torch.nan
            return out

    with _refused("lift_video: the pose of frame 1 is not finite: the weights are broken"):
        list(lift_video.lift_video(Broken(), read_frames(clip), MarkerModel()))


def _rgb(colour: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(colour[1:]), np.uint8).astype(int)


def _where(image: np.ndarray, colour: str) -> np.ndarray:
    """The pixels [N, 2] (x, y) of a colour."""
    rows, columns = np.nonzero(np.abs(image.astype(int) - _rgb(colour)).max(axis=2) < 10)
    return np.stack([columns, rows], axis=1)


def test_a_drawn_frame() -> None:
    image = np.full((400, 300, 3), 80, np.uint8)
    pose_2d = np.stack([np.linspace(50, 250, 17), np.linspace(100, 360, 17)], axis=1)
    pose_2d[13] = 270, 20  # the left wrist, away from the others
    pose_3d = np.zeros((17, 3))
    pose_3d[[1, 2, 3, 14, 15, 16], 0] = -0.4  # the person's right, to the left of the picture
    pose_3d[[4, 5, 6, 11, 12, 13], 0] = 0.4
    pose_3d[[3, 6], 1] = 0.8
    pose_3d[10, 1] = -0.7
    drawn = draw_frame(image, pose_2d, pose_3d)
    assert drawn.shape == (400, 700, 3)
    assert drawn.dtype == np.uint8
    assert np.abs(drawn[20, 270].astype(int) - _rgb(draw.LEFT)).max() < 10
    assert (drawn[380, :40] == 80).all()
    panel = drawn[:, 300:]
    assert (panel[:20] == 255).all()
    right, left = _where(panel, draw.RIGHT), _where(panel, draw.LEFT)
    assert right[:, 0].mean() < 180 < 220 < left[:, 0].mean()
    assert left[:, 1].max() > 260  # the ankles are at the bottom
    assert len(_where(panel, draw.FLOOR)) > 200
    # The far side of a person seen from the camera's right appears more to the right, and higher.
    nearer, farther = pose_3d - [0, 0, 0.3], pose_3d + [0, 0, 0.3]
    near, far = (_where(draw_frame(image, None, pose)[:, 300:], draw.RIGHT).mean(axis=0) for pose in (nearer, farther))
    assert near[0] < far[0]
    assert near[1] > far[1]
    assert (draw_frame(image, None, None)[:, :300] == 80).all()


def test_large_and_odd_pictures_are_drawn_for_encoders() -> None:
    pose = np.zeros((17, 3))
    assert draw_frame(np.zeros((1080, 1920, 3), np.uint8), None, pose).shape == (720, 1280 + 720, 3)
    assert draw_frame(np.zeros((2161, 1215, 3), np.uint8), None, pose).shape == (720, 404 + 720, 3)
    assert draw_frame(np.zeros((101, 33, 3), np.uint8), None, pose).shape == (100, 32 + 100, 3)
    wild = np.full((17, 2), 1e12)
    wild[3] = -1e12
    assert draw_frame(np.zeros((100, 100, 3), np.uint8), wild, pose).shape == (100, 200, 3)
