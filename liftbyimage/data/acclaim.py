"""Motion capture in Acclaim's ASF/AMC files, as the CMU Graphics Lab database publishes it.

An ASF file holds a skeleton: every bone starts where its parent ends, and in the base pose runs along `direction`. An
AMC file holds what turns it, frame by frame. A bone's angles turn it about its own axes C (from `axis`), on top of its
parent: ``rotation = parent's rotation @ C @ M @ C⁻¹``. Axes are x left, y up, z forward for a person of the database
in base pose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from liftbyimage._files import require_file
from liftbyimage.data.body import about

Array = NDArray[np.float64]

_INCH = 0.0254  # metres; a file's lengths are inches times its own unit
_CHANNELS = ("tx", "ty", "tz", "rx", "ry", "rz")
_ORDERS = ("xyz", "xzy", "yxz", "yzx", "zxy", "zyx")


@dataclass(frozen=True)
class Skeleton:
    """B bones, the root first and parents before their children; lengths in metres."""

    names: tuple[str, ...]
    parents: tuple[int, ...]  # of the root −1
    offsets: Array  # [B, 3] from a bone's start to its end in base pose; of the root its place
    axes: Array  # [B, 3, 3] the axes C that its angles turn about
    channels: tuple[tuple[str, ...], ...]  # of each bone, in the order in which they turn it
    unit: float  # metres per length in the files

    def columns(self) -> list[slice]:
        """Where each bone's channels stand in a row of angles."""
        ends = np.cumsum([len(channels) for channels in self.channels]).tolist()
        return [slice(end - len(channels), end) for end, channels in zip(ends, self.channels, strict=True)]


def forward_kinematics(skeleton: Skeleton, angles: Array) -> tuple[Array, Array]:
    """Where bones end, and how they are turned from the base pose.

    Args:
        angles: float64 [F, D] as `read_amc` gives them.

    Returns:
        Ends [F, B, 3] in metres and rotations [F, B, 3, 3].
    """
    frames, bones = len(angles), len(skeleton.names)
    ends, rotations = np.zeros((frames, bones, 3)), np.zeros((frames, bones, 3, 3))
    for bone, (parent, columns) in enumerate(zip(skeleton.parents, skeleton.columns(), strict=True)):
        axes, turn = skeleton.axes[bone], np.broadcast_to(np.eye(3), (frames, 3, 3))
        shift = np.zeros((frames, 3))
        for channel, value in zip(skeleton.channels[bone], angles[:, columns].T, strict=True):
            if channel[0] == "t":
                shift[:, "xyz".index(channel[1])] = value
            else:
                turn = about(channel[1], value) @ turn
        own = axes @ turn @ axes.T
        if parent < 0:
            rotations[:, bone], ends[:, bone] = own, skeleton.offsets[bone] + shift
        else:
            rotations[:, bone] = rotations[:, parent] @ own
            ends[:, bone] = ends[:, parent] + rotations[:, bone] @ skeleton.offsets[bone]
    return ends, rotations


@dataclass(frozen=True)
class _Line:
    """One line's words; commas and parentheses count as blanks, the rest after # as nothing."""

    path: Path
    number: int
    words: list[str]

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path}, line {self.number}: {what}")

    def wrong(self, expected: str) -> ValueError:
        return self.error(f"expected {expected}, got {' '.join(self.words)!r}")

    def numbers(self, count: int, what: str) -> list[float]:
        """The first `count` words after the first word, as finite numbers."""
        values = [value for value in map(_number, self.words[1 : 1 + count]) if value is not None]
        if len(values) < count:
            raise self.wrong(f"{what} as {_several(count)}")
        return values


def _several(count: int) -> str:
    return f"{count} number{'s' if count != 1 else ''}"


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _lines(path: Path) -> Iterator[_Line]:
    require_file(str(path), path)
    with path.open(encoding="latin-1") as file:
        for number, text in enumerate(file, start=1):
            words = text.split("#", 1)[0].translate(str.maketrans("(),", "   ")).split()
            if words:
                yield _Line(path, number, words)


