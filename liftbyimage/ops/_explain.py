"""Which backend serves a call, and why the others do not."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from torch import Tensor

from liftbyimage.ops._dispatch import Backend, select

OPS = (
    "attend_patches",
    "pose_guided_attention",
    "guide_patches",
    "prune_patches",
    "joint_queries",
    "update_joints",
    "sample_context",
    "residual_context",
    "attend_tokens",
    "residual_attention",
    "residual_feed_forward",
)


class BackendStatus(NamedTuple):
    name: str
    serves: bool  # this backend would run the call
    why_not: str | None  # why it cannot, None if it could


def backends_of(op: str) -> tuple[Backend, ...]:
    """The backends of an op, in the order in which they are tried."""
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}")
    # The package exports functions under the modules' names, so the module is fetched by its full path.
    backends: tuple[Backend, ...] = importlib.import_module(f"liftbyimage.ops.{op}").BACKENDS
    return backends


def explain(op: str, *tensors: Tensor) -> list[BackendStatus]:
    """For every backend of `op`: does it serve a call with `tensors`, and if it could not, why.

    Args:
        op: the op's name, for example "pose_guided_attention".
        tensors: the call's tensor arguments in their order.

    Returns:
        One BackendStatus per backend in the order in which they are tried; exactly one `serves`. The environment
        variable LIFTBYIMAGE_BACKEND is honoured.

    Raises:
        ValueError: the op is unknown, no tensor is given, or the demanded backend cannot serve.
    """
    backends = backends_of(op)
    if not tensors:
        raise ValueError("explain: tensors must hold the call's tensor arguments, got none")
    chosen = select(op, backends, None, *tensors)
    return [BackendStatus(backend.name, backend is chosen, backend.why_not(*tensors)) for backend in backends]
