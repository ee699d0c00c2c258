"""The attention of a pose-guided layer, whole: projections, both uses of A, output projections, importance.

Every row maps joints and patches to (attended joints, updated patches, importance) with the same weights. The
reference is the textbook: keys and values projected for all patches, A stored, heads concatenated and projected.
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
from liftbyimage.nn import PoseGuidedLayer
from liftbyimage.ops.attend_patches import statistics_dtype
from liftbyimage.reference.lift_by_image import GuidedLayer

Outputs = tuple[Tensor, Tensor, Tensor]


class Textbook(GuidedLayer):
    """The reference layer's attention."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting.D, HEADS, mlp_ratio=1.0, dropout=0.0, image_feed_forward=False)

    def forward(self, joints: Tensor, patches: Tensor) -> Outputs:  # type: ignore[override]
        attended, attention = self.patch_attention.attend_with_weights(joints, patches)
        return attended, *self.guide(joints, patches, attention)

    def guide(self, joints: Tensor, patches: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        return self.update(joints, patches, attention), attention.mean((1, 2), dtype=statistics_dtype(joints.dtype))

    def update(self, joints: Tensor, patches: Tensor, attention: Tensor) -> Tensor:
        sent = _split(self.pose_value(joints))
        received = (attention.transpose(2, 3) @ sent).transpose(1, 2).flatten(2)  # [B, P, D]
        return patches + self.image_out_proj(received)


class WithMultiheadAttention(Textbook):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.patch_attention = nn.MultiheadAttention(setting.D, HEADS, batch_first=True)

    def forward(self, joints: Tensor, patches: Tensor) -> Outputs:  # type: ignore[override]
        attended, attention = self.patch_attention(
            joints, patches, patches, need_weights=True, average_attn_weights=False
        )
        return attended, *self.guide(joints, patches, attention)


class WithTwoFusedAttentions(Textbook):
    def forward(self, joints: Tensor, patches: Tensor) -> Outputs:  # type: ignore[override]
        query, key, value = self.patch_attention.project(joints, patches)
        result = two_way_attention(query, key, value, _split(self.pose_value(joints)))
        received = result.received.transpose(1, 2).flatten(2)  # [B, P, D]
        importance = result.column_sums.mean(1) / joints.shape[1]
        return self.patch_attention.output(result.context), patches + self.image_out_proj(received), importance


class Absorbed(PoseGuidedLayer):
    """The library's layer: projections folded into the few query rows, then one op over bare tokens."""

    def __init__(self, setting: Setting, backend: str) -> None:
        super().__init__(setting.D, HEADS, mlp_ratio=1.0, dropout=0.0, formulation="absorbed")
        self.backend = backend

    def forward(self, joints: Tensor, patches: Tensor) -> Outputs:  # type: ignore[override]
        attention = self.patch_attention
        memory = attention.memory(patches, "absorbed")
        query, rows = attention.query(joints, memory.fold), self._pose_rows(joints)
        result = ops.pose_guided_attention(
            query, memory.key, memory.value, rows, memory.key, scale=attention.scale, backend=self.backend
        )
        return attention.output(result.context, memory.unfold, memory.value_bias), result.patches, result.importance


def _split(tokens: Tensor) -> Tensor:
    return tokens.unflatten(2, (HEADS, -1)).transpose(1, 2)  # [B, H, J, D / H]


def _absorbed(backend: str) -> Callable[[Setting], nn.Module]:
    return lambda setting: Absorbed(setting, backend)


IMPLEMENTATIONS = [
    Implementation("reference", Textbook),
    Implementation("torch.compile", Textbook, compiled=True),
    Implementation("nn.MultiheadAttention", WithMultiheadAttention),
    Implementation("fused attention twice", WithTwoFusedAttentions, compiled=DEVICE == "cuda", why_not=why_not_two_way),
    Implementation("absorbed in PyTorch", _absorbed("reference")),
    *(
        Implementation(f"liftbyimage {backend}", _absorbed(backend))
        for backend in serving_backends("pose_guided_attention")
    ),
]


def workload(setting: Setting) -> Workload:
    batch, patches, dim = setting.B, setting.P, setting.D

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shapes = ((batch, JOINTS, dim), (batch, patches, dim))
        return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

    # Both inputs and both outputs of the two token sets, the weights, and importance; backward reads tokens and the
    # gradient of the updated ones again and writes the gradient of the tokens.
    tokens, weights = batch * (patches + JOINTS) * dim, 6 * dim * dim
    passes = (5, 3) if setting.direction == TRAINING else (2, 1)
    return Workload(
        op="pose_guided_attention",
        setting=setting,
        reference=Textbook,
        inputs=inputs,
        outputs=("attended", "patches", "importance"),
        cotangents={"attended": (batch, JOINTS, dim), "patches": (batch, patches, dim)},
        compulsory_bytes=(passes[0] * tokens + passes[1] * weights) * DTYPE.itemsize + batch * patches * 4,
        needed_bytes=textbook_memory(setting),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_pose_guided_attention(measure: Measurement, setting: Setting, implementation: Implementation) -> None:
    measure(workload(setting), implementation)
