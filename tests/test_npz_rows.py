from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from converted_dataset import render_people, write_picture

from liftbyimage.data.npz_rows import array_names, npy_rows, npz_rows
from liftbyimage.data.plain_pickle import load_plain_pickle
from liftbyimage.data.skeleton import H36M_TO_MPI_INF_3DHP

ARRAYS = {
    "numbers": np.random.default_rng(0).normal(size=(50, 3, 2)),
    "names": np.array([f"picture {number}" for number in range(50)]),
    "scale": np.arange(50, dtype=np.float32),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "liftbyimage" / "npz"


def _refusal(read: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        read()
    return str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_are_the_arrays(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", **ARRAYS)
    assert array_names(tmp_path / "a.npz") == list(ARRAYS)
    for name, array in ARRAYS.items():
        rows = pickle.loads(pickle.dumps(npz_rows(tmp_path / "a.npz", name)))
        assert len(rows) == 50 and rows.shape == array.shape and rows.dtype == array.dtype
        for row in (0, 17, 49, -1):
            np.testing.assert_array_equal(rows[row], array[row])
        pieces = dict(rows.pieces(16))
        assert list(pieces) == [0, 16, 32, 48]
        np.testing.assert_array_equal(np.concatenate(list(pieces.values())), array)
        with pytest.raises(IndexError):
            rows[50]


def test_stored_arrays_are_read_in_place_and_compressed_ones_unpacked_once(tmp_path: Path, cache: Path) -> None:
    np.savez(tmp_path / "stored.npz", **ARRAYS)
    assert npz_rows(tmp_path / "stored.npz", "numbers").path == tmp_path / "stored.npz"
    assert not cache.exists()

    packed = tmp_path / "packed.npz"
    np.savez_compressed(packed, **ARRAYS)
    unpacked = npz_rows(packed, "numbers").path
    assert list(cache.iterdir()) == [unpacked]
    inode = unpacked.stat().st_ino
    assert npz_rows(packed, "numbers").path == unpacked and unpacked.stat().st_ino == inode

    np.savez_compressed(packed, numbers=2 * ARRAYS["numbers"])
    os.utime(packed, ns=(0, 0))
    rows = npz_rows(packed, "numbers")
    assert rows.path != unpacked
    np.testing.assert_array_equal(rows[3], 2 * ARRAYS["numbers"][3])


def test_npy_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ARRAYS["numbers"])
    rows = npy_rows(tmp_path / "a.npy")
    np.testing.assert_array_equal(rows.read(10, 20), ARRAYS["numbers"][10:20])
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-100])
    assert _refusal(lambda: rows[49]) == f"{tmp_path / 'a.npy'}: expected 50 rows, the file ends before row 50"
    assert _refusal(lambda: npy_rows(tmp_path / "a.npy")) == (
        f"{tmp_path / 'a.npy'}: expected [50, 3, 2] of float64, got 2300 bytes"
    )


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_objects_and_other_layouts_are_refused(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "a.npz"
    save(path, objects=np.array([{}, {}]), turned=np.asfortranarray(np.ones((4, 3))), value=np.float64(3))
    assert _refusal(lambda: npz_rows(path, "objects")) == (
        f"{path}: array 'objects' holds Python objects, expected numbers or strings"
    )
    assert _refusal(lambda: npz_rows(path, "turned")) == (
        f"{path}: array 'turned': expected rows in C order, got Fortran order"
    )
    assert _refusal(lambda: npz_rows(path, "value")) == (
        f"{path}: array 'value': expected rows in C order, got a single value"
    )
    assert _refusal(lambda: npz_rows(path, "S")) == f"{path}: expected an array 'S', got objects, turned, value"


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    assert _refusal(lambda: npz_rows(path, "S")) == f"{path}: no such file"
    path.write_text("nothing")
    assert _refusal(lambda: npz_rows(path, "S")).startswith(
        f"{path}: expected an .npz file, which is a zip of arrays ("
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("S.npy", "nothing")
    assert _refusal(lambda: npz_rows(path, "S")).startswith(f"{path}: array 'S': not an array in the .npy format")


def test_a_broken_compressed_array_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, numbers=np.random.default_rng(0).normal(size=20_000))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert _refusal(lambda: npz_rows(path, "numbers")).startswith(
        f"{path}: array 'numbers' cannot be unpacked to {cache}"
    )
    assert list(cache.iterdir()) == []


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_plain_pickles(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    value = {("S1", "5"): {"R": np.eye(3), "w": 1000, "f": np.float32(3), "id": "5", "k": [1.5, None, True]}}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(value, protocol))
        entry = load_plain_pickle(path)["S1", "5"]
        np.testing.assert_array_equal(entry.pop("R"), np.eye(3))
        assert entry == {"w": 1000, "f": 3.0, "id": "5", "k": [1.5, None, True]}
    older = pickle.dumps(value, 2).replace(b"numpy._core.", b"numpy.core.")  # as NumPy 1 writes it
    path.write_bytes(older)
    np.testing.assert_array_equal(load_plain_pickle(path)["S1", "5"]["R"], np.eye(3))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"R": _Evil(tmp_path / "made")}, protocol))
    module = os.mkdir.__module__
    assert _refusal(lambda: load_plain_pickle(path)) == (
        f"{path}: expected a pickle of plain values and arrays, it asks for {module}.mkdir"
    )
    assert not (tmp_path / "made").exists()
    pickle.loads(path.read_bytes())  # it would have
    assert (tmp_path / "made").exists()


