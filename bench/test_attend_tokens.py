"""Self-attention of few tokens from their packed projection, without the projections before and after.

Every row maps query, key and value, packed [B, T, 3D], to [B, T, D]. T is 5 (the levels of a joint: 17 sequences per
sample of Context-Aware PoseFormer) or 17 (joints); the setting's P holds it. The reference stores the attention; the
peer is PyTorch's fused attention with the copies that it makes of heads that do not lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from machine import DEVICE, DTYPE
from measurement import Measurement
from serving import serving_backends
from torch import Tensor, nn
from torch.nn import functional as F
from workload import FORWARD, HEADS, JOINTS, TRAINING, Implementation, Setting, Workload

from liftbyimage import ops

LEVELS = 5
BATCHES = (1, 8, 64) if DEVICE == "cpu" else (1, 256)


class Attend(nn.Module):
    def __init__(self, setting: Setting, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, packed: Tensor) -> tuple[Tensor]:
        return (ops.attend_tokens(packed, heads=HEADS, backend=self.backend),)


class WithFusedAttention(nn.Module):
    def __init__(self, setting: Setting) -> None:
        super().__init__()

    def forward(self, packed: Tensor) -> tuple[Tensor]:
        parts = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in packed.chunk(3, dim=2))
        return (F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2),)


def _why_not_fused(setting: Setting) -> str | None:
    if DEVICE == "cpu" and setting.direction == TRAINING and setting.P == JOINTS:
        return "its gradient is further from float64 than liftbyimage.testing allows"
    return None


def _backend(name: str) -> Callable[[Setting], nn.Module]:
    return lambda setting: Attend(setting, name)


IMPLEMENTATIONS = [
    Implementation("reference", _backend("reference")),
    Implementation("scaled_dot_product_attention", WithFusedAttention, why_not=_why_not_fused),
    Implementation("torch.compile", _backend("reference"), compiled=True),
    *(Implementation(f"liftbyimage {name}", _backend(name)) for name in serving_backends("attend_tokens")),
]


def workload(setting: Setting) -> Workload:
    batch, tokens, dim = setting.B, setting.P, setting.D

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.randn(batch, tokens, 3 * dim, generator=generator).to(dtype),)

    elements = 4 * batch * tokens * dim  # query, key and value are read, the result written
    training = setting.direction == TRAINING
    return Workload(
        op="attend_tokens",
        setting=setting,
        reference=_backend("reference"),
        inputs=inputs,
        outputs=("tokens",),
        cotangents={"tokens": (batch, tokens, dim)},
        compulsory_bytes=(3 if training else 1) * elements * DTYPE.itemsize,
        needed_bytes=10 * (elements + batch * HEADS * tokens**2) * DTYPE.itemsize,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke = metafunc.config.getoption("smoke")
    settings = [
        Setting(batch * sequences, tokens, dim, direction, central=smoke or batch == BATCHES[-1])
        for sequences, tokens, dim in ((1, JOINTS, 640), (JOINTS, LEVELS, 128))
        for batch in ((2,) if smoke else BATCHES)
        for direction in (FORWARD, TRAINING)
    ]
    metafunc.parametrize("sequences", settings, ids=str)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_attend_tokens(measure: Measurement, sequences: Setting, implementation: Implementation) -> None:
    measure(workload(sequences), implementation)
