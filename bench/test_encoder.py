"""The image encoder alone: HRNet-w32 as plain PyTorch runs it, and as Pipeline.optimize() makes it.

P counts the pixels of the features, D their channels. Where bfloat16 is allowed the optimised encoder may compute in
it; images come, and the reference computes, in the dtype of the row. `--sweep` adds batch 8, and torch.compile of the
plain module, which takes one to two minutes to compile.
"""

from __future__ import annotations

import pytest
import torch
from machine import DTYPE
from measurement import Measurement
from torch import Tensor, nn
from workload import FORWARD, Implementation, Setting, Workload

from liftbyimage.models import HRNet
from liftbyimage.models.optimize import BOUNDS, OptimizedEncoder, optimize_encoder

WIDTH = 32
CROP, SMALL_CROP = (256, 192), (64, 32)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = HRNet(WIDTH)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.encoder.features(images),)


class Optimised(Plain):
    """Optimised on the first images it gets, which are those of the verification."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.made: list[OptimizedEncoder] = []  # in a list, so that its weights are not the module's

    def forward(self, images: Tensor) -> tuple[Tensor]:
        if not self.made:
            made, report = optimize_encoder(self.encoder, images, dtype=self.dtype)
            self.made.append(made)
            print(report)
        return (self.made[0].features(images).to(images.dtype),)


def implementations(allowed: torch.dtype) -> list[Implementation]:
    reference = Implementation("reference", lambda setting: Plain())
    compiled = Implementation("torch.compile", lambda setting: Plain(), compiled=True)
    ours = Implementation("liftbyimage", lambda setting: Optimised(allowed))
    return [reference, compiled, ours] if allowed == DTYPE else [reference, ours]


def workload(batch: int, crop: tuple[int, int], allowed: torch.dtype) -> Workload:
    height, width = crop
    pixels = height * width // HRNet.stride**2

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 3, height, width, generator=generator).to(dtype),)

    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in HRNet(WIDTH).parameters())
    return Workload(
        op="hrnet_w32" if allowed == DTYPE else "hrnet_w32, bfloat16 allowed,",
        setting=Setting(batch, pixels, WIDTH, FORWARD, central=True),
        reference=lambda setting: Plain(),
        inputs=inputs,
        outputs=("features",),
        compulsory_bytes=(weights + batch * (3 * height * width + pixels * WIDTH)) * DTYPE.itemsize,
        # The widest maps have 256 channels at the resolution of the features; weights exist in about five copies.
        needed_bytes=(5 * weights + batch * pixels * 256 * 8) * DTYPE.itemsize,
        bounds={DTYPE: BOUNDS[allowed]},
    )


ROWS = [(allowed, row) for allowed in dict.fromkeys((DTYPE, torch.bfloat16)) for row in implementations(allowed)]


@pytest.mark.parametrize(("allowed", "implementation"), ROWS, ids=str)
@pytest.mark.parametrize("batch", (1, 8))
def test_encoder(
    measure: Measurement,
    pytestconfig: pytest.Config,
    batch: int,
    allowed: torch.dtype,
    implementation: Implementation,
) -> None:
    if not pytestconfig.getoption("sweep") and (batch > 1 or implementation.compiled):
        pytest.skip("with --sweep only")
    crop = SMALL_CROP if pytestconfig.getoption("smoke") else CROP
    measure(workload(batch, crop, allowed), implementation)
