"""What training, evaluation and bulk lifting read: person crops with their 2D joints and, where known, true 3D poses.

A source is a map-style dataset of records. It opens cheaply, reads a record when it is asked for, and gives the same
record for the same index every time, in every process. `open_source` makes one of a line such as
``human3.6m:/data/h36m,split=train``.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

# name → where its class is; imported when a source of that name is opened
SOURCES = {
    "synthetic": "liftbyimage.data.synthetic:SyntheticPeople",
    "mocap": "liftbyimage.data.mocap:MocapPeople",
    "pose2sim": "liftbyimage.data.pose2sim:Pose2SimPeople",
    "human3.6m": "liftbyimage.data.human36m:Human36M",
    "mpi-inf-3dhp": "liftbyimage.data.mpi_inf_3dhp:MpiInf3dhp",
    "mpi-inf-3dhp-test": "liftbyimage.data.mpi_inf_3dhp_test:MpiInf3dhpTest",
    "pictures": "liftbyimage.data.pictures:PicturePeople",
}


class CorruptRecord(ValueError):
    """One record, or the picture it names, that cannot be read; the rest of its source can."""


class Source(Dataset[dict[str, Any]]):
    """A dataset of people. Joints are Human3.6M-17 (`data.skeleton.JOINT_NAMES`); pixel (0, 0) is a pixel's centre.

    A record is a dict of

    - ``image`` uint8 [H, W, 3], RGB, the crop;
    - ``keypoints`` float32 [17, 2], px of the whole picture, as a detector (or the truth) gives them;
    - ``crop_matrix`` float64 [2, 3], px of the whole picture to px of the crop;
    - ``image_size`` float32 [2], (width, height) of the whole picture, px;
    - ``pose_3d`` float32 [17, 3], metres, relative to the pelvis, camera axes; absent where nobody knows it;
    - ``group`` int, which of `groups` it belongs to;
    - ``mask`` bool [H, W], the person's pixels in the crop; absent where nobody knows them.

    Every record of a source has the same keys. Reading raises `CorruptRecord` for one that cannot be read.

    Attributes:
        groups: names of what results are reported by, actions or sequences.
        size: (H, W) of the crops, px.
        description: plain values that say which records these are; equal descriptions promise equal records.
    """

    groups: tuple[str, ...]
    size: tuple[int, int]
    description: Mapping[str, Any]

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError


class ReadableRecords(Dataset[dict[str, Any]]):
    """A source's records by index, each with ``index`` and ``problem``.

    For a record that cannot be read the next readable one stands in, and ``problem`` says why; it is "" otherwise.
    With `strict` reading it raises instead.
    """

    def __init__(self, source: Source, strict: bool = False) -> None:
        self.source, self.strict = source, strict

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        problem = ""
        for position in (*range(index, len(self)), *range(index)):
            try:
                return {**self.source[position], "index": index, "problem": problem}
            except CorruptRecord as error:
                if self.strict:
                    raise
                problem = problem or str(error)
        raise ValueError(f"none of the {len(self)} records can be read: {problem}")


# What a record must hold: dtype and shape, H and W being those of `size`.
_FIELDS: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
    "image": (torch.uint8, ("H", "W", 3)),
    "keypoints": (torch.float32, (17, 2)),
    "crop_matrix": (torch.float64, (2, 3)),
    "image_size": (torch.float32, (2,)),
    "pose_3d": (torch.float32, (17, 3)),
    "mask": (torch.bool, ("H", "W")),
}
_OPTIONAL = ("pose_3d", "mask")
_REACH = 5.0  # metres; no joint is farther from the pelvis


def check_source(what: str, source: Source) -> dict[str, Any]:
    """Refuse a source whose first readable record is not as `Source` says; returns that record.

    Args:
        what: what the source is to the caller, the first words of every refusal.

    Raises:
        ValueError: an attribute or a field that is missing or of another kind, a group that `groups` lacks, or poses
            that cannot be metres.
    """
    missing = [name for name in ("groups", "size", "description") if not hasattr(source, name)]
    if missing:
        raise ValueError(f"{what} must have {missing[0]}, as a data.source.Source has, got a {type(source).__name__}")
    record = ReadableRecords(source)[0]
    sides = dict(zip("HW", source.size, strict=True))
    for name, (dtype, shape) in _FIELDS.items():
        if name in record:
            expected, value = _kind(dtype, [sides.get(side, side) for side in shape]), torch.as_tensor(record[name])
            if _kind(value.dtype, value.shape) != expected:
                raise ValueError(f"{what}: {name} must be {expected}, got {_kind(value.dtype, value.shape)}")
        elif name not in _OPTIONAL:
            raise ValueError(f"{what}: records must hold {name}, got {', '.join(record)}")
    group = record.get("group")
    if not isinstance(group, (int, np.integer)) or not 0 <= group < len(source.groups):
        raise ValueError(f"{what}: group must be a number below {len(source.groups)}, got {group!r}")
    reach = torch.as_tensor(record.get("pose_3d", [0.0])).abs().max().item()
    if reach > _REACH:
        raise ValueError(f"{what}: pose_3d must be metres from the pelvis, got a joint at {reach:.0f}")
    return record


def _kind(dtype: torch.dtype, shape: Iterable[int | str]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def open_source(line: str, **options: Any) -> Source:
    """The source that a line names: ``NAME[:FOLDER][,OPTION=VALUE]…``, the options those of the source's class.

    Values are numbers, ``true``, ``false`` and ``null`` as JSON writes them; everything else is text.

    Args:
        line: for example ``synthetic,count=4096,background=laboratory`` or ``human3.6m:/data/h36m,split=test``.
        options: more of them; the line's own come first.

    Raises:
        ValueError: an unknown name or option, a folder where none is needed or the other way round, and what the source
            itself refuses.
    """
    head, *pairs = line.split(",")
    name, _, folder = head.partition(":")
    if name not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {name!r}")
    module, _, kind = SOURCES[name].partition(":")
    make = getattr(importlib.import_module(module), kind)
    known = [option for option in inspect.signature(make).parameters if option != "root"]
    reads_folder = "root" in inspect.signature(make).parameters
    if reads_folder and not folder:
        raise ValueError(f"source {line!r}: {name} needs its folder, as in {name}:FOLDER")
    if folder and not reads_folder:
        raise ValueError(f"source {line!r}: {name} reads no folder, got {folder!r}")
    given = dict(options)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"source {line!r}: options must be OPTION=VALUE, got {pair!r}")
        given[key] = _value(value)
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"source {line!r}: {name} has no option {unknown[0]!r}, only {', '.join(known)}")
    try:
        source: Source = make(*([folder] if folder else []), **given)
    except TypeError as error:
        raise ValueError(f"source {line!r}: {error}") from None
    return source


def _value(text: str) -> Any:
    """A number, true, false or null, or else the text itself: YAML would read the clip 02_01 as the number 129."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
