"""What stage 2 of Lifting by Image starts from, computed once and read from disk in every epoch.

Encoder and stage 1 are frozen, so kept patches, joint tokens, coarse and true pose of a record never change: they lie
in memory-mapped shards, straight and, where flips are drawn, mirrored (docs/stage-2-cache.md).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from liftbyimage._files import differences, write_atomically
from liftbyimage.batches import Batch, make_batch, mirror
from liftbyimage.data.source import CorruptRecord, ReadableRecords, Source
from liftbyimage.models import LiftByImage, Pipeline
from liftbyimage.nn import FactoredPatches
from liftbyimage.ops import keep_count
from liftbyimage.predict import evaluating, mixed_precision
from liftbyimage.reading import in_batches, leave_signals_to_the_parent
from liftbyimage.training.signals import Stopped, StopRequest
from liftbyimage.training.stages import FocusedExploration, Kept

FORMAT = "liftbyimage-stage2-cache-1"
SHARD_BYTES = 256 * 2**20
OPEN_SHARDS = 256  # at a time: every mapped file takes a file descriptor, of which 1024 is a common limit
STAGE2 = ("lifter.stage2.", "lifter.refined_head.")

# dtype of the patches → what NumPy stores; it has no bfloat16, so that is stored as its bits.
_STORED = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<i2"}


@dataclass(frozen=True)
class _Layout:
    """Where the row of each record is: `copies` rows a record, straight before mirrored, in shards of equal length."""

    folder: Path
    records: int
    copies: int
    row: np.dtype[Any]

    @property
    def records_per_shard(self) -> int:
        return max(1, SHARD_BYTES // (self.copies * self.row.itemsize))

    @property
    def shards(self) -> range:
        return range(-(-self.records // self.records_per_shard))

    def records_of(self, shard: int) -> range:
        first = shard * self.records_per_shard
        return range(first, min(first + self.records_per_shard, self.records))

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.npy"

    def problems_path(self, shard: int) -> Path:
        return self.path(shard).with_suffix(".json")

    def header(self, shard: int) -> bytes:
        """What an .npy file of the shard's rows starts with."""
        described = np.lib.format.header_data_from_array_1_0(np.empty(0, self.row))
        header = io.BytesIO()
        rows = (self.copies * len(self.records_of(shard)),)
        np.lib.format.write_array_header_1_0(header, {**described, "shape": rows})
        return header.getvalue()

    def file_size(self, shard: int) -> int:
        return len(self.header(shard)) + self.copies * len(self.records_of(shard)) * self.row.itemsize

    def is_whole(self, shard: int) -> bool:
        """Whether the shard is there; it is written after the file of its problems."""
        path = self.path(shard)
        return path.is_file() and path.stat().st_size == self.file_size(shard) and self.problems_path(shard).is_file()


