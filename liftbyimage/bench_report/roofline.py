"""How near each work comes to what the machine can do: arithmetic intensity against rate, under the ceilings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from liftbyimage.bench_report.palette import BLUE, FAINT, GREY, INK, LINE
from liftbyimage.bench_report.results import Machine, Row
from liftbyimage.bench_report.tables import Line, ceilings, summary_lines

PANEL, KEY_COLUMN = 6.4, 4.6  # inches
INCHES_PER_LINE = 0.155
MOST_LINES = 44  # of a column of the key
# Where the number of a point may stand, in points from it: near first.
PLACES = [
    (radius * np.cos(angle), radius * np.sin(angle))
    for radius in (8, 13, 19, 26, 34)
    for angle in np.deg2rad([45, 135, 315, 225, 0, 90, 180, 270])
]


def plot_roofline(machines: Sequence[Machine], labels: Sequence[str]) -> Figure:
    """One panel per machine, its works numbered; plain PyTorch in grey, joined to this library's way of the same work.

    Works without counted products or bytes are left out: pruning, for one, multiplies nothing.

    Raises:
        ValueError: no work of a machine has products and bytes.
    """
    lines = [_with_products(machine) for machine in machines]
    works = list(dict.fromkeys(line.label for of_machine in lines for line in of_machine))
    numbers = {work: i + 1 for i, work in enumerate(works)}
    columns = -(-len(works) // MOST_LINES)
    height = max(PANEL, 0.8 + INCHES_PER_LINE * -(-len(works) // columns))
    figure = Figure(figsize=(PANEL * len(machines) + KEY_COLUMN * columns, height), layout="constrained")
    *panels, key = figure.subplots(1, len(machines) + 1, width_ratios=[PANEL] * len(machines) + [KEY_COLUMN * columns])
    for axes, machine, of_machine, label in zip(panels, machines, lines, labels, strict=True):
        _draw(axes, machine, of_machine)
        axes.set_title(label, fontsize=9, color=INK, loc="left")
    _write_key(key, works, columns)
    figure.draw_without_rendering()  # settles the layout, which the numbers' places depend on
    figure.set_layout_engine("none")
    for axes, of_machine in zip(panels, lines, strict=True):
        _number(axes, of_machine, numbers)
    return figure


def _with_products(machine: Machine) -> list[Line]:
    lines = [line for line in summary_lines(machine) if _point(line.ours)]
    if not lines:
        raise ValueError(f"{machine.named()}: no liftbyimage row has counted products and bytes to draw a roofline of")
    return lines


def _point(row: Row) -> tuple[float, float] | None:
    """FLOP per byte, GFLOP/s."""
    return (row.flops / row.bytes, row.gflops) if row.flops and row.bytes and row.gflops else None


def _draw(axes: Axes, machine: Machine, lines: Sequence[Line]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("FLOP per byte that must be read or written", color=INK)
    axes.set_ylabel("GFLOP/s", color=INK)
    ours = [_point(line.ours) for line in lines]
    pairs = [(_point(line.reference), point) for line, point in zip(lines, ours, strict=True)]
    for reference, point in pairs:
        if reference:
            axes.plot(*zip(reference, point, strict=True), color=GREY, linewidth=0.6, alpha=0.5, zorder=1)
    references = list(dict.fromkeys(reference for reference, _ in pairs if reference))
    if references:
        axes.scatter(*zip(*references, strict=True), s=20, color=GREY, label="plain PyTorch", zorder=2)
    axes.scatter(*zip(*ours, strict=True), s=24, color=BLUE, label="liftbyimage", zorder=3)
    _draw_ceilings(axes, machine, [*references, *ours])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(True, color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    axes.spines[:].set_color(LINE)
    axes.legend(loc="lower right", frameon=False, fontsize=8, labelcolor=INK)


def _draw_ceilings(axes: Axes, machine: Machine, points: Sequence[tuple[float, float]]) -> None:
    """Of every file its own: they are measured anew in every run."""
    intensities, rates = map(np.array, zip(*points, strict=True))
    x = np.geomspace(intensities.min() / 1.6, intensities.max() * 1.6, 200)
    tops = [rates.max()]
    for part in machine.parts:
        if part.matmul_gflops and part.copy_gbytes:
            label = ", ".join(ceilings(part))
            roof = np.minimum(part.matmul_gflops, part.copy_gbytes * x)
            axes.plot(x, roof, color=INK, linewidth=1.1, label=label, zorder=1)
            tops.append(part.matmul_gflops)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(rates.min() / 2, max(tops) * 1.5)


def _write_key(axes: Axes, works: Sequence[str], columns: int) -> None:
    axes.set_axis_off()
    length = -(-len(works) // columns)
    style = {"va": "top", "fontsize": 7, "linespacing": 1.4, "color": INK, "transform": axes.transAxes}
    for column in range(columns):
        left, chosen = column / columns, works[column * length : (column + 1) * length]
        first = column * length + 1
        numbers = "\n".join(str(first + i) for i in range(len(chosen)))
        axes.text(left + 0.05 / columns, 1, numbers, ha="right", **style | {"color": BLUE})
        axes.text(left + 0.07 / columns, 1, "\n".join(chosen), **style)


def _number(axes: Axes, lines: Sequence[Line], numbers: dict[str, int]) -> None:
    """Write each point's number at the first place near it where nothing stands yet."""
    ours = axes.transData.transform([_point(line.ours) for line in lines])
    references = [point for line in lines if (point := _point(line.reference))]
    scale = axes.figure.dpi / 72
    taken = [*ours, *axes.transData.transform(references)] if references else [*ours]  # centres, in pixels
    for line, place in zip(lines, ours, strict=True):
        offset = max(PLACES, key=lambda offset: _room(place + scale * np.array(offset), taken, 11 * scale, offset))
        taken.append(place + scale * np.array(offset))
        _annotate(axes, str(numbers[line.label]), _point(line.ours), offset)


def _room(centre: np.ndarray, taken: Sequence[np.ndarray], enough: float, offset: tuple[float, float]) -> float:
    """How far the nearest neighbour is, where more than enough is not worth going farther."""
    nearest = min(np.hypot(*(centre - other)) for other in taken)
    return min(nearest, enough) - 0.05 * np.hypot(*offset)


def _annotate(axes: Axes, text: str, point: tuple[float, float] | None, offset: tuple[float, float]) -> Annotation:
    arrow = {"arrowstyle": "-", "linewidth": 0.5, "color": FAINT, "shrinkA": 3, "shrinkB": 2}
    style = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 7, "color": BLUE}
    return axes.annotate(text, point, xytext=offset, arrowprops=arrow, **style)
