"""Lifting the person of a video: frames are read, lifted in batches and drawn as they come, never all in memory."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike

from liftbyimage._files import require_file, require_utf8, write_atomically
from liftbyimage.data.pose_file import ImagePose
from liftbyimage.data.skeleton import JOINT_NAMES
from liftbyimage.lift import HEAD, check_batch_size, check_format, check_pipeline, crop_person, lift_crops, results_name
from liftbyimage.models import Pipeline
from liftbyimage.pose_model import Detector, PoseModel, find_pose, where_to_look

SUFFIXES = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"))
USUAL_FPS = 25.0  # of a drawing whose video states none
MP4V = cv2.VideoWriter_fourcc(*"mp4v")
TEXT = cv2.VideoWriter_fourcc(*"ansi")  # the codec by which FFmpeg takes a text file for a video of a terminal


@dataclass(frozen=True)
class Video:
    """A video file that opens."""

    path: Path
    fps: float | None  # None: not stated
    frames: int | None  # as the file states it, which may be an estimate; None: not stated


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a video."""

    number: int  # from 0
    time: float  # s
    image: np.ndarray  # uint8 [H, W, 3] RGB


@dataclass(frozen=True, eq=False)
class LiftedFrame:
    """A frame and the person in it; `pose` and `pose_3d` are None where nobody was seen."""

    frame: Frame
    pose: ImagePose | None
    pose_3d: np.ndarray | None  # float32 [17, 3], metres, root-relative, camera axes