class Stage2Cache:
    """Kept patches, joint tokens, coarse and true poses of every record of a source, on disk.

    Attributes:
        problems: for each record that could not be read, by index, why; another record stands in for it.
        row_bytes: what one sample takes on disk.
    """

    def __init__(self, layout: _Layout, dtype: torch.dtype) -> None:
        self._layout, self._dtype = layout, dtype
        self._maps: OrderedDict[int, np.memmap[Any, Any]] = OrderedDict()
        self.problems = _read_problems(layout)
        self.row_bytes = layout.row.itemsize

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        pipeline: Pipeline,
        source: Source,
        *,
        flip: bool,
        batch_size: int,
        workers: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        precision: str = "float32",
        strict: bool = False,
        rank: int = 0,
        world: int = 1,
        stop: StopRequest | None = None,
    ) -> Stage2Cache | None:
        """The cache in `folder`, after computing the shards that are not there yet; None if it was asked to `stop`.

        Args:
            folder: one that all processes see; made where it is missing.
            pipeline: of a LiftByImage whose stage 1 is trained, on `device`; computed with in evaluation mode and
                without gradients, then left as it came.
            source: of records with `pose_3d`.
            flip: store every record mirrored too (`batches.mirror`).
            batch_size, workers: of the computing; a batch's size moves rows by rounding only.
            dtype: what patches are stored in: float32, or float16 or bfloat16 for half the disk. Poses and joint
                tokens are always float32.
            precision: that stage 1 computes in, by automatic mixed precision, as the run does without a cache.
            strict: raise for a record that cannot be read, where another would stand in.
            rank, world: this process computes every world-th shard, and where a process group exists waits for the
                others.

        Raises:
            TypeError, ValueError: arguments of another kind than said; a folder that holds what another encoder, stage
                1, configuration, source, flip or dtype gave; too little room on the disk; a patch beyond float16.
            CorruptRecord: with `strict`.
        """
        _check(pipeline, source, dtype)
        layout = _Layout(Path(folder), len(source), 2 if flip else 1, _row_type(pipeline.lifter, dtype))
        missing = [shard for shard in layout.shards if not layout.is_whole(shard)]
        key = _key(pipeline, source, layout, dtype, precision)
        _check_key(layout, key)
        _check_room(layout, missing)
        write_atomically(layout.folder / "key.json", lambda file: file.write(json.dumps(key, indent=1).encode()))
        mine = [shard for shard in missing if shard % world == rank]
        stopped = [False] * world
        with evaluating(pipeline), torch.no_grad(), mixed_precision(device, precision):
            try:
                _compute(layout, mine, pipeline, source, batch_size, workers, device, dtype, strict, stop)
            except Stopped:
                stopped[rank] = True
        if world > 1 and distributed.is_initialized():
            distributed.all_gather_object(stopped, stopped[rank])
        if any(stopped):
            return None
        cache = cls(layout, dtype)
        if strict and cache.problems:
            raise CorruptRecord(next(iter(cache.problems.values())))
        return cache

    def __len__(self) -> int:
        return self._layout.records

    def batch(self, index: Tensor, mirrored: Tensor) -> tuple[Kept, Tensor]:
        """What the first stage made of records, and their true poses, read from disk.

        Args:
            index: [B] int64, of records.
            mirrored: [B] bool, which of them are wanted mirrored.

        Returns:
            Kept, its patches formed, and pose_3d [B, J, 3] metres; float32, on the CPU.

        Raises:
            TypeError, ValueError: an index out of range, or mirrored records of a cache that holds none.
        """
        self._check_batch(index, mirrored)
        layout = self._layout
        rows = (layout.copies * index + mirrored).tolist()
        read = {
            name: np.empty((len(rows), *layout.row[name].shape), layout.row[name].base) for name in layout.row.names
        }
        rows_per_shard = layout.copies * layout.records_per_shard
        for position in sorted(range(len(rows)), key=rows.__getitem__):
            shard, row = divmod(rows[position], rows_per_shard)
            stored = self._map(shard)
            for name, values in read.items():
                values[position] = stored[name][row]
        joints, coarse, truth, patches = (torch.from_numpy(read[name]) for name in layout.row.names)
        return Kept(joints, patches.view(self._dtype).float(), coarse), truth

    def _map(self, shard: int) -> np.memmap[Any, Any]:
        """The shard's rows, mapped and not read."""
        if shard not in self._maps:
            if len(self._maps) == OPEN_SHARDS:
                self._maps.popitem(last=False)
            self._maps[shard] = np.load(self._layout.path(shard), mmap_mode="r", allow_pickle=False)
        self._maps.move_to_end(shard)
        return self._maps[shard]

    def _check_batch(self, index: Tensor, mirrored: Tensor) -> None:
        for name, tensor, dtype in (("index", index, torch.int64), ("mirrored", mirrored, torch.bool)):
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
                got = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"Stage2Cache.batch: {name} must be a tensor of {dtype}, got {got}")
        if index.dim() != 1 or index.shape != mirrored.shape:
            raise ValueError(
                "Stage2Cache.batch: index and mirrored must both have shape [B], "
                f"got {list(index.shape)} and {list(mirrored.shape)}"
            )
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise ValueError(
                f"Stage2Cache.batch: index must be in 0 … {len(self) - 1}, got {int(index.min())} … {int(index.max())}"
            )
        if self._layout.copies == 1 and mirrored.any():
            raise ValueError("Stage2Cache.batch: mirrored must be all False, for the cache was made with flip=False")


def _check(pipeline: Pipeline, source: Source, dtype: torch.dtype) -> None:
    lifter = pipeline.lifter
    if not isinstance(lifter, LiftByImage):
        raise TypeError(f"Stage2Cache: pipeline must hold a LiftByImage, got a {type(lifter).__name__}")
    if lifter.formulation == "factored":
        raise ValueError("Stage2Cache: the lifter's formulation must not be 'factored', for stored patches are formed")
    if dtype not in _STORED:
        raise ValueError(f"Stage2Cache: dtype must be float32, float16 or bfloat16, got {dtype}")
    if len(source) == 0:
        raise ValueError("Stage2Cache: source must have records, got none")


def _row_type(lifter: LiftByImage, dtype: torch.dtype) -> np.dtype[Any]:
    """A row of a shard. Patches come last: they alone may have an odd number of 16-bit numbers."""
    config = lifter.config
    joints, kept = config.num_joints, keep_count(math.prod(config.grid), config.retention)
    return np.dtype(
        [
            ("joints", "<f4", (joints, config.dim)),
            ("coarse_pose_3d", "<f4", (joints, 3)),
            ("pose_3d", "<f4", (joints, 3)),
            ("patches", _STORED[dtype], (kept, config.dim)),
        ]
    )


