"""Two runs of one machine: what became slower or faster, and what is only noise.

Medians of the same code differ from run to run by far more than the rounds within one run scatter: another process
took a core, or memory lies elsewhere. The runs tell by how much, as they measure what this library does not change:

- *Rulers* are rows of plain PyTorch, the `reference` of every work and, where a work has a liftbyimage row, its other
  ways too; and the two ceilings, the matrix product and the copy. They are never judged.
- The *drift* is the median of the rulers' changes. A change is the logarithm of new over old time.
- The *spread* is what nine of ten rulers keep within around the drift: how far a row moves that nobody changed.

Every other row that both runs have is judged, by two figures:

- its time: the change less the drift, so that a machine that became slower as a whole marks nothing;
- its ratio: the change less that of its work's reference, so that a work measured while the machine was busy marks
  nothing either. A work without a reference has only the first.

The *noise* of a figure is 2·√(spread² + own²), and at least 3 %. own² is the sum of the squared scatters within the
runs, of the row in both and for the ratio of the reference in both too; a scatter is half the logarithm of the upper
over the lower quartile. Twice, because many rows are judged at once, and of the rulers themselves one in ten lies
beyond the spread. A row is slower if each figure exceeds its noise, faster if each lies below minus its noise, and
within noise otherwise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from liftbyimage.bench_report import tables
from liftbyimage.bench_report.results import REFERENCE, Machine, Row, named
from liftbyimage.bench_report.tables import NO_FIGURE, Report, machine_data, provenance, significant

SLOWER, FASTER, NOISE, RULER = "slower", "faster", "noise", "ruler"
WITHIN_SPREAD = 0.9
TIMES = 2.0
SMALLEST = 0.03
COLUMNS = ("work", "implementation", "verdict", "old ms", "new ms", "time", "against plain PyTorch", "noise")

Key = tuple[str, str]  # work, implementation


@dataclass(frozen=True)
class Change:
    """A row that both runs have. Figures are logarithms of new over old; `ratio` is None without a reference."""

    old: Row
    new: Row
    references: tuple[Row, Row] | None
    time: float  # as measured: the drift is still in it
    ratio: float | None
    noise: tuple[float, float]  # of the time, of the ratio
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `gone` and `added` are rows that only the old or only the new run has."""

    old: Machine
    new: Machine
    rulers: int
    drift: float
    spread: float
    changes: Sequence[Change]
    gone: Sequence[Row]
    added: Sequence[Row]

    def marked(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]


def compare(old: Sequence[Machine], new: Sequence[Machine]) -> Comparison:
    """Judge a run by an older one of the same machine, by the rule at the head of this module.

    Raises:
        ValueError: one sentence: several machines, another machine, or no row that both runs have.
    """
    before, after = _only_one(old), _only_one(new)
    if before.hardware != after.hardware:
        raise ValueError(
            f"--compare: {before.named()} was measured on {before.hardware}, {after.named()} on {after.hardware}; "
            "name both as RESULTS to see them side by side"
        )
    then, now = _by_key(before), _by_key(after)
    common = [key for key in now if key in then]
    if not common:
        raise ValueError(f"--compare: {named(p.path for p in (*before.parts, *after.parts))} share no row")
    rulers = [_change(then[key], now[key]) for key in common if _is_ruler(now[key], after)]
    rulers += _ceilings(before, after)
    drift = statistics.median(rulers) if rulers else 0.0
    spread = float(np.quantile([abs(ruler - drift) for ruler in rulers], WITHIN_SPREAD)) if rulers else 0.0
    return Comparison(
        old=before,
        new=after,
        rulers=len(rulers),
        drift=drift,
        spread=spread,
        changes=[_judge(key, then, now, _is_ruler(now[key], after), drift, spread) for key in common],
        gone=[row for key, row in then.items() if key not in now],
        added=[row for key, row in now.items() if key not in then],
    )


def _only_one(machines: Sequence[Machine]) -> Machine:
    if len(machines) != 1:
        files = named(part.path for machine in machines for part in machine.parts)
        raise ValueError(f"--compare: {files} are of {len(machines)} machines or sets of versions; expected one")
    return machines[0]


def _by_key(machine: Machine) -> dict[Key, Row]:
    return {(row.work, row.implementation): row for row in machine.rows}


def _is_ruler(row: Row, machine: Machine) -> bool:
    if row.is_reference:
        return True
    return not row.is_ours and any(other.is_ours for other in machine.works()[row.work])


def _ceilings(old: Machine, new: Machine) -> Iterator[float]:
    """Changes of the ceilings, as if of times; of several parts the median."""
    for name in ("matmul_gflops", "copy_gbytes"):
        rates = [[getattr(part, name) for part in machine.parts] for machine in (old, new)]
        known = [[rate for rate in of_machine if rate] for of_machine in rates]
        if all(known):
            before, after = map(statistics.median, known)
            yield math.log(before / after)


def _judge(key: Key, then: dict[Key, Row], now: dict[Key, Row], is_ruler: bool, drift: float, spread: float) -> Change:
    old, new, reference = then[key], now[key], (key[0], REFERENCE)
    references = (then[reference], now[reference]) if reference in then and reference in now else None
    time = _change(old, new)
    ratio = None if references is None else time - _change(*references)
    own = _scatter(old, new)
    noise = tuple(
        max(SMALLEST, TIMES * math.hypot(spread, scatter))
        for scatter in (own, math.hypot(own, _scatter(*references) if references else 0.0))
    )
    figures = [(time - drift, noise[0]), *([] if ratio is None else [(ratio, noise[1])])]
    verdict = NOISE
    if is_ruler:
        verdict = RULER
    elif all(figure > bound for figure, bound in figures):
        verdict = SLOWER
    elif all(figure < -bound for figure, bound in figures):
        verdict = FASTER
    return Change(old, new, references, time, ratio, noise, verdict)


