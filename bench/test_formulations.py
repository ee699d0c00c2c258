"""What `formulation="auto"` chooses by counting, against what is measured: every formulation of one layer's attention.

Tokens come factored, once as the embedding gives them (48 channels, one embedding) and once as a pose-guided update
leaves them (48 + 136 channels, an embedding per sample). The row that auto takes is named so.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from machine import DTYPE
from measurement import Measurement
from torch import Tensor, nn
from workload import HEADS, JOINTS, SMOKE, Implementation, Setting, Workload, textbook_memory

from liftbyimage.nn import FactoredPatches, TransformerLayer
from liftbyimage.nn.formulation import AttentionSize, Formulation
from liftbyimage.ops import attend_patches
from liftbyimage.reference.lift_by_image import Layer

SETTINGS = (Setting(8, 3072, 256), Setting(8, 921, 256), Setting(8, 3072, 64))
WIDTHS = {"from the embedding": 48, "after an update": 48 + HEADS * JOINTS}
FORMULATIONS: tuple[Formulation, ...] = ("projected", "absorbed", "factored")


class Plain(Layer):
    """Tokens formed, keys and values projected, fused attention of PyTorch."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting.D, HEADS, mlp_ratio=1.0, dropout=0.0)

    def forward(self, joints: Tensor, channels: Tensor, embedding: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (self.patch_attention.attend(joints, channels @ embedding),)


class Attention(TransformerLayer):
    def __init__(self, setting: Setting, formulation: Formulation, after_update: bool) -> None:
        super().__init__(setting.D, HEADS, mlp_ratio=1.0, dropout=0.0, formulation=formulation)
        self.after_update = after_update

    def forward(self, joints: Tensor, channels: Tensor, embedding: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        patches = FactoredPatches(
            channels, embedding if self.after_update else embedding[0], embedding.new_zeros(self.dim)
        )
        attention, memory = self.patch_attention, self.patch_attention.memory(*self.choose(joints, patches))
        query = memory.rows(attention.query(joints, memory.fold))
        result = attend_patches(query, memory.key, memory.value, scale=attention.scale, need_importance=False)
        return (attention.output(memory.contexts(result.context), memory.unfold, memory.value_bias),)


def workload(setting: Setting, origin: str) -> Workload:
    batch, patches, dim, width = setting.B, setting.P, setting.D, WIDTHS[origin]

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        joints = torch.randn(batch, JOINTS, dim, generator=generator)
        channels = torch.randn(batch, patches, width, generator=generator)
        embedding = torch.randn(1 if width == 48 else batch, width, dim, generator=generator) * width**-0.5
        return joints.to(dtype), channels.to(dtype), embedding.expand(batch, -1, -1).to(dtype)

    return Workload(
        op=f"attention {origin}",
        setting=setting,
        reference=Plain,
        inputs=inputs,
        outputs=("attended",),
        compulsory_bytes=batch * patches * width * DTYPE.itemsize,
        needed_bytes=textbook_memory(setting),
    )


def implementations(setting: Setting, origin: str) -> Iterator[Implementation]:
    after_update, width = origin == "after an update", WIDTHS[origin]
    sample = FactoredPatches(
        torch.empty(setting.B, setting.P, width, device="meta"),
        torch.empty((setting.B, width, setting.D) if after_update else (width, setting.D), device="meta"),
        torch.empty(setting.D, device="meta"),
    )
    auto = AttentionSize(HEADS, JOINTS).cheapest(sample)

    def build(setting: Setting, formulation: Formulation) -> nn.Module:
        return Attention(setting, formulation, after_update)

    yield Implementation("reference", Plain)
    for formulation in sorted(FORMULATIONS, key=lambda formulation: formulation != auto):  # the choice first
        chosen = ", chosen by auto" if formulation == auto else ""
        yield Implementation(
            f"{formulation}{chosen}", lambda setting, formulation=formulation: build(setting, formulation)
        )


def rows(config: pytest.Config) -> Iterator[object]:
    settings = (Setting(2, **SMOKE),) if config.getoption("smoke") else SETTINGS
    for setting in settings:
        for origin in WIDTHS:
            for implementation in implementations(setting, origin):
                yield pytest.param(setting, origin, implementation, id=f"{setting}-{origin}-{implementation}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("size, origin, implementation", list(rows(metafunc.config)))


def test_formulations(measure: Measurement, size: Setting, origin: str, implementation: Implementation) -> None:
    measure(workload(size, origin), implementation)
