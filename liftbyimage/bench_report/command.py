"""`liftbyimage bench-report`: what its options mean together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from liftbyimage.bench_report import compare as comparing
from liftbyimage.bench_report import tables
from liftbyimage.bench_report.blocks import update
from liftbyimage.bench_report.results import Machine, read_machines

REGRESSED = 3  # exit code


@dataclass(frozen=True)
class Options:
    """The options of the command as they were written."""

    results: list[Path]
    compare: list[Path]
    only: list[str]
    summary: bool
    json: bool
    plot: Path | None
    figure: str | None
    html: Path | None
    update: list[Path]


def run(options: Options, say: Callable[[str], None], note: Callable[[str], None]) -> int:
    """Do what was asked for; `say` prints a result, `note` what is only for a person. The exit code, 0 or 3.

    Raises:
        ValueError: one sentence on options that do not go together or files that do not serve.
    """
    _check(options)
    if options.update:
        for path in options.update:
            changed = update(path)
            say(f"{path}: {changed or 'no'} {'block' if changed == 1 else 'blocks'} changed.")
        return 0
    machines = read_machines(options.results, options.only)
    comparison = None
    if options.compare:
        comparison = comparing.compare(read_machines(options.compare, options.only), machines)
    written = _write(options, machines, comparison)
    for path in written:
        (note if options.json else say)(f"Wrote {path}.")
    if options.json:
        say(json.dumps(_data(options, machines, comparison), indent=1, allow_nan=False))
    elif not written:
        say(comparing.chosen_report(machines, comparison, options.summary).markdown())
    elif comparison is not None:
        say(comparing.verdict(comparison))
    return REGRESSED if comparison is not None and comparison.marked(comparing.SLOWER) else 0


def _check(options: Options) -> None:
    others = [*options.results, *options.compare, *options.only, options.summary, options.json]
    if options.update and any([*others, options.plot, options.html, options.figure]):
        raise ValueError("--update goes alone: every block of the file names its own results and options")
    if not options.update and not options.results:
        raise ValueError("bench-report: expected RESULTS.json, what `pytest bench --benchmark-json=FILE` wrote")
    if options.figure is not None and options.plot is None:
        raise ValueError("--figure needs --plot, the file to draw into")
    if options.plot is not None:
        from liftbyimage.bench_report import plots

        plots.check(options.figure, options.plot)


def _data(options: Options, machines: list[Machine], comparison: comparing.Comparison | None) -> dict[str, object]:
    if comparison is not None:
        return comparing.as_data(comparison, options.summary)
    return tables.as_data(machines, options.summary)


def _write(options: Options, machines: list[Machine], comparison: comparing.Comparison | None) -> list[Path]:
    """The plot and the page, where asked for. A comparison draws the old run beside the new one."""
    written = []
    if options.plot is not None or options.html is not None:
        from liftbyimage.bench_report import plots

        shown = machines if comparison is None else [comparison.old, comparison.new]
        labels = tables.labels(machines) if comparison is None else ["old", "new"]
        if options.plot is not None:
            plots.save(plots.draw(options.figure, shown, labels), options.plot)
            written.append(options.plot)
        if options.html is not None:
            from liftbyimage.bench_report.page import write

            write(options.html, comparing.chosen_report(machines, comparison, options.summary), shown, labels)
            written.append(options.html)
    return written
