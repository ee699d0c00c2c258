"""Files: saying that one is missing, and writing so that a reader, or a crash, never meets half of one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

# The demonstration model that the package ships.
DEMO_CHECKPOINT = Path(__file__).resolve().parent / "assets" / "demo.pt"

_LONGEST = 40  # letters of a value in a message


def require_file(label: str, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{label}: {'is a folder' if path.is_dir() else 'no such file'}")


def require_utf8(label: str, path: str | os.PathLike[str]) -> None:
    """Refuse a name in another encoding: OpenCV would end Python, and JSON could not hold it."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{label}: the name is not UTF-8; rename the file or folder") from None


def require_place(label: str, folder: Path) -> None:
    """Refuse a folder that could not be made, or written into, before work is done for it."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    if not os.path.isdir(there):
        raise ValueError(f"{label}: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{label}: {there} is a folder that you may not write into")


def check_several(function: str, images: Any) -> None:
    """Refuse one image in the place of several: a string would be taken for the list of its letters."""
    if isinstance(images, (str, bytes, os.PathLike)):
        raise TypeError(f"{function}: images must be several files, got one: {os.fsdecode(images)}")


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file, then rename it: `path` is the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name on an empty file
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say what it has no room for
            error.filename = os.fspath(path)
        raise


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Delete what `write_atomically` leaves beside `path` when it is killed; nobody may be writing it."""
    path = Path(path)
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink(missing_ok=True)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Where plain values that a file holds differ from those of now: ``lifter.dim: 16 there, 32 here; …``, or ""."""
    before, now = _flat(there), _flat(here)
    names = [name for name in dict.fromkeys((*now, *before)) if before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {_short(before, name)} there, {_short(now, name)} here" for name in names)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings with dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat |= _flat(part, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _short(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "absent"
    text = json.dumps(values[name], ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
