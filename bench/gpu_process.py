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
        self.now = now
        self.end = now() + seconds
        self.start(1.0)

    def start(self, share: float) -> None:
        """Begin a part, which may take this share of what is left; what it does not take, the others have."""
        self.began = self.now()
        self.granted = share * (self.end - self.began)

    def left(self) -> float:
        """Seconds for the part."""
        return self.began + self.granted - self.now()

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
