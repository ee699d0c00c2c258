"""Joints query patches, whole: projections, attention with importance, output projection.

Every row maps joints and patches to (attended joints, importance) with the same weights. The reference projects keys
and values for all patches and stores A.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from machine import DEVICE, DTYPE
from measurement import Measurement
from peers import two_way_attention, why_not_two_way
from serving import serving_backends
from torch import Tensor, nn
from workload import HEADS, JOINTS, TRAINING, Implementation, Setting, Workload, textbook_memory

from liftbyimage import ops
from liftbyimage.nn import TransformerLayer
from liftbyimage.ops.attend_patches import statistics_dtype
from liftbyimage.reference.lift_by_image import Layer


class Projected(Layer):
    """The reference layer's attention to patches."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting.D, HEADS, mlp_ratio=1.0, dropout=0.0)

    def forward(self, joints: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        attended, attention = self.patch_attention.attend_with_weights(joints, patches)
        return attended, attention.mean((1, 2), dtype=statistics_dtype(joints.dtype))


class WithMultiheadAttention(Projected):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.patch_attention = nn.MultiheadAttention(setting.D, HEADS, batch_first=True)

    def forward(self, joints: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        attended, attention = self.patch_attention(
            joints, patches, patches, need_weights=True, average_attn_weights=False
        )
        return attended, attention.mean((1, 2), dtype=statistics_dtype(joints.dtype))


class WithTwoFusedAttentions(Projected):
    def forward(self, joints: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        query, key, value = self.patch_attention.project(joints, patches)
        result = two_way_attention(query, key, value, query)
        return self.patch_attention.output(result.context), result.column_sums.mean(1) / joints.shape[1]


class Absorbed(TransformerLayer):
    """The library's layer: projections folded into the few query rows, then one op over bare tokens."""

    def __init__(self, setting: Setting, backend: str) -> None:
        super().__init__(setting.D, HEADS, mlp_ratio=1.0, dropout=0.0, formulation="absorbed")
        self.backend = backend

    def forward(self, joints: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        attention = self.patch_attention
        memory = attention.memory(patches, "absorbed")
        query = attention.query(joints, memory.fold)
        result = ops.attend_patches(query, memory.key, memory.value, scale=attention.scale, backend=self.backend)
        return attention.output(result.context, memory.unfold, memory.value_bias), result.importance


def _absorbed(backend: str) -> Callable[[Setting], nn.Module]:
    return lambda setting: Absorbed(setting, backend)


IMPLEMENTATIONS = [
    Implementation("reference", Projected),
    Implementation("torch.compile", Projected, compiled=True),
    Implementation("nn.MultiheadAttention", WithMultiheadAttention),
    Implementation("fused attention twice", WithTwoFusedAttentions, compiled=DEVICE == "cuda", why_not=why_not_two_way),
    Implementation("absorbed in PyTorch", _absorbed("reference")),
    *(Implementation(f"liftbyimage {backend}", _absorbed(backend)) for backend in serving_backends("attend_patches")),
]


def workload(setting: Setting) -> Workload:
    batch, patches, dim = setting.B, setting.P, setting.D

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shapes = ((batch, JOINTS, dim), (batch, patches, dim))
        return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

    # Tokens are read, with a backward again, and their gradient is written; joints are read and written alike.
    joints, tokens, weights = batch * JOINTS * dim, batch * patches * dim, 4 * dim * dim
    passes = (5, 3, 3) if setting.direction == TRAINING else (2, 1, 1)
    elements = passes[0] * joints + passes[1] * tokens + passes[2] * weights
    return Workload(
        op="attend_patches",
        setting=setting,
        reference=Projected,
        inputs=inputs,
        outputs=("attended", "importance"),
        cotangents={"attended": (batch, JOINTS, dim)},
        compulsory_bytes=elements * DTYPE.itemsize + batch * patches * 4,
        needed_bytes=textbook_memory(setting),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_attend_patches(measure: Measurement, setting: Setting, implementation: Implementation) -> None:
    measure(workload(setting), implementation)
