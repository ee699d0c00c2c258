"""The live loop, its stages, its page and its command, on short videos of marked people and stand-ins for cameras."""

from __future__ import annotations

import http.client
import io
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from browser import opened, until
from marked_person import ContextPipeline, MarkerModel, picture, write_video
from rich.console import Console
from typer.testing import CliRunner, Result

from liftbyimage import checkpoint, cli, lift_video, live, live_command, live_server, models
from liftbyimage.lift_video import Frame, read_frames
from liftbyimage.live import Camera, Live, Newest, Stopwatch, optimized, timed
from liftbyimage.live_server import LiveServer

PLACES: list[tuple[int, int] | None] = [*((30 + 8 * step, 40) for step in range(8)), None, None, (60, 50), (66, 50)]
PEOPLE = sum(at is not None for at in PLACES)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "walk.avi", PLACES)


@pytest.fixture(scope="module")
def pipeline() -> models.Pipeline:
    torch.manual_seed(1)
    lifter = models.LiftByImage(models.LiftByImageConfig(dim=32, heads=4))
    return models.Pipeline(models.TinyEncoder(), lifter)


def _refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def _names(measured: live.Measured) -> list[str]:
    return [stage.name for stage in measured.stages]


# Stages


def test_stages_shares_and_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that is moved by hand: every second is of a stage or other."""
    now = 0.0
    monkeypatch.setattr(live.time, "perf_counter", lambda: now)
    synchronized: list[float] = []

    def synchronize() -> None:
        nonlocal now
        now += 1  # what the device still computed
        synchronized.append(now)

    def spend(stage: Callable[[str], Any], name: str, seconds: float) -> None:
        nonlocal now
        with stage(name):
            now += seconds

    now = 5.0
    watch = Stopwatch(synchronize)
    assert watch.measured() == live.Measured(0, 0, 0.0, (), 0.0)
    assert watch.measured().fps is None
    for draw, lifted in ((1.0, True), (2.0, False), (6.0, True)):
        spend(watch.stage, "read", 3.0)
        if lifted:
            spend(watch.stage, "lifter", 4.0)
        spend(watch.stage, "draw", draw)
        spend(watch.stage, "draw", draw)  # what one lap does twice counts together
        now += 0.5
        watch.lap()
    spend(watch.stage, "read", 7.0)  # for a frame that did not come
    watch.stop()
    now += 100
    measured = watch.measured()
    assert _names(measured) == ["read", "lifter", "draw"]
    read, lifter, draw = measured.stages
    # Each stage ends with a second of synchronising.
    assert (read.frames, read.seconds, read.median_ms) == (3, 3 * 4.0 + 8.0, 4000)
    assert (lifter.frames, lifter.seconds, lifter.median_ms, lifter.fps) == (2, 10.0, 5000, 0.2)
    assert (draw.frames, draw.seconds, draw.median_ms) == (3, 4.0 + 6.0 + 14.0, 6000)
    assert (measured.frames, measured.people, measured.other_seconds) == (3, 2, 1.5)
    assert measured.seconds == 20 + 10 + 24 + 1.5
    assert [stage.share for stage in measured.stages] == [20 / 55.5, 10 / 55.5, 24 / 55.5]
    assert measured.fps == 3 / 55.5
    assert len(synchronized) == 3 + 2 + 6 + 1
    recent = watch.measured_recently()  # without what came after the last frame
    assert (recent.seconds, recent.stages[0].seconds, recent.other_seconds) == (47.5, 12.0, 1.5)
    watch.start()
    assert watch.measured().frames == watch.measured_recently().frames == 0


def test_only_the_last_hundred_frames_are_recent() -> None:
    watch = Stopwatch()
    for number in range(130):
        with watch.stage("read" if number < 30 else "draw"):
            pass
        watch.lap()
    assert _names(watch.measured()) == ["read", "draw"]
    recent = watch.measured_recently()
    assert (recent.frames, _names(recent)) == (100, ["draw"])


def test_what_runs_beside_the_loop_takes_none_of_its_time() -> None:
    watch = Stopwatch()
    for name, clock in (("read", watch.beside), ("crop", watch.stage)):
        assert len(list(timed([Frame(n, 0.0, np.zeros(0)) for n in range(3)], lambda c=clock, n=name: c(n)))) == 3
    watch.lap()
    measured = watch.measured()
    read, crop = measured.stages
    assert (read.frames, read.share, crop.frames) == (3, None, 1)
    assert measured.seconds == pytest.approx(crop.seconds + measured.other_seconds, abs=1e-12)


# The loop


def _run(pipeline: Any, frames: Any, **options: Any) -> tuple[list[lift_video.LiftedFrame], Live]:
    loop = Live(pipeline, MarkerModel(), **options)
    loop.warm_up()
    lifted: list[lift_video.LiftedFrame] = []
    loop.run(frames, lifted.append)
    return lifted, loop


@pytest.mark.parametrize("of", ["lift-by-image", "no encoder"])
def test_lifts_as_a_video_is_lifted(clip: Path, pipeline: models.Pipeline, of: str) -> None:
    pipeline = pipeline if of == "lift-by-image" else ContextPipeline()
    expected = list(lift_video.lift_video(pipeline, read_frames(clip), MarkerModel(), batch_size=1))
    started = time.perf_counter()
    lifted, loop = _run(pipeline, read_frames(clip))
    wall = time.perf_counter() - started
    for mine, wanted in zip(lifted, expected, strict=True):
        assert mine.frame.number == wanted.frame.number
        assert (mine.pose_3d is None) == (wanted.pose_3d is None)
        if wanted.pose_3d is not None:
            np.testing.assert_array_equal(mine.pose.keypoints, wanted.pose.keypoints)
            np.testing.assert_allclose(mine.pose_3d, wanted.pose_3d, rtol=0, atol=1e-6)
    measured = loop.watch.measured()
    encoder = ["encoder"] if of == "lift-by-image" else []
    assert _names(measured) == ["2D pose model", "crop", *encoder, "lifter", "draw"]
    frames = {stage.name: stage.frames for stage in measured.stages}
    assert frames == dict.fromkeys(_names(measured), PEOPLE) | {"2D pose model": len(PLACES), "draw": len(PLACES)}
    assert (measured.frames, measured.people) == (len(PLACES), PEOPLE)
    assert 0 < measured.other_seconds < measured.seconds < wall  # the reading, which nobody timed here
    assert sum(stage.seconds for stage in measured.stages) + measured.other_seconds == pytest.approx(measured.seconds)


def test_nothing_is_drawn_for_nobody(clip: Path) -> None:
    loop = Live(ContextPipeline(), MarkerModel())
    loop.run(timed(read_frames(clip), lambda: loop.watch.stage("read")))
    assert _names(loop.watch.measured()) == ["read", "2D pose model", "crop", "lifter"]


def test_precision_and_an_optimised_encoder(clip: Path, pipeline: models.Pipeline) -> None:
    exact, _ = _run(pipeline, read_frames(clip, 0, 3))
    fast = optimized(pipeline, "cpu", "float32")
    assert fast.report is not None
    half, _ = _run(pipeline, read_frames(clip, 0, 3), precision="bfloat16")
    both, _ = _run(optimized(pipeline, "cpu", "bfloat16"), read_frames(clip, 0, 3), precision="bfloat16")
    same, _ = _run(fast, read_frames(clip, 0, 3))
    size = np.abs(exact[0].pose_3d).max()
    for lifted, tolerance in ((same, 1e-3), (half, 0.1), (both, 0.1)):
        for mine, wanted in zip(lifted, exact, strict=True):
            assert mine.pose_3d.dtype == np.float32
            assert np.abs(mine.pose_3d - wanted.pose_3d).max() < tolerance * size
    assert np.abs(half[0].pose_3d - exact[0].pose_3d).max() > 1e-6 * size  # it did compute in bfloat16
    with _refused("live: an optimised encoder computes in float32 or bfloat16, got precision float16"):
        optimized(pipeline, "cpu", "float16")


def test_pipelines_that_do_not_serve(clip: Path) -> None:
    class Broken(ContextPipeline):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(*inputs) * torch.nan

    with _refused("live: the pose of a picture of noise is not finite: the weights are broken"):
        Live(Broken(), MarkerModel()).warm_up()
    with _refused("live: the pose of frame 0 is not finite: the weights are broken"):
        Live(Broken(), MarkerModel()).run(read_frames(clip))
    other = ContextPipeline()
    other.lifter.config.num_joints = 16
    with _refused("live: pipeline must lift 17 joints, got one for 16"):
        Live(other, MarkerModel())


# Frames that do not wait


def _frames(count: int, after: Callable[[int], object] = lambda number: None) -> Iterator[Frame]:
    for number in range(count):
        yield Frame(number, number / 20, np.zeros((2, 2, 3), np.uint8))
        after(number)


def test_the_newest_frame_is_taken_and_the_others_are_dropped() -> None:
    taken, read_on = threading.Event(), threading.Event()

    def after(number: int) -> None:
        if number == 0:
            assert taken.wait(10)  # the first is taken; then five come at once
        elif number == 5:
            read_on.set()

    watch = Stopwatch()
    newest = Newest(_frames(7, after), watch, name="test")
    numbers = []
    for frame in newest:
        numbers.append(frame.number)
        taken.set()
        assert read_on.wait(10)
    assert numbers[0] == 0
    assert numbers[1] in (5, 6)
    assert numbers[-1] == 6  # the last is never dropped
    assert newest.dropped == 7 - len(numbers)
    watch.lap()
    assert _names(watch.measured()) == ["wait"]


def test_what_ends_reading_is_raised_after_the_last_frame() -> None:
    def torn() -> Iterator[Frame]:
        yield from _frames(1)
        raise ValueError("camera 0: gone")

    numbers = []
    with _refused("camera 0: gone"):
        for frame in Newest(torn(), Stopwatch(), name="camera 0"):
            numbers.append(frame.number)
    assert numbers == [0]


def test_a_source_that_hangs_and_one_that_is_left() -> None:
    leave = threading.Event()
    with _refused("camera 0: gave no picture for 0.05 s: was it unplugged?"):
        for _ in Newest(_frames(2, lambda _: leave.wait(10)), Stopwatch(), name="camera 0", patience=0.05):
            leave.clear()
            threading.Timer(0.3, leave.set).start()
    closed = threading.Event()

    def endless() -> Iterator[Frame]:
        try:
            while True:
                yield from _frames(10)
        finally:
            closed.set()

    frames = iter(Newest(endless(), Stopwatch(), name="test"))
    next(frames)
    frames.close()
    assert closed.is_set()


@pytest.mark.parametrize(
    ("times", "due"),
    [
        ([0, 0.5, 0.6], [0, 0.5, 0.6]),
        ([7, 7.5, 8], [0, 0.5, 1]),  # the first frame asked for
        ([0, 0, 0], [0, 0.1, 0.2]),  # a video that states no times
        ([0, 0.5, 0.2], [0, 0.5, 0.6]),
    ],
)
def test_a_video_keeps_its_times(monkeypatch: pytest.MonkeyPatch, times: list[float], due: list[float]) -> None:
    frames = [Frame(number, seconds, np.zeros(0)) for number, seconds in enumerate(times)]
    newest = Newest(iter(frames), Stopwatch(), name="test", fps=10)
    monkeypatch.setattr(live.time, "monotonic", lambda: 100.0)
    np.testing.assert_allclose([moment - 100 for moment, _ in newest._due(iter(frames))], due, atol=1e-12)


# Cameras


_open_file = cv2.VideoCapture


class FakeCamera:
    """What cv2.VideoCapture is of a camera that gives marked people and is then unplugged."""

    def __init__(self, count: int, opens: bool = True, fps: float = 30.0) -> None:
        self.count, self.opens, self.fps = count, opens, fps
        self.released = False

    def __call__(self, source: int | str) -> Any:
        if isinstance(source, str) and not source.startswith("/dev/"):
            return _open_file(source)
        self.source = source
        return self

    def isOpened(self) -> bool:
        return self.opens

    def get(self, what: int) -> float:
        return self.fps

    def grab(self) -> bool:
        time.sleep(0.03)
        self.count -= 1
        return self.count >= 0

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, cv2.cvtColor(picture((40, 40)), cv2.COLOR_RGB2BGR)

    def release(self) -> None:
        self.released = True


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeCamera]:
    def plug(*arguments: Any, **options: Any) -> FakeCamera:
        fake = FakeCamera(*arguments, **options)
        monkeypatch.setattr(live.cv2, "VideoCapture", fake)
        monkeypatch.setattr(Path, "exists", lambda self: True)
        return fake

    return plug


def test_a_camera_is_read_until_it_is_unplugged(camera: Callable[..., FakeCamera]) -> None:
    fake = camera(3)
    watch = Stopwatch()
    source = Camera(0)
    assert (source.fps, fake.source) == (30.0, 0)
    frames = []
    with _refused("camera 0: gives no more pictures: was it unplugged?"):
        frames.extend(source.frames(lambda: watch.beside("read")))
    assert fake.released
    camera(3)
    frames = source.frames(lambda: watch.beside("read"))
    fake.count = 3
    read = [next(frames) for _ in range(3)]
    assert [frame.number for frame in read] == [0, 1, 2]
    assert read[0].time == 0 < read[1].time < read[2].time
    np.testing.assert_array_equal(read[2].image, picture((40, 40)))  # RGB
    assert watch.measured().stages[0].frames == 6


def test_cameras_that_do_not_serve(camera: Callable[..., FakeCamera]) -> None:
    with _refused("camera 7: no such camera: there is no /dev/video7"):
        Camera(7)
    with _refused("camera /dev/video99: no such camera: there is no /dev/video99"):
        Camera("/dev/video99")
    camera(0, opens=False)
    with _refused("camera 0: cannot be opened: is it a camera, may you read it, does another program use it?"):
        Camera(0)
    camera(0, fps=0.0)
    source = Camera("/dev/video1")
    assert source.fps is None
    with _refused("camera /dev/video1: opens, but gives no picture: does another program use it?"):
        next(source.frames(lambda: Stopwatch().beside("read")))


# The server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    monkeypatch.setattr(live_server, "GRACE", 0.0)
    with LiveServer("<p>page</p>") as server:
        yield server


def _get(server: LiveServer, path: str, host: str | None = None, method: str = "GET") -> tuple[int, bytes, Any]:
    address = server.url.removeprefix("http://").strip("/")
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    contents = answer.read()
    connection.close()
    return answer.status, contents, answer.headers


def test_only_the_page_and_the_state_are_served(server: LiveServer) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", server.url)
    status, contents, headers = _get(server, "/")
    assert (status, contents) == (200, b"<p>page</p>")
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Security-Policy"] == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["X-Content-Type-Options"] == "nosniff"
    for path in ("/index.html", "/../pyproject.toml", "/page.css", "/next/"):
        assert _get(server, path)[0] == 404, path
    assert _get(server, "/favicon.ico")[0] == 204
    for bad in ("-1", "x", "%C2%B2", "1" * 16):
        assert _get(server, f"/next?after={bad}")[0] == 400, bad
    for method in ("POST", "PUT", "DELETE", "HEAD"):
        assert _get(server, "/", method=method)[0] == 501, method


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:1234", 200),  # through a tunnel the port is another
        ("LOCALHOST", 200),
        ("example.com", 403),
        ("127.0.0.1.example.com:80", 403),
        ("localhost.example.com", 403),
        ("example.com@localhost", 403),
        ("0.0.0.0", 403),
        ("", 403),
    ],
)
def test_other_names_for_this_machine_are_refused(server: LiveServer, host: str, status: int) -> None:
    server.publish({"secret": 1})
    for path in ("/", "/next?after=0"):
        answer, contents, _ = _get(server, path, host)
        assert answer == status
        assert (b"secret" in contents) == (status == 200 and path != "/")


def test_the_state_is_given_once_there_is_a_new_one(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.publish({"value": 1})
    assert json.loads(_get(server, "/next")[1]) == {"value": 1, "number_of_state": 1}
    server.publish({"value": 2})
    assert json.loads(_get(server, "/next?after=1")[1])["value"] == 2
    assert json.loads(_get(server, "/next?after=77")[1])["value"] == 2  # of a program that ran here before
    threading.Timer(0.1, server.publish, [{"value": 3}]).start()
    assert json.loads(_get(server, "/next?after=2")[1])["value"] == 3
    monkeypatch.setattr(live_server, "HOLD", 0.01)
    assert _get(server, "/next?after=3")[:2] == (204, b"")


def test_who_does_not_read_holds_up_nobody(server: LiveServer) -> None:
    address = tuple(server.url.removeprefix("http://").strip("/").split(":"))
    with socket.create_connection(address) as stuck:
        server.publish({"picture": "x" * 20_000_000})  # more than sockets buffer
        stuck.sendall(b"GET /next HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        server.wait_for_page()
        for number in range(20):
            server.publish({"value": number})
        assert json.loads(_get(server, "/next?after=1")[1])["value"] == 19


def test_a_port_that_is_taken(server: LiveServer) -> None:
    port = server.url.strip("/").split(":")[-1]
    with _refused(f"--port {port}: cannot be had (Address already in use): choose another, or 0 for a free one"):
        LiveServer("", int(port))


# The command


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, pipeline: models.Pipeline) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "small.pt"
    checkpoint.save_pipeline(pipeline, path, encoder="tiny")
    return path


@pytest.fixture
def command(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command with its pose model, marked people's, and a small checkpoint."""
    pose_model = tmp_path / "pose.onnx"
    pose_model.write_bytes(b"")
    model = MarkerModel()
    monkeypatch.setattr(live_command, "load_pose_model", lambda given, device: {pose_model: model}[given])

    def run(source: object, *arguments: object) -> Result:
        words = ("live", source, "--pose-model", pose_model, "--checkpoint", small, "--no-browser", *arguments)
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    run.model = model
    run.pose_model = pose_model
    return run


