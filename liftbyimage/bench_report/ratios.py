"""How many times faster than plain PyTorch: a bar per work, and per machine where there are several."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from liftbyimage.bench_report.palette import FAINT, INK, LINE, MACHINES, ORANGE
from liftbyimage.bench_report.results import Machine
from liftbyimage.bench_report.tables import Line, provenance, summary_lines

INCHES_PER_BAR = 0.19
INCHES_PER_WORK = 0.09
HEADING_LETTERS = 170


def plot_ratios(machines: Sequence[Machine], labels: Sequence[str]) -> Figure:
    """Bars from 1× to each ratio on a logarithmic axis; one machine also shows the fastest way without the library.

    Raises:
        ValueError: no work has both the reference and a liftbyimage row.
    """
    lines = [{line.label: line for line in summary_lines(machine)} for machine in machines]
    works = list(dict.fromkeys(label for of_machine in lines for label in of_machine))
    height = len(works) * (INCHES_PER_WORK + INCHES_PER_BAR * len(machines))
    heading = _heading(machines, labels)
    figure = Figure(figsize=(10.5, height + 1.3 + 0.15 * len(heading)), layout="constrained")
    axes = figure.subplots()
    thickness = 0.74 / len(machines)
    for i, (of_machine, label) in enumerate(zip(lines, labels, strict=True)):
        shown = [(place, of_machine[work]) for place, work in enumerate(works) if work in of_machine]
        places = np.array([place for place, _ in shown]) + (i - (len(machines) - 1) / 2) * thickness
        name = "liftbyimage" if len(machines) == 1 else label
        _draw(
            axes, places, [line for _, line in shown], thickness, MACHINES[i % len(MACHINES)], name, len(machines) == 1
        )
    _dress(axes, works)
    figure.suptitle("\n".join(heading), x=0.01, ha="left", fontsize=8, color=FAINT)
    return figure


def _draw(
    axes: Axes, places: np.ndarray, lines: Sequence[Line], thickness: float, colour: str, name: str, single: bool
) -> None:
    ratios = np.array([line.ratio for line in lines])
    # One machine has colours to spare: what is slower than plain PyTorch stands out.
    slow = (ratios < 1) & single
    for chosen, of_bars, label in ((~slow, colour, name), (slow, ORANGE, None)):
        axes.barh(places[chosen], ratios[chosen] - 1, left=1, height=0.92 * thickness, color=of_bars, label=label)
    others = [line.best_other if single else None for line in lines]
    best = [
        line.reference.seconds / other.seconds if other else np.nan for line, other in zip(lines, others, strict=True)
    ]
    if not np.isnan(best).all():
        style = {"marker": "D", "s": 16, "facecolor": "none", "edgecolor": INK, "linewidth": 0.9, "zorder": 3}
        axes.scatter(best, places, label="the best other way", **style)
    for place, ratio, other in zip(places, ratios, best, strict=True):
        end = np.nanmax([ratio, other, 1])
        text = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 7, "color": INK}
        axes.annotate(f"{ratio:.2f}×", (end, place), **text)


def _dress(axes: Axes, works: Sequence[str]) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 2) * 1.2)  # room for the figure beside the longest bar
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_yticks(range(len(works)), works, fontsize=8, color=INK)
    axes.set_ylim(len(works) - 0.4, -0.6)
    axes.set_xlabel("times as fast as plain PyTorch in the same run", color=INK)
    axes.axvline(1, color=INK, linewidth=0.9)
    axes.grid(True, axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    bars_first = sorted(zip(handles, names, strict=True), key=lambda entry: isinstance(entry[0], PathCollection))
    style = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "frameon": False, "fontsize": 8}
    axes.legend(*zip(*bars_first, strict=True), labelcolor=INK, **style)


def _heading(machines: Sequence[Machine], labels: Sequence[str]) -> list[str]:
    """Provenance without the list of files, in lines that fit the figure."""
    texts = [text.partition(". Joined")[0].rstrip(".") for text in provenance(machines, labels)]
    return [line for text in texts for line in textwrap.wrap(text, HEADING_LETTERS)]
