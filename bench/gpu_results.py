"""What `make gpu` keeps of a run: the results of its pytest processes as one file, and its place in bench/results."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The file by itself: what it needs is installed only once `make gpu` has built the library.
write_atomically = runpy.run_path(str(ROOT / "liftbyimage" / "_files.py"))["write_atomically"]


def slug(gpu: str) -> str:
    """The name of a folder: NVIDIA H200 as nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def merge(paths: Sequence[Path], gpu: Mapping[str, Any], not_run: Sequence[str]) -> dict[str, Any] | None:
    """Files of one run as one, in their order; those that were never written are left out. None without any."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    if not documents:
        return None
    merged = documents[0]
    merged["benchmarks"] = [row for document in documents for row in document["benchmarks"]]
    merged["machine_info"] |= {"gpu": dict(gpu), "rows_not_run": list(not_run)}
    return merged


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=4, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def why_not_publish(document: Mapping[str, Any]) -> str | None:
    """Only what a GPU measured is a GPU's result."""
    if not document["benchmarks"]:
        return "no row was measured"
    devices = {row["extra_info"].get("device") for row in document["benchmarks"]}
    return (
        None if devices == {"cuda"} else f"rows were measured on {', '.join(sorted(map(str, devices)))}, not on a GPU"
    )


def publish(document: Mapping[str, Any], results: Path) -> Path:
    """Write `<results>/<gpu>/<date>.json`; a further run of that day gets a number, and replaces nothing."""
    folder, date = results / slug(document["machine_info"]["gpu"]["name"]), document["datetime"][:10]
    path, number = folder / f"{date}.json", 2
    while path.exists():
        path, number = folder / f"{date}-{number}.json", number + 1
    write_json(path, document)
    return path
