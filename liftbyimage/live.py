"""Lifting live: the newest frame of a camera, or a video at its own rate, and what each stage of it takes."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike

from liftbyimage.data.crop import CROP_SIZE, normalise_image
from liftbyimage.data.pose_file import ImagePose, joints_box
from liftbyimage.data.skeleton import JOINT_NAMES
from liftbyimage.lift import PersonCrop, check_pipeline, crop_person, lifted_crops, pipeline_inputs
from liftbyimage.lift_video import Follower, Frame, LiftedFrame
from liftbyimage.models import Pipeline
from liftbyimage.pose_model import Detector, PoseModel
from liftbyimage.predict import PRECISIONS, mixed_precision

STAGES = ("wait", "read", "2D pose model", "crop", "encoder", "lifter", "draw")
RECENT = 100  # frames that the figures of now are over
KEPT = 10_000  # frames that a median is over at most
PATIENCE = 10.0  # s without a frame, after which a camera counts as gone; some take seconds to start


@dataclass(frozen=True)
class Stage:
    """What one stage took. The frames in which nobody is seen go through fewer stages."""

    name: str
    frames: int
    seconds: float
    median_ms: float
    share: float | None  # of the loop's time; None for a stage in a thread of its own beside the loop

    @property
    def fps(self) -> float | None:
        """Frames per second that this stage alone could do; None of waiting, which does nothing."""
        return None if self.name == "wait" else 1000 / self.median_ms


@dataclass(frozen=True)
class Measured:
    """What a loop took: `seconds` are those of its stages, but for the ones beside it, and `other_seconds`."""

    frames: int
    people: int  # frames with a pose
    seconds: float
    stages: tuple[Stage, ...]  # in the order of STAGES, those that ran
    other_seconds: float

    @property
    def fps(self) -> float | None:
        return self.frames / self.seconds if self.frames else None

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        stages = [
            {
                "stage": stage.name,
                "frames": stage.frames,
                "seconds": stage.seconds,
                "median_ms": stage.median_ms,
                "fps": stage.fps,
                "share": stage.share,
            }
            for stage in self.stages
        ]
        return {
            "frames": self.frames,
            "people": self.people,
            "seconds": self.seconds,
            "fps": self.fps,
            "stages": stages,
            "other_seconds": self.other_seconds,
        }


class Stopwatch:
    """Seconds of every stage of a loop, whose turns are laps.

    Args:
        synchronize: waits for what a device still computes; called where a stage of the loop ends.
    """

    def __init__(self, synchronize: Callable[[], object] = lambda: None) -> None:
        self._synchronize = synchronize
        self._lock = threading.Lock()  # of `_beside` and `_recent`, which other threads write and read
        self.start()

    def start(self) -> None:
        """Forget everything, and begin the first lap."""
        self._started = self._lap_started = time.perf_counter()
        self._stopped: float | None = None
        self._lap: dict[str, float] = {}
        self._laps = 0
        self._totals: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._samples: dict[str, deque[float]] = {}
        with self._lock:
            self._recent: deque[tuple[float, dict[str, float]]] = deque(maxlen=RECENT)
            self._beside: dict[str, tuple[int, float, deque[float]]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a part of this lap."""
        started = time.perf_counter()
        try:
            yield
            self._synchronize()
        finally:
            self._lap[name] = self._lap.get(name, 0.0) + time.perf_counter() - started

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Time one frame's part in another thread than the loop's; what raises was none."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        with self._lock:
            count, total, samples = self._beside.get(name, (0, 0.0, deque(maxlen=KEPT)))
            samples.append(seconds)
            self._beside[name] = count + 1, total + seconds, samples

    def lap(self) -> None:
        """A frame is through."""
        now = time.perf_counter()
        self._laps += 1
        with self._lock:
            self._recent.append((now - self._lap_started, self._lap))
        for name, seconds in self._lap.items():
            self._counts[name] = self._counts.get(name, 0) + 1
            self._samples.setdefault(name, deque(maxlen=KEPT)).append(seconds)
        self._add_lap(now)

    def stop(self) -> None:
        """The loop is over. The last lap, which waited for a frame in vain or was interrupted, counts as time only."""
        self._stopped = time.perf_counter()
        self._add_lap(self._stopped)

    def _add_lap(self, now: float) -> None:
        for name, seconds in self._lap.items():
            self._totals[name] = self._totals.get(name, 0.0) + seconds
        self._lap, self._lap_started = {}, now

    def measured(self) -> Measured:
        """Since the start; medians are over the last 10 000 frames."""
        seconds = (self._lap_started if self._stopped is None else self._stopped) - self._started
        return self._measured(self._laps, seconds, self._totals, self._counts, self._samples, KEPT)

    def measured_recently(self) -> Measured:
        """Over the last 100 frames; any thread may ask."""
        with self._lock:
            laps = list(self._recent)
        totals: dict[str, float] = {}
        samples: dict[str, list[float]] = {}
        for _, lap in laps:
            for name, seconds in lap.items():
                totals[name] = totals.get(name, 0.0) + seconds
                samples.setdefault(name, []).append(seconds)
        counts = {name: len(values) for name, values in samples.items()}
        seconds = sum(lap_seconds for lap_seconds, _ in laps)
        return self._measured(len(laps), seconds, totals, counts, samples, RECENT)

    def _measured(
        self,
        frames: int,
        seconds: float,
        totals: dict[str, float],
        counts: dict[str, int],
        samples: dict[str, Any],
        latest: int,
    ) -> Measured:
        with self._lock:
            beside = {
                name: (count, total, list(islice(reversed(values), latest)))
                for name, (count, total, values) in self._beside.items()
            }
        stages = []
        for name in STAGES:
            if name in samples:
                share = totals[name] / seconds
                stages.append(Stage(name, counts[name], totals[name], 1000 * statistics.median(samples[name]), share))
            elif name in beside:
                count, total, values = beside[name]
                stages.append(Stage(name, count, total, 1000 * statistics.median(values), None))
        return Measured(frames, counts.get("lifter", 0), seconds, tuple(stages), seconds - sum(totals.values()))


