"""One row of a benchmark: verify, count, weigh, then time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import machine
import pytest
import torch
from event_clock import EVENT_CLOCK, cache_flusher
from machine import DEVICE
from torch import Tensor
from verification import Truth, find_truth, verify
from workload import COMPILED_BOUNDS, TRAINING, Call, Implementation, Step, Workload, build, draw, dtype_name

from liftbyimage.profile import counting

MAX_INPUT_SETS = 64
WARM_UP_CALLS = 3
SECONDS_PER_ROW = 1.5 if DEVICE == "cpu" else 0.5  # a GPU takes less to say the same twice
MIN_ROUNDS, MAX_ROUNDS = 5, 300
AVAILABLE_SHARE = 0.6  # of the free memory that one row may take


def count_flops(step: Step, call: Call) -> int:
    """Floating-point operations of the products in one call, a multiply-add counted as 2."""
    # The counter's hooks refuse leaves as inputs of a module inside torch.autograd.grad.
    no_leaves = Call(tuple(tensor.clone() for tensor in call.inputs), call.cotangents)
    return counting.count_flops(lambda: step(no_leaves))


def count_operations(step: Step, call: Call) -> int:
    """Operations of one call, in forward and backward."""
    with counting.OperationCounter() as counter:
        step(call)
    return counter.count


def peak_memory(step: Step, call: Call) -> int:
    """Bytes allocated at most at one time by one call beyond inputs and weights; its results count."""
    return counting.peak_memory(lambda: step(call), DEVICE)


def saved_for_backward(step: Step, call: Call) -> int:
    """Bytes that forward keeps for backward beyond inputs and weights."""
    given = {t.untyped_storage().data_ptr() for t in (*call.inputs, *step.module.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(call)
    return sum(kept.values())


def rotating_calls(workload: Workload, first: Call) -> list[Call]:
    """Enough sets of inputs that none is still cached when its turn comes again, within the memory there is."""
    wanted = -(-2 * machine.last_level_cache() // first.size())
    affordable = machine.available_memory() // 8 // first.size()
    count = max(2, min(wanted, affordable, MAX_INPUT_SETS))
    if DEVICE == "cuda":  # drawing takes seconds there, and what counts is that the same values lie elsewhere
        return [first, *(first.map(Tensor.clone) for _ in range(count - 1))]
    return [first, *(draw(workload, seed) for seed in range(2, count + 1))]


def take_time(benchmark: Any, step: Step, calls: Sequence[Call]) -> None:
    turns = itertools.cycle(calls)
    rounds = warm_up(step, turns)
    if DEVICE == "cuda":
        take_event_time(benchmark, step, turns, rounds)
    else:
        benchmark.pedantic(step, setup=lambda: ((next(turns),), {}), rounds=rounds)


def warm_up(step: Step, turns: Iterator[Call]) -> int:
    """The number of rounds that fit SECONDS_PER_ROW."""
    for _ in range(WARM_UP_CALLS):
        step(next(turns))
    start = time.perf_counter()
    step(next(turns))
    wanted = SECONDS_PER_ROW / (time.perf_counter() - start)
    return int(min(max(wanted, MIN_ROUNDS), MAX_ROUNDS))


def take_event_time(benchmark: Any, step: Step, turns: Iterator[Call], rounds: int) -> None:
    """Every round starts on an idle GPU with a cache of other data; neither is in its time, which is EVENT_CLOCK's.

    Idle: behind the flush still running, the launches of a short call would be queued for nothing.
    """
    flush = cache_flusher(machine.last_level_cache(), DEVICE)

    def prepared() -> tuple[tuple[Call], dict[str, Any]]:
        flush()
        machine.synchronise()
        return (next(turns),), {}

    benchmark.pedantic(lambda call: EVENT_CLOCK.time(step.launch, call), setup=prepared, rounds=rounds)


class Measurement:
    """The `measure` fixture: verifies, counts, weighs and times one row, or skips it and says why."""

    def __init__(self, benchmark: Any, ceilings: machine.Ceilings, truths: dict[str, Truth]) -> None:
        self.benchmark, self.ceilings, self.truths = benchmark, ceilings, truths

    def __call__(self, workload: Workload, implementation: Implementation) -> None:
        reason = _why_not(workload, implementation)
        if reason is not None:
            pytest.skip(f"{workload.group}, {implementation}: {reason}")
        truth = self._truth_of(workload)
        eager = Step(workload, build(workload, implementation.build, truth.weights))
        step = Step(workload, eager.module, compiled=True) if implementation.compiled else eager
        bounds = workload.bounds or (COMPILED_BOUNDS if implementation.compiled else None)
        verify(truth, step, bounds, implementation.dtype)
        facts = self._facts(workload, implementation, step, truth.call)
        # A compiled module hides its products; they are those of the module it was compiled from.
        facts["flops"] = count_flops(eager, truth.call)
        if not implementation.compiled:
            facts["operations"] = count_operations(eager, truth.call)
        self.record(workload.group, facts)
        if self.benchmark.enabled:
            calls = rotating_calls(workload, truth.call)
            facts["input_sets"] = len(calls)
            try:
                take_time(self.benchmark, step, calls)
            except KeyboardInterrupt:
                self.benchmark.has_error = True  # or pytest-benchmark would save the rounds that there were as a row
                raise
            self.record_rates()
        else:
            self.benchmark(step, truth.call)

    def record(self, group: str, facts: dict[str, Any]) -> None:
        self.benchmark.group = group
        self.benchmark.extra_info = facts

    def record_rates(self) -> None:
        facts, seconds = self.benchmark.extra_info, self.benchmark.stats.stats.median
        facts["gflops"] = facts["flops"] / seconds / 1e9
        facts["fraction_of_matmul"] = facts["gflops"] / self.ceilings.matmul_gflops
        facts["fraction_of_copy"] = facts["bytes"] / seconds / 1e9 / self.ceilings.copy_gbytes

    def _facts(self, workload: Workload, implementation: Implementation, step: Step, call: Call) -> dict[str, Any]:
        setting = workload.setting
        facts = {
            "implementation": implementation.name,
            "op": workload.op,
            "direction": setting.direction,
            "shape": {"B": setting.B, "P": setting.P, "D": setting.D},
            "dtype": dtype_name(),
            **machine.description(self.ceilings),
            "bytes": workload.compulsory_bytes,
            "peak_memory_bytes": peak_memory(step, call),
        }
        if setting.direction == TRAINING and not implementation.compiled:
            facts["saved_bytes"] = saved_for_backward(step, call)
        return facts

    def _truth_of(self, workload: Workload) -> Truth:
        """Rows of a group follow each other, so only the last group's truth is kept."""
        if workload.group not in self.truths:
            self.truths.clear()
            self.truths[workload.group] = find_truth(workload)
        return self.truths[workload.group]


def _why_not(workload: Workload, implementation: Implementation) -> str | None:
    if implementation.compiled and not workload.setting.central:
        return "compiled at the central settings only"
    available = AVAILABLE_SHARE * machine.available_memory()
    if workload.needed_bytes > available:
        return f"needs about {workload.needed_bytes / 1e9:.1f} GB, {available / 1e9:.1f} GB may be taken"
    return implementation.why_not(workload.setting)
