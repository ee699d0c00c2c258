"""`liftbyimage live`: what its options mean together, where frames come from and where they are shown."""

from __future__ import annotations

import base64
import html
import os
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.live import Live as Display
from rich.table import Table

from liftbyimage._files import require_file
from liftbyimage.data.skeleton import BONES, JOINT_NAMES
from liftbyimage.draw_video import draw_picture
from liftbyimage.html import asset, page
from liftbyimage.lift_command import frame_range, is_short, stated_frames, where_to_look
from liftbyimage.lift_video import (
    USUAL_FPS,
    Frame,
    LiftedFrame,
    draw_lifted,
    drawing_file,
    is_video,
    open_video,
    read_frames,
)
from liftbyimage.live import Camera, Live, Measured, Newest, Stage, Stopwatch, optimized, timed
from liftbyimage.live_server import LiveServer
from liftbyimage.models import Pipeline
from liftbyimage.pose_model import load_pose_model
from liftbyimage.predict import chosen_device

JPEG_QUALITY = 80
TABLE_INTERVAL = 0.25  # s


@dataclass(frozen=True)
class Options:
    """The options of the command as they were written."""

    source: str
    pose_model: Path | None
    box: str | None
    detector: str | None
    device: str
    precision: str
    optimize: bool
    port: int | None
    browser: bool
    page: bool
    unpaced: bool
    out: Path | None
    frames: str | None


@dataclass(frozen=True)
class Result:
    """What was shown and measured, and why it ended."""

    source: str
    device: str
    precision: str
    optimized: bool
    measured: Measured
    dropped: int
    ended: str
    error: Exception | None  # what ended it, if one did
    drawing: Path | None

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "device": self.device,
            "precision": self.precision,
            "optimized": self.optimized,
            **self.measured.as_json(),
            "dropped": self.dropped,
            "ended": self.ended,
            "drawing": None if self.drawing is None else str(self.drawing),
        }