def timed(frames: Iterable[Frame], clock: Callable[[], AbstractContextManager[None]]) -> Iterator[Frame]:
    """The same frames, each one's reading inside a context of its own."""
    iterator = iter(frames)
    while True:
        try:
            with clock():
                frame = next(iterator)
        except StopIteration:
            return
        yield frame


class Camera:
    """A camera that opens.

    Args:
        source: its number from 0, or its path, as /dev/video0.

    Attributes:
        fps: frames per second as it states them, or None.

    Raises:
        ValueError: there is none, or it cannot be opened.
    """

    def __init__(self, source: int | str) -> None:
        self.name = f"camera {source}"
        device = Path(f"/dev/video{source}" if isinstance(source, int) else source)
        if sys.platform == "linux" and not device.exists():
            raise ValueError(f"{self.name}: no such camera: there is no {device}")
        self._capture = _quietly(lambda: cv2.VideoCapture(source))
        if not self._capture.isOpened():
            raise ValueError(
                f"{self.name}: cannot be opened: is it a camera, may you read it, does another program use it?"
            )
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < np.inf else None

    def frames(self, clock: Callable[[], AbstractContextManager[None]]) -> Iterator[Frame]:
        """Frames as they come, without end; `time` is since the first.

        Args:
            clock: a context around the decoding of each frame; waiting for the camera is outside.

        Raises:
            ValueError: there is no first frame, or none any more.
        """
        number, first = 0, 0.0
        try:
            while self._capture.grab():
                now = time.monotonic()
                with clock():
                    ok, image = self._capture.retrieve()
                    if ok:
                        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
                if not ok:
                    break
                first = first if number else now
                yield Frame(number, now - first, image)
                number += 1
        finally:
            self._capture.release()
        if number == 0:
            raise ValueError(f"{self.name}: opens, but gives no picture: does another program use it?")
        raise ValueError(f"{self.name}: gives no more pictures: was it unplugged?")


def _quietly(open_capture: Callable[[], Any]) -> Any:
    """Without OpenCV's own lines on what fails, which is said in one sentence instead."""
    logging = cv2.utils.logging
    level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        return open_capture()
    finally:
        logging.setLogLevel(level)


class Newest:
    """The newest frame of a source that waits for nobody: a thread reads it, and what is not taken in time is dropped.

    Iterating begins to read, and waits in the stage "wait" of `watch`; what the source raises is raised there too.

    Args:
        frames: read in the thread, and closed there.
        fps: play a video by its frames' times; the rate is for those without. None: frames come when they come.
        name: of the source, in an error.
        patience: seconds without a frame after which the source counts as gone; None: never.

    Attributes:
        dropped: frames that were read, and replaced before they were taken.
    """

    def __init__(
        self,
        frames: Iterator[Frame],
        watch: Stopwatch,
        *,
        name: str,
        fps: float | None = None,
        patience: float | None = PATIENCE,
    ) -> None:
        self._frames, self._watch, self._fps = frames, watch, fps
        self._name, self._patience = name, patience
        self._changed = threading.Condition()
        self._newest: Frame | None = None
        self._over = False
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)
        self.dropped = 0

    def __iter__(self) -> Iterator[Frame]:
        self._thread.start()
        try:
            while True:
                with self._watch.stage("wait"):
                    frame = self._take()
                if frame is None:
                    return
                yield frame
        finally:
            self._stop.set()
            self._thread.join(timeout=2)  # a thread that hangs in a dead camera is left behind

    def _take(self) -> Frame | None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._newest is not None or self._over, self._patience):
                raise ValueError(f"{self._name}: gave no picture for {self._patience:g} s: was it unplugged?")
            frame, self._newest = self._newest, None
            if frame is None and self._error is not None:
                raise self._error
            return frame

    def _read(self) -> None:
        try:
            for due, frame in self._due(self._frames):
                if self._stop.wait(max(0.0, due - time.monotonic())):
                    break
                with self._changed:
                    self.dropped += self._newest is not None
                    self._newest = frame
                    self._changed.notify()
        except Exception as error:
            self._error = error
        finally:
            self._frames.close()
            with self._changed:
                self._over = True
                self._changed.notify()

    def _due(self, frames: Iterator[Frame]) -> Iterator[tuple[float, Frame]]:
        """Frames and when each is to be shown, on the monotonic clock."""
        due, last = 0.0, None
        for frame in frames:
            if last is None or self._fps is None:
                due = time.monotonic()
            else:
                step = frame.time - last.time
                # Of videos that state no times, or none that grow.
                due += step if step > 0 else 1 / self._fps
            last = frame
            yield due, frame


