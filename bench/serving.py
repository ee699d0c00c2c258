"""Which backends get a row here: all that serve tensors of the machine's device, in the order of choice."""

from __future__ import annotations

import torch
from machine import DEVICE, DTYPE

from liftbyimage.ops._dispatch import Backend
from liftbyimage.ops._explain import backends_of


def serving(op: str) -> list[Backend]:
    """The compiled backends (not the reference) that serve a small tensor of the device and dtype."""
    tensor = torch.zeros(1, 1, 1, 16, device=DEVICE, dtype=DTYPE)
    return [b for b in backends_of(op) if b.forward is not None and b.why_not(tensor) is None]


def serving_backends(op: str) -> list[str]:
    return [backend.name for backend in serving(op)]
