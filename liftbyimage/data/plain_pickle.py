"""Pickles of plain values: containers, numbers, strings and NumPy arrays of numbers and strings. Anything else is
refused, nothing is run.

NumPy believes the state it unpickles: an array of objects may be given bytes that it takes for pointers, by a call that
looks harmless. So its own classes are never handed out, and arrays are rebuilt here from dtypes that hold no pointers.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from liftbyimage._files import require_file

_PLAIN_DTYPE = re.compile(r"b1|[biufcSU]\d+")
_ARRAY = "numpy.ndarray"  # what the class itself becomes: a word that cannot be called


class _Refused(pickle.UnpicklingError):
    pass


class _Dtype:
    """A dtype of plain values; its state adds nothing to its code but the order of bytes."""

    def __init__(self, code: str) -> None:
        self.plain = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.plain = self.plain.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that looks at its state before it takes it."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, values = state
        checked: Any = (1, shape, _plain(dtype), bool(fortran_order), bytes(values))
        super().__setstate__(checked)


def _dtype(code: str, align: bool = False, copy: bool = False) -> _Dtype:
    if not isinstance(code, str) or not _PLAIN_DTYPE.fullmatch(code):
        raise _Refused(f"an array of dtype {code!r}")
    return _Dtype(code)


def _plain(dtype: object) -> np.dtype[Any]:
    if not isinstance(dtype, _Dtype):
        raise _Refused(f"an array of dtype {dtype!r}")
    return dtype.plain


def _reconstruct(kind: Any, shape: tuple[int, ...], code: bytes) -> _Array:
    if kind != _ARRAY:
        raise _Refused(f"an array of kind {kind!r}")
    empty: _Array = _Array((0,), np.int8)
    return empty


def _scalar(dtype: Any, value: bytes) -> Any:
    [one] = np.frombuffer(value, _plain(dtype))
    return one


def _frombuffer(values: bytes, dtype: Any, shape: tuple[int, ...], order: Any) -> Any:
    return np.frombuffer(values, _plain(dtype)).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    """Bytes, which old protocols write as text."""
    if encoding != "latin1":
        raise _Refused(f"the encoding {encoding!r}")
    return text.encode(encoding)


# Under which names NumPy 1 and 2 pickle arrays and their scalars, and what rebuilds them.
_REBUILD: dict[tuple[str, str], Callable[..., Any]] = {
    ("multiarray", "_reconstruct"): _reconstruct,
    ("multiarray", "scalar"): _scalar,
    ("numeric", "_frombuffer"): _frombuffer,
}
_ADMITTED: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.{part}", name): call for core in ("core", "_core") for (part, name), call in _REBUILD.items()},
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise _Refused(f"{module}.{name}")
        return _ADMITTED[module, name]


def load_plain_pickle(path: str | Path) -> Any:
    """The value in a pickle file.

    Raises:
        ValueError: no such file, no pickle, or one that asks for anything but plain values.
    """
    path = Path(path)
    require_file(str(path), path)
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file).load()
    except _Refused as error:
        raise ValueError(f"{path}: expected a pickle of plain values and arrays, it asks for {error}") from None
    except Exception as error:  # broken pickles raise all kinds
        raise ValueError(f"{path}: not a pickle that can be read ({error})") from None
