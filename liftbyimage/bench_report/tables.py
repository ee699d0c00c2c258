"""Measured figures as a report: paragraphs on what was measured where, and one table; as Markdown or as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from liftbyimage.bench_report.results import Machine, Part, Row

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
NO_FIGURE = "–"


@dataclass(frozen=True)
class Report:
    """What is printed: paragraphs, a table whose first `labels` columns are words, more paragraphs."""

    before: Sequence[str]
    columns: Sequence[str]
    labels: int
    rows: Sequence[Sequence[str]]
    after: Sequence[str] = ()

    def markdown(self) -> str:
        rule = ["---"] * self.labels + ["---:"] * (len(self.columns) - self.labels)
        table = "\n".join(map(_line, [self.columns, rule, *self.rows]))
        return "\n\n".join([*self.before, table, *self.after])


@dataclass(frozen=True)
class Line:
    """A line of the summary: one way of this library, beside plain PyTorch and the fastest way without the library."""

    label: str
    reference: Row
    best_other: Row | None
    ours: Row

    @property
    def ratio(self) -> float:
        """How many times faster than plain PyTorch."""
        return self.reference.seconds / self.ours.seconds


def table(machines: Sequence[Machine]) -> Report:
    """Every row; ratios are medians of one run, reference over implementation. Machines stand side by side."""
    return _table_of_one(machines[0]) if len(machines) == 1 else _table_of_several(machines)


def summary(machines: Sequence[Machine]) -> Report:
    """One line per work: plain PyTorch, the best way without this library, and this library.

    Where the library has several rows (another precision, another backend) each after the first gets its own line.
    Several machines stand side by side, with the library's time and its ratio alone.

    Raises:
        ValueError: no work has both the reference and a liftbyimage row.
    """
    lines = [summary_lines(machine) for machine in machines]
    before = provenance(machines)
    if len(machines) == 1:
        return Report(before, SUMMARY_COLUMNS, 1, [_summary_cells(line) for line in lines[0]])
    found = [{line.label: line for line in of_machine} for of_machine in lines]
    rows = []
    for label in _in_order(found):
        cells = [label]
        for of_machine in found:
            line = of_machine.get(label)
            cells += [_ms(line.ours), _times(line.ratio)] if line else [NO_FIGURE] * 2
        rows.append(cells)
    return Report(before, ["work", *_pairs(machines)], 1, rows)


def summary_lines(machine: Machine) -> list[Line]:
    """What `summary` shows of a machine; work that lacks the reference or a liftbyimage row is left out."""
    lines = []
    for work, rows in machine.works().items():
        reference = next((row for row in rows if row.is_reference), None)
        others = [row for row in rows if not row.is_ours and not row.is_reference]
        best = min(others, key=lambda row: row.seconds, default=None)
        if reference is not None:
            ours = [row for row in rows if row.is_ours]
            labels = [f"{work}: {row.implementation}" if i else work for i, row in enumerate(ours)]
            lines += [Line(label, reference, best, row) for label, row in zip(labels, ours, strict=True)]
    if not lines:
        raise ValueError(
            f"{machine.named()}: no work has both a row of plain PyTorch (reference) and one of liftbyimage"
        )
    return lines


def as_data(machines: Sequence[Machine], summarised: bool = False) -> dict[str, Any]:
    """The same as plain data: the machines, and rows that say by "machine" which of them they are of."""
    rows = []
    for i, machine in enumerate(machines):
        if summarised:
            rows += [{"machine": i, **_line_data(line)} for line in summary_lines(machine)]
        else:
            rows += [{"machine": i, **_row_data(row, _references(machine))} for row in machine.rows]
    return {"machines": [machine_data(machine) for machine in machines], "rows": rows}


def machine_data(machine: Machine) -> dict[str, Any]:
    files = [{**asdict(part), "path": str(part.path), "works": len(part.works)} for part in machine.parts]
    return {**asdict(machine.hardware), "versions": machine.versions, "files": files}


def _row_data(row: Row, references: dict[str, float]) -> dict[str, Any]:
    reference = references.get(row.work)
    return {**asdict(row), "against_reference": None if reference is None else reference / row.seconds}


def _line_data(line: Line) -> dict[str, Any]:
    best, ours = line.best_other, line.ours
    return {
        "work": ours.work,
        "implementation": ours.implementation,
        "seconds": ours.seconds,
        "reference_seconds": line.reference.seconds,
        "against_reference": line.ratio,
        "best_other": best and {"implementation": best.implementation, "seconds": best.seconds},
        "against_best_other": best and best.seconds / ours.seconds,
        "fraction_of_matmul": ours.fraction_of_matmul,
        "memory_of_reference": _memory_ratio(line),
    }


def provenance(machines: Sequence[Machine], names: Sequence[str] | None = None) -> list[str]:
    """One paragraph per machine: what, when, with which versions and ceilings, from which files; several are named."""
    if len(machines) == 1:
        return [_provenance(machines[0])]
    return [f"{name}: {_provenance(m)}" for name, m in zip(names or labels(machines), machines, strict=True)]


def labels(machines: Sequence[Machine]) -> list[str]:
    """A short name of each machine, with as much of threads, dtype and versions as tells it from its namesakes."""
    found = []
    for machine in machines:
        namesakes = [m for m in machines if m.hardware.name == machine.hardware.name]
        facts = [_facts(m) for m in namesakes]
        differing = [key for key in _in_order(facts) if len({of_one.get(key) for of_one in facts}) > 1]
        mine = _facts(machine)
        found.append(", ".join([machine.hardware.name, *(mine[key] for key in differing if key in mine)]))
    return found


def _facts(machine: Machine) -> dict[str, str]:
    versions = {name: f"{name} {version}" for name, version in machine.versions.items()}
    return {"threads": f"{machine.hardware.threads} threads", "dtype": machine.hardware.dtype or "", **versions}


def _provenance(machine: Machine) -> str:
    dates = " and ".join(dict.fromkeys(part.date for part in machine.parts))
    software = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    parts = [f"Measured on {dates}: {machine.hardware}", *filter(None, [software])]
    if len(machine.parts) == 1:
        return "; ".join([*parts, *ceilings(machine.parts[0])]) + "."
    joined = [
        f"{part.path.name} ({', '.join([f'{len(part.works)} works', *ceilings(part)])})" for part in machine.parts
    ]
    return "; ".join(parts) + f". Joined from {len(joined)} files: {', '.join(joined)}."


def ceilings(part: Part) -> list[str]:
    """``matrix product 195 GFLOP/s``, ``copy 33.4 GB/s``: what the run measured of them."""
    figures = (("matrix product", part.matmul_gflops, "GFLOP/s"), ("copy", part.copy_gbytes, "GB/s"))
    return [f"{name} {significant(figure)} {unit}" for name, figure, unit in figures if figure is not None]


def _table_of_one(machine: Machine) -> Report:
    references = _references(machine)
    rows = []
    for work, members in machine.works().items():
        rows += [_cells("" if i else work, row, references.get(work)) for i, row in enumerate(members)]
    return Report(provenance([machine]), COLUMNS, 2, rows)


def _table_of_several(machines: Sequence[Machine]) -> Report:
    references = [_references(machine) for machine in machines]
    found = [{(row.work, row.implementation): row for row in machine.rows} for machine in machines]
    works = _in_order([machine.works() for machine in machines])
    keys = sorted(_in_order(found), key=lambda key: works.index(key[0]))  # stable: a work's rows stay in their order
    rows, last = [], None
    for work, implementation in keys:
        cells = ["" if work == last else work, implementation]
        for of_machine, reference in zip(found, references, strict=True):
            row = of_machine.get((work, implementation))
            cells += [_ms(row), _against(reference.get(work), row)] if row else [NO_FIGURE] * 2
        rows.append(cells)
        last = work
    return Report(provenance(machines), ["work", "implementation", *_pairs(machines)], 2, rows)


def _pairs(machines: Sequence[Machine]) -> list[str]:
    return [f"{label}: {column}" for label in labels(machines) for column in ("median ms", "against plain PyTorch")]


def _in_order(mappings: Iterable[Iterable[Any]]) -> list[Any]:
    """The keys of all, each once, in the order in which they first come."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _references(machine: Machine) -> dict[str, float]:
    return {row.work: row.seconds for row in machine.rows if row.is_reference}