def test_json_is_all_that_stdout_holds(command: Callable[..., Result], clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "drawn.mp4"
    result = command(clip, "--no-page", "--unpaced", "--json", "--out", out, "--frames", "1:12")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found) == [
        *("source", "device", "precision", "optimized", "frames", "people", "seconds", "fps", "stages"),
        *("other_seconds", "dropped", "ended", "drawing"),
    ]
    assert (found["source"], found["precision"], found["optimized"]) == (str(clip), "float32", False)
    assert (found["frames"], found["people"], found["dropped"]) == (11, PEOPLE - 1, 0)
    assert (found["ended"], found["drawing"]) == ("the frames asked for ended", str(out))
    assert [stage["stage"] for stage in found["stages"]] == [
        *("read", "2D pose model", "crop", "encoder", "lifter", "draw")
    ]
    assert list(found["stages"][0]) == ["stage", "frames", "seconds", "median_ms", "fps", "share"]
    seconds = sum(stage["seconds"] for stage in found["stages"]) + found["other_seconds"]
    assert seconds == pytest.approx(found["seconds"])
    assert len(list(read_frames(out))) == 11
    assert [path.name for path in out.parent.iterdir()] == ["drawn.mp4"]


def test_the_table(command: Callable[..., Result], clip: Path) -> None:
    result = command(clip, "--no-page", "--optimize", "--precision", "bfloat16", "--box", "0,0,200,190")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    for stage in ("wait", "read", "2D pose model", "crop", "encoder", "lifter", "other"):
        assert re.search(rf"│ {stage} ", result.stdout), stage
    assert "│ draw " not in result.stdout  # nobody looks
    assert "beside it" in result.stdout
    last = result.stdout.splitlines()[-1]
    match = re.fullmatch(
        r"The video ended: (\d+) frames in [\d.]+ s, [\d.]+ frames/s; (\d+) dropped; a person in \d+\.", last
    )
    assert match is not None, last
    assert int(match[1]) + int(match[2]) == len(PLACES)


