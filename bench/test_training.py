"""Stage-2 training of Lifting by Image: what the cache of its frozen first stage costs and saves.

"step only" takes one batch again and again, which lies in memory: what reading can at best leave over. "cache" reads
every batch from the stage-2 cache as the training loop does, "no cache" makes it anew of pictures that lie in memory:
encoder, stage 1, selection. TinyEncoder(32), 64 synthetic people, batches of 16, dropout and flips on; a round is an
epoch. The losses of the last two are compared before anything is timed.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import pytest
import torch
from machine import DEVICE
from measurement import Measurement
from workload import dtype_name

from liftbyimage.data.crop import CROP_SIZE
from liftbyimage.data.synthetic import SyntheticPeople
from liftbyimage.models import LiftByImage, LiftByImageConfig, Pipeline, TinyEncoder
from liftbyimage.training import TrainingConfig
from liftbyimage.training.feed import (
    Batches,
    Part,
    mirrored_records,
    parts_from_cache,
    parts_from_records,
    record_loader,
)
from liftbyimage.training.loss import StageLoss
from liftbyimage.training.stage2_cache import Stage2Cache
from liftbyimage.training.stages import FocusedExploration

CHANNELS = 32
STAGE = 1  # counted from 0
STEP_ONLY, NO_CACHE = "step only", "no cache"
CACHES = {"cache": torch.float32, "cache, float16": torch.float16}
# Largest relative difference of a step's loss from that without a cache: formed and factored patches round differently
# in float32, and float16 patches are other patches by up to half a unit of their last digit.
BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2}
ROUNDS = 5

Feed = Callable[[int], Iterator[Part]]  # of the epoch


class Training:
    """Stage 2 from fixed weights, and the ways in which it can be fed."""

    def __init__(self, folder: Path, smoke: bool) -> None:
        size = (64, 48) if smoke else CROP_SIZE
        grid = (size[0] // TinyEncoder.stride, size[1] // TinyEncoder.stride)
        self.lifter = LiftByImageConfig(image_channels=CHANNELS, grid=grid, dim=64 if smoke else 256)
        self.config = TrainingConfig(encoder="tiny", batch_size=4 if smoke else 16)
        self.source = SyntheticPeople(count=8 if smoke else 64, size=size)
        self.batches = Batches(self.config, len(self.source), STAGE, rank=0, world=1)
        self.folder, self.device = folder, torch.device(DEVICE)

    def begin(self) -> None:
        torch.manual_seed(0)
        self.stage, encoder = FocusedExploration(), TinyEncoder(CHANNELS)
        self.pipeline = Pipeline(encoder, LiftByImage(self.lifter)).to(self.device).requires_grad_(False)
        parameters = [parameter.requires_grad_() for parameter in self.stage.parameters(self.pipeline)]
        self.optimiser = torch.optim.Adam(parameters, lr=self.config.learning_rate)
        self.loss = StageLoss(self.pipeline, self.stage, self.config.loss, self.config.precision)

    def cache(self, dtype: torch.dtype) -> Stage2Cache:
        folder = self.folder / str(dtype)
        return Stage2Cache.open(
            folder, self.pipeline, self.source, flip=True, batch_size=16, device=self.device, dtype=dtype
        )

    def feed(self, name: str) -> Feed:
        if name in CACHES:
            cache = self.cache(CACHES[name])
            return lambda epoch: parts_from_cache(cache, self.batches, self._mirrored(epoch), self.device)
        loader = record_loader(self.source, self.batches, self.config)
        if name == NO_CACHE:
            return lambda epoch: parts_from_records(loader, self.pipeline.lifter, self._mirrored(epoch), self.device)
        part = next(self.feed("cache")(0))
        return lambda epoch: itertools.repeat(part, self.batches.steps)

    def epoch(self, feed: Feed, epoch: int) -> list[float]:
        """The losses of its steps."""
        self.stage.train(self.pipeline)
        self.batches.start(epoch, 0)
        return [self.step(part, number) for number, part in enumerate(feed(epoch))]

    def step(self, part: Part, number: int) -> float:
        torch.manual_seed(number)  # of dropout, as the loop seeds it anew in every step
        self.optimiser.zero_grad()
        loss = self.loss(part) / len(part.pose_3d)
        loss.backward()
        self.optimiser.step()
        return loss.item()

    def _mirrored(self, epoch: int) -> torch.Tensor:
        return mirrored_records(self.config, len(self.source), STAGE, epoch)


@pytest.fixture(scope="module")
def training(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(tmp_path_factory.mktemp("caches"), pytestconfig.getoption("smoke"))


def verify(training: Training, name: str) -> None:
    """An epoch's losses are those without a cache."""
    losses = {}
    for one in (name, NO_CACHE):
        training.begin()
        losses[one] = torch.tensor(training.epoch(training.feed(one), 0))
    torch.testing.assert_close(losses[name], losses[NO_CACHE], atol=0, rtol=BOUNDS[CACHES[name]])


@pytest.mark.parametrize("name", [STEP_ONLY, *CACHES, NO_CACHE])
def test_stage_2_training(measure: Measurement, training: Training, name: str) -> None:
    if name in CACHES:
        verify(training, name)
    training.begin()
    step_only, feed, epochs = training.feed(STEP_ONLY), training.feed(name), itertools.count()
    samples, config = len(training.source), training.lifter
    facts: dict[str, Any] = {
        "implementation": name,
        "op": "stage-2 training",
        "direction": "epoch of training",
        "shape": {"B": training.config.batch_size, "P": config.grid[0] * config.grid[1], "D": config.dim},
        "dtype": dtype_name(),
        "bytes_read_per_sample": training.cache(CACHES[name]).row_bytes if name in CACHES else 0,
        **machine.description(measure.ceilings),
    }
    measure.record(f"stage-2 training {samples} samples {dtype_name()} {DEVICE}", facts)

    def epoch_of(one: Feed) -> None:
        training.epoch(one, next(epochs))

    if not measure.benchmark.enabled:
        measure.benchmark(epoch_of, feed)
        return
    alone = []  # seconds of an epoch of steps only, taken between the rounds: the machine's mood is the same for both

    def before_round() -> None:
        alone.append(machine.seconds_of(lambda: epoch_of(step_only)))

    def timed() -> None:
        epoch_of(feed)
        machine.synchronise()

    timed()
    measure.benchmark.pedantic(timed, setup=before_round, rounds=ROUNDS)
    seconds = measure.benchmark.stats.stats.median
    facts["samples_per_second"] = samples / seconds
    facts["fraction_of_step_only"] = statistics.median(alone) / seconds
