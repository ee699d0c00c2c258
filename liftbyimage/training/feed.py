"""What a step of training is given: which records, in which order, mirrored or not.

All of it is a function of the seed, the stage and the epoch. An epoch is one permutation of the records, cut into
batches; every process takes its share of each batch, so that any number of processes sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from liftbyimage.batches import Batch, make_batch, mirror
from liftbyimage.data.skeleton import JOINT_NAMES
from liftbyimage.data.source import ReadableRecords, Source
from liftbyimage.models.pipeline import Lifter
from liftbyimage.reading import leave_signals_to_the_parent
from liftbyimage.training.config import TrainingConfig
from liftbyimage.training.prefetch import prefetch
from liftbyimage.training.stage2_cache import Stage2Cache
from liftbyimage.training.stages import Kept

# What a random draw is for: the same numbers must not serve two purposes.
ORDER, FLIP, DROPOUT = range(3)


def seed_of(*numbers: int) -> int:
    """One seed of several numbers; other numbers give an unrelated one."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_of(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*numbers))


class Part(NamedTuple):
    """What one pass through the network takes: a process's share of a step, or one of several parts of it."""

    inputs: Batch | Kept
    pose_3d: Tensor  # [B, J, 3] metres, the truth
    problems: list[str]  # why records of it could not be read


class Batches(Sampler[list[int]]):
    """The records of each part of each step of an epoch, for one process of `world`.

    The last batch of an epoch may be smaller, so that every record comes once an epoch; with fewer records than
    processes some processes get an empty part of it.
    """

    def __init__(self, config: TrainingConfig, count: int, stage: int, rank: int, world: int) -> None:
        self.config, self.count, self.stage, self.rank, self.world = config, count, stage, rank, world
        self.steps = -(-count // config.batch_size)  # of an epoch
        self.start(0, 0)

    def start(self, epoch: int, step: int) -> None:
        """The next iteration gives `epoch` from `step` on."""
        self.epoch, self.step = epoch, step

    def samples(self, step: int) -> int:
        """How many records a step has over all processes."""
        return min(self.config.batch_size, self.count - step * self.config.batch_size)

    def parts(self, step: int) -> int:
        """In how many parts every process takes its share of a step; at least one process has a record in each."""
        return min(self.config.accumulate, -(-self.samples(step) // self.world))

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.count, generator=generator_of(self.config.seed, ORDER, self.stage, self.epoch))
        for step in range(self.step, self.steps):
            batch = order[step * self.config.batch_size :][: self.samples(step)]
            share = batch.tensor_split(self.world)[self.rank]
            for part in share.tensor_split(self.parts(step)):
                yield part.tolist()


def mirrored_records(config: TrainingConfig, count: int, stage: int, epoch: int) -> Tensor:
    """Which records an epoch sees in a mirror, bool [N]."""
    if not config.flip:
        return torch.zeros(count, dtype=torch.bool)
    return torch.rand(count, generator=generator_of(config.seed, FLIP, stage, epoch)) < 0.5


def record_loader(source: Source, batches: Batches, config: TrainingConfig) -> DataLoader[Any]:
    """Reads the records of `batches`, in `config.workers` processes that live as long as the loader."""
    return DataLoader(
        ReadableRecords(source),  # a worker's exception would come with its traceback: the trainer sees to `strict`
        batch_sampler=batches,
        num_workers=config.workers,
        collate_fn=partial(_collate, size=source.size),
        generator=torch.Generator(),  # or it would draw from the global one
        worker_init_fn=leave_signals_to_the_parent,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available() and config.device != "cpu",
    )


def parts_from_records(
    loader: DataLoader[Any], lifter: Lifter, mirrored: Tensor, device: torch.device
) -> Iterator[Part]:
    for records in loader:
        flips = mirrored[records["index"]]
        batch = make_batch(lifter, records, device)
        if flips.any():
            batch = mirror(lifter, batch, flips.to(device))
        yield Part(batch, batch.pose_3d, [problem for problem in records["problem"] if problem])


def parts_from_cache(cache: Stage2Cache, batches: Batches, mirrored: Tensor, device: torch.device) -> Iterator[Part]:
    """The next part is read from disk while the caller works on one."""

    def read(records: list[int]) -> Part:
        index = torch.tensor(records, dtype=torch.int64)
        kept, pose_3d = cache.batch(index, mirrored[index])
        return Part(kept, pose_3d, [cache.problems[record] for record in records if record in cache.problems])

    for kept, pose_3d, problems in prefetch(read, batches):
        yield Part(Kept(*(tensor.to(device) for tensor in kept)), pose_3d.to(device), problems)


def _collate(records: list[dict[str, Any]], size: tuple[int, int]) -> dict[str, Any]:
    """Records as one batch, without what training does not read; an empty one of the same kinds if there are none."""
    if records:
        return default_collate(
            [{key: record[key] for key in record if key not in ("mask", "group")} for record in records]
        )
    joints = len(JOINT_NAMES)
    return {
        "image": torch.empty(0, *size, 3, dtype=torch.uint8),
        "keypoints": torch.empty(0, joints, 2),
        "crop_matrix": torch.empty(0, 2, 3, dtype=torch.float64),
        "image_size": torch.empty(0, 2),
        "pose_3d": torch.empty(0, joints, 3),
        "index": torch.empty(0, dtype=torch.int64),
        "problem": [],
    }
