"""Reading ahead: the next batch is read while the current step runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def prefetch(read: Callable[[Key], Value], keys: Iterable[Key]) -> Iterator[Value]:
    """`read(key)` of every key, in their order, each read in a thread while its predecessor is in use.

    An error of `read` is raised where its value is asked for. Keys are drawn in the caller's thread, one ahead. Closing
    the iterator waits for the read under way and draws no other key.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
        ahead: deque[Future[Value]] = deque()
        for key in keys:
            ahead.append(thread.submit(read, key))
            if len(ahead) == 2:
                yield ahead.popleft().result()
        if ahead:
            yield ahead.popleft().result()
