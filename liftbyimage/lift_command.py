"""`liftbyimage lift`: what its options mean together, and the way from files to files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from liftbyimage._files import require_file
from liftbyimage.data.pose_file import read_pose_file
from liftbyimage.lift import FORMATS, LiftedImage, lift_images, picture_names, results_name, write_results
from liftbyimage.lift_video import (
    Video,
    VideoResults,
    is_video,
    lift_video,
    open_video,
    read_frames,
    write_video_results,
)
from liftbyimage.models import Pipeline
from liftbyimage.pose_model import find_poses, load_detector, load_pose_model


@dataclass(frozen=True)
class Options:
    """The options of the command as they were written, and what a page says of the lifter."""

    files: list[Path]
    pose: Path | None
    pose_model: Path | None
    box: str | None
    detector: str | None
    out: Path
    format: str
    pictures: bool
    frames: str | None
    html: bool
    note: str


class Lifted(NamedTuple):
    """What was done: for a person, and for a program."""

    sentence: str
    report: dict[str, Any]  # plain values and paths


def run(options: Options, load_pipeline: Callable[[], Pipeline], console: Console) -> Lifted:
    """Lift what was asked for, and say so. No pose is written before all of them are known.

    Raises:
        ValueError: one sentence on options that do not go together or files that do not serve.
    """
    videos = [path for path in options.files if is_video(path)]
    for path in options.files:
        require_file(f"{'video' if path in videos else 'image'} {path}", path)
    if videos and len(options.files) > 1:
        raise ValueError(f"expected pictures or one video, got the video {videos[0]} among {len(options.files)} files")
    _check(options, bool(videos))
    if videos:
        return _run_video(options, videos[0], load_pipeline, console)
    return _run_pictures(options, load_pipeline)


def _check(options: Options, video: bool) -> None:
    if options.format not in FORMATS:
        raise ValueError(f"--format: expected {' or '.join(FORMATS)}, got {options.format}")
    if options.pose is not None and options.pose_model is not None:
        raise ValueError("--pose and --pose-model both give the 2D poses: choose one")
    if options.pose_model is None:
        if video:
            raise ValueError("a video needs --pose-model FILE, which finds the 2D pose in every frame")
        if options.pose is None:
            raise ValueError("no 2D poses: give --pose FILE, or --pose-model FILE to find them")
        for name, value in (("--box", options.box), ("--detector", options.detector)):
            if value is not None:
                raise ValueError(f"{name} says where a pose model looks: it needs --pose-model")
    if options.frames is not None and not video:
        raise ValueError("--frames chooses frames of a video, got pictures")
    if options.html:
        if video:
            raise ValueError("--html shows people of pictures, got a video")
        from liftbyimage.viewer import check_people

        check_people("--html", len(options.files))
    written = options.out / results_name(options.format)
    if options.pose is not None and written.resolve() == options.pose.resolve():
        raise ValueError(f"--out {options.out} would overwrite the pose file {options.pose}: choose another folder")


def _run_pictures(options: Options, load_pipeline: Callable[[], Pipeline]) -> Lifted:
    images = options.files
    if options.pose is not None:
        poses = read_pose_file(options.pose, images)
        pipeline = load_pipeline()
    else:
        assert options.pose_model is not None
        where = where_to_look(options.box, options.detector)
        pose_model = load_pose_model(options.pose_model)
        pipeline = load_pipeline()
        poses = find_poses(pose_model, images, **where)
    results = lift_images(pipeline, images, poses)
    written = write_results(results, options.out, options.pictures, options.format)
    people = "1 person" if len(results) == 1 else f"{len(results)} people"
    sentence = f"Lifted {people}: {written}{' and a picture of each beside it' if options.pictures else ''}."
    pictures = [options.out / name for name in picture_names(results, options.out)] if options.pictures else []
    report: dict[str, Any] = {"people": len(results), "poses": written, "pictures": pictures}
    if options.html:
        report["page"] = _write_page(options, pipeline, results)
        sentence += f" {report['page']} shows them in a browser."
    return Lifted(sentence, report)


def _write_page(options: Options, pipeline: Pipeline, results: Sequence[LiftedImage]) -> Path:
    from liftbyimage import viewer  # matplotlib, which a run without the page need not load

    path = options.out / viewer.FILE
    viewer.write_viewer(path, pipeline, viewer.people_of(results, pipeline), "Lifted people", options.note)
    return path


def _run_video(options: Options, path: Path, load_pipeline: Callable[[], Pipeline], console: Console) -> Lifted:
    assert options.pose_model is not None
    video = open_video(path)
    first, end = frame_range(options.frames)
    where = where_to_look(options.box, options.detector)
    pose_model = load_pose_model(options.pose_model)
    lifted = lift_video(load_pipeline(), read_frames(path, first, end), pose_model, **where)
    total = stated_frames(video, first, end)
    shown = track(lifted, "Lifting", total=total, console=console, disable=not console.is_terminal)
    results = write_video_results(shown, video, options.out, options.pictures, options.format)
    counts = {"people": results.people, "frames": results.frames, "stated_frames": total}
    return Lifted(_summary(results, video, total), {**counts, "poses": results.poses, "drawing": results.drawing})


def _summary(results: VideoResults, video: Video, expected: int | None) -> str:
    drawing = "" if results.drawing is None else f" and {results.drawing}"
    text = f"Lifted the person in {results.people} of {results.frames} frames: {results.poses}{drawing}."
    if results.people < results.frames:
        text += " Nobody was seen in the others."
    if is_short(results.frames, expected):
        text += f" {video.path} states {expected} frames, but no more could be read."
    return text


def stated_frames(video: Video, first: int, end: int | None) -> int | None:
    """How many of the frames first … end − 1 a video states to have."""
    return None if video.frames is None else max(0, min(video.frames, end or video.frames) - first)


def is_short(read: int, expected: int | None) -> bool:
    """Whether frames are missing of those that a video's head states, which may be an estimate, a little off."""
    return expected is not None and read < 0.98 * expected - 1


def where_to_look(box: str | None, detector: str | None) -> dict[str, Any]:
    """What `--box` and `--detector` say, as `box` and `detect`."""
    if box is not None and detector is not None:
        raise ValueError("--box and --detector both say where to look: choose one")
    return {"box": _box(box), "detect": None if detector is None else load_detector(detector)}


def _box(text: str | None) -> np.ndarray | None:
    if text is None:
        return None
    try:
        box = np.array([float(number) for number in text.split(",")])
    except ValueError:
        box = np.empty(0)
    if box.shape != (4,) or not np.isfinite(box).all() or not (box[:2] < box[2:]).all():
        raise ValueError(f"--box: expected x0,y0,x1,y1 in px with x0 < x1 and y0 < y1, got {text}")
    return box


def frame_range(text: str | None) -> tuple[int, int | None]:
    """What `--frames` says: the first frame and the one after the last, None for the end of the video."""
    if text is None:
        return 0, None
    first, colon, end = text.partition(":")
    if not (colon and all(part == "" or part.isdecimal() for part in (first, end))):
        raise ValueError(f"--frames: expected A:B, frame numbers from 0 of which either may be left out, got {text}")
    if end and int(end) <= int(first or 0):
        raise ValueError(f"--frames: expected A:B with A < B, got {text}")
    return int(first or 0), int(end) if end else None
