"""What a person sees of a run: a progress bar or a line an epoch, and TensorBoard's curves and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from liftbyimage.batches import make_batch
from liftbyimage.data.crop import apply_affine
from liftbyimage.data.source import ReadableRecords, Source
from liftbyimage.models import Pipeline
from liftbyimage.ops import keep_count
from liftbyimage.predict import predict
from liftbyimage.reading import spread
from liftbyimage.training.distributed import Processes
from liftbyimage.training.stages import Stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from liftbyimage.training.trainer import Place

PROBLEMS_SHOWN = 3
INPUTS = ("image", "keypoints", "crop_matrix", "image_size")


class Log:
    """Reports a run; only the first process draws curves, and every process says which records it could not read."""

    def __init__(self, out: Path, group: Processes, pictures: int, console: Console | None) -> None:
        self.out, self.group, self.pictures = out, group, pictures
        self.console = console or Console(stderr=True)
        self.seen: set[str] = set()  # problems that were told
        self.bar: Progress | None = None
        self.board: Any = None

    @contextmanager
    def open(self, step: int) -> Iterator[None]:
        """While a run is on; TensorBoard forgets what an interrupted run drew from `step` on, for it is drawn again."""
        if not self.group.first:
            yield
            return
        self.board = self._open_board(step)
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self.bar = Progress(
                *columns, TextColumn("{task.fields[loss]}"), TimeRemainingColumn(), console=self.console
            )
            self.bar.start()
        try:
            yield
        finally:
            if self.bar is not None:
                self.bar.stop()
            if self.board is not None:
                self.board.close()

    def _open_board(self, step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("TensorBoard is not installed (pip install tensorboard): curves go to curves.json only.")
            return None
        return SummaryWriter(self.out / "tensorboard", purge_step=step)

    def say(self, text: str) -> None:
        if self.group.first:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def problems(self, problems: list[str]) -> None:
        """Tell the first few records that this process could not read."""
        for problem in problems:
            if problem not in self.seen and len(self.seen) < PROBLEMS_SHOWN:
                self.seen.add(problem)
                self.console.print(f"warning: {problem}", markup=False, highlight=False, soft_wrap=True, style="yellow")

    def begin_epoch(self, stage: str, place: Place, epochs: int, steps: int) -> None:
        self.title = f"{stage}, epoch {place.epoch + 1} of {epochs}"
        self.unread = 0
        if self.bar is not None:
            self.task = self.bar.add_task(self.title, total=steps, completed=place.step, loss="")

    def step(self, step: int, loss: float, rate: float, seconds: float, unread: int) -> None:
        """`unread`: how many of the step's records could not be read, in all processes."""
        self.unread += unread
        if self.bar is not None:
            self.bar.update(self.task, advance=1, loss=f"loss {loss:.5f}")
        if self.board is not None:
            for name, value in (("loss", loss), ("learning rate", rate), ("seconds per step", seconds)):
                self.board.add_scalar(name, value, step)

    def end_epoch(self, losses: list[float], complete: bool) -> None:
        if self.unread:
            text = f"warning: {self.unread} records could not be read in {self.title}; the next ones stood in for them."
            if self.group.first:
                self.console.print(text, markup=False, highlight=False, soft_wrap=True, style="yellow")
        if complete:
            self.say(f"{self.title}: loss {np.mean(losses):.5f}")
        if self.bar is not None:
            self.bar.remove_task(self.task)

    def validated(
        self, step: int, errors: Mapping[str, float], stage: Stage, pipeline: Pipeline, source: Source
    ) -> None:
        self.say("  validation: " + ", ".join(f"{name} {value:.1f}" for name, value in errors.items()))
        if self.board is None:
            return
        for name, value in errors.items():
            self.board.add_scalar(f"validation/{name}", value, step)
        for number, figure in enumerate(draw_people(pipeline, stage, source, self.pictures, self.group.device)):
            self.board.add_figure(f"validation/{number}", figure, step)


def draw_people(pipeline: Pipeline, stage: Stage, source: Source, count: int, device: torch.device) -> Iterator[Figure]:
    """Drawings of `count` lifted people of `source`, always the same, from its beginning to its end; in stage 1 of the
    coarse pose alone, for nobody has trained the refined one."""
    from liftbyimage.draw import picture_of_person  # matplotlib takes long to import

    readable = ReadableRecords(source)
    pipeline.eval()
    for index in spread(len(source), count):
        record = readable[index]
        inputs = {name: torch.as_tensor(record[name])[None] for name in INPUTS}
        lifted = predict(pipeline, make_batch(pipeline.lifter, inputs, device))
        pose, coarse = lifted.pose_3d, lifted.coarse_pose_3d
        if stage.measured and coarse is not None:
            pose, coarse = coarse, None
        patches = (None, None, None)
        if lifted.importance is not None:
            importance, config = lifted.importance[0].cpu(), pipeline.lifter.config
            kept = importance.topk(keep_count(len(importance), config.retention)).indices.sort().values
            patches = (importance, kept, config.grid)
        yield picture_of_person(
            np.asarray(record["image"]),
            apply_affine(record["crop_matrix"], record["keypoints"]),
            *patches,
            pose[0].cpu(),
            coarse_pose_3d=None if coarse is None else coarse[0].cpu(),
            truth_3d=record["pose_3d"],
        )
