"""Tables in Markdown files that are made of stored results, so that nobody types a number.

A block lies between two lines of its own; the first says what it is made of, files relative to the Markdown file:

    <!-- measured:begin bench/results/cpu-2-cores/2026-11-20.json summary -->
    <!-- measured:end -->

After `measured:begin` come one or more results, and in any order `summary` (one line per work), `only=START` (the works
that start so; may be repeated, quoted where it holds spaces) and `compare=OLD.json` (may be repeated for the parts of a
run). What lies between the two lines is what `liftbyimage bench-report` prints for the same.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from liftbyimage._files import require_file, write_atomically
from liftbyimage.bench_report import compare as comparing
from liftbyimage.bench_report.results import read_machines
from liftbyimage.bench_report.tables import Report

_BEGIN = re.compile(r"<!-- measured:begin (?P<source>.*) -->\s*")
_END = re.compile(r"<!-- measured:end -->\s*")


def update(path: str | Path) -> int:
    """Rewrite the blocks of a Markdown file in place; how many of them changed.

    Raises:
        ValueError: one sentence on a file without blocks, a block that does not end, or one that cannot be made.
    """
    path = Path(path)
    require_file(f"--update {path}", path)
    old = path.read_text(encoding="utf-8")
    new, changed = renew(old, path)
    if changed:
        write_atomically(path, lambda file: file.write(new.encode()))
    return changed


def renew(text: str, path: Path) -> tuple[str, int]:
    """The text of the Markdown file `path` with its blocks made anew, and how many differ from before."""
    lines = text.splitlines(keepends=True)
    fresh: list[str] = []
    blocks = changed = place = 0
    while place < len(lines):
        begin = _BEGIN.fullmatch(lines[place])
        fresh.append(lines[place])
        place += 1
        if begin is None:
            continue
        label = f"{path}, line {place}"
        end = _end_of_block(label, lines, place)
        content = _content(label, begin["source"], path.parent) + "\n"
        fresh.append(content)
        changed += content != "".join(lines[place:end])
        blocks += 1
        place = end
    if not blocks:
        raise ValueError(f"{path}: has no block that starts with <!-- measured:begin RESULTS.json -->")
    return "".join(fresh), changed


def _end_of_block(label: str, lines: list[str], start: int) -> int:
    for place in range(start, len(lines)):
        if _END.fullmatch(lines[place]):
            return place
        if _BEGIN.fullmatch(lines[place]):
            break
    raise ValueError(f"{label}: the block has no line <!-- measured:end -->")


def _content(label: str, source: str, folder: Path) -> str:
    try:
        words = shlex.split(source)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    options = {"only": [], "compare": []}
    files, summarised = [], False
    for word in words:
        key, equals, value = word.partition("=")
        if word == "summary":
            summarised = True
        elif equals and key in options:
            options[key].append(value)
        elif word.endswith(".json"):
            files.append(folder / word)
        else:
            raise ValueError(f"{label}: expected RESULTS.json, summary, only=START or compare=OLD.json, got {word}")
    if not files:
        raise ValueError(f"{label}: names no RESULTS.json")
    try:
        old = [folder / name for name in options["compare"]]
        return make_report(files, summarised, options["only"], old).markdown()
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


def make_report(files: list[Path], summarised: bool, only: list[str], old: list[Path]) -> Report:
    """The report of results, or of their comparison with `old` where that names any."""
    machines = read_machines(files, only)
    comparison = comparing.compare(read_machines(old, only), machines) if old else None
    return comparing.chosen_report(machines, comparison, summarised)
