"""Bulk lifting: every record of a source to 3D, in shards that any number of machines write into one folder.

A shard is written whole or not at all, and what is there is not done again: a run that was stopped goes on when it is
started again. `BatchLifter` is also what Ray Data's `map_batches` takes.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from liftbyimage._files import differences, sha256_of, write_atomically
from liftbyimage.batches import check_crop_size, make_batch
from liftbyimage.checkpoint import load_pipeline
from liftbyimage.data.source import Source, check_source
from liftbyimage.lift import check_batch_size
from liftbyimage.models import Pipeline
from liftbyimage.predict import chosen_device, predict
from liftbyimage.reading import ReadBatch, in_batches, read_batches

FORMAT = "liftbyimage-shards-1"
RUN_FILE = "source.json"
_INPUTS = ("image", "keypoints", "crop_matrix", "image_size")
_PASSED_ON = ("group", "pose_3d")
_ALWAYS = {  # what every shard holds, of a record
    "index": ((), np.int64),
    "problem": ((), np.str_),
    "pose_3d_lifted": ((17, 3), np.float32),
    "keypoints": ((17, 2), np.float32),
    "crop_matrix": ((2, 3), np.float64),
    "image_size": ((2,), np.float32),
    "group": ((), np.int64),
}


class BatchLifter:
    """A function of batches of records, which loads its model in the process that first calls it.

    It can be pickled at any time, and its copies load the model anew.

    Args:
        checkpoint, encoder_weights: files as `checkpoint.load_pipeline` takes them.
        device: where to compute; "auto" is the GPU where there is one.
        precision: "float32", "bfloat16", or "float16" on a GPU.
        flip_test: average each pose with that of the mirrored crop.

    Raises:
        ValueError: when called first, a checkpoint that cannot be read, or a device or precision that this machine
            does not have.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        encoder_weights: str | os.PathLike[str] | None = None,
        device: str = "cpu",
        precision: str = "float32",
        flip_test: bool = False,
    ) -> None:
        self.checkpoint, self.encoder_weights = checkpoint, encoder_weights
        self.device, self.precision, self.flip_test = device, precision, flip_test
        self._pipeline: Pipeline | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.checkpoint, self.encoder_weights, self.device, self.precision, self.flip_test)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Lift N records.

        Args:
            batch: `image` uint8 [N, H, W, 3], `keypoints` [N, 17, 2], `crop_matrix` [N, 2, 3] and `image_size` [N, 2],
                as in `data.source.Source`, and whatever else.

        Returns:
            The batch without `image`, with `pose_3d_lifted` float32 [N, 17, 3] (metres, relative to the pelvis, camera
            axes, Human3.6M's order) and, of a lifter of two stages, `coarse_pose_3d_lifted` likewise.

        Raises:
            ValueError: an input is missing, or a pose is not finite.
        """
        missing = [name for name in _INPUTS if name not in batch]
        if missing:
            raise ValueError(f"BatchLifter: batch must hold {', '.join(_INPUTS)}, missing {', '.join(missing)}")
        pipeline, device = self.load()
        records = {name: torch.from_numpy(np.array(batch[name])) for name in _INPUTS}
        made = make_batch(pipeline.lifter, records, device)
        predicted = predict(pipeline, made, flip_test=self.flip_test, precision=self.precision)
        lifted = {"pose_3d_lifted": predicted.pose_3d, "coarse_pose_3d_lifted": predicted.coarse_pose_3d}
        poses = {name: pose.cpu().numpy() for name, pose in lifted.items() if pose is not None}
        if not all(np.isfinite(pose).all() for pose in poses.values()):
            raise ValueError(f"BatchLifter: a pose is not finite: the weights of {self.checkpoint} are broken")
        return {**{name: values for name, values in batch.items() if name != "image"}, **poses}

    def load(self) -> tuple[Pipeline, torch.device]:
        """The model, in evaluation mode and on its device; loaded when this process first asks for it."""
        device = chosen_device("BatchLifter", self.device, self.precision)
        if self._pipeline is None:
            self._pipeline = load_pipeline(self.checkpoint, self.encoder_weights).to(device).eval()
        return self._pipeline, device


class Lifted(NamedTuple):
    """How many shards a call of `lift_all` wrote, found there, and left to the other machines."""

    done: int
    present: int
    others: int
    problems: int  # records that could not be read, in the shards written


def lift_all(
    source: Source,
    out: str | os.PathLike[str],
    lifter: BatchLifter,
    *,
    shard_size: int = 1024,
    batch_size: int = 32,
    workers: int = 0,
    part: tuple[int, int] = (0, 1),
    strict: bool = False,
    on_batch: Callable[[int, int], object] | None = None,
) -> Lifted:
    """Lift every record of a source into `OUT/shard-00000-of-00100.npz`, …

    A shard holds, over its records, `index` int64, `problem` ("" for a record that was read), `pose_3d_lifted` float32
    [n, 17, 3] and where the lifter has two stages `coarse_pose_3d_lifted`, and of the record `keypoints`,
    `crop_matrix`, `image_size`, `group` and, where it is known, `pose_3d`. Of a record that could not be read the
    floats are NaN and the group is −1. `OUT/source.json` says what was lifted with which weights and how.

    Args:
        lifter: its model is loaded here, before anything is written.
        shard_size: records in a shard, at least 1.
        batch_size: records per pass; it changes nothing but rounding.
        workers: processes that read records.
        part: (k, n), of n machines the k-th from 0: it writes the shards k, k + n, k + 2 n, …
        strict: raise for a record that cannot be read, instead of keeping its place with NaN.
        on_batch: called after each batch with the number of its records and that of all to be lifted here.

    Raises:
        TypeError, ValueError: options of another kind than said, a source without records, a folder that holds shards
            of another run, or what `lifter` refuses.
        CorruptRecord: with `strict`, a record that cannot be read; the shards before its own are there.
    """
    if not isinstance(lifter, BatchLifter):
        raise TypeError(f"lift_all: lifter must be a BatchLifter, got {type(lifter).__name__}")
    check_batch_size("lift_all", batch_size)
    check_batch_size("lift_all", shard_size, "shard_size")
    machine, machines = _checked_part(part)
    if not len(source):
        raise ValueError("lift_all: source must have records, got none")
    check_source("lift_all: source", source)
    check_crop_size("lift_all: records", lifter.load()[0], source.size)
    out = Path(out)
    _claim(out, _run(source, lifter, shard_size))
    names = _shard_names(len(source), shard_size)
    mine = range(machine, len(names), machines)
    pending = [number for number in mine if not (out / names[number]).is_file()]
    shards = [
        in_batches(range(number * shard_size, min((number + 1) * shard_size, len(source))), batch_size)
        for number in pending
    ]
    batches = [batch for shard in shards for batch in shard]
    total, problems = sum(map(len, batches)), 0
    reading = read_batches(source, batches, workers, strict)
    for number, shard in zip(pending, shards, strict=True):
        parts = []
        for indices in shard:
            read = next(reading)
            parts.append(_lift(lifter, indices, read))
            problems += len(read.problems)
            if on_batch is not None:
                on_batch(len(indices), total)
        write_atomically(out / names[number], partial(np.savez, **_joined(parts)))
    return Lifted(len(pending), len(mine) - len(pending), len(names) - len(mine), problems)


def load_shards(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """What `lift_all` wrote, all shards joined: arrays over the N records of the source, in their order.

    Raises:
        ValueError: no folder of `lift_all`, a shard that is missing, or one that cannot be read.
    """
    folder = Path(folder)
    run = _read_run(folder)
    names = _shard_names(run["records"], run["shard_size"])
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"folder {folder}: {len(missing)} of {len(names)} shards are missing, the first {missing[0]}; "
            "lift-all again makes them"
        )
    return _joined([_read_shard(folder / name) for name in names])


def _read_shard(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            shard = dict(arrays)
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"shard {path}: not a file of arrays that lift-all wrote ({error})") from None
    missing = [name for name in _ALWAYS if name not in shard]
    if missing:
        raise ValueError(f"shard {path}: expected the arrays that lift-all writes, missing {', '.join(missing)}")
    return shard


def _checked_part(part: tuple[int, int]) -> tuple[int, int]:
    numbers = tuple(part)
    if len(numbers) != 2 or not all(isinstance(number, int) for number in numbers) or not 0 <= numbers[0] < numbers[1]:
        raise ValueError(f"lift_all: part must be (k, n) with 0 ≤ k < n, got {part!r}")
    return numbers


def _shard_names(records: int, shard_size: int) -> list[str]:
    count = -(-records // shard_size)
    return [f"shard-{number:05d}-of-{count:05d}.npz" for number in range(count)]


def _run(source: Source, lifter: BatchLifter, shard_size: int) -> dict[str, Any]:
    """What all machines that write into one folder must have in common."""
    weights = (lifter.checkpoint, lifter.encoder_weights)
    digests = [None if path is None else sha256_of(path) for path in weights]
    run = {
        "format": FORMAT,
        "source": dict(source.description),
        "groups": list(source.groups),
        "records": len(source),
        "shard_size": int(shard_size),
        "checkpoint_sha256": digests[0],
        "encoder_weights_sha256": digests[1],
        "precision": lifter.precision,
        "flip_test": lifter.flip_test,
    }
    return json.loads(json.dumps(run))  # as it is read back: tuples are lists


def _claim(out: Path, run: dict[str, Any]) -> None:
    """Write the run's file into a new folder, or refuse a folder of another run."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out {out}: expected a folder, got a file")
    path = out / RUN_FILE
    if not path.is_file():
        if any(out.glob("shard-*-of-*.npz")):
            raise ValueError(f"out {out}: holds shards but no {RUN_FILE} that says of what; choose another folder")
        text = json.dumps(run, indent=1, ensure_ascii=False) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))
    other = differences(_read_run(out), run)
    if other:
        raise ValueError(f"out {out}: holds shards of another run ({other}); choose another folder or delete that one")


