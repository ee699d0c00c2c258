"""Context-Aware PoseFormer's lifter behind HRNet-w32: inference, and the training step (forward and every gradient, no
optimiser).

The reference is the published order of operations in plain PyTorch with the same state dict. The training step is the
published one: stochastic depth rises to 0.2, with the same masks in every row, and the backbone's maps get no gradient.
Maps are channels-last, as an optimised backbone gives them. P counts the pixels of the largest map.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from machine import DEVICE, DTYPE
from measurement import Measurement
from torch import Tensor, nn
from torch.nn import functional as F
from workload import FORWARD, TRAINING, Implementation, Setting, Workload

from liftbyimage.models import ContextAwarePoseFormer, ContextAwarePoseFormerConfig
from liftbyimage.reference import ReferenceContextAwarePoseFormer

LEVELS = 4
# Largest error over twelve blocks beyond twice the reference's, relative to the output's RMS.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
MASKS = 1  # the seed that draws which branches are dropped
SETTINGS = [Setting(batch, 3072, 128, FORWARD, central=batch == 8) for batch in (1, 8, 64)]
SETTINGS += [Setting(batch, 3072, 128, TRAINING, central=batch == 8) for batch in (8, 64)]
SMOKE = [Setting(2, 48, 32, direction, central=True) for direction in (FORWARD, TRAINING)]


def config(setting: Setting) -> ContextAwarePoseFormerConfig:
    return ContextAwarePoseFormerConfig(dim=setting.D)


def _smooth_map(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A map whose neighbours resemble each other, as a network's do: in noise, bfloat16 places read other values."""
    coarse = torch.randn(*shape[:2], *(-(-side // 4) for side in shape[2:]), generator=generator)
    return F.interpolate(coarse, shape[2:], mode="bilinear")


class _Flat:
    """Takes the maps and both poses one after the other, and drops the same branches in every call."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        if self.training:  # type: ignore[attr-defined]
            torch.manual_seed(MASKS)
        return (super().forward(inputs[:LEVELS], *inputs[LEVELS:]),)  # type: ignore[misc]


class Lifter(_Flat, ContextAwarePoseFormer):
    pass


class Reference(_Flat, ReferenceContextAwarePoseFormer):
    def __init__(self, sizes: ContextAwarePoseFormerConfig) -> None:
        super().__init__(sizes)
        nn.init.normal_(self.Spatial_pos_embed)  # it starts at zero

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        if inputs[0].dtype == torch.bfloat16:  # channels-last, F.grid_sample gives NaN there (PyTorch 2.13, CPU)
            inputs = tuple(tensor.contiguous() for tensor in inputs)
        return super().forward(*inputs)


class HalfPrecision(Lifter):
    """The same weights in bfloat16, from float32 inputs on."""

    def __init__(self, sizes: ContextAwarePoseFormerConfig) -> None:
        super().__init__(sizes)
        self.cast: Lifter | None = None

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        if self.cast is None:
            cast = Lifter(self.config).eval()
            cast.load_state_dict(self.state_dict())
            self.cast = cast.bfloat16()
        return self.cast(*(tensor.bfloat16() for tensor in inputs))


def _why_no_half_precision(setting: Setting) -> str | None:
    if DTYPE.itemsize == torch.bfloat16.itemsize:
        return "every row is in half precision"
    return None if setting.direction == FORWARD else "inference only"


IMPLEMENTATIONS = [
    Implementation("reference", lambda setting: Reference(config(setting))),
    Implementation("torch.compile", lambda setting: Reference(config(setting)), compiled=True),
    Implementation("liftbyimage", lambda setting: Lifter(config(setting))),
    Implementation(
        "liftbyimage bfloat16",
        lambda setting: HalfPrecision(config(setting)),
        why_not=_why_no_half_precision,
        dtype=torch.bfloat16,
    ),
]


def workload(setting: Setting) -> Workload:
    sizes = config(setting)
    batch, joints = setting.B, sizes.num_joints
    side = {3072: 16, 48: 2}[setting.P]
    grids = [(max(1, 4 * side >> level), max(1, 3 * side >> level)) for level in range(LEVELS)]

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        maps = [
            _smooth_map((batch, channels, *grid), generator)
            for channels, grid in zip(sizes.channels, grids, strict=True)
        ]
        poses = [torch.rand(batch, joints, 2, generator=generator) * 2 - 1 for _ in range(2)]
        last = [one.to(dtype).contiguous(memory_format=torch.channels_last) for one in maps]
        return *last, *(pose.to(dtype) for pose in poses)

    training = setting.direction == TRAINING
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in ContextAwarePoseFormer(sizes).parameters())
    pixels = sum(channels * grid[0] * grid[1] for channels, grid in zip(sizes.channels, grids, strict=True))
    elements = batch * pixels + weights
    return Workload(
        op="context_aware_poseformer",
        setting=setting,
        reference=lambda setting: Reference(config(setting)),
        inputs=inputs,
        outputs=("pose_3d",),
        cotangents={"pose_3d": (batch, joints, 3)},
        compulsory_bytes=(3 if training else 1) * elements * DTYPE.itemsize,
        needed_bytes=(20 if training else 6) * elements * DTYPE.itemsize,
        bounds=BOUNDS,
        frozen=range(LEVELS),
        coupled=training,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = SMOKE if metafunc.config.getoption("smoke") else SETTINGS
    if DEVICE != "cpu" and not metafunc.config.getoption("smoke"):
        settings = [*settings, *(replace(setting, B=256) for setting in settings if setting.B == 64)]
    metafunc.parametrize("own_setting", settings, ids=str)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_context_aware_poseformer(measure: Measurement, own_setting: Setting, implementation: Implementation) -> None:
    measure(workload(own_setting), implementation)
