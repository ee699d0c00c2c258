"""Pickles of plain values: containers, numbers, strings and NumPy arrays. Anything else is refused, nothing is run."""

from __future__ import annotations

import codecs
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from liftbyimage._files import require_file

# Under which names NumPy 1 and 2 pickle arrays and their scalars, and what rebuilds them; old protocols write bytes as
# encoded text.
_REBUILD = {
    ("multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("multiarray", "scalar"): np.float64(0).__reduce__()[0],
    ("numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
}
_ADMITTED: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.{part}", name): call for core in ("core", "_core") for (part, name), call in _REBUILD.items()},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Refused(pickle.UnpicklingError):
    pass


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
