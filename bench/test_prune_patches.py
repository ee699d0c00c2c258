"""Adaptive feature selection at retention 0.3: select, then gather; backward scatters the rows back.

The reference is what the plain lifter does: `topk`, sort the indices, gather. The definition in `ops` costs more than
that, because it also promises what happens with ties and NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from machine import DTYPE
from measurement import Measurement
from serving import serving_backends
from torch import Tensor, nn
from workload import TRAINING, Implementation, Setting, Workload

from liftbyimage import ops

RETENTION = 0.3


class TopkAndGather(nn.Module):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.keep = ops.keep_count(setting.P, RETENTION)

    def forward(self, patches: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        index = importance.detach().topk(self.keep, dim=1).indices.sort(dim=1).values  # [B, K]
        return patches.gather(1, index[:, :, None].expand(-1, -1, patches.shape[2])), index


class Prune(nn.Module):
    def __init__(self, setting: Setting, backend: str) -> None:
        super().__init__()
        self.keep = ops.keep_count(setting.P, RETENTION)
        self.backend = backend

    def forward(self, patches: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        return ops.prune_patches(patches, importance, self.keep, backend=self.backend)


def _prune(backend: str) -> Callable[[Setting], nn.Module]:
    return lambda setting: Prune(setting, backend)


IMPLEMENTATIONS = [
    Implementation("reference", TopkAndGather),
    Implementation("torch.compile", TopkAndGather, compiled=True),
    Implementation("definition in PyTorch", _prune("reference")),
    *(Implementation(f"liftbyimage {backend}", _prune(backend)) for backend in serving_backends("prune_patches")),
]


def workload(setting: Setting) -> Workload:
    batch, patches, dim = setting.B, setting.P, setting.D
    keep = ops.keep_count(patches, RETENTION)

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        tokens = torch.randn(batch, patches, dim, generator=generator).to(dtype)
        return tokens, torch.randn(batch, patches, generator=generator).softmax(dim=1)  # as an attention gives it

    kept_rows, index = batch * keep * dim * DTYPE.itemsize, batch * keep * 8
    forward = batch * patches * 4 + 2 * kept_rows + index
    backward = kept_rows + index + batch * patches * dim * DTYPE.itemsize
    return Workload(
        op="prune_patches",
        setting=setting,
        reference=TopkAndGather,
        inputs=inputs,
        outputs=("patches", "index"),
        cotangents={"patches": (batch, keep, dim)},
        compulsory_bytes=forward + (backward if setting.direction == TRAINING else 0),
        needed_bytes=4 * batch * patches * dim * DTYPE.itemsize,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_prune_patches(measure: Measurement, setting: Setting, implementation: Implementation) -> None:
    measure(workload(setting), implementation)
