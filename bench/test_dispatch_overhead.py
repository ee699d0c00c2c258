"""What the public functions cost around the kernels: checks, choice of backend and autograd, on tiny tensors.

Per op: the plain reference, the bare kernel op, the public function, and the public function with a graph to record.
Every call sees the same cached tensors, because the overhead is what is sought.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import machine
import pytest
import torch
from machine import DEVICE, DTYPE
from measurement import Measurement
from serving import serving_backends
from torch import Tensor
from workload import dtype_name

from liftbyimage import ops
from liftbyimage.ops._explain import OPS, backends_of
from liftbyimage.testing import Case, differentiable, make_inputs

TINY = Case("tiny", B=1, H=1, J=1, P=8, E=8, F=8, D=8, K=2, value_is_key=True)
EPS = 1e-5  # of the layer norms, their default
CALLS_PER_ROUND = 200
ROUNDS = 30
REFERENCE, RAW, PUBLIC, RECORDED = "reference", "kernel op", "public function", "public function with autograd"

Inputs = dict[str, Any]


def _bare_arguments(op: str, inputs: Inputs) -> list[Any]:
    """The arguments of the op's kernel: a value that is the key is not passed again."""
    if op == "prune_patches":
        return list(inputs.values())
    if op in ("joint_queries", "update_joints"):
        return [*inputs.values(), EPS]
    if op == "residual_context":
        return [*list(inputs.values())[:-1], None, inputs["heads"], EPS]
    if op == "sample_context":
        return [*list(inputs.values())[:-1], inputs["padding"] == "zeros"]
    if op == "residual_feed_forward":
        return [*inputs.values(), None, EPS, False]
    if op == "residual_attention":
        return [*list(inputs.values())[:-1], None, inputs["heads"], EPS, False]
    if op == "attend_tokens":
        return [inputs["query_key_value"], TINY.H, (TINY.D // TINY.H) ** -0.5]
    query, scale = inputs["query"], TINY.E**-0.5
    if op == "guide_patches":
        return [query, inputs["channels"], scale]
    key = inputs["key"]
    if op == "attend_patches":
        return [query, key, None, scale, False, True]
    return [query, key, None, inputs["pose_value"], inputs["patches"], scale]


def _call(op: str, kind: str, backend: str, inputs: Inputs) -> Callable[[], Any]:
    if kind == RAW:
        forward = next(b.forward for b in backends_of(op) if b.name == backend)
        assert forward is not None
        arguments = _bare_arguments(op, inputs)
        return lambda: forward(*arguments)
    public = getattr(ops, op)
    name = "reference" if kind == REFERENCE else backend
    return lambda: public(**inputs, backend=name)


def _listed(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs


def _rows() -> list[Any]:
    rows = []
    for op in OPS:
        rows.append(pytest.param(op, REFERENCE, "reference", id=f"{op}-{REFERENCE}"))
        for backend in serving_backends(op):
            kinds = (RAW, PUBLIC, RECORDED)
            rows += [pytest.param(op, kind, backend, id=f"{op}-{backend}-{kind}") for kind in kinds]
    return rows


@pytest.mark.parametrize("op, kind, backend", _rows())
def test_dispatch_overhead(measure: Measurement, op: str, kind: str, backend: str) -> None:
    inputs = make_inputs(op, TINY, DTYPE, DEVICE)
    if kind == RECORDED:
        inputs = differentiable(inputs, DTYPE)
    call = _call(op, kind, backend, inputs)
    expected = _listed(getattr(ops, op)(**inputs, backend="reference"))
    for actual, correct in zip(_listed(call()), expected, strict=False):  # a kernel op also returns what backward needs
        if correct is not None:
            torch.testing.assert_close(actual, correct)
    facts = {
        "implementation": kind if kind == REFERENCE else f"{kind} ({backend})",
        "op": op,
        "direction": "call overhead",
        "shape": {"B": TINY.B, "P": TINY.P, "D": TINY.D},
        "dtype": dtype_name(),
        **machine.description(measure.ceilings),
    }
    measure.record(f"{op} call overhead, tiny tensors {dtype_name()} {DEVICE}", facts)

    def timed() -> None:
        call()
        machine.synchronise()

    measure.benchmark.pedantic(timed, rounds=ROUNDS, iterations=CALLS_PER_ROUND, warmup_rounds=2)
