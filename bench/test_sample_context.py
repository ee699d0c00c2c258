"""Image context about joints: what a context block reads from the four maps of a frozen HRNet-w32 backbone.

Three groups: the sampling alone; with the projection of what was sampled, where the published order projects every
sample and then weighs and sums; and the whole first half of a context block, from tokens to tokens. There are no
patches here: P is 0, D the width of the tokens. Maps are channels-last and, as the backbone is frozen, get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from machine import DTYPE
from measurement import Measurement
from serving import serving_backends
from torch import Tensor, nn
from torch.nn import functional as F
from workload import FORWARD, JOINTS, TRAINING, Implementation, Setting, Workload

from liftbyimage import ops

MAPS = ((32, 64, 48), (64, 32, 24), (128, 16, 12), (256, 8, 6))  # [C, Hf, Wf] of HRNet-w32
LEVELS, HEADS, SAMPLES, DIM = len(MAPS), 4, 4, 128
PLACES = HEADS * SAMPLES


def read(feature_map: Tensor, places: Tensor) -> Tensor:
    """[B, J, H · S, C] at places [B, J, H · S, 2]"""
    sampled = F.grid_sample(feature_map, places, padding_mode="border", align_corners=True)
    return sampled.permute(0, 2, 3, 1)


class PerLevel(nn.Module):
    """One grid_sample for each level, then the weighted sums."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()

    def forward(self, reference: Tensor, offsets: Tensor, weights: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        places = (reference[:, None, :, None, None] + offsets).flatten(3, 4)
        samples = [read(m, places[:, level]).unflatten(2, (HEADS, SAMPLES)) for level, m in enumerate(maps)]
        return tuple((weights[:, level, ..., None] * s).sum(3) for level, s in enumerate(samples))


class Sampled(PerLevel):
    """The op."""

    def __init__(self, setting: Setting, backend: str) -> None:
        super().__init__(setting)
        self.backend = backend

    def forward(self, reference: Tensor, offsets: Tensor, weights: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.sample_context(maps, reference, offsets, weights, backend=self.backend))


class Published(nn.Module):
    """The published order: sample, project every sample, weigh by a softmax, sum."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.embed_proj = nn.ModuleList([nn.Linear(channels, DIM // HEADS) for channels, _, _ in MAPS])

    def forward(self, reference: Tensor, offsets: Tensor, logits: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        places = (reference[:, None, :, None, None] + offsets).flatten(3, 4)
        return (self.gathered(places, logits.softmax(4), maps),)

    def gathered(self, places: Tensor, weights: Tensor, maps: tuple[Tensor, ...]) -> Tensor:
        """[B, L, J, D]"""
        projected = [
            embed(read(feature_map, places[:, level]).contiguous())
            for level, (feature_map, embed) in enumerate(zip(maps, self.embed_proj, strict=True))
        ]
        stacked = torch.stack(projected, dim=1).unflatten(3, (HEADS, SAMPLES))  # [B, L, J, H, S, D / H]
        return (weights[..., None] * stacked).sum(4).flatten(3)


class SummedFirst(Published):
    """The op, and a projection of the sums."""

    def __init__(self, setting: Setting, backend: str) -> None:
        super().__init__(setting)
        self.backend = backend

    def forward(self, reference: Tensor, offsets: Tensor, logits: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        contexts = ops.sample_context(maps, reference, offsets, logits.softmax(4), backend=self.backend)
        projected = [embed(context).flatten(2) for context, embed in zip(contexts, self.embed_proj, strict=True)]
        return (torch.stack(projected, dim=1),)


class PublishedHalf(Published):
    """A context block up to its feed-forward, in the published order."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.norm1 = nn.LayerNorm(DIM)
        self.attention_weights = nn.Linear(DIM, PLACES)
        self.sampling_offsets = nn.Linear(DIM, 2 * PLACES)

    def forward(self, tokens: Tensor, pose: Tensor, reference: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        asking = self.norm1(tokens + pose[:, None])
        weights = self.attention_weights(asking).unflatten(3, (HEADS, SAMPLES)).softmax(-1)
        places = self.sampling_offsets(asking).unflatten(3, (PLACES, 2)).tanh() + reference[:, None, :, None]
        return (tokens + self.gathered(places, weights, maps),)


class FusedHalf(PublishedHalf):
    """The op, with the same weights."""

    def __init__(self, setting: Setting, backend: str) -> None:
        super().__init__(setting)
        self.backend = backend

    def forward(self, tokens: Tensor, pose: Tensor, reference: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        weights, offsets = self.attention_weights, self.sampling_offsets
        updated = ops.residual_context(
            *(tokens, pose, reference, maps, self.norm1.weight, self.norm1.bias),
            *(weights.weight, weights.bias, offsets.weight, offsets.bias),
            [embed.weight for embed in self.embed_proj],
            [embed.bias for embed in self.embed_proj],
            heads=HEADS,
            backend=self.backend,
        )
        return (updated,)


def _fused(module: Callable[[Setting, str], nn.Module], backend: str) -> Callable[[Setting], nn.Module]:
    return lambda setting: module(setting, backend)


def rows(op: str, reference: type[nn.Module], module: Callable[[Setting, str], nn.Module]) -> list[Implementation]:
    return [
        Implementation("reference", reference),
        Implementation("torch.compile", reference, compiled=True),
        *(Implementation(f"liftbyimage {backend}", _fused(module, backend)) for backend in serving_backends(op)),
    ]


def _maps(batch: int, generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    maps = [torch.randn(batch, *sizes, generator=generator).to(dtype) for sizes in MAPS]
    return [feature_map.to(memory_format=torch.channels_last) for feature_map in maps]


def _map_elements(batch: int) -> int:
    """What must be read of the maps: all, or four cells for every place."""
    return batch * sum(c * min(height * width, 4 * JOINTS * PLACES) for c, height, width in MAPS)


def sampling(setting: Setting, *, projected: bool) -> Workload:
    batch = setting.B

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        reference = torch.rand(batch, JOINTS, 2, generator=generator) * 1.6 - 0.8
        offsets = torch.randn(batch, LEVELS, JOINTS, HEADS, SAMPLES, 2, generator=generator) * 0.2
        logits = torch.randn(batch, LEVELS, JOINTS, HEADS, SAMPLES, generator=generator)
        weights = logits if projected else logits.softmax(4)
        places = (reference.to(dtype), offsets.to(dtype), weights.to(dtype))
        return (*places, *_maps(batch, generator, dtype))

    contexts = {f"context{level}": (batch, JOINTS, HEADS, sizes[0]) for level, sizes in enumerate(MAPS)}
    outputs = {"gathered": (batch, LEVELS, JOINTS, DIM)} if projected else contexts
    written = batch * JOINTS * (LEVELS * DIM if projected else HEADS * sum(sizes[0] for sizes in MAPS))
    elements = _map_elements(batch) + 3 * batch * LEVELS * JOINTS * PLACES + written
    return Workload(
        op="sample_context and projection" if projected else "sample_context",
        setting=setting,
        reference=Published if projected else PerLevel,
        inputs=inputs,
        outputs=tuple(outputs),
        cotangents=outputs,
        compulsory_bytes=(2 if setting.direction == TRAINING else 1) * elements * DTYPE.itemsize,
        needed_bytes=8 * elements * DTYPE.itemsize,
        frozen=range(3, 3 + LEVELS),
    )


def half_block(setting: Setting) -> Workload:
    batch = setting.B

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        tokens = torch.randn(batch, LEVELS, JOINTS, DIM, generator=generator).to(dtype)
        pose = torch.randn(batch, JOINTS, DIM, generator=generator).to(dtype)
        reference = (torch.rand(batch, JOINTS, 2, generator=generator) * 1.6 - 0.8).to(dtype)
        return (tokens, pose, reference, *_maps(batch, generator, dtype))

    elements = _map_elements(batch) + (2 * LEVELS + 1) * batch * JOINTS * DIM
    return Workload(
        op="residual_context",
        setting=setting,
        reference=PublishedHalf,
        inputs=inputs,
        outputs=("tokens",),
        cotangents={"tokens": (batch, LEVELS, JOINTS, DIM)},
        compulsory_bytes=(2 if setting.direction == TRAINING else 1) * elements * DTYPE.itemsize,
        needed_bytes=16 * elements * DTYPE.itemsize,
        # A place that rounding moves over a cell's border has another gradient, though hardly another value.
        bounds={torch.float32: 5e-2, torch.bfloat16: 2.0} if setting.direction == TRAINING else None,
        frozen=range(3, 3 + LEVELS),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    batches = (2,) if metafunc.config.getoption("smoke") else (1, 8, 64)
    settings = [
        Setting(b, 0, DIM, direction, central=b in (2, 8)) for direction in (FORWARD, TRAINING) for b in batches
    ]
    metafunc.parametrize("block", settings, ids=str)


@pytest.mark.parametrize("implementation", rows("sample_context", PerLevel, Sampled), ids=str)
def test_sample_context(measure: Measurement, block: Setting, implementation: Implementation) -> None:
    measure(sampling(block, projected=False), implementation)


@pytest.mark.parametrize("implementation", rows("sample_context", Published, SummedFirst), ids=str)
def test_sample_context_and_projection(measure: Measurement, block: Setting, implementation: Implementation) -> None:
    measure(sampling(block, projected=True), implementation)


@pytest.mark.parametrize("implementation", rows("residual_context", PublishedHalf, FusedHalf), ids=str)
def test_residual_context(measure: Measurement, block: Setting, implementation: Implementation) -> None:
    measure(half_block(block), implementation)
