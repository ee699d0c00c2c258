"""Candidate plans of the Triton attention kernels, compiled without a GPU, beside what the resource model says.

python tests/plan_resources.py              a sample, the same every time, as JSON
python tests/plan_resources.py --every      all of them: half an hour on two cores
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import aot_triton
import cubin
import torch

ARCHITECTURES = (80, 90)
SAMPLE = 31  # one of so many: a prime, so that it walks through kernels, types, widths, candidates and architectures


@dataclass(frozen=True)
class Found:
    """What the compiler says of one launch, and what the model says."""

    kernel: str
    use: str
    candidate: int
    architecture: int
    shared: int  # bytes per block
    shared_by_model: int
    spills: int
    let_through: bool  # where there is memory enough

    def problems(self) -> list[str]:
        found = []
        if self.shared > self.shared_by_model:
            found.append(f"more shared memory than the model says: {self}")
        if self.spills and self.let_through:
            found.append(f"spills: {self}")
        return found


@dataclass(frozen=True)
class Candidate:
    stage: str
    number: int  # in the order of preference
    plan: Any
    work: Any
    launch: aot_triton.Launch


@functools.cache
def candidates() -> list[Candidate]:
    """Every distinct launch of every candidate: bf16 and fp32, one token tensor for all roles or several."""
    aot_triton.load_kernels()
    found: dict[tuple[str, ...], Candidate] = {}
    for dtype, width, shared in itertools.product((torch.bfloat16, torch.float32), (48, 184, 256), (True, False)):
        for name, call in aot_triton.attention_calls(dtype, width, 1, shared).items():
            for candidate in launched(call, f"{name}, {aot_triton.TYPES[dtype]} width {width}"):
                found.setdefault(candidate.launch.identity(), candidate)
    return list(found.values())


def launched(call: Callable[[], object], use: str) -> list[Candidate]:
    """What `call` launches with the first candidate of every stage, the second, and so on until none is left."""
    from aot_kernels import _attention, _attention_plans

    usual, found = _attention.chosen, []
    stages = {kernel: stage for stage, kernels in _attention_plans.KERNELS.items() for kernel in kernels}
    picked: dict[str, tuple[int, Any, Any]] = {}
    number = 0

    def choose(stage: str, work: Any, *_: Any) -> Any:
        plans = _attention_plans.candidates(stage, work)
        position = min(number, len(plans) - 1)
        picked[stage] = (position, plans[position], work)
        return plans[position]

    while True:
        _attention.chosen = choose
        try:
            launches = aot_triton.record_launches(call)
        finally:
            _attention.chosen = usual
        if all(position < number for position, _, _ in picked.values()):
            return found
        number += 1
        for kernel, arguments, keywords in launches:
            options = {key: value for key, value in keywords.items() if key in aot_triton.OPTIONS}
            launch = aot_triton.Launch(kernel, use, "", *aot_triton.specialise(kernel, arguments, keywords), options)
            stage = stages[kernel.__name__.removesuffix("_kernel")]
            found.append(Candidate(stage, *picked[stage], launch))


def compiled(number: int, architecture: int) -> Found:
    """The candidate of that number, as compiled."""
    from aot_kernels import _attention_plans, _resources

    torch.set_num_threads(1)
    candidate = candidates()[number]
    stage, plan, work = candidate.stage, candidate.plan, candidate.work
    kernel = candidate.launch.kernel.__name__.removesuffix("_kernel")
    bound = _resources.shared_bytes(kernel, plan.tiles, work.dtype.itemsize, work.value_is_key, architecture == 90)
    any_memory = _resources.Device(sys.maxsize, warp_groups=architecture == 90)
    binary = aot_triton.compiled(candidate.launch, architecture)
    [usage] = cubin.read(binary.asm["cubin"])
    return Found(
        kernel, candidate.launch.call, candidate.number, architecture, binary.metadata.shared,
        bound, usage.local_accesses, plan in _attention_plans.fitting(stage, work, any_memory),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--every", action="store_true", help="not a sample")
    arguments = parser.parse_args()
    tasks = list(itertools.product(range(len(candidates())), ARCHITECTURES))[:: 1 if arguments.every else SAMPLE]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(compiled, *zip(*tasks, strict=True)))
    json.dump([dataclasses.asdict(one) for one in found], sys.stdout, indent=1)
    sys.exit("\n".join(text for one in found for text in one.problems()) or 0)


if __name__ == "__main__":
    main()
