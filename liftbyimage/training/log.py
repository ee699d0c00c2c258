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

from liftbyimage.batches import joint_order, make_batch
from liftbyimage.data.crop import apply_affine
from liftbyimage.data.source import ReadableRecords, Source
from liftbyimage.models import LiftedPose, Pipeline
from liftbyimage.training.distributed import Processes

if TYPE_CHECKING:
    from liftbyimage.training.trainer import Place

PICTURES = 4
PROBLEMS_SHOWN = 3


class Log:
    """Reports a run; only the first process draws curves, and every process says which records it could not read."""

    def __init__(self, out: Path, group: Processes, console: Console | None) -> None:
        self.out, self.group = out, group
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
            self.say("TensorBoard is not installed (pip install 'liftbyimage[train]'): curves go to curves.json only.")
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
        self.losses: list[float] = []
        self.unread = 0
        if self.bar is not None:
            self.task = self.bar.add_task(self.title, total=steps, completed=place.step, loss="")

    def step(self, step: int, loss: float, rate: float, seconds: float, unread: int) -> None:
        """`unread`: how many of the step's records could not be read, in all processes."""
        self.losses.append(loss)
        self.unread += unread
        if self.bar is not None:
            self.bar.update(self.task, advance=1, loss=f"loss {loss:.5f}")
        if self.board is not None:
            for name, value in (("loss", loss), ("learning rate", rate), ("seconds per step", seconds)):
                self.board.add_scalar(name, value, step)

    def end_epoch(self) -> None:
        if self.unread:
            text = f"warning: {self.unread} records could not be read in {self.title}; the next ones stood in for them."
            if self.group.first:
                self.console.print(text, markup=False, highlight=False, soft_wrap=True, style="yellow")
        self.say(f"{self.title}: loss {np.mean(self.losses):.5f}")
        if self.bar is not None:
            self.bar.remove_task(self.task)

    def validated(self, step: int, errors: Mapping[str, float], pipeline: Pipeline, source: Source) -> None:
        self.say(", ".join(f"  validation {name} {value:.1f}" for name, value in errors.items()))
        if self.board is None:
            return
        for name, value in errors.items():
            self.board.add_scalar(f"validation/{name}", value, step)
        for number, figure in enumerate(pictures(pipeline, source, self.group.device)):
            self.board.add_figure(f"validation/{number}", figure, step)


@torch.no_grad()
def pictures(pipeline: Pipeline, source: Source, device: torch.device) -> Iterator[Any]:
    """Drawings of the lifted people of a few fixed records of `source`."""
    from liftbyimage.draw import picture_of_person

    lifter = pipeline.lifter
    h36m = np.argsort(joint_order(lifter))  # the lifter's joints in the Human3.6M order
    readable = ReadableRecords(source)
    pipeline.eval()
    for index in np.linspace(0, len(source) - 1, min(PICTURES, len(source))).astype(int):
        record = readable[int(index)]
        records = {
            key: torch.as_tensor(record[key])[None] for key in ("image", "keypoints", "crop_matrix", "image_size")
        }
        batch = make_batch(lifter, records, device)
        lifted = pipeline(batch.images, *batch.poses)
        patches = (None, None, None)
        if isinstance(lifted, LiftedPose):
            patches = (lifted.importance[0].cpu(), lifted.index[0].cpu(), lifter.config.grid)
        pose = lifted.pose_3d if isinstance(lifted, LiftedPose) else lifted
        pose = pose[0, h36m].float().cpu()
        yield picture_of_person(
            np.asarray(record["image"]),
            apply_affine(np.asarray(record["crop_matrix"]), np.asarray(record["keypoints"])),
            *patches,
            pose - pose[:1],
            coarse_pose_3d=lifted.coarse_pose_3d[0].cpu() if isinstance(lifted, LiftedPose) else None,
            truth_3d=record.get("pose_3d"),
        )