class _Source:
    """A camera or a video: what it is called, its frames, and why they end.

    Raises:
        ValueError: it does not open.
    """

    def __init__(self, text: str, frames: str | None, paced: bool) -> None:
        self._camera = Camera(int(text) if text.isdecimal() else text) if _is_camera(text) else None
        self._video = None if self._camera else open_video(text)
        self._first, self._end = frame_range(frames)
        self._paced = paced
        self._read = 0
        self._newest: Newest | None = None
        self.name = self._camera.name if self._camera else f"video {text}"
        self.waits_for_a_page = self._camera is None
        self.fps = (self._camera or self._video).fps or USUAL_FPS

    def frames(self, watch: Stopwatch) -> Iterable[Frame]:
        """The frames to lift; their reading is booked in `watch`."""
        if self._camera is not None:
            self._newest = Newest(self._camera.frames(partial(watch.beside, "read")), watch, name=self.name)
            return self._newest
        read = self._counted(read_frames(self._video.path, self._first, self._end))
        if not self._paced:
            return timed(read, partial(watch.stage, "read"))
        read = timed(read, partial(watch.beside, "read"))
        self._newest = Newest(read, watch, name=self.name, fps=self.fps, patience=None)
        return self._newest

    def _counted(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        for frame in frames:
            self._read += 1
            yield frame

    @property
    def dropped(self) -> int:
        return self._newest.dropped if self._newest else 0

    def slot(self, frame: Frame) -> int:
        """The frame's place in a drawing of this source's rate."""
        return round(frame.time * self.fps) if self._camera else frame.number - self._first

    def ended(self) -> str:
        """Why there are no more frames."""
        stated = stated_frames(self._video, self._first, self._end) if self._video else None
        if is_short(self._read, stated):
            return f"{self.name} states {stated} frames, but no more could be read"
        return "the video ended" if self._end is None else "the frames asked for ended"


def _is_camera(text: str) -> bool:
    return text.isdecimal() or text.startswith("/dev/")


def run(options: Options, load_pipeline: Callable[[], Pipeline], demonstration: str, console: Console) -> Result:
    """Show what was asked for until it ends or is stopped.

    Args:
        demonstration: a sentence on the model for the page, or "".
        console: for the address of the page and the figures of now.

    Raises:
        ValueError: one sentence on options that do not go together or files that do not serve. What ends a loop that
            has lifted frames is returned instead.
    """
    _check(options)
    source = _Source(options.source, options.frames, paced=not options.unpaced)
    looks = where_to_look(options.box, options.detector)
    device = chosen_device("live", options.device, options.precision)
    with ExitStack() as stack:
        server: LiveServer | None = None
        if options.page:
            document = _document(source.name, _settings(options, str(device)), demonstration)
            server = stack.enter_context(LiveServer(document, options.port or 0))
        pose_model = load_pose_model(options.pose_model, device)
        pipeline = load_pipeline()
        if options.optimize:
            pipeline = optimized(pipeline, device, options.precision)
        live = Live(pipeline, pose_model, device=device, precision=options.precision, **looks)
        live.warm_up()
        ended, error = _loop(live, source, server, options, console)
        measured = live.watch.measured()
        if server is not None:
            server.publish({"ended": ended, "table": _table_for_page(measured, source.dropped)})
    if error is not None and not measured.frames:
        raise error
    drawing = options.out if measured.frames else None
    return Result(
        options.source,
        str(device),
        options.precision,
        options.optimize,
        measured,
        source.dropped,
        ended,
        error,
        drawing,
    )


def _loop(
    live: Live, source: _Source, server: LiveServer | None, options: Options, console: Console
) -> tuple[str, Exception | None]:
    """Run until it is over, and say why."""
    with ExitStack() as stack:
        sinks: list[Callable[[LiftedFrame], object]] = []
        if options.out is not None:
            write = stack.enter_context(drawing_file(options.out, source.fps))
            sinks.append(_ConstantRate(write, source.slot))
        if server is not None:
            sinks.append(_Publisher(server, live.watch, source))
        # The ways out are caught here, so that the drawing of the frames before is kept.
        try:
            if server is not None:
                _announce(server, source, options.browser, console)
            if console.is_terminal:
                now = Display(
                    get_renderable=lambda: _table("Over the last 100 frames", live.watch.measured_recently()),
                    console=console,
                    refresh_per_second=2,
                    transient=True,
                )
                stack.enter_context(now)
            live.run(source.frames(live.watch), (lambda lifted: [sink(lifted) for sink in sinks]) if sinks else None)
        except KeyboardInterrupt:
            return "stopped", None
        except (ValueError, TypeError, OSError) as error:
            return str(error), error
    return source.ended(), None


def _check(options: Options) -> None:
    if options.pose_model is None:
        raise ValueError("live needs --pose-model FILE, which finds the 2D pose in every frame")
    if not options.page and options.port is not None:
        raise ValueError("--port is of the page, which --no-page leaves out")
    if _is_camera(options.source):
        for name, given in (("--frames", options.frames is not None), ("--unpaced", options.unpaced)):
            if given:
                raise ValueError(f"{name} is for a video file, got the camera {options.source}")
    else:
        _check_video(Path(options.source))
    if options.out is not None:
        if options.out.suffix.lower() != ".mp4":
            raise ValueError(f"--out: expected a file ending in .mp4, got {options.out}")
        if options.out.is_dir():
            raise ValueError(f"--out {options.out}: expected a file, got a folder")
        if options.out.resolve() == Path(options.source).resolve():
            raise ValueError(f"--out {options.out} would overwrite the video: choose another file")


def _check_video(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path}: no such video; expected the number of a camera, as 0, its path, or a video file")
    require_file(f"video {path}", path)
    if not is_video(path) and cv2.haveImageReader(str(path)):
        raise ValueError(f"{path}: is a picture, which `liftbyimage lift` lifts; live takes a camera or a video")


class _ConstantRate:
    """Writes pictures into a drawing of constant rate: one stays until the next one's place."""

    def __init__(self, write: Callable[[np.ndarray, int], None], slot: Callable[[Frame], int]) -> None:
        self._write, self._slot = write, slot
        self._last: np.ndarray | None = None
        self._written = 0

    def __call__(self, lifted: LiftedFrame) -> None:
        number, slot = lifted.frame.number, self._slot(lifted.frame)
        picture = draw_lifted(lifted)
        while self._written < slot:
            self._write(picture if self._last is None else self._last, number)
            self._written += 1
        if self._written == slot:  # else frames came faster than the rate
            self._write(picture, number)
            self._written += 1
        self._last = picture


class _Publisher:
    """Hands every frame and, four times a second, the table of stages to the page."""

    def __init__(self, server: LiveServer, watch: Stopwatch, source: _Source) -> None:
        self._server, self._watch, self._source = server, watch, source
        self._table: dict[str, Any] | None = None
        self._due = 0.0

    def __call__(self, lifted: LiftedFrame) -> None:
        now = time.monotonic()
        if now >= self._due:
            self._table = _table_for_page(self._watch.measured_recently(), self._source.dropped)
            self._due = now + TABLE_INTERVAL
        frame, pose = lifted.frame, lifted.pose
        picture = cv2.cvtColor(draw_picture(frame.image, None if pose is None else pose.keypoints), cv2.COLOR_RGB2BGR)
        _, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        self._server.publish(
            {
                "frame": frame.number,
                "time": frame.time,
                "picture": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}",
                "pose_3d": None if lifted.pose_3d is None else lifted.pose_3d.tolist(),
                "table": self._table,
            }
        )


