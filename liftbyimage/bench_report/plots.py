"""The figures of a report, by name, and writing them as PNG or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from liftbyimage._files import write_atomically
from liftbyimage.bench_report.ratios import plot_ratios
from liftbyimage.bench_report.results import Machine
from liftbyimage.bench_report.roofline import plot_roofline
from liftbyimage.bench_report.scaling import plot_scaling, scales

FIGURES = ("ratios", "roofline", "scaling")
FORMATS = (".png", ".svg")


def draw(name: str | None, machines: Sequence[Machine], labels: Sequence[str]) -> Figure:
    """A figure of FIGURES; without a name that of a --scaling run is scaling, that of another ratios.

    Raises:
        ValueError: one sentence: several machines' scaling, or results without what the figure shows.
    """
    if name is None:
        name = "scaling" if len(machines) == 1 and scales(machines[0]) else "ratios"
    if name == "ratios":
        return plot_ratios(machines, labels)
    if name == "roofline":
        return plot_roofline(machines, labels)
    if len(machines) > 1:
        raise ValueError(f"--figure scaling draws one machine, got {len(machines)}")
    return plot_scaling(machines[0])


def check(name: str | None, path: Path) -> None:
    """Refuse an unknown figure or format before anything is read."""
    if name is not None and name not in FIGURES:
        raise ValueError(f"--figure: expected {', '.join(FIGURES)}, got {name}")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--plot {path}: expected a file that ends in {' or '.join(FORMATS)}")


def save(figure: Figure, path: Path) -> None:
    """Write it atomically, in the format of the suffix; the same figure gives the same bytes."""
    data = svg(figure) if path.suffix.lower() == ".svg" else _rendered(figure, "png", dpi=110)
    write_atomically(path, lambda file: file.write(data))


def svg(figure: Figure) -> bytes:
    """As SVG whose text is text."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "liftbyimage"}):
        return _rendered(figure, "svg", metadata={"Date": None})


def _rendered(figure: Figure, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format=format, **options)
    return buffer.getvalue()
