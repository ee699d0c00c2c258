"""How rows on a GPU are timed: by CUDA events around the call, with nothing of it in the L2 cache.

pytest-benchmark has no public place for durations that somebody else measured, but its versions 4 and 5 both take a
timer of one's own by a marker: a function whose difference before and after the call is the call's time. `EventClock`
is such a function; it stands still but for what two events measured. Statistics and JSON stay pytest-benchmark's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FLUSHED_CACHES = 2  # that many times the L2 cache is written, so that no line of it outlives the flush


def timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class EventClock:
    """Seconds, a timer for pytest-benchmark: only what `time` runs makes it advance."""

    def __init__(self, make_event: Callable[[], Any] = timing_event) -> None:
        self.make_event = make_event
        self.seconds = 0.0

    def __repr__(self) -> str:
        """What the results name as their timer."""
        return "CUDA events"

    def __call__(self) -> float:
        return self.seconds

    def time(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function`, which need not wait for the GPU; the clock advances from its first work there to its last."""
        start, end = self.make_event(), self.make_event()
        start.record()
        result = function(*args)
        end.record()
        end.synchronize()
        self.seconds += start.elapsed_time(end) / 1e3  # events tell milliseconds
        return result


EVENT_CLOCK = EventClock()


def cache_flusher(cache_bytes: int, device: str) -> Callable[[], object]:
    """A function that writes a buffer larger than the cache."""
    return torch.empty(FLUSHED_CACHES * cache_bytes, dtype=torch.uint8, device=device).zero_
