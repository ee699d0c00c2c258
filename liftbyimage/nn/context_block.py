"""Joint tokens of every level read that level's feature map at learned places about their joint."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from liftbyimage.nn.attention import check_heads
from liftbyimage.nn.token_block import Mlp, draw_branch_scale, feed_forward
from liftbyimage.ops import residual_context, sample_context
from liftbyimage.ops._dispatch import autocast_to_float32, has_kernel
from liftbyimage.ops._residual import add_branch
from liftbyimage.ops.residual_context import BACKENDS


class ContextBlock(nn.Module):
    """levels + what each joint reads from its level's map; then a feed-forward. Levels do not mix.

    Where a kernel serves, the first half is one fused op; else it is composed of `ops.sample_context` and PyTorch's
    layers. Either way samples are weighted and summed before they are projected,
    which their weights' sum of 1 makes exact. Parameters have the published names.

    Args:
        dim: token width D, a multiple of `heads`.
        channels: C_l of each level's map.
        samples: S, places per head.
        drop_path: in training, the probability with which a sample of the batch skips a branch.

    Source: Q. Zhao, C. Zheng, M. Liu, C. Chen, "A Single 2D Pose with Context is Worth Hundreds for 3D Human Pose
    Estimation", NeurIPS 2023.
    """

    def __init__(
        self,
        dim: int,
        channels: Sequence[int],
        heads: int = 4,
        samples: int = 4,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads, self.samples, self.drop_path = heads, samples, drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.attention_weights = nn.Linear(dim, heads * samples)
        self.sampling_offsets = nn.Linear(dim, 2 * heads * samples)
        self.embed_proj = nn.ModuleList([nn.Linear(width, dim // heads) for width in channels])
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self._look_around()

    @torch.no_grad()
    def _look_around(self) -> None:
        """Start with equal weights and offsets that grow sample by sample, each head in its own direction."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)  # [H, 2]
        directions /= directions.abs().amax(dim=1, keepdim=True)
        steps = 0.01 * torch.arange(1, self.samples + 1)  # [S] of half a crop
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_((directions[:, None] * steps[:, None]).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)

    def forward(self, levels: Tensor, pose: Tensor, reference: Tensor, feature_maps: Sequence[Tensor]) -> Tensor:
        """levels [B, L, J, D], pose [B, J, D], reference [B, J, 2] in [-1, 1], L maps [B, C_l, H_l, W_l] → levels"""
        drop_path = self.drop_path if self.training else 0.0
        read = self._read_at_once if has_kernel(BACKENDS, *autocast_to_float32(levels)) else self._read
        levels = read(levels, pose, reference, feature_maps, draw_branch_scale(levels, drop_path))
        tokens = levels.flatten(1, 2)  # [B, L · J, D]
        return feed_forward(tokens, self.norm2, self.mlp, draw_branch_scale(tokens, drop_path)).view_as(levels)

    def aim(self, levels: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
        """Where each head reads about its joint, offsets [B, L, J, H, S, 2], and with what weights, [B, L, J, H, S].

        Offsets are in the units of `forward`'s reference; weights sum to 1 over the S samples.
        """
        asking = self.norm1(levels + pose[:, None])
        places = (self.heads, self.samples)
        weights = self.attention_weights(asking).unflatten(3, places).softmax(dim=4)
        return self.sampling_offsets(asking).unflatten(3, (*places, 2)).tanh(), weights

    def _read(
        self,
        levels: Tensor,
        pose: Tensor,
        reference: Tensor,
        feature_maps: Sequence[Tensor],
        branch_scale: Tensor | None,
    ) -> Tensor:
        offsets, weights = self.aim(levels, pose)
        contexts = sample_context(feature_maps, reference, offsets, weights)
        gathered = [embed(context).flatten(2) for embed, context in zip(self.embed_proj, contexts, strict=True)]
        return add_branch(levels, torch.stack(gathered, dim=1), branch_scale)

    def _read_at_once(
        self,
        levels: Tensor,
        pose: Tensor,
        reference: Tensor,
        feature_maps: Sequence[Tensor],
        branch_scale: Tensor | None,
    ) -> Tensor:
        norm, weights, offsets = self.norm1, self.attention_weights, self.sampling_offsets
        return residual_context(
            levels,
            pose,
            reference,
            feature_maps,
            norm.weight,
            norm.bias,
            weights.weight,
            weights.bias,
            offsets.weight,
            offsets.bias,
            [embed.weight for embed in self.embed_proj],
            [embed.bias for embed in self.embed_proj],
            branch_scale,
            heads=self.heads,
            eps=norm.eps,
        )

    def extra_repr(self) -> str:
        return f"heads={self.heads}, samples={self.samples}, drop_path={self.drop_path:g}"
