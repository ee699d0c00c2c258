"""Parts of a forward pass: methods that are opened and closed around, and who is open when something happens.

What happens belongs to the innermost open part, so that parts never count anything twice and together make the whole.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from liftbyimage.profile.counting import extra_formulas, memory_events
from liftbyimage.profile.machine import synchronise


@dataclass(frozen=True)
class Scope:
    """One method of one module, and the name of the part that its calls belong to."""

    part: str
    module: nn.Module
    method: str = "forward"


@dataclass
class Counts:
    """What a part executed in one forward pass."""

    flops: int = 0
    bytes: int = 0  # that its operations read and wrote, as if no cache stood between two of them
    operations: int = 0
    weights: set[tuple[int, int]] = field(default_factory=set)  # where parameters lie that were read, and how many

    @property
    def parameters(self) -> int:
        return sum(count for _, count in self.weights)


@contextmanager
def _wrapped(scopes: Sequence[Scope], enter: Callable[[str], Any], leave: Callable[[Any], None]) -> Iterator[None]:
    """Call `enter(part)` before and `leave(what it gave)` after every call of a scope's method."""

    def wrap(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            entered = enter(part)
            try:
                return method(*args, **kwargs)
            finally:
                leave(entered)

        return call

    for scope in scopes:
        scope.module.__dict__[scope.method] = wrap(scope.part, getattr(scope.module, scope.method))
    try:
        yield
    finally:
        for scope in scopes:
            del scope.module.__dict__[scope.method]


class _Count(TorchDispatchMode):
    def __init__(self, model: nn.Module, root: str) -> None:
        super().__init__()
        self.open = [root]
        self.counts: dict[str, Counts] = defaultdict(Counts)
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.formulas = {**flop_registry, **{op: shape_wrapper(f) for op, f in extra_formulas().items()}}

    def enter(self, part: str) -> None:
        self.open.append(part)

    def leave(self, _: None) -> None:
        self.open.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:
            counts = self.counts[self.open[-1]]
            counts.operations += 1
            formula = self.formulas.get(func.overloadpacket)
            if formula is not None:
                counts.flops += formula(*args, **kwargs, out_val=out)
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            counts.bytes += sum(map(_bytes, {id(leaf): leaf for leaf in (*read, *tree_leaves(out))}.values()))
            for leaf in read:
                if leaf.numel() and leaf.untyped_storage().data_ptr() in self.weights:
                    counts.weights.add((leaf.data_ptr(), leaf.numel()))
        return out


def _bytes(leaf: Any) -> int:
    """Of the memory behind a tensor; an expanded one has less than its elements."""
    return min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes()) if isinstance(leaf, Tensor) else 0


def count(model: nn.Module, scopes: Sequence[Scope], call: Callable[[], Any], root: str) -> dict[str, Counts]:
    """What every part executed in one call; what is in no scope belongs to `root`. In order of first execution."""
    mode = _Count(model, root)
    with _wrapped(scopes, mode.enter, mode.leave), mode:
        call()
    return dict(mode.counts)


def take_times(scopes: Sequence[Scope], call: Callable[[], Any], root: str, device: str) -> dict[str, float]:
    """Seconds that every part took in one call, without what other parts took inside it."""
    own: dict[str, float] = defaultdict(float)
    inside = [0.0]  # of each open part, the seconds of parts within it

    def enter(part: str) -> tuple[str, float]:
        synchronise(device)
        inside.append(0.0)
        return part, time.perf_counter()

    def leave(entered: tuple[str, float]) -> None:
        synchronise(device)
        part, start = entered
        took = time.perf_counter() - start
        own[part] += took - inside.pop()
        inside[-1] += took

    with _wrapped(scopes, enter, leave):
        started = enter(root)
        call()
        leave(started)
    return dict(own)


def peaks(scopes: Sequence[Scope], call: Callable[[], Any], device: str) -> dict[str, int]:
    """Bytes allocated at most at one time while a part was open, above what was there when it was opened."""
    highest: dict[str, int] = defaultdict(int)
    if device == "cuda":
        return dict(highest)  # of a GPU the whole pass is measured (`counting.peak_memory`)

    def enter(part: str) -> Any:
        recorded = record_function(f"{_PREFIX}{part}")
        recorded.__enter__()
        return recorded

    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        _wrapped(scopes, enter, lambda recorded: recorded.__exit__(None, None, None)),
    ):
        call()
    assert profiler.profiler is not None
    changes = memory_events(profiler)
    for event in profiler.profiler.kineto_results.events():
        if event.name().startswith(_PREFIX):
            start, end, level = event.start_ns(), event.end_ns(), 0
            for when, change in changes:
                if start <= when <= end:
                    level += change
                    part = event.name().removeprefix(_PREFIX)
                    highest[part] = max(highest[part], level)
    return dict(highest)


_PREFIX = "liftbyimage part: "