def test_the_drawing_keeps_the_time_of_dropped_frames(clip: Path) -> None:
    written: list[int] = []
    pictures: list[np.ndarray] = []

    def write(picture: np.ndarray, number: int) -> None:
        written.append(number)
        pictures.append(picture)

    writer = live_command._ConstantRate(write, lambda frame: frame.number)
    for frame in read_frames(clip):
        if frame.number in (1, 2, 6):
            writer(lift_video.LiftedFrame(frame, None, None))
    assert len(written) == 7
    for early, late in ((0, 1), (2, 3), (2, 5)):
        np.testing.assert_array_equal(pictures[early], pictures[late])
    assert any((pictures[place] != pictures[place + 1]).any() for place in (1, 5))
    writer(lift_video.LiftedFrame(frame, None, None))
    again = len(written)
    writer(lift_video.LiftedFrame(frame, None, None))  # no place of its own
    assert len(written) == again == 12


def test_what_a_video_lacks_is_said(command: Callable[..., Result], tmp_path: Path, clip: Path) -> None:
    torn = tmp_path / "torn.avi"
    torn.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    stated = lift_video.open_video(torn).frames
    result = command(torn, "--no-page", "--unpaced", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert 0 < found["frames"] < len(PLACES)
    assert found["ended"] == f"video {torn} states {stated} frames, but no more could be read"


def test_ctrl_c_keeps_what_was_measured_and_drawn(
    command: Callable[..., Result], clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = lift_video.Follower.find
    calls = 0

    def interrupted(self: Any, image: np.ndarray) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return find(self, image)

    monkeypatch.setattr(lift_video.Follower, "find", interrupted)
    out = tmp_path / "drawn.mp4"
    result = command(clip, "--no-page", "--unpaced", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("Stopped: 4 frames in ")
    assert result.stdout.replace("\n", "").endswith(f"a person in 4. Drawn: {out}.")
    assert len(list(read_frames(out))) == 4


def test_ctrl_c_before_anything_came(command: Callable[..., Result], clip: Path, tmp_path: Path) -> None:
    """A video waits for the page to be opened; nobody does."""
    out = tmp_path / "drawn.mp4"
    stop = threading.Timer(1.0, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    stop.start()
    result = command(clip, "--out", out)
    stop.join()
    assert result.exit_code == 0, result.output
    first, last = result.stdout.splitlines()
    assert re.fullmatch(
        rf"video {re.escape(str(clip))} lifted live: http://127\.0\.0\.1:\d+/ \(Ctrl-C stops\)\. "
        r"The video starts when the page is open\.",
        first,
    )
    assert last == "Stopped, before the first frame."
    assert not out.exists()


def test_a_camera_unplugged_in_the_middle(command: Callable[..., Result], camera: Callable[..., FakeCamera]) -> None:
    camera(20)
    result = command(0, "--no-page", "--json")
    gone = "camera 0: gives no more pictures: was it unplugged?"
    assert result.exit_code == 2
    assert result.stderr == f"error: {gone}\n"
    found = json.loads(result.stdout)
    assert (found["ended"], found["source"]) == (gone, "0")
    assert found["frames"] + found["dropped"] == 20
    assert found["frames"] == found["people"] > 0
    camera(0)
    result = command(0, "--no-page", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: camera 0: opens, but gives no picture: does another program use it?\n"


def test_mistakes_are_one_sentence(
    command: Callable[..., Result], clip: Path, tmp_path: Path, server: LiveServer
) -> None:
    def refused(message: str, *arguments: object) -> None:
        result = command(*arguments)
        assert result.stderr == f"error: {message}\n"
        assert (result.exit_code, result.stdout) == (2, "")

    result = CliRunner().invoke(cli.app, ["live", str(clip)])
    needs = "live needs --pose-model FILE, which finds the 2D pose in every frame"
    assert (result.exit_code, result.stderr) == (2, f"error: {needs}\n")
    image, text, none = tmp_path / "a.png", tmp_path / "a.txt", tmp_path / "none.mp4"
    assert cv2.imwrite(str(image), picture(None))
    text.write_text("text")
    refused(f"{image}: is a picture, which `liftbyimage lift` lifts; live takes a camera or a video", image)
    refused(f"video {text}: not a video that OpenCV can read", text)
    refused(f"video {tmp_path}: is a folder", tmp_path)
    refused(f"{none}: no such video; expected the number of a camera, as 0, its path, or a video file", none)
    refused("camera 7: no such camera: there is no /dev/video7", 7)
    refused("--frames is for a video file, got the camera 0", 0, "--frames", ":3")
    refused("--unpaced is for a video file, got the camera /dev/video0", "/dev/video0", "--unpaced")
    refused("--port is of the page, which --no-page leaves out", clip, "--no-page", "--port", 80)
    port = server.url.strip("/").split(":")[-1]
    taken = f"--port {port}: cannot be had (Address already in use): choose another, or 0 for a free one"
    refused(taken, clip, "--port", port)
    refused("--out: expected a file ending in .mp4, got a.avi", clip, "--out", "a.avi")
    (tmp_path / "folder.mp4").mkdir()
    refused(f"--out {tmp_path / 'folder.mp4'}: expected a file, got a folder", clip, "--out", tmp_path / "folder.mp4")
    own = write_video(tmp_path / "own.mp4", PLACES[:2], "mp4v")
    before = own.read_bytes()
    refused(f"--out {own} would overwrite the video: choose another file", own, "--out", own)
    assert own.read_bytes() == before
    refused("--box and --detector both say where to look: choose one", clip, "--box", "0,0,9,9", "--detector", "a:b")
    refused("live: device must be auto, cpu or cuda, got 'tpu'", clip, "--device", "tpu")
    message = f"video {clip}: has {len(PLACES)} frames, expected more than 50, the first one asked for"
    refused(message, clip, "--no-page", "--frames", "50:")


def test_a_drawing_whose_frames_change_their_size(
    command: Callable[..., Result], camera: Callable[..., FakeCamera], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = camera(10)

    def retrieve() -> tuple[bool, np.ndarray]:
        return True, np.zeros((100 if fake.count < 5 else 200, 240, 3), np.uint8)

    monkeypatch.setattr(fake, "retrieve", retrieve)
    out = tmp_path / "drawn.mp4"
    result = command(0, "--no-page", "--out", out)
    assert result.exit_code == 2
    message = rf"error: video {re.escape(str(out))}: frame \d+ is drawn at 340×100 px, expected 440×200, as the first\n"
    assert re.fullmatch(message, result.stderr)
    assert {frame.image.shape for frame in read_frames(out)} == {(200, 440, 3)}  # the frames before are kept


@pytest.mark.parametrize(("display", "opens"), [(":0", True), (None, False)])
def test_a_browser_is_opened_where_one_can_be_seen(
    monkeypatch: pytest.MonkeyPatch, display: str | None, opens: bool
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    if display is not None:
        monkeypatch.setenv("DISPLAY", display)
    opened_urls: list[str] = []
    monkeypatch.setattr(live_command.sys, "platform", "linux")
    monkeypatch.setattr(live_command.webbrowser, "open", opened_urls.append)
    live_command._open_browser("http://127.0.0.1:1/")
    for thread in threading.enumerate():
        if thread.name.startswith("browser"):
            thread.join()
    assert opened_urls == (["http://127.0.0.1:1/"] if opens else [])


# The page


class _Background:
    """The command's `run` in a thread, as a person's terminal would have it, and the address it prints."""

    def __init__(self, options: live_command.Options, pipeline: models.Pipeline) -> None:
        self.printed = io.StringIO()
        self.result: live_command.Result | None = None
        console = Console(file=self.printed)

        def run() -> None:
            self.result = live_command.run(options, lambda: pipeline, "A <b>demonstration</b>.", console)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def url(self) -> str:
        until(lambda: "http://" in self.printed.getvalue())
        return re.search(r"http://\S+", self.printed.getvalue())[0]


def _options(source: Path, **changes: Any) -> live_command.Options:
    usual = {"box": None, "detector": None, "device": "cpu", "precision": "float32", "optimize": False, "port": None}
    usual |= {"browser": False, "page": True, "unpaced": False, "out": None, "frames": None}
    return live_command.Options(source=str(source), **(usual | {"pose_model": Path("pose.onnx")} | changes))


def test_the_page_shows_frames_the_skeleton_and_the_stages(
    tmp_path: Path, pipeline: models.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_command, "load_pose_model", lambda *arguments: MarkerModel())
    find, stop = lift_video.Follower.find, threading.Event()

    def until_stopped(self: Any, image: np.ndarray) -> Any:
        if stop.is_set():
            raise KeyboardInterrupt
        return find(self, image)

    monkeypatch.setattr(lift_video.Follower, "find", until_stopped)
    # Half a minute, which no browser needs.
    clip = write_video(tmp_path / "<img src=x onerror=broken()>.avi", (PLACES[:8] + PLACES[7::-1]) * 20, fps=10)
    running = _Background(_options(clip), pipeline)
    with opened(running.url()) as shown:
        page = shown.page
        until(lambda: page.evaluate("document.getElementById('picture').naturalWidth > 0"))
        page.wait_for_selector("#stages tbody tr")
        assert page.text_content("#source") == f"video {clip} · cpu, float32"
        assert page.text_content("#demonstration") == "A <b>demonstration</b>."
        until(lambda: page.text_content("#state") == "Live.")

        def drawn() -> str:
            return page.evaluate("document.getElementById('skeleton').toDataURL()")

        def frame() -> str:
            return page.evaluate("document.getElementById('picture').src")

        for look, before in ((drawn, drawn()), (frame, frame())):
            until(lambda look=look, before=before: look() != before)  # it goes on
        with_another = page.context.browser.new_page()  # several pages, one of which is closed and opened again
        with_another.goto(running.url())
        with_another.wait_for_selector("#stages tbody tr")
        page.reload()
        page.wait_for_selector("#stages tbody tr")
        stop.set()
        for end in (page, with_another):
            end.wait_for_selector("#state.ended", timeout=15_000)
            assert end.text_content("#state") == "Ended: stopped."
        running.thread.join(10)
        result = running.result
        assert result is not None
        assert (result.ended, result.error) == ("stopped", None)
        rows = page.locator("#stages tbody tr").all_inner_texts()
        assert [row.split("\t")[0] for row in rows] == [*live.STAGES, "other"]
        assert rows[1].split("\t")[3] == "beside it"
        assert page.text_content("#window") == f"over all {result.measured.frames} frames"
        assert page.text_content("#fps") == f"{result.measured.fps:.1f}"
        assert page.text_content("#dropped") == str(result.dropped)
        # The last skeleton still turns, without the program.
        last = drawn()
        page.focus("#skeleton")
        page.keyboard.press("ArrowLeft")
        until(lambda: drawn() != last)
        page.click("#reset")
        until(lambda: drawn() == last)
        assert shown.errors == []
        origin = running.url()
        assert all(url.startswith((origin, "data:")) for url in shown.requests)


def test_the_page_says_when_nobody_is_seen_and_when_the_program_is_gone(
    tmp_path: Path, pipeline: models.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_command, "load_pose_model", lambda *arguments: MarkerModel())
    monkeypatch.setattr(live_server, "GRACE", 0.0)
    monkeypatch.setattr(live_server, "HOLD", 0.1)
    document = live_command._document("a camera", "cpu", "")
    with LiveServer(document) as server:
        publisher = live_command._Publisher(
            server, Stopwatch(), live_command._Source(str(_video(tmp_path)), None, True)
        )
        with opened(server.url, width=420) as shown:
            publisher(lift_video.LiftedFrame(Frame(3, 0.15, picture(None)), None, None))
            until(lambda: shown.page.text_content("#frame") == "frame 3, 0.15 s")
            # Nothing follows.
            until(lambda: shown.page.text_content("#state") == "Waiting for the next frame …")
            assert shown.page.locator("#demonstration").is_hidden()
            assert shown.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            server.__exit__()
            shown.page.wait_for_selector("#state.ended")
            assert shown.page.text_content("#state") == "The program does not answer: has it ended?"


def _video(folder: Path) -> Path:
    return write_video(folder / "a.avi", PLACES[:2])
