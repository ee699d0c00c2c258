"""How time grows with each size: a picture of `pytest bench --scaling --benchmark-json=FILE`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter

from liftbyimage.bench_report.palette import COLOURS, LINE
from liftbyimage.bench_report.results import OURS, Machine, Row

AXES = {"B": "batch B", "P": "patches P", "D": "token width D"}
MIN_POINTS = 3


def scales(machine: Machine) -> bool:
    """Whether a size varies enough to be drawn, as in a --scaling run."""
    return bool(_panels(machine))


def plot_scaling(machine: Machine) -> Figure:
    """One row of panels per work and one panel per size: medians on logarithmic axes, with the fitted exponent.

    A panel shows the rows that differ from the most frequent setting in that size alone, if there are at least three.

    Raises:
        ValueError: no size varies.
    """
    panels = _panels(machine)
    if not panels:
        raise ValueError(f"{machine.named()}: no size takes {MIN_POINTS} values: run with --scaling")
    figure = Figure(figsize=(4.2 * len(AXES), 3.6 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), len(AXES), squeeze=False)
    for line, (work, varying) in zip(grid, panels.items(), strict=True):
        for axes, axis in zip(line, AXES, strict=True):
            if axis in varying:
                _draw(axes, axis, varying[axis], work)
            else:
                axes.set_visible(False)
    return figure


def _panels(machine: Machine) -> dict[str, dict[str, list[Row]]]:
    kinds: dict[str, list[Row]] = {}
    for row in _reference_and_ours(machine.rows):
        kinds.setdefault(row.kind, []).append(row)
    return {kind: varying for kind, members in kinds.items() if (varying := _varying(members))}


def _reference_and_ours(rows: Sequence[Row]) -> list[Row]:
    """Of every group the reference and the library's first row."""
    chosen: dict[tuple[str, str], Row] = {}
    for row in rows:
        name = OURS if row.is_ours else row.implementation
        if row.shape is not None and name in COLOURS:
            chosen.setdefault((row.work, name), replace(row, implementation=name))
    return [*chosen.values()]


def _varying(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By axis, the rows at the most frequent values of the two others, where the axis takes enough values."""
    centre = {axis: Counter(row.shape[axis] for row in rows if row.shape).most_common(1)[0][0] for axis in AXES}
    varying = {}
    for axis in AXES:
        members = [
            r for r in rows if r.shape and all(r.shape[other] == centre[other] for other in AXES if other != axis)
        ]
        if len({row.shape[axis] for row in members if row.shape}) >= MIN_POINTS:
            varying[axis] = members
    return varying


def _draw(axes: Axes, axis: str, rows: Sequence[Row], work: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel="median ms")
    sizes: list[int] = []
    for name, colour in COLOURS.items():
        points = sorted(
            (row.shape[axis], 1e3 * row.seconds) for row in rows if row.shape and row.implementation == name
        )
        if points:
            sizes, times = ([*values] for values in zip(*points, strict=True))
            label = f"{name}: {axis}$^{{{exponent(sizes, times):.2f}}}$" if len(points) >= MIN_POINTS else name
            axes.plot(sizes, times, "o-", color=colour, label=label)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.grid(True, color=LINE, linewidth=0.5)
    axes.legend(frameon=False)
    fixed = next(row.shape for row in rows if row.shape)
    axes.set_title(f"{work}, " + ", ".join(f"{other} {fixed[other]}" for other in AXES if other != axis), fontsize=9)


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The e of the power law times ~ sizes ** e, by least squares on logarithms."""
    x, y = ([math.log(value) for value in values] for values in (sizes, times))
    return float(np.polyfit(x, y, 1)[0])
