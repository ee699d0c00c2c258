"""What became of every row of a run: a file of one JSON line per change, whole up to where the run was killed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

DUE, LEFT_OUT = "due", "left out"  # besides pytest's passed, failed and skipped


class State(NamedTuple):
    state: str
    reason: str


class RowStates:
    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, row: str, state: str, reason: str = "") -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"row": row, "state": state, "reason": reason}) + "\n")


def read_states(paths: Iterable[Path]) -> dict[str, State]:
    """The last state of every row in the files, one after the other; a line that was being written is not counted."""
    states = {}
    for path in paths:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        for entry in map(json.loads, lines):
            states[entry["row"]] = State(entry["state"], entry["reason"])
    return states


def not_run(states: dict[str, State]) -> list[str]:
    return [row for row, state in states.items() if state.state in (DUE, LEFT_OUT)]
