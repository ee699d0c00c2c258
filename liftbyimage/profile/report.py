"""A profile for a terminal and for programs: tables, JSON, CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from liftbyimage.profile.measure import Part, Profile, Run

NO_FIGURE = "–"


def as_json(profile: Profile) -> str:
    return json.dumps(profile.as_json(), indent=1, allow_nan=False) + "\n"


def as_csv(profile: Profile) -> str:
    """One line per batch size and part, the whole first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["batch", *(field.name for field in fields(Part))])
    for run in profile.runs:
        writer.writerows([run.batch, *asdict(part).values()] for part in (run.whole, *run.parts))
    return text.getvalue()


def headline(run: Run) -> str:
    """What one batch size comes to, in a sentence."""
    slowest = max(run.parts, key=lambda part: part.milliseconds)
    share = 100 * slowest.milliseconds / sum(part.milliseconds for part in run.parts)
    text = f"{milliseconds(run.whole.milliseconds)} ms for {run.batch} crop{'s' if run.batch > 1 else ''}"
    if run.whole.reference_flops and run.whole.flops:
        text += f", with {run.whole.reference_flops / run.whole.flops:.1f}× fewer FLOPs than plain PyTorch executes"
    return f"{text}; {share:.0f} % of the parts' time goes to {slowest.name}."


def provenance(profile: Profile) -> str:
    """Where, when and with what it was measured."""
    software = ", ".join(f"{name} {version}" for name, version in profile.versions.items())
    ceilings = profile.ceilings
    return (
        f"Measured on {profile.date[:10]}: {profile.device_name}, {profile.threads} CPU threads, {profile.device}, "
        f"{profile.dtype}; {software}; matrix product {ceilings.matmul_gflops:.0f} GFLOP/s; "
        f"copy {ceilings.copy_gbytes:.0f} GB/s."
    )


def peer_lines(run: Run) -> list[str]:
    return [
        f"{peer.name}: {peer.why_not}"
        if peer.milliseconds is None or peer.ratio is None
        else f"{peer.name}: {milliseconds(peer.milliseconds)} ms, {peer.ratio:.2f}× ours, outputs equal"
        for peer in run.peers
    ]


COLUMNS = (
    "part",
    "ms",
    "quartiles",
    "MFLOP",
    "plain MFLOP",
    "plain ms",
    "MB moved",
    "of matmul",
    "of copy",
    "peak MB",
    "parameters",
    "operations",
)


NARROW = ("part", "ms", "plain ms", "MFLOP", "of matmul")
WIDE_TERMINAL = 150  # columns of text that the whole table needs


def cells(part: Part) -> list[str]:
    return [
        part.name,
        milliseconds(part.milliseconds),
        f"{milliseconds(part.milliseconds_low)}–{milliseconds(part.milliseconds_high)}",
        f"{part.flops / 1e6:.1f}",
        NO_FIGURE if part.reference_flops is None else f"{part.reference_flops / 1e6:.1f}",
        NO_FIGURE if part.reference_milliseconds is None else milliseconds(part.reference_milliseconds),
        f"{part.bytes / 1e6:.2f}",
        f"{100 * part.of_matmul:.0f} %",
        f"{100 * part.of_copy:.0f} %",
        NO_FIGURE if part.peak_memory_bytes is None else f"{part.peak_memory_bytes / 1e6:.2f}",
        f"{part.parameters:,}",
        str(part.operations),
    ]


def milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def print_profile(console: Console, profile: Profile) -> None:
    """The tables; a narrow terminal gets the columns that matter most."""
    columns = COLUMNS if console.width >= WIDE_TERMINAL else NARROW
    console.print(Text(f"{profile.model}: {provenance(profile)}"))
    for run in profile.runs:
        console.print(Group(Text(), _table(run, columns), Text(headline(run)), *map(Text, peer_lines(run))))


def _table(run: Run, columns: tuple[str, ...]) -> Table:
    table = Table(
        title=f"batch {run.batch}, {run.rounds} rounds", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    chosen = [COLUMNS.index(column) for column in columns]

    def add(values: list[str], style: str | None = None) -> None:
        table.add_row(*(values[i] for i in chosen), style=style)

    for part in run.parts:
        add(cells(part))
    table.add_section()
    add(["unattributed", milliseconds(run.unattributed_ms), *[""] * (len(COLUMNS) - 2)])
    add(cells(run.whole), "bold")
    return table
