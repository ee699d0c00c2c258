"""The attention and feed-forward halves of a pre-norm block, at the sizes of Context-Aware PoseFormer.

Joint blocks have one sequence of 17 tokens of width 640 per frame, level blocks 17 sequences of 5 tokens of width 128;
the hidden layer is twice as wide. A setting's B counts sequences, its P the tokens of one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from machine import DTYPE
from measurement import Measurement
from serving import serving_backends
from torch import Tensor, nn
from torch.nn import functional as F
from workload import FORWARD, JOINTS, TRAINING, Implementation, Setting, Workload

from liftbyimage import ops
from liftbyimage.reference.context_aware_poseformer import BLOCK_EPS, Attention, Mlp

MLP_RATIO, HEADS = 2, 8


@dataclass(frozen=True)
class Tokens:
    name: str
    sequences: int  # per frame
    length: int
    dim: int

    def __str__(self) -> str:
        return self.name


JOINT_BLOCK = Tokens("joint block", sequences=1, length=JOINTS, dim=640)
LEVEL_BLOCK = Tokens("level block", sequences=JOINTS, length=5, dim=128)


class FeedForward(nn.Module):
    """As plain PyTorch composes it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.mlp = Mlp(dim, MLP_RATIO)

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (tokens + self.mlp(self.norm(tokens)),)


class Fused(FeedForward):
    def __init__(self, dim: int, backend: str) -> None:
        super().__init__(dim)
        self.backend = backend

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        norm, fc1, fc2 = self.norm, self.mlp.fc1, self.mlp.fc2
        updated = ops.residual_feed_forward(
            *(tokens, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias),
            eps=norm.eps,
            backend=self.backend,
        )
        return (updated,)


class SelfAttention(nn.Module):
    """As plain PyTorch composes it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.attn = Attention(dim, HEADS)

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (tokens + self.attn(self.norm(tokens)),)


class WithFusedAttention(SelfAttention):
    """With PyTorch's own fused attention."""

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        parts = self.attn.qkv(self.norm(tokens)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return (tokens + self.attn.proj(attended.transpose(1, 2).flatten(2)),)


class FusedSelfAttention(SelfAttention):
    def __init__(self, dim: int, backend: str) -> None:
        super().__init__(dim)
        self.backend = backend

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        norm, packed, out = self.norm, self.attn.qkv, self.attn.proj
        updated = ops.residual_attention(
            *(tokens, norm.weight, norm.bias, packed.weight, packed.bias, out.weight, out.bias),
            heads=HEADS,
            eps=norm.eps,
            backend=self.backend,
        )
        return (updated,)


def _fused(backend: str) -> Implementation:
    return Implementation(f"liftbyimage {backend}", lambda setting: Fused(setting.D, backend))


IMPLEMENTATIONS = [
    Implementation("reference", lambda setting: FeedForward(setting.D)),
    Implementation("torch.compile", lambda setting: FeedForward(setting.D), compiled=True),
    *(_fused(backend) for backend in serving_backends("residual_feed_forward")),
]


def _fused_attention(backend: str) -> Implementation:
    return Implementation(f"liftbyimage {backend}", lambda setting: FusedSelfAttention(setting.D, backend))


ATTENTIONS = [
    Implementation("reference", lambda setting: SelfAttention(setting.D)),
    Implementation("scaled_dot_product_attention", lambda setting: WithFusedAttention(setting.D)),
    Implementation("torch.compile", lambda setting: SelfAttention(setting.D), compiled=True),
    *(_fused_attention(backend) for backend in serving_backends("residual_attention")),
]


def attention_workload(block: Tokens, frames: int, direction: str) -> Workload:
    own = workload(block, frames, direction)  # as many weights: 4 · D², for a hidden layer twice as wide
    return replace(own, op=f"attention of a {block}", reference=lambda setting: SelfAttention(setting.D))


def workload(block: Tokens, frames: int, direction: str) -> Workload:
    batch = frames * block.sequences
    shape = (batch, block.length, block.dim)
    values, weights = batch * block.length * block.dim, 2 * MLP_RATIO * block.dim**2

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.randn(shape, generator=generator).to(dtype),)

    return Workload(
        op=f"feed-forward of a {block}",
        setting=Setting(batch, block.length, block.dim, direction, central=frames == 8),
        reference=lambda setting: FeedForward(setting.D),
        inputs=inputs,
        outputs=("tokens",),
        cotangents={"tokens": shape},
        # Tokens are read and written; backward also reads the cotangent and the weights, and writes both gradients.
        compulsory_bytes=(3 if direction == TRAINING else 1) * (2 * values + weights) * DTYPE.itemsize,
        needed_bytes=8 * ((2 + 3 * MLP_RATIO) * values + weights) * DTYPE.itemsize,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("direction", [FORWARD, TRAINING])
@pytest.mark.parametrize("frames", [1, 8, 64])
@pytest.mark.parametrize("block", [JOINT_BLOCK, LEVEL_BLOCK], ids=str)
def test_feed_forward(
    measure: Measurement,
    pytestconfig: pytest.Config,
    block: Tokens,
    frames: int,
    direction: str,
    implementation: Implementation,
) -> None:
    if pytestconfig.getoption("smoke") and frames > 1:
        pytest.skip("one size is enough for a smoke test")
    measure(workload(block, frames, direction), implementation)


@pytest.mark.parametrize("implementation", ATTENTIONS, ids=str)
@pytest.mark.parametrize("direction", [FORWARD, TRAINING])
@pytest.mark.parametrize("frames", [1, 8, 64])
@pytest.mark.parametrize("block", [JOINT_BLOCK, LEVEL_BLOCK], ids=str)
def test_attention(
    measure: Measurement,
    pytestconfig: pytest.Config,
    block: Tokens,
    frames: int,
    direction: str,
    implementation: Implementation,
) -> None:
    if pytestconfig.getoption("smoke") and frames > 1:
        pytest.skip("one size is enough for a smoke test")
    measure(attention_workload(block, frames, direction), implementation)