def _key(pipeline: Pipeline, source: Source, layout: _Layout, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """All that the rows depend on, as plain values of JSON."""
    key = {
        "format": FORMAT,
        "source": {**source.description, "size": source.size, "records": len(source)},
        "encoder": type(pipeline.encoder).__name__,
        "lifter": pipeline.lifter.config.to_dict(),
        "weights": _digest(pipeline),
        "flip": layout.copies == 2,
        "dtype": str(dtype).removeprefix("torch."),
        "precision": precision,
        "records_per_shard": layout.records_per_shard,
    }
    return json.loads(json.dumps(key))


def _digest(pipeline: Pipeline) -> str:
    """SHA-256 over the weights and buffers of encoder and stage 1."""
    digest = hashlib.sha256()
    for name, tensor in sorted(pipeline.state_dict().items()):
        if not name.startswith(STAGE2):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_key(layout: _Layout, key: Mapping[str, Any]) -> None:
    folder = layout.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cache: {folder} must be a folder, got a file")
    path = folder / "key.json"
    if not path.is_file():
        if any(folder.glob("shard-*.npy")):
            raise ValueError(f"cache: {folder} holds shards without the key.json that says what they were made of")
        return
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"cache: {path} is not the key.json of a cache") from None
    other = differences(found, key)
    if other:
        raise ValueError(
            f"cache: {folder} was made of something else ({other}); name another folder or delete that one"
        )


def _check_room(layout: _Layout, shards: list[int]) -> None:
    needed = sum(layout.file_size(shard) for shard in shards)
    folder = layout.folder.absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if needed > free:
        raise ValueError(f"cache: {layout.folder} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB free")


def _compute(
    layout: _Layout,
    shards: list[int],
    pipeline: Pipeline,
    source: Source,
    batch_size: int,
    workers: int,
    device: str | torch.device,
    dtype: torch.dtype,
    strict: bool,
    stop: StopRequest | None,
) -> None:
    """Compute and write these shards. No batch crosses a shard, so that a shard's bytes depend on it alone."""
    if not shards:
        return
    batches = {shard: in_batches(layout.records_of(shard), batch_size) for shard in shards}
    order = [batch for parts in batches.values() for batch in parts]
    # A generator of its own: the loader draws a seed, and the caller's random numbers must not depend on the cache.
    loader = DataLoader(
        ReadableRecords(source),
        batch_sampler=order,
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),
    )
    records = iter(loader)

    def write(shard: int, file: BinaryIO) -> None:
        problems: dict[int, str] = {}
        file.write(layout.header(shard))
        for _ in batches[shard]:
            if stop is not None:
                stop.check()
            batch = next(records)
            found = {
                i: problem for i, problem in zip(batch["index"].tolist(), batch["problem"], strict=True) if problem
            }
            if strict and found:
                raise CorruptRecord(next(iter(found.values())))
            problems |= found
            file.write(_rows(layout, pipeline, make_batch(pipeline.lifter, batch, device), dtype).tobytes())
        _write_problems(layout, shard, problems)

    for shard in shards:
        write_atomically(layout.path(shard), lambda file, shard=shard: write(shard, file))


def _rows(layout: _Layout, pipeline: Pipeline, batch: Batch, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """The rows of a batch's records, [B, copies]."""
    if batch.pose_3d is None:
        raise ValueError("Stage2Cache: source must know the true poses, got records without pose_3d")
    rows = np.empty((len(batch.images), layout.copies), layout.row)
    everyone = torch.ones(len(batch.images), dtype=torch.bool, device=batch.images.device)
    for copy, seen in enumerate((batch, mirror(pipeline.lifter, batch, everyone))[: layout.copies]):
        kept = FocusedExploration().keep(pipeline, seen)
        patches = kept.patches.dense() if isinstance(kept.patches, FactoredPatches) else kept.patches
        if dtype == torch.float16 and patches.abs().max() > torch.finfo(dtype).max:
            raise ValueError(f"Stage2Cache: patches reach {float(patches.abs().max()):.3g}, beyond dtype float16")
        patches = patches.to(dtype).cpu()
        rows["patches"][:, copy] = patches.view(torch.int16) if dtype == torch.bfloat16 else patches
        rows["joints"][:, copy] = kept.joints.float().cpu()
        rows["coarse_pose_3d"][:, copy] = kept.coarse_pose_3d.float().cpu()
        rows["pose_3d"][:, copy] = seen.pose_3d.cpu()
    return rows


def _write_problems(layout: _Layout, shard: int, problems: Mapping[int, str]) -> None:
    write_atomically(layout.problems_path(shard), lambda file: file.write(json.dumps(problems).encode()))


def _read_problems(layout: _Layout) -> dict[int, str]:
    """Of all shards that are there: without a process group, other ranks' may follow."""
    problems: dict[int, str] = {}
    for shard in filter(layout.is_whole, layout.shards):
        path = layout.problems_path(shard)
        try:
            found = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"cache: {path} is not valid JSON; delete it, and its shard is made anew") from None
        problems |= {int(index): problem for index, problem in found.items()}
    return problems
