"""Measuring a pipeline part by part, beside its plain PyTorch twin."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from liftbyimage.models import Pipeline
from liftbyimage.profile import counting, scopes
from liftbyimage.profile.machine import Ceilings, device_name, measure_ceilings, seconds_of, versions
from liftbyimage.profile.parts import REST, PlainPipeline, example_inputs, scopes_of, tensors_of, why_no_twin

SCHEMA = 1
PEERS = ("reference", "compile")
SECONDS_PER_BATCH = 4.0
MIN_ROUNDS, MAX_ROUNDS = 5, 50
# Largest difference from a peer, relative to the largest value, before no ratio is reported.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}


@dataclass(frozen=True)
class Part:
    """One part of a forward pass, or all of it. Times are of one pass; what the twin lacks is None."""

    name: str
    milliseconds: float  # median
    milliseconds_low: float  # first quartile
    milliseconds_high: float  # third quartile
    flops: int  # of products, a multiply-add counted as 2
    bytes: int  # read and written by the operations
    operations: int  # that PyTorch dispatched
    parameters: int  # that were read
    peak_memory_bytes: int | None
    gflops: float  # per second
    of_matmul: float  # fraction of the measured rate of a large matrix product
    of_copy: float  # fraction of the measured rate of a large copy
    reference_flops: int | None
    reference_milliseconds: float | None


@dataclass(frozen=True)
class Peer:
    """The same work done another way in the same run; `why_not` says why it was not timed."""

    name: str
    milliseconds: float | None
    ratio: float | None  # its time over ours
    why_not: str | None


@dataclass(frozen=True)
class Run:
    """One batch size."""

    batch: int
    rounds: int
    whole: Part
    parts: tuple[Part, ...]  # in order of execution
    unattributed_ms: float  # of the whole, measured without looking at parts, less the parts' sum
    peers: tuple[Peer, ...]


@dataclass(frozen=True)
class Profile:
    """What `profile` measured; `asdict` gives plain values, as `profile.json` holds them."""

    schema: int
    model: str
    device: str
    device_name: str
    threads: int
    dtype: str
    date: str  # UTC
    versions: dict[str, str]
    ceilings: Ceilings
    runs: tuple[Run, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def profile(
    pipeline: Pipeline,
    *,
    model: str = "pipeline",
    batches: Sequence[int] = (1,),
    against: Sequence[str] = (),
    crop: tuple[int, int] = (256, 192),
    seconds: float = SECONDS_PER_BATCH,
    small_ceilings: bool = False,
) -> Profile:
    """Measure a pipeline's inference part by part, on its own device and in its own dtype.

    Inputs are random; times do not depend on their values. Every part is counted in one pass (FLOPs by
    `torch.utils.flop_counter` with the ops' registered formulas), timed over several, and compared with the part of
    the same name in the plain PyTorch twin (`liftbyimage.reference`) where there is one.

    Args:
        pipeline: in evaluation mode; what is measured.
        model: what the report calls it.
        batches: batch sizes, each at least 1.
        against: of "reference" (the plain twin) and "compile" (torch.compile of it), which to time in turn with the
            whole; outputs are compared first.
        crop: (height, width) of the crops, px.
        seconds: about how long one batch size is timed.
        small_ceilings: measure the machine's ceilings on small tensors: quick, and of no worth.

    Raises:
        ValueError: a batch size below 1, an unknown peer, a pipeline in training mode, or a pose that is not finite.
    """
    _check(pipeline, batches, against)
    weight = next(pipeline.lifter.parameters())
    device = weight.device.type
    ceilings = measure_ceilings(device, weight.dtype, small_ceilings)
    twin = PlainPipeline(pipeline) if why_no_twin(pipeline.lifter) is None else None
    runs = [_run(pipeline, twin, batch, against, crop, seconds, ceilings, device) for batch in batches]
    return Profile(
        SCHEMA,
        model,
        device,
        device_name(device),
        torch.get_num_threads(),
        str(weight.dtype).removeprefix("torch."),
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions(device),
        ceilings,
        tuple(runs),
    )


def _check(pipeline: Pipeline, batches: Sequence[int], against: Sequence[str]) -> None:
    for batch in batches:
        if batch < 1:
            raise ValueError(f"profile: batch must be at least 1, got {batch}")
    for peer in against:
        if peer not in PEERS:
            raise ValueError(f"profile: against must be of {', '.join(PEERS)}, got {peer!r}")
    if any(module.training for module in pipeline.modules()):
        raise ValueError("profile: pipeline must be in evaluation mode, got training mode; call eval()")


def _run(
    pipeline: Pipeline,
    twin: PlainPipeline | None,
    batch: int,
    against: Sequence[str],
    crop: tuple[int, int],
    seconds: float,
    ceilings: Ceilings,
    device: str,
) -> Run:
    inputs = example_inputs(pipeline, batch, crop)
    ours = _Subject(pipeline, lambda: pipeline(*inputs), device)
    plain = None if twin is None else _Subject(twin, lambda: twin(*inputs), device)
    peers: dict[str, Callable[[], Any]] = {}
    refused = {}
    for name in against:
        try:
            peers[name] = _peer(name, pipeline, twin, inputs)
        except _NotEqual as error:
            refused[name] = str(error)
    rounds = min(max(int(seconds / max(seconds_of(ours.call, device), 1e-9)), MIN_ROUNDS), MAX_ROUNDS)
    subjects = [ours] if plain is None else [ours, plain]
    calls = {"ours": ours.call, **({} if plain is None else {"reference": plain.call}), **peers}
    whole: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):  # in turn, so that a change of the machine's speed meets all alike
        for subject in subjects:
            subject.time_parts()
        for name, call in calls.items():
            whole[name].append(seconds_of(call, device))
    peaks = scopes.peaks(ours.scopes, ours.call, device)
    parts = tuple(_part(name, ours, plain, peaks, ceilings) for name in ours.counts)
    total = _whole(ours, plain, whole, ceilings, device)
    timed = [_peer_row(name, whole[name], whole["ours"]) for name in peers]
    rows = (*timed, *(Peer(name, None, None, reason) for name, reason in refused.items()))
    unattributed = total.milliseconds - sum(part.milliseconds for part in parts)
    return Run(batch, rounds, total, parts, unattributed, tuple(sorted(rows, key=lambda row: against.index(row.name))))


class _Subject:
    """A model, its parts, and what was counted and timed of them."""

    def __init__(self, model: Pipeline | PlainPipeline, call: Callable[[], Any], device: str) -> None:
        self.scopes, self.call, self.device = scopes_of(model), call, device
        if not all(torch.isfinite(value).all() for value in tensors_of(call()).values()):
            raise ValueError("profile: the pose is not finite: the weights are broken")
        self.counts = scopes.count(model, self.scopes, call, REST)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def time_parts(self) -> None:
        for part, seconds in scopes.take_times(self.scopes, self.call, REST, self.device).items():
            self.seconds[part].append(seconds)


class _NotEqual(Exception):
    """Why a peer is not timed."""


def _peer(name: str, pipeline: Pipeline, twin: PlainPipeline | None, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """What to time, once its outputs were compared with ours."""
    if twin is None:
        raise _NotEqual(str(why_no_twin(pipeline.lifter)))
    module = twin if name == "reference" else torch.compile(twin, dynamic=False)
    bound = BOUNDS[inputs[1].dtype]
    try:
        theirs = tensors_of(module(*inputs))
    except Exception as error:  # a compiler that is missing or fails is the peer's affair, and is reported
        raise _NotEqual(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    for key, value in tensors_of(pipeline(*inputs)).items():
        difference = (value - theirs[key]).abs().max().item()
        if not difference <= bound * theirs[key].abs().max().item():
            raise _NotEqual(f"{key} differs by {difference:.2e}; no ratio is reported")
    return lambda: module(*inputs)


def _peer_row(name: str, theirs: list[float], ours: list[float]) -> Peer:
    middle = statistics.median(theirs)
    return Peer(name, 1e3 * middle, middle / statistics.median(ours), None)


def _part(name: str, ours: _Subject, plain: _Subject | None, peaks: dict[str, int], ceilings: Ceilings) -> Part:
    counts, peer = ours.counts[name], None if plain is None else plain.counts.get(name)
    reference = None if plain is None or peer is None else 1e3 * statistics.median(plain.seconds[name])
    return _row(name, ours.seconds[name], [counts], peaks.get(name), ceilings, peer and peer.flops, reference)


def _whole(
    ours: _Subject, plain: _Subject | None, whole: dict[str, list[float]], ceilings: Ceilings, device: str
) -> Part:
    flops = None if plain is None else sum(counts.flops for counts in plain.counts.values())
    reference = None if plain is None else 1e3 * statistics.median(whole["reference"])
    peak = counting.peak_memory(ours.call, device)
    return _row("whole", whole["ours"], list(ours.counts.values()), peak, ceilings, flops, reference)


def _row(
    name: str,
    seconds: list[float],
    counts: list[scopes.Counts],
    peak: int | None,
    ceilings: Ceilings,
    reference_flops: int | None,
    reference_milliseconds: float | None,
) -> Part:
    low, middle, high = statistics.quantiles(seconds, n=4)
    flops, moved = sum(one.flops for one in counts), sum(one.bytes for one in counts)
    weights = set().union(*(one.weights for one in counts))
    gflops = flops / middle / 1e9
    return Part(
        name=name,
        milliseconds=1e3 * middle,
        milliseconds_low=1e3 * low,
        milliseconds_high=1e3 * high,
        flops=flops,
        bytes=moved,
        operations=sum(one.operations for one in counts),
        parameters=sum(size for _, size in weights),
        peak_memory_bytes=peak,
        gflops=gflops,
        of_matmul=gflops / ceilings.matmul_gflops,
        of_copy=moved / middle / 1e9 / ceilings.copy_gbytes,
        reference_flops=reference_flops,
        reference_milliseconds=reference_milliseconds,
    )
