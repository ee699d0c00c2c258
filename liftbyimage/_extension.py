"""Loads the compiled modules and remembers, in one sentence each, why one is missing.

A module that was never built is a reason; a module that is there but does not load (built for another torch) is an
error and raised, so that a broken build is never mistaken for a slow machine.
"""

from __future__ import annotations

import importlib
import importlib.util


def _load(module: str, reason: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return reason
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is built but does not load ({error}); rebuild it against the installed torch with "
            "`pip install --no-build-isolation -e .`"
        ) from error
    return None


CPU_MISSING = _load(
    "liftbyimage._C",
    "the C++ extension is not built (no C++ compiler when liftbyimage was installed)",
)
CUDA_MISSING = (
    "the CUDA module needs the C++ extension, which is not built"
    if CPU_MISSING
    else _load("liftbyimage._cuda", "the CUDA module is not built (no nvcc when liftbyimage was installed)")
)
