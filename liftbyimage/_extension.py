"""Loads the compiled modules and remembers, in one sentence each, why one is missing.

A module that was never built is a reason; a module that is there but does not load (built for another torch, or for
another processor) is an error and raised, so that a broken build is never mistaken for a slow machine.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from liftbyimage._processor import RECORD, available, lacking


class BrokenBuild(ImportError):
    """A compiled module is there and cannot be used."""


def _load(module: str, reason: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return reason
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise BrokenBuild(
            f"{module} is built but does not load ({error}); rebuild it against the installed torch with "
            "`pip install --no-build-isolation -e .`"
        ) from error
    return None


def _require_processor(record: Path) -> None:
    """Refuse to load what would end in an illegal instruction."""
    missing = lacking(record, available())
    if missing:
        raise BrokenBuild(
            f"liftbyimage._C was built for a processor with {', '.join(missing)}, which this one lacks; rebuild it "
            "here, or with LIFTBYIMAGE_MARCH=x86-64-v3 for both"
        )


_require_processor(Path(__file__).with_name(RECORD))
CPU_MISSING = _load(
    "liftbyimage._C",
    "the C++ extension is not built (no C++ compiler when liftbyimage was installed)",
)
CUDA_MISSING = (
    "the CUDA module needs the C++ extension, which is not built"
    if CPU_MISSING
    else _load("liftbyimage._cuda", "the CUDA module is not built (no nvcc when liftbyimage was installed)")
)
