"""Everything one decoder layer does to its joint tokens, without the attention to patches between the two halves.

Self-attention and the folded queries, then, from given contexts on, output projection and feed-forward. Every row maps
joints [B, J, D] and contexts [B, H, J, D] to (queries, joints) with the weights of one layer, as the absorbed
formulation does. There are no patches here: P is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from machine import DTYPE
from measurement import Measurement
from serving import serving_backends
from torch import Tensor, nn
from torch.nn import functional as F
from workload import CENTRAL, HEADS, JOINTS, SMOKE, TRAINING, Implementation, Setting, Workload

from liftbyimage import ops
from liftbyimage.reference.lift_by_image import Layer

MLP_RATIO = 4


class Composed(Layer):
    """The absorbed layer's joint side as plain PyTorch calls, projections of one input in one product."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting.D, HEADS, MLP_RATIO, dropout=0.0)

    def forward(self, joints: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        own, image = self.self_attention, self.patch_attention
        projected = F.linear(joints, own.in_proj_weight, own.in_proj_bias).chunk(3, dim=2)
        attended = F.scaled_dot_product_attention(*(own.split(part) for part in projected))
        joints = self.norm1(joints + own.output(attended))
        query_weight, key_weight, value_weight = image.in_proj_weight.chunk(3)
        query_bias, _, value_bias = image.in_proj_bias.chunk(3)
        asked = image.split(F.linear(joints, query_weight, query_bias))
        query = asked @ key_weight.unflatten(0, (HEADS, -1))  # [B, H, J, D]
        answer = context @ value_weight.unflatten(0, (HEADS, -1)).transpose(1, 2) + value_bias.unflatten(
            0, (HEADS, 1, -1)
        )
        return query, self.finish(joints, image.output(answer))


class Fused(Composed):
    """The two ops, with the same weights."""

    def __init__(self, setting: Setting, backend: str) -> None:
        super().__init__(setting)
        self.backend = backend

    def forward(self, joints: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        own, image, inner = self.self_attention, self.patch_attention, self.feed_forward
        query_weight, key_weight, value_weight = image.in_proj_weight.chunk(3)
        query_bias, _, value_bias = image.in_proj_bias.chunk(3)
        asked = ops.joint_queries(
            joints,
            own.in_proj_weight,
            own.in_proj_bias,
            own.out_proj.weight,
            own.out_proj.bias,
            self.norm1.weight,
            self.norm1.bias,
            query_weight,
            query_bias,
            key_weight.unflatten(0, (HEADS, -1)),
            heads=HEADS,
            backend=self.backend,
        )
        updated = ops.update_joints(
            asked.joints,
            context,
            value_weight.unflatten(0, (HEADS, -1)).transpose(1, 2),
            value_bias,
            image.out_proj.weight,
            image.out_proj.bias,
            self.norm2.weight,
            self.norm2.bias,
            inner.linear1.weight,
            inner.linear1.bias,
            inner.linear2.weight,
            inner.linear2.bias,
            self.norm3.weight,
            self.norm3.bias,
            backend=self.backend,
        )
        return asked.query, updated


def _fused(backend: str) -> Callable[[Setting], nn.Module]:
    return lambda setting: Fused(setting, backend)


IMPLEMENTATIONS = [
    Implementation("reference", Composed),
    Implementation("torch.compile", Composed, compiled=True),
    *(Implementation(f"liftbyimage {backend}", _fused(backend)) for backend in serving_backends("joint_queries")),
]


def workload(setting: Setting) -> Workload:
    batch, dim = setting.B, setting.D

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shapes = ((batch, JOINTS, dim), (batch, HEADS, JOINTS, dim))
        return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

    # Joints, contexts and the weights of both attentions and of the feed-forward are read, joints and queries written.
    joints, weights = batch * JOINTS * dim, (8 + 2 * MLP_RATIO) * dim * dim
    elements = (2 + 2 * HEADS) * joints + weights
    return Workload(
        op="joint side of a layer",
        setting=setting,
        reference=Composed,
        inputs=inputs,
        outputs=("query", "joints"),
        cotangents={"query": (batch, HEADS, JOINTS, dim), "joints": (batch, JOINTS, dim)},
        compulsory_bytes=(3 if setting.direction == TRAINING else 1) * elements * DTYPE.itemsize,
        needed_bytes=8 * elements * DTYPE.itemsize,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_joint_side(measure: Measurement, setting: Setting, implementation: Implementation) -> None:
    if setting.P not in (CENTRAL["P"], SMOKE["P"]):
        pytest.skip("no patches here: measured once for every batch and width")
    measure(workload(replace(setting, P=0, central=setting.central or setting.B == 1)), implementation)
