"""Processes that end at a limit, and the time that is left for them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRACE = 10.0  # seconds from the interruption to the end: pytest writes its results then
OUT_OF_TIME = None


class Budget:
    """Seconds for everything, and for the part that runs now."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.total = now, seconds
        self.end = now() + seconds
        self.start(1.0)

    def start(self, share: float, keep: float = 0.0) -> None:
        """Begin a part, which may take this share of everything but must leave `keep` of it."""
        self.began = self.now()
        self.part_end = min(self.began + share * self.total, self.end - keep * self.total)

    def left(self) -> float:
        """Seconds for the part."""
        return self.part_end - self.now()

    def is_over(self) -> bool:
        return self.left() <= 0

    def seconds(self) -> float:
        """Since the part began."""
        return self.now() - self.began


def run(command: Sequence[str | Path], limit: float, environment: Mapping[str, str]) -> int | None:
    """The exit status, or OUT_OF_TIME. Interrupted before the limit and killed at it, with all that it started."""
    grace = min(GRACE, limit / 4)
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(limit - grace)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return OUT_OF_TIME
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End what is left of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
