"""Reading a source in batches, in a given order, whatever its records are like."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from liftbyimage.data.source import CorruptRecord, Source


class Problem(NamedTuple):
    """A record that could not be read, and why."""

    index: int
    problem: str


class ReadBatch(NamedTuple):
    """The readable records of a batch, collated: tensors with a leading B, and `index` int64 [B]."""

    records: dict[str, Any] | None  # None if none could be read
    problems: list[Problem]


class _Attempts(Dataset[Any]):
    """Records with their `index`, or the problem with them."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: int) -> dict[str, Any] | Problem:
        try:
            return {**self.source[index], "index": index}
        except CorruptRecord as error:
            return Problem(index, str(error))


def _collate(attempts: Sequence[dict[str, Any] | Problem]) -> ReadBatch:
    readable = [attempt for attempt in attempts if not isinstance(attempt, Problem)]
    problems = [attempt for attempt in attempts if isinstance(attempt, Problem)]
    return ReadBatch(default_collate(readable) if readable else None, problems)


def read_batches(
    source: Source, batches: Iterable[Sequence[int]], workers: int = 0, strict: bool = False
) -> Iterator[ReadBatch]:
    """The records of a source, a batch for each of `batches`, in their order.

    Args:
        batches: the indices of each batch's records.
        workers: processes that read; 0 reads in this one. They change nothing of what is read.
        strict: raise for a record that cannot be read.

    Raises:
        CorruptRecord: with `strict`, the problem of the first record that cannot be read.
    """
    # A generator of its own: the loader would otherwise draw from, and so change, the global one.
    loader = DataLoader(
        _Attempts(source),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),
        worker_init_fn=leave_signals_to_the_parent,
    )
    for batch in loader:
        if strict and batch.problems:
            raise CorruptRecord(batch.problems[0].problem)
        yield batch


def leave_signals_to_the_parent(worker: int) -> None:
    """In a process that reads records: what is asked of a whole process group, to end or to be interrupted, its parent
    answers, and may need its records until it has."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def in_batches(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """`indices` cut into pieces of `batch_size`, the last one shorter."""
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def spread(count: int, limit: int | None) -> range | list[int]:
    """`limit` numbers below `count`, evenly spread; all of them without a limit."""
    if limit is None or limit >= count:
        return range(count)
    return [number * count // limit for number in range(limit)]
