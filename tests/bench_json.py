"""Made-up results in the form that `pytest bench --benchmark-json=FILE` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MACHINE = {
    "device": "cpu",
    "dtype": "float32",
    "device_name": "Some CPU",
    "threads": 2,
    "versions": {"liftbyimage": "0.1.0", "torch": "2.13.0+cpu"},
    "matmul_gflops": 194.6,
    "copy_gbytes": 6.63,
}


def entry(work: str, implementation: str, median: float, scatter: float = 0.0, **figures: Any) -> dict[str, Any]:
    """A row whose quartiles are `scatter` of the median away; `figures` are of extra_info, the machine's too."""
    facts = {"implementation": implementation, **MACHINE, **figures}
    stats = {"median": median, "mean": 7.0, "q1": median * (1 - scatter), "q3": median * (1 + scatter)}
    group = f"{work} {facts['dtype']} {facts['device']}"
    return {"group": group, "extra_info": facts, "stats": stats}


def write(path: Path, entries: Any) -> Path:
    """A list of rows as a run of 2 January 2026; a string or an object as it is."""
    data = {"datetime": "2026-01-02T03:04:05", "benchmarks": entries} if isinstance(entries, list) else entries
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path
