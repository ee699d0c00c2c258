"""The training loop: stages, epochs, steps.

What is random is a function of the seed and of where in the run it is drawn (stage, epoch, step, process), never of
what was drawn before: a run that continues from `last.pt`, even from the middle of an epoch, is the run that was never
interrupted, bit by bit.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from liftbyimage._files import differences, remove_leftovers, write_atomically
from liftbyimage.checkpoint import save_atomically, save_pipeline
from liftbyimage.data.source import CorruptRecord, Source, check_source, open_source
from liftbyimage.models import Pipeline
from liftbyimage.training.build import build_pipeline
from liftbyimage.training.config import MAY_CHANGE, TrainingConfig
from liftbyimage.training.distributed import Processes, processes
from liftbyimage.training.feed import (
    DROPOUT,
    Batches,
    Part,
    mirrored_records,
    parts_from_cache,
    parts_from_records,
    record_loader,
    seed_of,
)
from liftbyimage.training.log import Log
from liftbyimage.training.loss import StageLoss
from liftbyimage.training.signals import StopRequest
from liftbyimage.training.stage2_cache import Stage2Cache
from liftbyimage.training.stages import FocusedExploration, Stage, stages_of
from liftbyimage.training.validation import validate

FORMAT = "liftbyimage-training-1"
LAST, BEST, MODEL, CONFIG, CURVES = "last.pt", "best.pt", "model.pt", "config.yaml", "curves.json"


Feed = Callable[[Tensor], Iterator[Part]]  # the records [N] that an epoch mirrors → the parts of its steps, in order


class Trained(NamedTuple):
    """How a call of `train` ended."""

    finished: bool  # False: it was asked to stop, and OUT/last.pt continues it
    curves: dict[str, Any]  # as OUT/curves.json
    best_mpjpe_mm: float | None  # of OUT/best.pt; None without validation

    def report(self, out: Path) -> dict[str, Any]:
        """How it ended, in plain values: the files that `out` holds, each stage's steps and last loss, the last
        validation."""
        losses = {stage: values for stage, values in self.curves["loss"].items() if values}
        validation = self.curves["validation"]
        files = {name: out / name for name in (MODEL, BEST, LAST, CONFIG, CURVES)}
        return {
            "finished": self.finished,
            "files": {Path(name).stem: str(path) for name, path in files.items() if path.is_file()},
            "steps": {stage: len(values) for stage, values in losses.items()},
            "loss": {stage: values[-1] for stage, values in losses.items()},
            "validation": validation[-1] if validation else None,
            "best_mpjpe_mm": self.best_mpjpe_mm,
        }


@dataclass
class Place:
    """Where a run stands: `step` steps of `epoch` of `stage` are done. All count from 0."""

    stage: int = 0
    epoch: int = 0
    step: int = 0


@dataclass
class StageWork:
    """What lives as long as a stage."""

    stage: Stage
    epochs: int
    model: nn.Module  # a part of a step in, its loss out
    parameters: list[nn.Parameter]
    optimiser: torch.optim.Optimizer
    average: AveragedModel | None
    batches: Batches


def train(
    config: TrainingConfig,
    out: str | os.PathLike[str],
    *,
    source: Source | None = None,
    validation: Source | None = None,
    resume: bool = True,
    console: Console | None = None,
) -> Trained:
    """Train a lifter, and leave in `out`

    - `model.pt`, the trained pipeline, and `best.pt`, the one of the last stage with the best validation MPJPE, as
      `checkpoint.load_pipeline` reads them;
    - `last.pt`, all that continues the run, written at every epoch's end and every `config.save_every_minutes`;
    - `config.yaml`, `curves.json` (every step's loss, every epoch's validation) and `tensorboard/`.

    Where `out` holds a `last.pt` the run continues from it, bit by bit as if it had never stopped. SIGTERM, or Ctrl-C
    once, ends it after the step at hand. Called in every process that torchrun starts, it trains in all of them.

    Args:
        source, validation: sources in place of those that `config.data` and `config.validate` name.
        resume: False starts anew, and what `out` holds is replaced.
        console: where to write; standard error by default.

    Raises:
        ValueError: a source without true poses, settings that do not fit, `last.pt` of another run, a loss that is not
            finite, or, with `config.strict`, a record that cannot be read.
    """
    if source is None:
        source = _open(config.data, "data")
    if validation is None and config.validate is not None:
        validation = _open(config.validate, "validate")
    with processes(config.device, config.precision) as group, StopRequest() as stop:
        devices = [group.device] if group.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return Trainer(config, Path(out), source, validation, group, stop, console).run(resume)


def _open(line: str | None, key: str) -> Source:
    if line is None:
        raise ValueError(f"TrainingConfig: {key} must name a source, got None")
    return open_source(line)


def learning_rate(config: TrainingConfig, place: Place, steps: int, epochs: int) -> float:
    """The rate of a step of a stage of `epochs` epochs of `steps` steps: warm-up times schedule."""
    done = place.epoch * steps + place.step
    rise = min(1.0, (done + 1) / config.warm_up) if config.warm_up else 1.0
    if config.schedule == "step":
        return config.learning_rate * rise * config.decay ** (place.epoch // config.decay_every)
    progress = max(0, done - config.warm_up) / max(1, epochs * steps - config.warm_up)
    return config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """One run: its weights, its place, and the methods that move both on, from the whole down to a step."""

    def __init__(
        self,
        config: TrainingConfig,
        out: Path,
        source: Source,
        validation: Source | None,
        group: Processes,
        stop: StopRequest,
        console: Console | None,
    ) -> None:
        self.config, self.out, self.source, self.validation = config, out, source, validation
        self.group, self.stop = group, stop
        _check_records(source, validation)
        start = build_pipeline(config, source.size)
        self.encoder_name, self.encoder_config = start.encoder, start.encoder_config
        self.pipeline = start.pipeline.to(group.device)
        group.synchronise_batch_norm(self.pipeline)
        self.stages = stages_of(self.pipeline.lifter)
        self.epochs = (config.epochs, config.stage2_epochs)[: len(self.stages)]
        self.steps = -(-len(source) // config.batch_size)  # of an epoch
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=config.precision == "float16")
        self.place = Place()
        self.best: float | None = None
        self.curves: dict[str, Any] = {"loss": {stage.name: [] for stage in self.stages}, "validation": []}
        self.restored: dict[str, Any] | None = None  # of last.pt, until the stage it was written in has taken it
        self.saved_at = time.monotonic()
        self.log = Log(out, group, config.pictures, console)
        _check_folder(config.cache, "cache")
        if start.encoder_is_new and self.pipeline.lifter.encoder_is_frozen:
            self.log.say(
                f"warning: a {config.model} never trains its encoder, and this one has random weights; "
                "encoder_weights gives it others"
            )

    def run(self, resume: bool) -> Trained:
        if resume:
            self._restore()
        elif self.group.first:
            for name in (LAST, BEST, MODEL):
                (self.out / name).unlink(missing_ok=True)
        if self.group.first:
            for name in (LAST, BEST, MODEL, CONFIG, CURVES):
                remove_leftovers(self.out / name)
            self._write(CONFIG, yaml.safe_dump(self.config.to_dict(), sort_keys=False, allow_unicode=True))
        self._introduce()
        finished = self._run_stages()
        if finished:
            self._save_pipeline(MODEL, self.pipeline)
            self._save(None)
            best = "" if self.best is None else f"; {BEST}: MPJPE {self.best:.1f} mm in validation"
            self.log.say(f"Finished: {self.out / MODEL}{best}.")
        return Trained(finished, self.curves, self.best)

    def _introduce(self) -> None:
        weights = sum(parameter.numel() for parameter in self.pipeline.parameters())
        processes = f"{self.group.world} processes" if self.group.world > 1 else "one process"
        self.log.say(
            f"{self.config.model}, {weights / 1e6:.1f} million weights, on {len(self.source)} records: "
            f"{self.steps} steps an epoch, {self.group.device}, {processes}."
        )

    def _run_stages(self) -> bool:
        """False if the run was asked to stop."""
        if self.place.stage == len(self.stages):  # opened once more, TensorBoard would forget the last validation
            return True
        with self.log.open(self._global_step()):
            return all(self._run_stage(number) for number in range(self.place.stage, len(self.stages)))

    def _run_stage(self, number: int) -> bool:
        """False if the run was asked to stop."""
        if self.epochs[number]:
            work = self._begin_stage(number)
            feed = self._feed(work)
            if feed is None:
                return False
            while self.place.epoch < work.epochs:
                if not (self._run_epoch(work, feed) and self._validate(work)):
                    return False
                self.place = Place(number, self.place.epoch + 1)
            if work.average is not None:  # what was validated is what the next stage builds on
                self.pipeline.load_state_dict(work.average.module.state_dict())
        self.place = Place(number + 1)
        return True

    def _begin_stage(self, number: int) -> StageWork:
        config, stage = self.config, self.stages[number]
        parameters = stage.parameters(self.pipeline)
        self.pipeline.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_()
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimiser]
        optimiser = kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        average = None
        if config.ema is not None:
            average = AveragedModel(self.pipeline, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        if self.restored is not None:
            optimiser.load_state_dict(self.restored["optimiser"])
            self.scaler.load_state_dict(self.restored["scaler"])
            if average is not None:
                average.load_state_dict(self.restored["average"])
            self.restored = None
        loss = StageLoss(self.pipeline, stage, config.loss, config.precision)
        model = self.group.parallel(loss, stage.has_idle_parameters(self.pipeline))
        batches = Batches(config, len(self.source), number, self.group.rank, self.group.world)
        return StageWork(stage, self.epochs[number], model, parameters, optimiser, average, batches)

    def _feed(self, work: StageWork) -> Feed | None:
        """Where the parts of the stage's steps come from: records, or what the frozen stage 1 made of them. None if the
        run was asked to stop while that was computed."""
        config, device = self.config, self.group.device
        if config.cache is not None and isinstance(work.stage, FocusedExploration):
            self.log.say(f"{work.stage.name} reads {config.cache}; what is not there yet is computed first.")
            cache = Stage2Cache.open(
                config.cache,
                self.pipeline,
                self.source,
                flip=config.flip,
                batch_size=config.batch_size,
                workers=config.workers,
                device=device,
                precision=config.precision,
                strict=config.strict,
                rank=self.group.rank,
                world=self.group.world,
                stop=self.stop,
            )
            if cache is None:
                return None
            return lambda mirrored: parts_from_cache(cache, work.batches, mirrored, device)
        loader = record_loader(self.source, work.batches, config)
        return lambda mirrored: parts_from_records(loader, self.pipeline.lifter, mirrored, device)

    def _run_epoch(self, work: StageWork, feed: Feed) -> bool:
        """The steps of the epoch at hand that are not done yet; False if the run was asked to stop."""
        place = self.place
        if place.step == self.steps:  # continued between the last step and validation
            return True
        work.stage.train(self.pipeline)
        work.batches.start(place.epoch, place.step)
        parts = feed(mirrored_records(self.config, len(self.source), place.stage, place.epoch))
        self.log.begin_epoch(work.stage.name, place, work.epochs, self.steps)
        stopping = False
        while place.step < self.steps and not stopping:
            stopping = self._step(work, islice(parts, work.batches.parts(place.step)))
            place.step += 1
            if stopping or place.step == self.steps or self._saving_is_due():
                self._save(work)
        self.log.end_epoch(self.curves["loss"][work.stage.name][-place.step :], complete=not stopping)
        return not stopping

    def _step(self, work: StageWork, parts: Iterator[Part]) -> bool:
        """One step, from records to the optimiser; True if any process was asked to stop."""
        config, group, place = self.config, self.group, self.place
        started = time.perf_counter()
        rate = learning_rate(config, place, self.steps, work.epochs)
        for settings in work.optimiser.param_groups:
            settings["lr"] = rate
        work.optimiser.zero_grad()
        samples, last = work.batches.samples(place.step), work.batches.parts(place.step) - 1
        loss, problems = 0.0, 0
        for number, part in enumerate(parts):
            draw = (place.stage, place.epoch, place.step, number, group.rank)
            torch.manual_seed(seed_of(config.seed, DROPOUT, *draw))
            with nullcontext() if number == last else group.local(work.model):
                part_loss = work.model(part)  # summed over the part's samples
                # DistributedDataParallel will divide the sum of all processes' gradients by their number.
                self.scaler.scale(part_loss * (group.world / samples)).backward()
            loss += part_loss.item()
            problems += self._tell(part.problems)
        loss, problems, stopping = group.add_up([loss / samples, problems, self.stop.requested])
        if not math.isfinite(loss):
            raise self._broken(work, place.step + 1, f"the loss is {loss}")
        if config.clip_norm is not None:
            self.scaler.unscale_(work.optimiser)
            nn.utils.clip_grad_norm_(work.parameters, config.clip_norm)
        self.scaler.step(work.optimiser)
        self.scaler.update()
        if work.average is not None:
            work.average.update_parameters(self.pipeline)
        self.curves["loss"][work.stage.name].append(loss)
        self.log.step(self._global_step(), loss, rate, time.perf_counter() - started, int(problems))
        return bool(stopping)

    def _tell(self, problems: list[str]) -> int:
        """Say which records could not be read, and how many they are; the first one ends a strict run."""
        if problems and self.config.strict:
            raise CorruptRecord(problems[0])
        self.log.problems(problems)
        return len(problems)

    def _validate(self, work: StageWork) -> bool:
        """Measure the epoch's weights, and keep them if they are the best of the last stage; False if the run was asked
        to stop meanwhile: last.pt stands before the validation, which is then done again."""
        if self.validation is None:
            return True
        pipeline = self.pipeline if work.average is None else work.average.module
        errors = validate(pipeline, work.stage, self.validation, self.config, self.group, self.stop)
        if errors is None:
            return False
        where = {"stage": work.stage.name, "epoch": self.place.epoch + 1, "step": self._global_step()}
        self.curves["validation"].append({**where, **errors})
        self._write_curves()
        self.log.validated(self._global_step(), errors, work.stage, pipeline, self.validation)
        if work.stage is self.stages[-1] and (self.best is None or errors["mpjpe_mm"] < self.best):
            self.best = errors["mpjpe_mm"]
            self._save_pipeline(BEST, pipeline)
        return True

    def _global_step(self) -> int:
        """How many steps are done in all stages: where curves stand."""
        before = sum(self.epochs[: self.place.stage])
        return (before + self.place.epoch) * self.steps + self.place.step

    def _saving_is_due(self) -> bool:
        return time.monotonic() - self.saved_at >= 60 * self.config.save_every_minutes

    def _broken(self, work: StageWork, step: int, what: str) -> ValueError:
        return ValueError(
            f"{work.stage.name}, epoch {self.place.epoch + 1}, step {step}: {what}; "
            f"{self.out / LAST} stays as it was before"
        )

    def _save(self, work: StageWork | None) -> None:
        """Write last.pt: all that continues the run from its place.

        Raises:
            ValueError: the weights are not finite, as the gradient of a finite loss may make them.
        """
        if work is not None and not all(parameter.isfinite().all() for parameter in work.parameters):
            raise self._broken(work, self.place.step, "the weights are not finite")
        self.saved_at = time.monotonic()
        if not self.group.first:
            return
        average = None if work is None or work.average is None else work.average.state_dict()
        state = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "records": self._records(),
            "place": asdict(self.place),
            "pipeline": self.pipeline.state_dict(),
            "optimiser": None if work is None else work.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": average,
            "curves": self.curves,
            "best": self.best,
        }
        save_atomically(state, self.out / LAST)
        self._write_curves()

    def _records(self) -> dict[str, Any]:
        """Which records the run sees, as JSON gives it back: tuples are lists."""
        sources = {"data": self.source, "validate": self.validation}
        described = {
            key: None if source is None else {**source.description, "records": len(source)}
            for key, source in sources.items()
        }
        return json.loads(json.dumps(described))

    def _restore(self) -> None:
        """Take up last.pt where there is one."""
        path = self.out / LAST
        state = self.group.share(_read_last(path, self.config, self._records()) if self.group.first else None)
        if state is None:
            return
        self.pipeline.load_state_dict(state["pipeline"])
        self.place = Place(**state["place"])
        self.curves, self.best = state["curves"], state["best"]
        self.restored = state if state["optimiser"] is not None else None
        finished = self.place.stage == len(self.stages)
        self.log.say(
            f"{path} holds this run, finished." if finished else f"Continuing {path} at step {self._global_step()}."
        )

    def _save_pipeline(self, name: str, pipeline: Pipeline) -> None:
        if self.group.first:
            save_pipeline(pipeline, self.out / name, encoder=self.encoder_name, encoder_config=self.encoder_config)

    def _write_curves(self) -> None:
        if self.group.first:
            self._write(CURVES, json.dumps(self.curves, indent=1))

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.out / name, lambda file: file.write(text.encode()))


def _check_folder(path: str | None, key: str) -> None:
    if path is not None and Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"TrainingConfig: {key} must be a folder, got the file {path}")


def _check_records(source: Source, validation: Source | None) -> None:
    for key, one in {"data": source, "validate": validation}.items():
        if one is None:
            continue
        if not len(one):
            raise ValueError(f"TrainingConfig: {key} must have records, got none")
        if "pose_3d" not in check_source(f"TrainingConfig: {key}", one):
            raise ValueError(f"TrainingConfig: {key} must have true poses (pose_3d), got records without")
    if validation is not None and tuple(validation.size) != tuple(source.size):
        (height, width), (other_height, other_width) = source.size, validation.size
        raise ValueError(
            f"TrainingConfig: validate must have crops of {height}x{width} px as data has, "
            f"got {other_height}x{other_width}"
        )


def _read_last(path: Path, config: TrainingConfig, records: dict[str, Any]) -> dict[str, Any] | None:
    """last.pt of the same run; None where there is none."""
    if not path.is_file():
        kept = [name for name in (MODEL, BEST) if (path.parent / name).is_file()]
        if kept:
            raise ValueError(
                f"{path.parent} holds {kept[0]} but no {LAST} to go on from; choose another folder or delete it"
            )
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken or foreign file
        raise ValueError(f"{path}: not a readable PyTorch file of plain values") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path}: expected what training writes ({FORMAT!r}), got another file")
    before, now = _settings(state["config"]), _settings(config.to_dict())
    other = differences({**before, **state["records"]}, {**now, **records})
    if other:
        raise ValueError(f"{path} is of another run, choose another folder for this one ({other})")
    return state


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must keep to the end. Where the cache lies may change, whether there is one moves rounding."""
    kept = {key: value for key, value in config.items() if key not in MAY_CHANGE}
    return {**kept, "cache": config.get("cache") is not None}
