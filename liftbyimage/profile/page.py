"""A profile as one page: roofline, times part by part, FLOPs before and after, ratios to peers, and the table."""

from __future__ import annotations

import html
import math

from liftbyimage.html import asset, page
from liftbyimage.profile.machine import Ceilings
from liftbyimage.profile.measure import Profile, Run
from liftbyimage.profile.report import COLUMNS, cells, headline, milliseconds, peer_lines, provenance

WIDTH, ROW = 760, 20  # px of the drawings, which scale with the page
LABELS = 270  # px left of the bars


def document(profile: Profile, command: str) -> str:
    """The page; `command` is what made it."""
    sections = "".join(_section(i, run, profile.ceilings) for i, run in enumerate(profile.runs))
    body = (
        f"<h1>Profile of {html.escape(profile.model)}</h1>"
        f'<p class="faint">{html.escape(provenance(profile))}<br><code>{html.escape(command)}</code></p>{sections}'
        '<p class="faint">MB moved: what operations read and wrote, as if no cache stood between them. Of matmul, of '
        "copy: fractions of the measured rates of a large matrix product and a large copy. Unattributed: the whole, "
        "timed without looking at parts, less their sum. Plain: the part of the same name in plain PyTorch.</p>"
        '<div id="tip" role="status" hidden></div>'
    )
    data = profile.as_json()
    return page(f"Profile of {profile.model}", body, style=asset("profile.css"), script=asset("profile.js"), data=data)


def _section(index: int, run: Run, ceilings: Ceilings) -> str:
    peers = "".join(f"<li>{html.escape(line)}</li>" for line in peer_lines(run))
    drawings = [
        ("Where the time goes, in order", _waterfall(index, run)),
        ("Roofline", _roofline(index, run, ceilings)),
    ]
    if run.whole.reference_flops is not None:
        drawings.append(("Executed FLOPs: plain PyTorch before, ours after", _flops(index, run)))
    if any(peer.ratio is not None for peer in run.peers):
        drawings.append(("Time of a peer over ours", _ratios(run)))
    figures = "".join(f"<h2>{title}</h2>{drawing}" for title, drawing in drawings)
    return (
        f'<section><h2 class="batch">Batch {run.batch}</h2><p class="headline">{html.escape(headline(run))}</p>'
        f"<ul>{peers}</ul>{figures}<h2>Every part</h2>{_table(index, run)}</section>"
    )


def _table(index: int, run: Run) -> str:
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    rows = [
        f'<tr data-part="{index}:{i}">{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells(part))}</tr>'
        for i, part in enumerate(run.parts)
    ]
    rest = (
        f"<tr><td>unattributed</td><td>{milliseconds(run.unattributed_ms)}</td>{'<td></td>' * (len(COLUMNS) - 2)}</tr>"
    )
    whole = f'<tr class="whole">{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells(run.whole))}</tr>'
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}{rest}{whole}</table></div>'


def _svg(height: float, content: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">{content}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{html.escape(text)}</text>'


def _bar(x: float, y: float, width: float, height: float, kind: str, part: str = "") -> str:
    mark = f' data-part="{part}"' if part else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.8):.1f}" height="{height}" class="{kind}"{mark}/>'


def _waterfall(index: int, run: Run) -> str:
    """Every part begins where the one before ended; below it, thin, what the plain part of that name takes."""
    plain = [part.reference_milliseconds or 0.0 for part in run.parts]
    total = sum(part.milliseconds for part in run.parts)
    longest = max([total, *(p + sum(q.milliseconds for q in run.parts[:i]) for i, p in enumerate(plain))])
    scale, start, content = (WIDTH - LABELS - 70) / longest, 0.0, []
    for i, part in enumerate(run.parts):
        x, y = LABELS + start * scale, i * ROW
        content += [
            _text(LABELS - 8, y + 13, part.name, "end"),
            _bar(x, y + 3, part.milliseconds * scale, 9, "ours", f"{index}:{i}"),
            _bar(x, y + 13, plain[i] * scale, 3, "plain", f"{index}:{i}") if plain[i] else "",
            _text(
                x + max(part.milliseconds, plain[i]) * scale + 5, y + 13, milliseconds(part.milliseconds), kind="faint"
            ),
        ]
        start += part.milliseconds
    content.append(_text(LABELS, len(run.parts) * ROW + 14, "ms; thick: ours, thin: plain PyTorch", kind="faint"))
    return _svg(len(run.parts) * ROW + 22, "".join(content), "Time of every part in order of execution")