class Live:
    """Lifts one frame at a time, and measures every stage.

    Args:
        pipeline: moved to `device`, in evaluation mode.
        pose_model, box, detect: as `lift_video` takes them.
        device: where the pipeline computes.
        precision: one of `predict.PRECISIONS`, for the lifter, and for an encoder that `optimize` has not made.

    Attributes:
        watch: what everything takes. Also what reads the frames books there.

    Raises:
        ValueError: the pipeline is for another skeleton or crop.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        pose_model: PoseModel,
        *,
        box: ArrayLike | None = None,
        detect: Detector | None = None,
        device: str | torch.device = "cpu",
        precision: str = "float32",
    ) -> None:
        check_pipeline("live", pipeline)
        self._device = torch.device(device)
        self._pipeline = pipeline.to(self._device).eval()
        self._pose_model = pose_model
        self._follower = Follower(pose_model, box, detect)
        self._precision = precision
        on_gpu = self._device.type == "cuda"
        self.watch = Stopwatch(partial(torch.cuda.synchronize, self._device)) if on_gpu else Stopwatch()

    def warm_up(self, passes: int = 2) -> None:
        """Run the models on noise, so that the first frame is as fast as the others, and set the watch to zero."""
        crop = noise_crop()
        with torch.inference_mode(), mixed_precision(self._device, self._precision):
            for _ in range(passes):
                with mixed_precision(self._device, "float32"):
                    self._pose_model(normalise_image(crop.pixels)[None])
                self._lift(crop)
        self.watch.start()

    def run(self, frames: Iterable[Frame], show: Callable[[LiftedFrame], object] | None = None) -> None:
        """Lift frames until they end; each is handed to `show`, if given, in the stage "draw".

        Raises:
            ValueError: a pose that is not finite, or what `frames` raises.
        """
        self.watch.start()
        try:
            # One autocast around the loop: weights are cast once, not in every frame.
            with torch.inference_mode(), mixed_precision(self._device, self._precision):
                for frame in frames:
                    with self.watch.stage("2D pose model"), mixed_precision(self._device, "float32"):
                        pose = self._follower.find(frame.image)
                    pose_3d = None if pose is None else self._lift_person(frame, pose)
                    if show is not None:
                        with self.watch.stage("draw"):
                            show(LiftedFrame(frame, pose, pose_3d))
                    self.watch.lap()
        finally:
            self.watch.stop()

    def _lift_person(self, frame: Frame, pose: ImagePose) -> np.ndarray:
        with self.watch.stage("crop"):
            crop = crop_person(frame.image, pose, f"frame {frame.number}")
        return self._lift(crop)

    def _lift(self, crop: PersonCrop) -> np.ndarray:
        """The pose [17, 3] of one person."""
        pipeline, watch = self._pipeline, self.watch
        with watch.stage("crop"):
            images, poses = pipeline_inputs(pipeline, [crop], self._device)
        if pipeline.encoder is None:
            with watch.stage("lifter"):
                return lifted_crops("live", pipeline(images, *poses), [crop]).pose_3d[0]
        # What `optimize` made computes in the dtype that it was verified in.
        precision = self._precision if pipeline.report is None else "float32"
        with watch.stage("encoder"), mixed_precision(self._device, precision):
            maps = pipeline.read(images)
        with watch.stage("lifter"):
            return lifted_crops("live", pipeline.lifter(maps, *poses), [crop]).pose_3d[0]


def noise_crop() -> PersonCrop:
    """A crop of noise with a pose, for trying models out."""
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (*CROP_SIZE, 3), dtype=np.uint8)
    keypoints = random.uniform(0.2, 0.8, (len(JOINT_NAMES), 2)) * CROP_SIZE[::-1]
    pose = ImagePose(keypoints, np.ones(len(JOINT_NAMES)), joints_box(keypoints))
    return crop_person(image, pose, "a picture of noise")


def optimized(pipeline: Pipeline, device: str | torch.device, precision: str) -> Pipeline:
    """`pipeline.optimize` for frames as they will come; the encoder may compute in bfloat16 if that is the precision.

    Raises:
        ValueError: there is nothing to optimise, or not in this precision.
    """
    if precision == "float16":
        raise ValueError("live: an optimised encoder computes in float32 or bfloat16, got precision float16")
    pipeline = pipeline.to(device).eval()
    images, _ = pipeline_inputs(pipeline, [noise_crop()], device)
    return pipeline.optimize(images, dtype=PRECISIONS[precision])
