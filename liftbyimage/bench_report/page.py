"""A report as one page: its paragraphs and table, and the figures as inline SVG that follows light and dark."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from liftbyimage.bench_report.palette import PAPER, VARIABLES
from liftbyimage.bench_report.plots import draw, svg
from liftbyimage.bench_report.results import Machine
from liftbyimage.bench_report.scaling import scales
from liftbyimage.bench_report.tables import Report
from liftbyimage.html import asset, page, write_page

TITLES = {
    "ratios": "Against plain PyTorch",
    "roofline": "Under the ceilings of the machine",
    "scaling": "How time grows with each size",
}


def write(path: Path, report: Report, machines: Sequence[Machine], labels: Sequence[str]) -> None:
    write_page(path, document(report, machines, labels))


def document(report: Report, machines: Sequence[Machine], labels: Sequence[str]) -> str:
    """The page; a figure that the results cannot give is left out with the reason in its place."""
    scaled = len(machines) == 1 and scales(machines[0])
    names = ["ratios", "roofline", *(["scaling"] if scaled else [])]
    figures = [_figure(name, machines, labels) for name in names]
    body = ["<h1>Measured</h1>", *map(_paragraph, report.before), *figures, "<h2>Rows</h2>", _table(report)]
    body += map(_paragraph, report.after)
    return page("liftbyimage: measured", "\n".join(body), style=asset("bench_report.css"))


def _paragraph(text: str) -> str:
    """A paragraph of a report; a list keeps its lines."""
    return f"<p class='text'>{html.escape(text)}</p>"


def _table(report: Report) -> str:
    words = report.labels
    head = "".join(f"<th{_word(i < words)}>{html.escape(column)}</th>" for i, column in enumerate(report.columns))
    rows = "\n".join(
        "<tr>" + "".join(f"<td{_word(i < words)}>{_cell(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in report.rows
    )
    return f"<div class='scroll panel'><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"


def _word(is_word: bool) -> str:
    return " class='word'" if is_word else ""


def _cell(text: str) -> str:
    """A cell; what is bold in Markdown is a mark with the word's class."""
    bold = re.fullmatch(r"\*\*(\w+)\*\*", text)
    return f"<strong class='{bold[1]}'>{bold[1]}</strong>" if bold else html.escape(text)


def _figure(name: str, machines: Sequence[Machine], labels: Sequence[str]) -> str:
    try:
        drawing = _inline(svg(draw(name, machines, labels)).decode())
    except ValueError as error:
        drawing = f"<p class='faint'>{html.escape(str(error))}</p>"
    return f"<h2>{TITLES[name]}</h2>\n<div class='scroll panel figure' id='{name}'>{drawing}</div>"


def _inline(document: str) -> str:
    """The <svg> element alone, its colours the page's variables and its ground the panel's."""
    drawing = document[document.index("<svg") :]
    for colour, variable in (VARIABLES | {PAPER: "--panel", "#000000": "--ink"}).items():
        drawing = drawing.replace(colour, f"var({variable})")
    return drawing