def read_asf(path: str | Path) -> Skeleton:
    """The skeleton in an ASF file.

    Raises:
        ValueError: for a file that is not one, naming its line.
    """
    sections = _sections(Path(path))
    unit, degrees = _units(sections.get(":units", []))
    root = {line.words[0].lower(): line for line in sections[":root"][1:]}
    bones = {"root": _root(root, sections[":root"][0])}
    for block in _blocks(sections[":bonedata"]):
        name, bone = _bone(block, degrees)
        if name in bones:
            raise block["name"].wrong("another name for each bone")
        bones[name] = bone
    order = _hierarchy(sections[":hierarchy"], bones)
    return Skeleton(
        names=tuple(order),
        parents=tuple(list(order).index(parent) if parent else -1 for parent in order.values()),
        offsets=np.array([bones[name].offset for name in order]) * unit,
        axes=np.array([bones[name].axes for name in order]),
        channels=tuple(bones[name].channels for name in order),
        unit=unit,
    )


@dataclass(frozen=True)
class _Bone:
    offset: Array  # [3] in the file's lengths
    axes: Array  # [3, 3]
    channels: tuple[str, ...]


def _sections(path: Path) -> dict[str, list[_Line]]:
    """Keyword → its own line and those up to the next keyword."""
    sections: dict[str, list[_Line]] = {}
    lines: list[_Line] = []
    last = 1
    for line in _lines(path):
        last = line.number
        if line.words[0].startswith(":"):
            lines = sections.setdefault(line.words[0].lower(), [])
        lines.append(line)
    for keyword in (":root", ":bonedata", ":hierarchy"):
        if keyword not in sections:
            raise ValueError(f"{path}, line {last}: the file ends without a section {keyword}")
    return sections


def _units(lines: Sequence[_Line]) -> tuple[float, float]:
    """Metres per length, degrees per angle."""
    length, degrees = 1.0, 1.0
    for line in lines:
        word = line.words[0].lower()
        if word == "length":
            (length,) = line.numbers(1, "a length above 0")
            if length <= 0:
                raise line.wrong("a length above 0")
        elif word == "angle":
            degrees = math.degrees(1) if line.words[1:] == ["rad"] else 1.0
            if line.words[1:] not in (["rad"], ["deg"]):
                raise line.wrong("angle deg or angle rad")
    return _INCH / length, degrees


def _root(given: dict[str, _Line], section: _Line) -> _Bone:
    for key in ("order", "position", "orientation"):
        if key not in given:
            raise section.error(f"the section :root lacks {key}")
    if any(given["orientation"].numbers(3, "an orientation")):
        raise given["orientation"].wrong("orientation 0 0 0: programs differ in what another one means")
    position = np.array(given["position"].numbers(3, "a position"))
    return _Bone(position, np.eye(3), _channels(given["order"], _CHANNELS))


def _bone(block: dict[str, _Line], degrees: float) -> tuple[str, _Bone]:
    for key in ("name", "direction", "length", "axis"):
        if key not in block:
            raise block["end"].error(f"a bone ends without {key}")
    if len(block["name"].words) != 2:
        raise block["name"].wrong("a name of one word")
    direction = np.array(block["direction"].numbers(3, "a direction"))
    (length,) = block["length"].numbers(1, "a length")
    angles = [degrees * angle for angle in block["axis"].numbers(3, "an axis")]
    order = block["axis"].words[-1].lower()
    if order not in _ORDERS:
        raise block["axis"].wrong("an axis order such as XYZ at its end")
    channels = _channels(block["dof"], _CHANNELS[3:]) if "dof" in block else ()
    return block["name"].words[1], _Bone(direction * length, _turned(order, angles), channels)