def _change(old: Row, new: Row) -> float:
    return math.log(new.seconds / old.seconds)


def _scatter(old: Row, new: Row) -> float:
    """Within both runs: half the logarithm of upper over lower quartile, added in squares."""
    halves = [0.5 * math.log(row.quartiles[1] / row.quartiles[0]) for row in (old, new) if row.quartiles]
    return math.hypot(*halves)


def report(comparison: Comparison, summarised: bool = False) -> Report:
    """The comparison to print: every row that both runs have, or only those that are judged."""
    changes = [change for change in comparison.changes if not (summarised and change.verdict == RULER)]
    rows, last = [], None
    for change in changes:
        work = change.new.work
        rows.append(["" if work == last else work, *_cells(change)])
        last = work
    old, new = (provenance([machine])[0] for machine in (comparison.old, comparison.new))
    before = [f"Old: {old}", f"New: {new}", *_other_versions(comparison), _drift(comparison), verdict(comparison)]
    return Report(before, COLUMNS, 3, rows, _only_in_one(comparison))


def chosen_report(machines: Sequence[Machine], comparison: Comparison | None, summarised: bool) -> Report:
    """What there is to print: a comparison, else the machines' rows or one line per work."""
    if comparison is not None:
        return report(comparison, summarised)
    return tables.summary(machines) if summarised else tables.table(machines)


def verdict(comparison: Comparison) -> str:
    """One sentence: how many rows became slower or faster beyond noise."""
    slower, faster, noise = (len(comparison.marked(name)) for name in (SLOWER, FASTER, NOISE))
    return f"Beyond noise, {slower} {_rows(slower)} slower and {faster} faster; {noise} within it."


def _rows(count: int) -> str:
    return "row is" if count == 1 else "rows are"


def _other_versions(comparison: Comparison) -> list[str]:
    then, now = comparison.old.versions, comparison.new.versions
    differing = [name for name in {**then, **now} if name != "liftbyimage" and then.get(name) != now.get(name)]
    if not differing:
        return []
    changed = ", ".join(
        f"{name} {then.get(name, 'absent')} then and {now.get(name, 'absent')} now" for name in differing
    )
    return [f"Versions differ, {changed}: what is measured against plain PyTorch may have changed with them."]


def _drift(comparison: Comparison) -> str:
    if not comparison.rulers:
        return "Nothing in both runs is independent of the library, so that their drift is unknown and taken for none."
    return (
        f"{comparison.rulers} figures that the library does not change (plain PyTorch's rows and the ceilings) took "
        f"{_percent(comparison.drift)} time in the median, and nine of ten lie within "
        f"±{100 * math.expm1(comparison.spread):.0f} % of that."
    )


def _only_in_one(comparison: Comparison) -> list[str]:
    found = []
    for which, rows in (("old", comparison.gone), ("new", comparison.added)):
        if rows:
            works: dict[str, list[str]] = {}
            for row in rows:
                works.setdefault(row.work, []).append(row.implementation)
            listed = "\n".join(f"- {work}: {', '.join(names)}" for work, names in works.items())
            found.append(f"Only in the {which} run:\n\n{listed}")
    return found


def _cells(change: Change) -> list[str]:
    ratios = NO_FIGURE
    if change.references and change.verdict != RULER:
        pairs = zip(change.references, (change.old, change.new), strict=True)
        ratios = " → ".join(f"{reference.seconds / row.seconds:.2f}×" for reference, row in pairs)
    shown = {SLOWER: f"**{SLOWER}**", FASTER: f"**{FASTER}**", NOISE: "", RULER: RULER}
    return [
        change.new.implementation,
        shown[change.verdict],
        significant(1e3 * change.old.seconds),
        significant(1e3 * change.new.seconds),
        _percent(change.time),
        ratios,
        NO_FIGURE if change.verdict == RULER else f"±{100 * math.expm1(change.noise[0]):.0f} %",
    ]


def _percent(change: float) -> str:
    return f"{100 * math.expm1(change):+.1f} %".replace("-", "−")


def as_data(comparison: Comparison, summarised: bool = False) -> dict[str, Any]:
    """The same as plain data; changes are fractions, 0.1 for 10 % more time."""
    rows = [_data(change) for change in comparison.changes if not (summarised and change.verdict == RULER)]
    return {
        "old": machine_data(comparison.old),
        "new": machine_data(comparison.new),
        "rulers": comparison.rulers,
        "drift": math.expm1(comparison.drift),
        "spread": math.expm1(comparison.spread),
        "slower": len(comparison.marked(SLOWER)),
        "faster": len(comparison.marked(FASTER)),
        "rows": rows,
        "only_in_old": [{"work": row.work, "implementation": row.implementation} for row in comparison.gone],
        "only_in_new": [{"work": row.work, "implementation": row.implementation} for row in comparison.added],
    }


def _data(change: Change) -> dict[str, Any]:
    old_reference, new_reference = change.references or (None, None)
    return {
        "work": change.new.work,
        "implementation": change.new.implementation,
        "old_seconds": change.old.seconds,
        "new_seconds": change.new.seconds,
        "time_change": math.expm1(change.time),
        "old_against_reference": old_reference and old_reference.seconds / change.old.seconds,
        "new_against_reference": new_reference and new_reference.seconds / change.new.seconds,
        "noise_of_time": math.expm1(change.noise[0]),
        "noise_of_ratio": math.expm1(change.noise[1]),
        "verdict": change.verdict,
    }