def _table_for_page(measured: Measured, dropped: int) -> dict[str, Any]:
    return {**measured.as_json(), "dropped": dropped}


def _settings(options: Options, device: str) -> str:
    return ", ".join([device, options.precision, *(["optimised encoder"] if options.optimize else [])])


def _document(source: str, settings: str, demonstration: str) -> str:
    body = asset("live.html").format(
        source=html.escape(source), settings=html.escape(settings), demonstration=html.escape(demonstration)
    )
    sides = [name.split("_")[0] if name.startswith(("left_", "right_")) else "middle" for name in JOINT_NAMES]
    return page(
        f"{source}: lifted live",
        body,
        style=asset("live.css"),
        script=asset("orbit.js") + asset("live.js"),
        data={"bones": BONES, "sides": sides},
        fetches=True,
    )


def _announce(server: LiveServer, source: _Source, browser: bool, console: Console) -> None:
    starts = " The video starts when the page is open." if source.waits_for_a_page else ""
    console.print(
        f"{source.name} lifted live: {server.url} (Ctrl-C stops).{starts}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if browser:
        _open_browser(server.url)
    if source.waits_for_a_page:
        server.wait_for_page()


def _open_browser(url: str) -> None:
    # Without a display Python would start a browser for terminals, in the middle of this one.
    if sys.platform == "linux" and not any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))):
        return
    threading.Thread(
        target=webbrowser.open, args=(url,), name="browser", daemon=True
    ).start()  # it may wait for the browser


def print_result(console: Console, result: Result) -> None:
    """The table of stages, and how it went in a sentence or two."""
    measured = result.measured
    ended = f"{result.ended[0].upper()}{result.ended[1:]}"
    if measured.fps is None:
        console.print(f"{ended}, before the first frame.", markup=False, highlight=False, soft_wrap=True)
        return
    console.print(_table(f"{result.source}, {result.device}, {result.precision}", measured))
    text = (
        f"{ended}: {measured.frames} frames in {measured.seconds:.1f} s, {measured.fps:.1f} frames/s; "
        f"{result.dropped} dropped; a person in {measured.people}."
    )
    if result.drawing is not None:
        text += f" Drawn: {result.drawing}."
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _table(title: str, measured: Measured) -> Table:
    table = Table(title=title)
    table.add_column("stage")
    for name in ("median ms", "frames/s alone", "share of the loop"):
        table.add_column(name, justify="right")
    for stage in measured.stages:
        table.add_row(*_row(stage))
    if measured.frames:
        table.add_row("other", "", "", f"{measured.other_seconds / measured.seconds:.1%}")
    return table


def _row(stage: Stage) -> tuple[str, str, str, str]:
    share = "beside it" if stage.share is None else f"{stage.share:.1%}"
    alone = "" if stage.fps is None else f"{stage.fps:.1f}"
    return stage.name, f"{stage.median_ms:.2f}", alone, share