def _cells(work: str, row: Row, reference: float | None) -> list[str]:
    return [
        work,
        row.implementation,
        _ms(row),
        _against(reference, row),
        significant(row.gflops) if row.gflops else NO_FIGURE,
        _percent(row.fraction_of_matmul),
        _percent(row.fraction_of_copy),
        NO_FIGURE if row.peak_memory_bytes is None else significant(row.peak_memory_bytes / 1e6),
        NO_FIGURE if row.operations is None else f"{row.operations:.0f}",
    ]


def _summary_cells(line: Line) -> list[str]:
    best, memory = line.best_other, _memory_ratio(line)
    return [
        line.label,
        _ms(line.reference),
        f"{_ms(best)} ({best.implementation})" if best else NO_FIGURE,
        _ms(line.ours),
        _times(line.ratio),
        _times(best.seconds / line.ours.seconds) if best else NO_FIGURE,
        _percent(line.ours.fraction_of_matmul),
        NO_FIGURE if memory is None else f"{memory:.2f}",
    ]


def _memory_ratio(line: Line) -> float | None:
    ours, reference = line.ours.peak_memory_bytes, line.reference.peak_memory_bytes
    return ours / reference if ours and reference else None


def _ms(row: Row) -> str:
    return significant(1e3 * row.seconds)


def _against(reference: float | None, row: Row) -> str:
    return NO_FIGURE if reference is None else _times(reference / row.seconds)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def _percent(fraction: float | None) -> str:
    return f"{100 * fraction:.0f} %" if fraction else NO_FIGURE


def significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(decimals, 0)}f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
