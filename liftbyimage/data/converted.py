"""What Human3.6M and MPI-INF-3DHP share in the layout into which MMPose's scripts convert them.

An annotation file is an .npz of N rows, one per person and picture: `imgname`, the picture's path under ``images/``;
`part` [N, 17, 2 or 3], the joints in px of the whole picture (and a confidence); `S` [N, 17, 3 or 4], the joints in
metres, camera axes (and a confidence); `center` [N, 2] px and `scale` [N], a square of side 200 · scale px about it,
1.2 times the longer side of the joints' box. A row is read when its record is asked for; none is held.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from liftbyimage.data.camera import Camera
from liftbyimage.data.crop import crop_size
from liftbyimage.data.npz_rows import Rows, array_names, npy_rows, npz_rows
from liftbyimage.data.picture_record import bounding_box, picture_record
from liftbyimage.data.plain_pickle import load_plain_pickle
from liftbyimage.data.source import CorruptRecord, Source

BOXES = ("joints", "annotation")
_JOINTS = 17
_SCALE_UNIT = 200.0  # px


class Picture(NamedTuple):
    """What the name of a picture tells."""

    subject: str
    group: str
    frame: int  # in its video, the first is 1


class ConvertedPeople(Source):
    """The records of one annotation file. A subclass says how its dataset names pictures, joints and cameras.

    Class attributes, set by a subclass:
        layout: the folder's parts, for the sentence that says one is missing.
        joint_order: which of the file's joints is joint j of `data.skeleton.JOINT_NAMES`.

    Attributes:
        frame_stride: the file has every so many-th frame of the videos (0: the first ones alone).

    Args:
        root: the dataset's folder.
        annotations: the .npz file.
        cameras: the file of `cameras`, opened when they are asked for.
        subjects: whose rows are records.
        step: every `step`-th frame of a video is a record, the first one among them.
        keypoints: detected 2D joints, row by row those of the annotation file and in the joint order of its `part`:
            an .npy file [N, 17, 2 or 3], or an .npz file with one array or one called ``keypoints``. None takes
            `part` itself, the truth.
        box: the crop is cut round the smallest box of `part`'s joints ("joints") or center ± 100 · scale
            ("annotation").
        size: crop (height, width), px.
        description: what else tells these records from others.
    """

    layout: str
    joint_order: tuple[int, ...]

    def __init__(
        self,
        root: str | Path,
        *,
        annotations: Path,
        cameras: Path,
        subjects: Sequence[str],
        step: int,
        keypoints: str | Path | None,
        box: str,
        size: Sequence[int] | str,
        description: Mapping[str, Any],
    ) -> None:
        if box not in BOXES:
            raise ValueError(f"box must be one of {', '.join(BOXES)}, got {box!r}")
        self.root, self._annotations, self._cameras = Path(root), annotations, cameras
        missing = [str(path) for path in (annotations, self.root / "images") if not path.exists()]
        if missing:
            raise ValueError(f"root {root}: expected a folder with {self.layout}, missing {', '.join(missing)}")
        self.size = crop_size(size)
        self._box = box
        self._rows = _annotation_rows(annotations, box)
        self._detections = None if keypoints is None else _keypoint_rows(Path(keypoints), len(self._rows["part"]))
        self._chosen, self._group, self.groups, self.frame_stride = self._choose(frozenset(subjects), step)
        if not len(self._chosen):
            raise ValueError(f"{annotations}: no rows of subjects {', '.join(subjects)}")
        self.description = {
            **description,
            "subjects": list(subjects),
            "box": box,
            "size": list(self.size),
            "annotations": file_state(annotations),
            "keypoints": None if keypoints is None else file_state(Path(keypoints)),
        }

    def parse(self, imgname: str) -> Picture | None:
        """What a picture's name tells, or None if it is not a name of this dataset."""
        raise NotImplementedError

    def group_order(self, groups: Iterable[str]) -> list[str]:
        return sorted(groups)

    def camera(self, values: Mapping[str, Any]) -> Camera:
        """A camera from an entry of the cameras' file."""
        raise NotImplementedError

    @cached_property
    def cameras(self) -> dict[Hashable, Camera]:
        """The cameras by the keys of their file, read from it when first asked for; metres and px.

        Raises:
            ValueError: no such file, one that holds anything but plain values, or an entry that is not a camera.
        """
        entries = load_plain_pickle(self._cameras)
        if not isinstance(entries, dict):
            raise ValueError(f"{self._cameras}: expected a dict of cameras, got {type(entries).__name__}")
        cameras = {}
        for key, values in entries.items():
            try:
                cameras[key] = self.camera(values)
            except KeyError as error:
                raise ValueError(f"{self._cameras}: camera {key!r} lacks {error}") from None
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self._cameras}: camera {key!r}: {error}") from None
        return cameras

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        row = int(self._chosen[index])
        label = f"{self._annotations}: row {row}"
        try:
            values = {name: rows[row] for name, rows in self._rows.items()}
            detected = None if self._detections is None else self._detections[row]
        except (OSError, ValueError) as error:
            raise CorruptRecord(f"{label} cannot be read ({error})") from None
        order = list(self.joint_order)
        truth = values["part"][order, :2].astype(np.float64)  # [17, 2]
        keypoints = truth if detected is None else detected[order, :2].astype(np.float64)  # [17, 2]
        return picture_record(
            self.root / "images" / _text(values["imgname"]),
            keypoints,
            bounding_box(truth) if self._box == "joints" else _annotated_box(values["center"], values["scale"]),
            values["S"][order, :3].astype(np.float64),  # [17, 3]
            int(self._group[index]),
            self.size,
            label,
        )

    def _choose(self, subjects: frozenset[str], step: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], int]:
        """Which rows are records [M], the number of each one's group [M], the groups' names, and the frames' stride."""
        chosen = [np.empty(0, dtype=np.int32)]
        numbers = [np.empty(0, dtype=np.int32)]
        found: dict[str, int] = {}  # group → its number in the order found
        stride = 0
        for start, names in self._rows["imgname"].pieces():
            pictures = [self._picture(start + row, _text(name)) for row, name in enumerate(names.tolist())]
            stride = math.gcd(stride, *(picture.frame - 1 for picture in pictures))
            kept = [
                (start + row, found.setdefault(picture.group, len(found)))
                for row, picture in enumerate(pictures)
                if picture.subject in subjects and (picture.frame - 1) % step == 0
            ]
            rows, found_numbers = np.array(kept, dtype=np.int32).reshape(-1, 2).T
            chosen.append(rows)
            numbers.append(found_numbers)
        groups = tuple(self.group_order(found))
        rank = np.array([groups.index(name) for name in found], dtype=np.int16)
        return np.concatenate(chosen), rank[np.concatenate(numbers)], groups, stride

    def _picture(self, row: int, imgname: str) -> Picture:
        picture = self.parse(imgname)
        if picture is None:
            raise ValueError(f"{self._annotations}: row {row}: '{imgname}' is not named as its pictures are")
        return picture


