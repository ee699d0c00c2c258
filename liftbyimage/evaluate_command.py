"""`liftbyimage evaluate`: the way from a checkpoint and a line of data to a table and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from liftbyimage._files import require_place, sha256_of, write_atomically
from liftbyimage.checkpoint import load_pipeline
from liftbyimage.data.source import open_source
from liftbyimage.evaluate import LENGTHS, measure, summarise
from liftbyimage.reading import spread

# The columns of the table, which fits 80 letters; the JSON file has every measure.
_COLUMNS = {
    "mpjpe": "\nMPJPE",
    "p_mpjpe": "P-\nMPJPE",
    "coarse_mpjpe": "coarse\nMPJPE",
    "pck": "\nPCK",
    "auc": "\nAUC",
    "background": "back-\nground",
    "background_of_uniform": "of uni-\nform",
}


def run(
    checkpoint: Path,
    data: str,
    console: Console,
    *,
    encoder_weights: Path | None = None,
    limit: int | None = None,
    json_file: Path | None = None,
    per_joint: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate and print; `options` are those of `evaluate.measure`.

    Args:
        limit: only so many records, evenly spread over the source.
        json_file: where to write what is returned.

    Returns:
        The summary, with what was evaluated, on what and how.
    """
    if json_file is not None and json_file.is_dir():  # said before hours of work
        raise ValueError(f"--json {json_file}: expected a file, got a folder")
    if json_file is not None:
        require_place(f"--json {json_file}", json_file.parent)
    pipeline = load_pipeline(checkpoint, encoder_weights)
    source = open_source(data)
    indices = spread(len(source), limit)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Evaluating", total=len(indices))
        measurements = measure(
            pipeline, source, indices=indices, on_batch=lambda count: progress.advance(task, count), **options
        )
    summary = summarise(measurements, source.groups, per_joint=per_joint)
    document = {
        **summary,
        "lifter": pipeline.lifter.name,
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": sha256_of(checkpoint),
        "data": data,
        "source": dict(source.description),
        "flip_test": options["flip_test"],
        "precision": options["precision"],
    }
    if json_file is not None:
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(json_file, lambda file: file.write(text.encode()))
    _print(console, summary)
    return document


def _print(console: Console, summary: Mapping[str, Any]) -> None:
    names = [name for name in _COLUMNS if name in summary or f"{name}_mm" in summary]
    table = Table(title="Lengths in mm, shares in %", title_justify="left", box=box.SIMPLE)
    table.add_column("\ngroup")
    table.add_column("rec-\nords", justify="right")
    for name in names:
        table.add_column(_COLUMNS[name], justify="right", no_wrap=True)
    for group, means in summary["groups"].items():
        table.add_row(group, str(means["records"]), *_cells(names, means))
    table.add_section()
    table.add_row("average", "", *_cells(names, summary["average"]))
    table.add_row("all", str(summary["records"]), *_cells(names, summary))
    console.print(table)
    if "per_joint_mm" in summary:
        table = Table(title="Mean error of each joint", title_justify="left", box=box.SIMPLE)
        table.add_column("joint")
        table.add_column("mm", justify="right")
        for joint, error in summary["per_joint_mm"].items():
            table.add_row(joint, f"{error:.1f}")
        console.print(table)
    if summary["skipped"]:
        text = f"Left out {summary['skipped']} records that could not be read, the first: {summary['problems'][0]}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _cells(names: list[str], means: Mapping[str, Any]) -> list[str]:
    return [f"{means[f'{name}_mm']:.1f}" if name in LENGTHS else f"{100 * means[name]:.1f}" for name in names]