class _Call:
    """Pickles as a call of NumPy's, and what may follow it."""

    def __init__(self, *reduced: object) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[object, ...]:
        return self.reduced


_EMPTY, _EMPTY_ARGUMENTS, _STATE = np.zeros(1).__reduce__()
_POINTER = b"\x41" * 8


@pytest.mark.parametrize(
    ("value", "asks_for"),
    [
        (np.array([{}], dtype=object), "an array of dtype 'O8'"),
        (_Call(np.frombuffer(b"", "u1").__reduce_ex__(5)[0], (_POINTER, np.dtype("O"), (1,), "C")), "dtype 'O8'"),
        (_Call(_EMPTY, _EMPTY_ARGUMENTS, (1, (1,), np.dtype("O"), False, _POINTER)), "an array of dtype 'O8'"),
        (_Call(_EMPTY, _EMPTY_ARGUMENTS, (1, (1,), np.dtype("i8,O"), False, 2 * _POINTER)), "an array of dtype 'V16'"),
        (_Call(_EMPTY, _EMPTY_ARGUMENTS, (1, (1,), "O", False, _POINTER)), "an array of dtype 'O'"),
        (_Call(_EMPTY, (list, (0,), b"b")), "builtins.list"),
        (_Call(_EMPTY, ("list", (0,), b"b")), "an array of kind 'list'"),
    ],
)
def test_bytes_never_become_pointers(tmp_path: Path, value: object, asks_for: str) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"R": value}, 4))
    assert _refusal(lambda: load_plain_pickle(path)).endswith(asks_for)
    path.write_bytes(pickle.dumps(_Call(np.ndarray, ((1,), np.dtype("f8"), _POINTER)), 4))
    assert _refusal(lambda: load_plain_pickle(path)).startswith(f"{path}: not a pickle that can be read (")


@pytest.mark.parametrize("array", [np.arange(6, dtype=">i2").reshape(2, 3).T, np.array(["a", "bé"]), np.array([True])])
def test_plain_arrays_of_every_kind_come_back(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "a.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps([array, array[(0,) * array.ndim]], protocol))
        expected, _ = pickle.loads(path.read_bytes())
        found, scalar = load_plain_pickle(path)
        np.testing.assert_array_equal(found, array)
        assert found.dtype == expected.dtype and scalar == array[(0,) * array.ndim]


def test_a_broken_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    assert _refusal(lambda: load_plain_pickle(path)) == f"{path}: no such file"
    for broken in (b"", b"nothing", pickle.dumps([1, 2, 3])[:-3]):
        path.write_bytes(broken)
        assert _refusal(lambda: load_plain_pickle(path)).startswith(f"{path}: not a pickle that can be read (")


ROWS = 270_000

READ_SOME = """
import json, sys
from liftbyimage.data.mpi_inf_3dhp import MpiInf3dhp

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024

root = sys.argv[1]
MpiInf3dhp(root, annotations=root + "/small.npz", size=(64, 48))[0]  # what the first record loads and allocates
before = memory("VmRSS:")
source = MpiInf3dhp(root, size=(64, 48))
poses = [source[row]["pose_3d"].tolist() for row in range(0, len(source), len(source) // 20)]
print(json.dumps({"records": len(source), "grown": memory("VmHWM:") - before, "first": poses[0], "last": poses[-1]}))
"""


def _write_repeated(path: Path, rows: dict[str, np.ndarray], count: int) -> None:
    """A compressed .npz of rows that are all the same, written without ever holding an array."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, row in rows.items():
            header = {"descr": row.dtype.str, "fortran_order": False, "shape": (count, *row.shape)}
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, header)
                block = row.tobytes() * 1000
                for _ in range(count // 1000):
                    file.write(block)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_annotations_larger_than_memory_would_hold_are_read_in_little(tmp_path: Path, cache: Path) -> None:
    people = render_people(1)
    write_picture(tmp_path / "images" / "S1_Seq1_Cam0_000001.jpg", people.pictures[0])
    order, one = list(H36M_TO_MPI_INF_3DHP), np.ones((17, 1))
    rows = {
        "imgname": np.array("S1_Seq1_Cam0_000001.jpg"),
        "part": np.hstack([people.joints_2d[0], one])[order],
        "S": np.hstack([people.joints_3d[0], one])[order],
    }
    (tmp_path / "annotations").mkdir()
    _write_repeated(tmp_path / "annotations" / "mpi_inf_3dhp_train.npz", rows, ROWS)
    _write_repeated(tmp_path / "small.npz", rows, 1000)

    run = subprocess.run([sys.executable, "-c", READ_SOME, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    megabytes = sum(file.stat().st_size for file in cache.iterdir()) / 2**20
    assert result["records"] == ROWS and megabytes > 250
    assert result["grown"] < 0.1 * megabytes
    expected = (people.joints_3d[0] - people.joints_3d[0, :1]).astype(np.float32).tolist()
    assert result["first"] == result["last"] == expected