def _read_run(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILE
    if not path.is_file():
        raise ValueError(
            f"folder {folder}: expected what lift-all writes, {RUN_FILE} and shard-00000-of-….npz, missing {RUN_FILE}"
        )
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    sizes = [run.get(name) for name in ("records", "shard_size")] if isinstance(run, dict) else []
    if not sizes or run.get("format") != FORMAT or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{path}: expected what lift-all writes ({FORMAT!r}), got another file")
    return run


def _lift(lifter: BatchLifter, indices: Sequence[int], read: ReadBatch) -> dict[str, np.ndarray]:
    """The columns of these records; those that could not be read keep a blank in each."""
    problems = dict(read.problems)
    columns = {
        "index": np.array(indices, dtype=np.int64),
        "problem": np.array([problems.get(index, "") for index in indices], dtype=str),
    }
    if read.records is None:
        return columns
    rows = np.searchsorted(columns["index"], read.records["index"].numpy())
    given = {name: values.numpy() for name, values in read.records.items() if name in (*_INPUTS, *_PASSED_ON)}
    for name, values in lifter(given).items():
        columns[name] = _blank(values, len(indices))
        columns[name][rows] = values
    return columns


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Parts one after the other; a column that one of them lacks, as no record of it could be read, is blank there."""
    like = {name: np.empty((0, *shape), dtype) for name, (shape, dtype) in _ALWAYS.items()}
    for part in parts:
        like |= {name: values[:0] for name, values in part.items()}
    return {
        name: np.concatenate([part[name] if name in part else _blank(column, len(part["index"])) for part in parts])
        for name, column in like.items()
    }


def _blank(like: np.ndarray, count: int) -> np.ndarray:
    return np.full((count, *like.shape[1:]), np.nan if like.dtype.kind == "f" else -1, dtype=like.dtype)