def _turned(order: str, degrees: Sequence[float]) -> Array:
    """The rotation [3, 3] by these angles about fixed x, y and z, one after the other in this order."""
    rotation = np.eye(3)
    for axis in order:
        rotation = about(axis, np.array([degrees["xyz".index(axis)]]))[0] @ rotation
    return rotation


def _channels(line: _Line, allowed: Sequence[str]) -> tuple[str, ...]:
    channels = tuple(word.lower() for word in line.words[1:])
    if not set(channels) <= set(allowed) or len(set(channels)) < len(channels):
        raise line.wrong(f"some of {', '.join(allowed)}, each once")
    return channels


def _blocks(lines: Sequence[_Line]) -> Iterator[dict[str, _Line]]:
    """Each begin … end as first word → line."""
    block: dict[str, _Line] | None = None
    for line in lines[1:]:
        word = line.words[0].lower()
        if word == "begin" and block is None:
            block = {}
        elif block is None or word == "begin":
            raise line.wrong("begin" if block is None else "the bone's end first")
        else:
            block.setdefault(word, line)
            if word == "end":
                yield block
                block = None
    if block is not None:
        raise lines[-1].error("a bone begins and does not end")


def _hierarchy(lines: Sequence[_Line], bones: dict[str, _Bone]) -> dict[str, str]:
    """Bone → its parent ("" of the root), parents first."""
    parents = {"root": ""}
    for line in lines[1:]:
        if line.words[0] in ("begin", "end"):
            continue
        parent, *children = line.words
        for child in children:
            if parent not in parents or child in parents or child not in bones:
                raise line.wrong("a bone already placed, then bones of :bonedata that are not")
            parents[child] = parent
    lost = [name for name in bones if name not in parents]
    if lost:
        raise lines[-1].error(f"the hierarchy ends without {lost[0]}")
    return parents


def read_amc(path: str | Path, skeleton: Skeleton) -> Array:
    """The motion in an AMC file: float64 [F, D], the channels of all bones of `skeleton` in its order.

    Angles are in degrees, translations in metres.

    Raises:
        ValueError: for a file that is not one, or not of this skeleton, naming its line.
    """
    columns = dict(zip(skeleton.names, skeleton.columns(), strict=True))
    moving = [name for name in skeleton.names if columns[name].stop > columns[name].start]
    scale = 1.0
    frames: list[Array] = []
    seen: set[str] = set()
    first = heading = None
    for line in _lines(Path(path)):
        word = line.words[0]
        if word.startswith(":"):
            scale = math.degrees(1) if word.upper() == ":RADIANS" else scale
        elif word.isdecimal():
            _check_complete(heading, moving, seen)
            first = int(word) if first is None else first
            if len(line.words) > 1 or int(word) != first + len(frames):
                raise line.wrong(f"frame number {first + len(frames)} alone")
            heading, seen = line, set()
            frames.append(np.zeros(columns[skeleton.names[-1]].stop))
        else:
            if heading is None:
                raise line.wrong("a frame number first")
            if word not in columns or word in seen:
                raise line.wrong(f"another bone of the skeleton in frame {heading.words[0]}")
            count = columns[word].stop - columns[word].start
            if len(line.words) != count + 1:
                raise line.wrong(f"{word} and {_several(count)}")
            frames[-1][columns[word]] = line.numbers(count, word)
            seen.add(word)
    if heading is None:
        raise ValueError(f"{path}, line 1: the file holds no frames")
    _check_complete(heading, moving, seen)
    angles = np.array(frames)  # [F, D]
    shifts = np.array([channel[0] == "t" for channels in skeleton.channels for channel in channels])
    return angles * np.where(shifts, skeleton.unit, scale)


def _check_complete(heading: _Line | None, moving: Sequence[str], seen: set[str]) -> None:
    missing = [name for name in moving if name not in seen]
    if heading is not None and missing:
        raise heading.error(f"frame {heading.words[0]} lacks {missing[0]}")
