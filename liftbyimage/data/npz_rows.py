"""The rows of an array in an .npy or .npz file, read by random access: the array itself is never in memory.

A stored array of an .npz file is read where it lies in the zip. A compressed one is unpacked once, piece by piece, into
the cache folder ($XDG_CACHE_HOME or ~/.cache, then liftbyimage/npz), under a name made of the file's path, size and
time of change and the array's name; deleting the folder is safe.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from liftbyimage._files import require_file, write_atomically

_PIECE = 1 << 20  # bytes
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class Rows:
    """An array [N, …] in a file.

    Every read opens the file anew: nothing is held, so rows serve any process, forked or spawned.

    Attributes:
        path: the file that holds the values.
        offset: where in it they begin, bytes.
        dtype, shape: of the whole array.
    """

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        """One row, [*shape[1:]]."""
        row = range(len(self))[row]
        values: np.ndarray = self.read(row, row + 1)[0]
        return values

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start … stop − 1, [stop − start, *shape[1:]].

        Raises:
            OSError, ValueError: the file is gone, or shorter than it was.
        """
        per_row = math.prod(self.shape[1:])
        wanted = (stop - start) * per_row
        offset = self.offset + start * per_row * self.dtype.itemsize
        values = np.fromfile(self.path, self.dtype, wanted, offset=offset)
        if len(values) != wanted:
            raise ValueError(f"{self.path}: expected {len(self)} rows, the file ends before row {stop}")
        return values.reshape(stop - start, *self.shape[1:])

    def pieces(self, rows: int = 1 << 14) -> Iterator[tuple[int, np.ndarray]]:
        """All rows in order: the number of the first, and at most so many of them."""
        for start in range(0, len(self), rows):
            yield start, self.read(start, min(start + rows, len(self)))


def npy_rows(path: str | Path) -> Rows:
    """The array of an .npy file.

    Raises:
        ValueError: no such file, not an .npy file, objects or Fortran order instead of plain rows, or a file cut short.
    """
    path = Path(path)
    require_file(str(path), path)
    return _rows(path, 0, path.stat().st_size, str(path))


def array_names(path: str | Path) -> list[str]:
    """The names of the arrays in an .npz file.

    Raises:
        ValueError: no such file, or not an .npz file.
    """
    with _open_zip(Path(path)) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def npz_rows(path: str | Path, name: str) -> Rows:
    """An array of an .npz file, by name.

    Raises:
        ValueError: as `npy_rows`, or no array of that name.
    """
    path = Path(path)
    label = f"{path}: array '{name}'"
    with _open_zip(path) as archive:
        try:
            member = archive.getinfo(f"{name}.npy")
        except KeyError:
            raise ValueError(f"{path}: expected an array '{name}', got {', '.join(array_names(path))}") from None
        if member.compress_type == zipfile.ZIP_STORED:
            return _rows(path, _start(path, member), member.file_size, label)
        unpacked = _unpacked_file(path, member)
        try:
            _unpack(archive, member, unpacked)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{label} cannot be unpacked to {unpacked} ({error})") from None
    return _rows(unpacked, 0, member.file_size, label)


def _open_zip(path: Path) -> zipfile.ZipFile:
    require_file(str(path), path)
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: expected an .npz file, which is a zip of arrays ({error})") from None


def _start(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: behind its local header, whose name and extra field vary in length."""
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return member.header_offset + _LOCAL_HEADER + name + extra


def _unpacked_file(path: Path, member: zipfile.ZipInfo) -> Path:
    state = path.stat()
    version = f"{path.resolve()}\n{member.filename}\n{state.st_size}\n{state.st_mtime_ns}"
    key = hashlib.sha256(os.fsencode(version)).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liftbyimage" / "npz"
    return cache / f"{key}.npy"


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    if not target.is_file():
        with archive.open(member) as packed:
            write_atomically(target, lambda file: shutil.copyfileobj(packed, file, _PIECE))


def _rows(path: Path, start: int, size: int, label: str) -> Rows:
    """The array whose .npy form lies at byte `start` of a file and is `size` bytes long."""
    with open(path, "rb") as file:
        file.seek(start)
        shape, fortran_order, dtype = _read_header(file, label)
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{label} holds Python objects, expected numbers or strings")
    if not shape or (fortran_order and len(shape) > 1):
        layout = "Fortran order" if shape else "a single value"
        raise ValueError(f"{label}: expected rows in C order, got {layout}")
    if math.prod(shape) * dtype.itemsize != size - (offset - start):
        raise ValueError(f"{label}: expected {list(shape)} of {dtype}, got {size - (offset - start)} bytes")
    return Rows(path, offset, dtype, shape)


def _read_header(file: BinaryIO, label: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        return _HEADER_READERS[np.lib.format.read_magic(file)](file)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{label}: not an array in the .npy format, version 1 or 2 ({error})") from None
