"""Reading what `pytest bench --benchmark-json=FILE` wrote: rows, their machine, and files that belong together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from liftbyimage._files import require_file

REFERENCE = "reference"
OURS = "liftbyimage"


@dataclass(frozen=True)
class Row:
    """One implementation of one work; figures that the benchmark did not take are None."""

    work: str  # pytest-benchmark's group without dtype and device, which are the machine's
    implementation: str
    seconds: float  # median
    quartiles: tuple[float, float] | None  # seconds
    kind: str  # the work without its shape
    shape: dict[str, int] | None  # B, P, D
    flops: float | None
    bytes: float | None  # what any implementation must read and write
    gflops: float | None  # per second
    fraction_of_matmul: float | None
    fraction_of_copy: float | None
    peak_memory_bytes: float | None
    operations: float | None  # that PyTorch dispatched in one call

    @property
    def is_reference(self) -> bool:
        return self.implementation == REFERENCE

    @property
    def is_ours(self) -> bool:
        return self.implementation.startswith(OURS)


@dataclass(frozen=True)
class Part:
    """One file: a run, or a part of one."""

    path: Path
    date: str  # 2026-11-20
    works: frozenset[str]
    matmul_gflops: float | None
    copy_gbytes: float | None


@dataclass(frozen=True)
class Hardware:
    """Where rows were measured, and what they compute in."""

    name: str
    threads: str
    dtype: str | None

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.name, f"{self.threads} CPU threads", self.dtype)))


@dataclass(frozen=True)
class Machine:
    """The rows of one machine with one set of versions, from one file or several."""

    hardware: Hardware
    versions: dict[str, str]
    parts: tuple[Part, ...]
    rows: tuple[Row, ...]

    @property
    def identity(self) -> tuple[Any, ...]:
        return self.hardware, tuple(sorted(self.versions.items()))

    def works(self) -> dict[str, list[Row]]:
        """Rows by work, in the order of the files."""
        works: dict[str, list[Row]] = {}
        for row in self.rows:
            works.setdefault(row.work, []).append(row)
        return works

    def named(self) -> str:
        return named(part.path for part in self.parts)


def named(paths: Iterable[Path]) -> str:
    return "benchmark results " + " and ".join(map(str, paths))


def read_machines(paths: Sequence[str | Path], only: Sequence[str] = ()) -> list[Machine]:
    """Read files and join those of the same machine and versions; others stay side by side.

    Args:
        paths: what `pytest bench --benchmark-only --benchmark-json=FILE` wrote.
        only: keep the works that start with one of these; () keeps all.

    Returns:
        One machine per device name, number of threads, dtype and set of versions, in the order of the files.

    Raises:
        ValueError: one sentence on why a file is no such result, on a work that two files of one machine share, or on
            an `only` that no work starts with.
    """
    machines: dict[tuple[Any, ...], Machine] = {}
    for path in paths:
        machine = _read_machine(Path(path))
        there = machines.get(machine.identity)
        machines[machine.identity] = machine if there is None else _join(there, machine)
    return _keep([*machines.values()], only)


def _join(first: Machine, second: Machine) -> Machine:
    (new,) = second.parts
    for part in first.parts:
        shared = next((work for work in second.works() if work in part.works), None)
        if shared is not None:
            raise ValueError(
                f'{named([part.path, new.path])}: both measured "{shared}" on the same machine with the same versions; '
                "files of one machine are joined only if they share no work, two runs are compared by --compare"
            )
    return replace(first, parts=first.parts + second.parts, rows=first.rows + second.rows)


def _keep(machines: list[Machine], only: Sequence[str]) -> list[Machine]:
    for start in only:
        if not any(row.work.startswith(start) for machine in machines for row in machine.rows):
            raise ValueError(f'{machines[0].named()}: no work starts with "{start}"')
    if not only:
        return machines
    kept = [replace(m, rows=tuple(row for row in m.rows if row.work.startswith(tuple(only)))) for m in machines]
    return [machine for machine in kept if machine.rows]


def _read_machine(path: Path) -> Machine:
    label = named([path])
    data = _read(label, path)
    entries = [_checked(f"{label}: entry {i}", entry) for i, entry in enumerate(data["benchmarks"])]
    hardware = [_hardware(entry["extra_info"]) for entry in entries]
    for i, other in enumerate(hardware):
        if other != hardware[0]:
            raise ValueError(
                f"{label}: entry {i} was measured on {other}, entry 0 on {hardware[0]}: expected one machine"
            )
    rows = [_row(entry) for entry in entries]
    _refuse_repeated(label, rows)
    facts = entries[0]["extra_info"]
    part = Part(
        path=path,
        date=str(data.get("datetime", "an unknown date"))[:10],
        works=frozenset(row.work for row in rows),
        matmul_gflops=_figure(facts.get("matmul_gflops")),
        copy_gbytes=_figure(facts.get("copy_gbytes")),
    )
    versions = facts.get("versions") if isinstance(facts.get("versions"), dict) else {}
    return Machine(
        hardware=hardware[0],
        versions={name: str(version) for name, version in versions.items()},
        parts=(part,),
        rows=tuple(rows),
    )


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


def _checked(label: str, entry: Any) -> dict[str, Any]:
    """The entry, known to have an implementation and a median."""
    entry = entry if isinstance(entry, dict) else {}
    facts, stats = entry.get("extra_info"), entry.get("stats")
    if not (isinstance(facts, dict) and isinstance(facts.get("implementation"), str)):
        raise ValueError(f'{label} has no "implementation" in its "extra_info": not one of these benchmarks')
    seconds = _figure(stats.get("median")) if isinstance(stats, dict) else None
    if seconds is None or seconds <= 0:
        raise ValueError(f'{label} has no positive "median" in its "stats"')
    return entry


def _hardware(facts: dict[str, Any]) -> Hardware:
    dtype = facts.get("dtype")
    return Hardware(
        name=str(facts.get("device_name", "an unnamed machine")),
        threads=str(facts.get("threads", "?")),
        dtype=dtype if isinstance(dtype, str) else None,
    )


def _row(entry: dict[str, Any]) -> Row:
    facts, stats = entry["extra_info"], entry["stats"]
    names = ("flops", "bytes", "gflops", "fraction_of_matmul", "fraction_of_copy", "peak_memory_bytes", "operations")
    figures = {name: _figure(facts.get(name)) for name in names}
    suffix = f" {facts.get('dtype')} {facts.get('device')}"
    return Row(
        work=str(entry.get("group")).removesuffix(suffix),
        implementation=facts["implementation"],
        seconds=float(stats["median"]),
        quartiles=_quartiles(stats),
        kind=" ".join(str(facts[name]) for name in ("op", "direction") if name in facts),
        shape=_shape(facts.get("shape")),
        **figures,
    )


def _quartiles(stats: dict[str, Any]) -> tuple[float, float] | None:
    low, high = _figure(stats.get("q1")), _figure(stats.get("q3"))
    return (low, high) if low is not None and high is not None and 0 < low <= high else None


def _shape(value: Any) -> dict[str, int] | None:
    is_shape = isinstance(value, dict) and set(value) == {"B", "P", "D"}
    return value if is_shape and all(isinstance(size, int) for size in value.values()) else None


def _figure(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _refuse_repeated(label: str, rows: Sequence[Row]) -> None:
    seen: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rows):
        first = seen.setdefault((row.work, row.implementation), i)
        if first != i:
            raise ValueError(
                f'{label}: entry {i} measures "{row.implementation}" of "{row.work}" again, after entry {first}'
            )
