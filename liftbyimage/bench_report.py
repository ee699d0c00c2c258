"""The table of measured figures: from the JSON of `pytest bench --benchmark-json=FILE` to Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftbyimage._files import require_file

REFERENCE = "reference"
COLUMNS = (
    "work",
    "implementation",
    "median ms",
    "speed against reference",
    "GFLOP/s",
    "of matmul rate",
    "of copy rate",
    "peak memory MB",
    "operations",
)
SUMMARY_COLUMNS = (
    "work",
    "plain PyTorch ms",
    "best other way, ms",
    "liftbyimage ms",
    "against plain PyTorch",
    "against the best other",
    "of matmul rate",
    "peak memory, of plain",
)
OURS = "liftbyimage"
NO_FIGURE = "–"


@dataclass(frozen=True)
class Row:
    """One implementation of one group; figures that the benchmark did not take are None."""

    group: str
    implementation: str
    seconds: float  # median
    work: str  # the group without its shape
    shape: dict[str, int] | None  # B, P, D
    gflops: float | None
    fraction_of_matmul: float | None
    fraction_of_copy: float | None
    peak_memory_bytes: float | None
    operations: float | None  # that PyTorch dispatched in one call


def table(json_path: str | Path) -> str:
    """The figures of a benchmark run as Markdown: where and when it was measured, then one row per implementation.

    Args:
        json_path: what `pytest bench --benchmark-only --benchmark-json=FILE` wrote.

    Returns:
        Two paragraphs, the second a table. Ratios are medians of one run: reference over implementation.

    Raises:
        ValueError: one sentence on why the file is no such result.
    """
    data, rows = read_rows(json_path)
    references = {row.group: row.seconds for row in rows if row.implementation == REFERENCE}
    lines = [_line(COLUMNS), _line(["---", "---", *["---:"] * (len(COLUMNS) - 2)])]
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        lines += [_line(_cells("" if i else group, row, references.get(group))) for i, row in enumerate(members)]
    return "\n".join([_provenance(data), "", *lines])


def summary(json_path: str | Path) -> str:
    """The same run with one line per work: plain PyTorch, the best way without this library, and this library.

    Where the library has several rows (another precision, another backend) each after the first gets its own line.

    Args, Raises: as `table`. Work that lacks the reference or a liftbyimage row is left out.
    """
    data, rows = read_rows(json_path)
    lines = [_line(SUMMARY_COLUMNS), _line(["---", *["---:"] * (len(SUMMARY_COLUMNS) - 1)])]
    for group in dict.fromkeys(row.group for row in rows):
        members = {row.implementation: row for row in rows if row.group == group}
        ours = [row for name, row in members.items() if name.startswith(OURS)]
        if REFERENCE in members and ours:
            others = [row for name, row in members.items() if not name.startswith(OURS) and name != REFERENCE]
            for i, row in enumerate(ours):
                label = f"{group}: {row.implementation}" if i else group
                lines.append(_line(_summary_cells(label, members[REFERENCE], others, row)))
    return "\n".join([_provenance(data), "", *lines])


def _summary_cells(label: str, reference: Row, others: list[Row], ours: Row) -> list[str]:
    best = min(others, key=lambda row: row.seconds, default=None)
    memories = ours.peak_memory_bytes, reference.peak_memory_bytes
    return [
        label,
        _significant(1e3 * reference.seconds),
        f"{_significant(1e3 * best.seconds)} ({best.implementation})" if best else NO_FIGURE,
        _significant(1e3 * ours.seconds),
        f"{reference.seconds / ours.seconds:.2f}×",
        f"{best.seconds / ours.seconds:.2f}×" if best else NO_FIGURE,
        _percent(ours.fraction_of_matmul),
        f"{memories[0] / memories[1]:.2f}" if memories[0] and memories[1] else NO_FIGURE,
    ]


def read_rows(json_path: str | Path) -> tuple[dict[str, Any], list[Row]]:
    """The whole file and its rows, or ValueError in one sentence."""
    label = f"benchmark results {json_path}"
    data = _read(label, Path(json_path))
    return data, [_parse(f"{label}: entry {i}", entry) for i, entry in enumerate(data["benchmarks"])]


def _read(label: str, path: Path) -> dict[str, Any]:
    require_file(label, path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{label}: not valid JSON ({error})") from None
    if not (isinstance(data, dict) and isinstance(data.get("benchmarks"), list)):
        raise ValueError(f'{label}: expected what pytest-benchmark writes, an object with a list "benchmarks"')
    if not data["benchmarks"]:
        raise ValueError(f"{label}: no row was measured")
    return data


def _parse(label: str, entry: Any) -> Row:
    entry = entry if isinstance(entry, dict) else {}
    facts, stats = entry.get("extra_info"), entry.get("stats")
    if not (isinstance(facts, dict) and isinstance(facts.get("implementation"), str)):
        raise ValueError(f'{label} has no "implementation" in its "extra_info": not one of these benchmarks')
    seconds = _figure(stats.get("median")) if isinstance(stats, dict) else None
    if seconds is None or seconds <= 0:
        raise ValueError(f'{label} has no positive "median" in its "stats"')
    names = ("gflops", "fraction_of_matmul", "fraction_of_copy", "peak_memory_bytes", "operations")
    figures = {name: _figure(facts.get(name)) for name in names}
    shape = facts.get("shape")
    work = " ".join(str(facts[name]) for name in ("op", "direction", "dtype") if name in facts)
    return Row(
        group=str(entry.get("group")),
        implementation=facts["implementation"],
        seconds=seconds,
        work=work,
        shape=shape if isinstance(shape, dict) and set(shape) == {"B", "P", "D"} else None,
        **figures,
    )


def _figure(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _provenance(data: dict[str, Any]) -> str:
    facts = data["benchmarks"][0]["extra_info"]
    versions = facts.get("versions") if isinstance(facts.get("versions"), dict) else {}
    where = f"{facts.get('device_name', 'an unnamed machine')}, {facts.get('threads', '?')} CPU threads"
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    ceilings = [
        f"{name} {_significant(figure)} {unit}"
        for name, figure, unit in (
            ("matrix product", _figure(facts.get("matmul_gflops")), "GFLOP/s"),
            ("copy", _figure(facts.get("copy_gbytes")), "GB/s"),
        )
        if figure is not None
    ]
    date = str(data.get("datetime", "an unknown date"))[:10]
    parts = [f"Measured on {date}: {where}", *filter(None, [software]), *ceilings]
    return "; ".join(parts) + "."


def _cells(group: str, row: Row, reference: float | None) -> list[str]:
    return [
        group,
        row.implementation,
        _significant(1e3 * row.seconds),
        NO_FIGURE if reference is None else f"{reference / row.seconds:.2f}×",
        _significant(row.gflops) if row.gflops else NO_FIGURE,
        _percent(row.fraction_of_matmul),
        _percent(row.fraction_of_copy),
        NO_FIGURE if row.peak_memory_bytes is None else _significant(row.peak_memory_bytes / 1e6),
        NO_FIGURE if row.operations is None else f"{row.operations:.0f}",
    ]


def _percent(fraction: float | None) -> str:
    return f"{100 * fraction:.0f} %" if fraction else NO_FIGURE


def _significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(decimals, 0)}f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
