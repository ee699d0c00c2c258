"""What became of the parts of `make gpu`, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PASSED, FAILED, NOT_RUN, OUT_OF_TIME = "passed", "failed", "NOT RUN", "out of time"


@dataclass(frozen=True)
class Outcome:
    part: str
    result: str
    seconds: float
    notes: Sequence[str]  # sentences: why it is not passed, what it left out

    @property
    def is_bad(self) -> bool:
        return self.result in (FAILED, OUT_OF_TIME)


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line per part, and under it what there is to say of it."""
    lines = [f"{'part':10}{'result':13}seconds"]
    for outcome in outcomes:
        lines.append(f"{outcome.part:10}{outcome.result:13}{outcome.seconds:7.0f}")
        lines += [f"{'':10}{note}" for note in outcome.notes]
    return "\n".join(lines)