def chosen_names(option: str, given: str | Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """Names out of `known`, in its order: those of a list or of a text such as "S9+S11"; None is all."""
    several = isinstance(given, Sequence) and not isinstance(given, str)
    names = known if given is None else list(given) if several else str(given).split("+")
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"{option} must be some of {', '.join(known)}, got {', '.join(map(str, unknown)) or 'none'}")
    return tuple(name for name in known if name in names)


def file_state(path: Path) -> dict[str, Any]:
    """What tells a file from its other versions."""
    state = path.stat()
    return {"file": path.name, "bytes": state.st_size, "modified_ns": state.st_mtime_ns}


def _annotation_rows(path: Path, box: str) -> dict[str, Rows]:
    names = ("imgname", "part", "S", *(("center", "scale") if box == "annotation" else ()))
    rows = {name: npz_rows(path, name) for name in names}
    count = len(rows["imgname"])
    allowed: dict[str, list[tuple[int, ...]]] = {
        "imgname": [()],
        "part": [(_JOINTS, 3), (_JOINTS, 2)],
        "S": [(_JOINTS, 4), (_JOINTS, 3)],
        "center": [(2,)],
        "scale": [()],
    }
    for name, array in rows.items():
        if len(array) != count or array.shape[1:] not in allowed[name]:
            expected = [count, *allowed[name][0]]
            raise ValueError(f"{path}: array '{name}' must be {expected}, got {list(array.shape)}")
        kinds = "SU" if name == "imgname" else "fiu"
        if array.dtype.kind not in kinds:
            content = "text" if name == "imgname" else "numbers"
            raise ValueError(f"{path}: array '{name}' must hold {content}, got {array.dtype}")
    return rows


def _keypoint_rows(path: Path, count: int) -> Rows:
    if path.suffix == ".npz":
        names = array_names(path)
        name = "keypoints" if "keypoints" in names else names[0] if len(names) == 1 else None
        if name is None:
            raise ValueError(f"keypoints {path}: expected one array or one called keypoints, got {', '.join(names)}")
        rows = npz_rows(path, name)
    else:
        rows = npy_rows(path)
    if rows.shape[1:] not in ((_JOINTS, 2), (_JOINTS, 3)) or len(rows) != count or rows.dtype.kind not in "fiu":
        raise ValueError(
            f"keypoints {path}: expected numbers [{count}, {_JOINTS}, 2 or 3], as many rows as the annotations, "
            f"got {rows.dtype} {list(rows.shape)}"
        )
    return rows


def _annotated_box(center: np.ndarray, scale: np.ndarray) -> np.ndarray:
    half = np.float64(scale) * _SCALE_UNIT / 2
    return np.concatenate([center - half, center + half]).astype(np.float64)


def _text(name: str | bytes | np.ndarray) -> str:
    if isinstance(name, np.generic):
        name = name.item()
    return name.decode() if isinstance(name, bytes) else str(name)