def _flops(index: int, run: Run) -> str:
    rows = [(i, part) for i, part in enumerate(run.parts) if part.flops or part.reference_flops]
    longest = max(max(part.flops, part.reference_flops or 0) for _, part in rows)
    scale, content = (WIDTH - LABELS - 130) / longest, []
    for line, (i, part) in enumerate(rows):
        y, before = line * ROW, part.reference_flops or 0
        end = LABELS + max(part.flops, before) * scale
        content += [
            _text(LABELS - 8, y + 13, part.name, "end"),
            _bar(LABELS, y + 3, before * scale, 5, "plain", f"{index}:{i}"),
            _bar(LABELS, y + 9, part.flops * scale, 5, "ours", f"{index}:{i}"),
            _text(end + 5, y + 13, f"{before / 1e6:.0f} → {part.flops / 1e6:.0f} MFLOP", kind="faint"),
        ]
    return _svg(len(rows) * ROW + 6, "".join(content), "FLOPs of every part, before and after")


def _ratios(run: Run) -> str:
    rows = [(peer.name, peer.ratio) for peer in run.peers if peer.ratio is not None]
    scale, content = (WIDTH - LABELS - 60) / max(1.0, *(ratio for _, ratio in rows)), []
    for line, (name, ratio) in enumerate(rows):
        content += [
            _text(LABELS - 8, line * ROW + 13, name, "end"),
            _bar(LABELS, line * ROW + 4, ratio * scale, 11, "ours"),
            _text(LABELS + ratio * scale + 5, line * ROW + 13, f"{ratio:.2f}×", kind="faint"),
        ]
    height = len(rows) * ROW
    content.append(f'<line x1="{LABELS + scale:.1f}" x2="{LABELS + scale:.1f}" y1="0" y2="{height}" class="one"/>')
    return _svg(height + 6, "".join(content), "Time of each peer over ours")


def _roofline(index: int, run: Run, ceilings: Ceilings) -> str:
    """FLOPs per byte moved against GFLOP/s, on logarithmic axes, under the two measured ceilings."""
    dots = [(i, part) for i, part in enumerate(run.parts) if part.flops]
    if not dots:
        return "<p>No part multiplies matrices.</p>"
    height, left, bottom = 360, 60, 320
    intensities = [part.flops / part.bytes for _, part in dots]
    ridge = ceilings.matmul_gflops / ceilings.copy_gbytes
    x_range = _decades(min(*intensities, ridge), max(*intensities, ridge))
    y_range = _decades(min(part.gflops for _, part in dots), ceilings.matmul_gflops * 1.2)

    def x(value: float) -> float:
        return left + (math.log10(value) - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - left - 20)

    def y(value: float) -> float:
        return bottom - (math.log10(value) - y_range[0]) / (y_range[1] - y_range[0]) * (bottom - 14)

    content = []
    for power in range(x_range[0], x_range[1] + 1):
        content += [
            _line(x(10**power), 14, x(10**power), bottom, "grid"),
            _text(x(10**power), 336, _power(power), "middle"),
        ]
    for power in range(y_range[0], y_range[1] + 1):
        content += [
            _line(left, y(10**power), WIDTH - 20, y(10**power), "grid"),
            _text(54, y(10**power) + 4, _power(power), "end"),
        ]
    lowest = max(10 ** x_range[0], 10 ** y_range[0] / ceilings.copy_gbytes)
    content += [
        _line(x(lowest), y(lowest * ceilings.copy_gbytes), x(ridge), y(ceilings.matmul_gflops), "roof"),
        _line(x(ridge), y(ceilings.matmul_gflops), WIDTH - 20, y(ceilings.matmul_gflops), "roof"),
        _text(WIDTH - 22, y(ceilings.matmul_gflops) - 5, f"{ceilings.matmul_gflops:.0f} GFLOP/s", "end", "faint"),
        _text(WIDTH / 2, 354, "FLOPs per byte moved (GFLOP/s upwards)", "middle", "faint"),
    ]
    longest = max(part.milliseconds for _, part in dots)
    for (i, part), intensity in zip(dots, intensities, strict=True):
        radius = 4 + 8 * math.sqrt(part.milliseconds / longest)
        spot = f'cx="{x(intensity):.1f}" cy="{y(part.gflops):.1f}" r="{radius:.1f}"'
        content.append(f'<circle {spot} class="dot" tabindex="0" data-part="{index}:{i}"/>')
    return _svg(height, "".join(content), "Roofline") + '<p class="faint">Larger dots take longer; point at one.</p>'


def _decades(low: float, high: float) -> tuple[int, int]:
    return math.floor(math.log10(low)), math.ceil(math.log10(high))


def _power(power: int) -> str:
    return f"{10**power:g}"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'