@dataclass(frozen=True)
class VideoResults:
    """What `write_video_results` wrote."""

    poses: Path
    drawing: Path | None
    frames: int
    people: int  # frames with a pose


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a video: by its suffix, or because OpenCV opens it as one, not as a picture or text."""
    path = Path(path)
    require_utf8(f"file {path}", path)
    if path.suffix.lower() in SUFFIXES:
        return True
    return path.is_file() and not cv2.haveImageReader(str(path)) and _is_open(_capture(path))


def open_video(path: str | os.PathLike[str]) -> Video:
    """What a video file says of itself.

    Raises:
        ValueError: there is no such file, or OpenCV cannot read it.
    """
    path = Path(path)
    capture = _open(path)
    fps, frames = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    capture.release()
    return Video(path, fps if 0 < fps < np.inf else None, int(frames) if 0 < frames < 2**53 else None)


def _capture(path: Path) -> cv2.VideoCapture:
    require_utf8(f"video {path}", path)
    # What FFmpeg prints about a broken file is said here in one sentence; it reads this when it is first used.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    return cv2.VideoCapture(str(path))


def _is_open(capture: cv2.VideoCapture) -> bool:
    return capture.isOpened() and int(capture.get(cv2.CAP_PROP_FOURCC)) != TEXT


def _open(path: Path) -> cv2.VideoCapture:
    require_file(f"video {path}", path)
    capture = _capture(path)
    if not _is_open(capture):
        raise ValueError(f"video {path}: not a video that OpenCV can read")
    return capture


def read_frames(path: str | os.PathLike[str], first: int = 0, end: int | None = None) -> Iterator[Frame]:
    """The frames first … end − 1 of a video (to its last without `end`), upright, one at a time.

    A frame that cannot be decoded ends the video, as it does for OpenCV.

    Raises:
        ValueError: there is no such file, OpenCV cannot read it, or it holds none of these frames.
    """
    path = Path(path)
    capture = _open(path)
    number = 0
    try:
        while (end is None or number < end) and capture.grab():
            if number >= first:
                time = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                ok, image = capture.retrieve()
                if not ok:
                    break
                yield Frame(number, time, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
            number += 1
    finally:
        capture.release()
    if number == 0:
        raise ValueError(f"video {path}: holds no frame that OpenCV can read")
    if number <= first:
        raise ValueError(f"video {path}: has {number} frames, expected more than {first}, the first one asked for")


def lift_video(
    pipeline: Pipeline,
    frames: Iterable[Frame],
    pose_model: PoseModel,
    *,
    box: ArrayLike | None = None,
    detect: Detector | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 8,
) -> Iterator[LiftedFrame]:
    """Follow the person through a video and lift it in every frame.

    In the first frame the pose model looks into `box`, or at the whole frame; then into the box of the last frame's
    pose, and where that frame showed nobody, as in the first again. With a detector it looks into the largest box of
    each frame. What is lifted is the crop of the frame's own joints (`find_pose`).

    Args:
        frames: as `read_frames` gives them; `batch_size` of them are in memory at a time.
        pose_model: sees one frame at a time, on its own device.
        box: [4], x0, y0, x1, y1 px of the first frame.
        detect: image uint8 [H, W, 3] RGB → boxes [N, 4] px.
        device: where the pipeline computes. It is moved there, in evaluation mode.
        batch_size: crops per pass, at least 1. Poses agree for any to rounding.

    Yields:
        One LiftedFrame per frame, in their order.

    Raises:
        TypeError, ValueError: the pipeline is for another skeleton or predicts what is not finite; what the pose model
            or the detector gives is of another kind; a bad `batch_size`.
    """
    check_batch_size("lift_video", batch_size)
    check_pipeline("lift_video", pipeline)
    pipeline = pipeline.to(device).eval()
    follower = Follower(pose_model, box, detect)
    batch: list[tuple[Frame, ImagePose | None]] = []
    for frame in frames:
        batch.append((frame, follower.find(frame.image)))
        if len(batch) == batch_size:
            yield from _lift_batch(pipeline, batch, device)
            batch = []  # let go of its pictures before the next are read
    yield from _lift_batch(pipeline, batch, device)


class Follower:
    """Finds the person in one frame after the other; `lift_video` says where it looks."""

    def __init__(self, pose_model: PoseModel, box: ArrayLike | None = None, detect: Detector | None = None) -> None:
        self._pose_model, self._box, self._detect = pose_model, box, detect
        self._last: ImagePose | None = None

    def find(self, image: np.ndarray) -> ImagePose | None:
        """The pose in the next frame, uint8 [H, W, 3] RGB, or None if nobody is seen."""
        if self._last is not None and self._detect is None:
            look: np.ndarray | None = self._last.box
        else:
            look = where_to_look(image, self._box, self._detect)
        self._last = None if look is None else find_pose(self._pose_model, image, look)
        return self._last


def _lift_batch(
    pipeline: Pipeline, batch: list[tuple[Frame, ImagePose | None]], device: str | torch.device
) -> Iterator[LiftedFrame]:
    crops = [crop_person(frame.image, pose, f"frame {frame.number}") for frame, pose in batch if pose is not None]
    poses = iter(lift_crops("lift_video", pipeline, crops, device).pose_3d if crops else ())
    for frame, pose in batch:
        yield LiftedFrame(frame, pose, None if pose is None else next(poses))


def write_video_results(
    lifted: Iterable[LiftedFrame],
    video: Video,
    out_dir: str | os.PathLike[str],
    drawing: bool = True,
    format: str = "json",
) -> VideoResults:
    """Write the poses of a video and `<stem>.mp4`, its frames with both skeletons; every file atomically.

    Where `<stem>.mp4` would take the place of the video itself, it is `<stem>-2.mp4`; another file of that name is
    replaced. Of each frame only its numbers (about 1.6 KB) stay in memory.

    Args:
        lifted: as `lift_video` yields it.
        format: "json" writes `poses.json`, one line per frame, null for what a frame without a person lacks; "npz"
            writes `poses.npz`, arrays over the N frames that `np.load(allow_pickle=False)` reads: number, time, box,
            pose_2d, confidence, pose_3d (NaN where there is nobody); also fps (NaN if not stated) and the strings
            video, drawing ("" without), units, axes and joint_names.

    Raises:
        ValueError: another format; frames drawn at several sizes; or OpenCV cannot write the drawing, or not all of it.
    """
    check_format("write_video_results", format)
    out_dir = Path(out_dir)
    drawn = _drawing_path(video.path, out_dir) if drawing else None
    rows: list[dict[str, Any]] = []
    with nullcontext(None) if drawn is None else drawing_file(drawn, video.fps or USUAL_FPS) as write:
        for each in lifted:
            rows.append(_row(each))
            if write is not None:
                write(draw_lifted(each), each.frame.number)
        if not rows:
            raise ValueError("write_video_results: lifted must hold at least one frame, got none")
    path = out_dir / results_name(format)
    head = {**HEAD, "video": str(video.path), "fps": video.fps, "drawing": None if drawn is None else drawn.name}
    if format == "npz":
        write_atomically(path, lambda file: np.savez(file, **_arrays(head, rows)))
    else:
        write_atomically(path, lambda file: _write_json(file, head, rows))
    return VideoResults(path, drawn, len(rows), sum(row["pose_3d"] is not None for row in rows))


def _row(lifted: LiftedFrame) -> dict[str, Any]:
    frame, pose = lifted.frame, lifted.pose
    return {
        "number": frame.number,
        "time": frame.time,
        "box": None if pose is None else pose.box,
        "pose_2d": None if pose is None else pose.keypoints,
        "confidence": None if pose is None else pose.confidence,
        "pose_3d": lifted.pose_3d,
    }


def _write_json(file: BinaryIO, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    # Frame by frame: the text of an hour is a few hundred MB.
    file.write(json.dumps(head, ensure_ascii=False)[:-1].encode() + b',\n"frames": [')
    for count, row in enumerate(rows):
        values = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}
        file.write((",\n" if count else "\n").encode() + json.dumps(values, allow_nan=False).encode())
    file.write(b"\n]}\n")


def _arrays(head: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    joints = len(JOINT_NAMES)
    shapes = {"box": (4,), "pose_2d": (joints, 2), "confidence": (joints,), "pose_3d": (joints, 3)}
    missing = {"fps": np.nan, "drawing": ""}  # None would be an object, which np.load refuses
    arrays = {name: np.array(missing[name] if value is None else value) for name, value in head.items()}
    arrays |= {name: np.array([row[name] for row in rows]) for name in ("number", "time")}
    for name, shape in shapes.items():
        dtype = np.float32 if name == "pose_3d" else np.float64
        arrays[name] = np.full((len(rows), *shape), np.nan, dtype)
        for row, values in zip(arrays[name], rows, strict=True):
            if values[name] is not None:
                row[:] = values[name]
    return arrays


def _drawing_path(video: Path, out_dir: Path) -> Path:
    path = out_dir / f"{video.stem}.mp4"
    # Casefolded: on some file systems A.MP4 and a.mp4 are one file.
    own = video.resolve().parent == out_dir.resolve() and video.name.casefold() == path.name.casefold()
    return path.with_stem(f"{path.stem}-2") if own else path


def draw_lifted(lifted: LiftedFrame) -> np.ndarray:
    """The frame with both skeletons, as `draw_frame` draws it."""
    from liftbyimage.draw_video import draw_frame  # matplotlib's colours, which a caller without pictures need not load

    return draw_frame(lifted.frame.image, None if lifted.pose is None else lifted.pose.keypoints, lifted.pose_3d)


@contextmanager
def drawing_file(path: Path, fps: float) -> Iterator[Callable[[np.ndarray, int], None]]:
    """Takes pictures, RGB, and their frames' numbers into a temporary file, which becomes `path` once all are in it.

    Without a picture no file is written.
    """
    require_utf8(f"video {path}", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter()
    sizes: list[tuple[int, int]] = []  # (width, height) px, of each picture
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        temporary = Path(folder) / path.name

        def write(picture: np.ndarray, number: int) -> None:
            size = (picture.shape[1], picture.shape[0])
            if not writer.isOpened() and not writer.open(str(temporary), MP4V, fps, size):
                raise ValueError(f"video {path}: OpenCV cannot write it")
            if sizes and size != sizes[0]:  # OpenCV would leave the frame out without a word
                given, wanted = ("{}×{}".format(*size) for size in (size, sizes[0]))
                raise ValueError(
                    f"video {path}: frame {number} is drawn at {given} px, expected {wanted}, as the first"
                )
            writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
            sizes.append(size)

        try:
            yield write
        finally:
            writer.release()
        # A disk that fills up ends a file early, and OpenCV says nothing.
        written = max(0, int(_capture(temporary).get(cv2.CAP_PROP_FRAME_COUNT)))  # negative if it does not open
        if written != len(sizes):
            raise ValueError(f"video {path}: only {written} of {len(sizes)} frames could be written: is the disk full?")
        if sizes:
            os.replace(temporary, path)
