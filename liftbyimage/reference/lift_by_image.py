"""Lifting by Image in plain PyTorch, as a good engineer writes it without custom kernels.

Keys and values are projected for all patches; attention goes through `F.scaled_dot_product_attention` wherever the
attention matrix itself is not needed; patches are pruned with `topk` and `gather`. It loads the same state dict as
`liftbyimage.models.LiftByImage` and gives equal outputs and gradients. Imports torch only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention with the parameter names of torch.nn.MultiheadAttention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, H, N, D / H]

    def project(self, joints: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dim = self.dim
        query = F.linear(joints, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        key, value = F.linear(memory, self.in_proj_weight[dim:], self.in_proj_bias[dim:]).chunk(2, dim=2)
        return self.split(query), self.split(key), self.split(value)

    def output(self, context: Tensor) -> Tensor:
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def attend(self, joints: Tensor, memory: Tensor) -> Tensor:
        return self.output(F.scaled_dot_product_attention(*self.project(joints, memory)))

    def attend_with_weights(self, joints: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.project(joints, memory)
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        attention = scores.softmax(dim=3)  # [B, H, J, P]
        return self.output(attention @ value), attention


class FeedForward(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(int(dim * mlp_ratio), dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.gelu(self.linear1(tokens))))


class Layer(nn.Module):
    """Self-attention over joints, cross-attention to patches, feed-forward."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(dim, heads)
        self.patch_attention = Attention(dim, heads)
        self.feed_forward = FeedForward(dim, mlp_ratio, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def look_around(self, joints: Tensor) -> Tensor:
        return self.norm1(joints + self.dropout(self.self_attention.attend(joints, joints)))

    def finish(self, joints: Tensor, attended: Tensor) -> Tensor:
        joints = self.norm2(joints + self.dropout(attended))
        return self.norm3(joints + self.dropout(self.feed_forward(joints)))

    def forward(self, joints: Tensor, patches: Tensor, need_importance: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        joints = self.look_around(joints)
        if not need_importance:
            return self.finish(joints, self.patch_attention.attend(joints, patches))
        attended, attention = self.patch_attention.attend_with_weights(joints, patches)
        return self.finish(joints, attended), attention.mean((1, 2))


class GuidedLayer(Layer):
    """The same with the attention also used from patches to joints (Eq. 2)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, dropout: float, image_feed_forward: bool) -> None:
        super().__init__(dim, heads, mlp_ratio, dropout)
        self.pose_value = nn.Linear(dim, dim)
        self.image_out_proj = nn.Linear(dim, dim, bias=False)
        self.image_feed_forward = FeedForward(dim, mlp_ratio, dropout) if image_feed_forward else None
        self.image_norm = nn.LayerNorm(dim) if image_feed_forward else None

    def forward(  # type: ignore[override]
        self, joints: Tensor, patches: Tensor, need_importance: bool = False
    ) -> tuple[Tensor, ...]:
        joints = self.look_around(joints)
        attended, attention = self.patch_attention.attend_with_weights(joints, patches)
        sent = self.patch_attention.split(self.pose_value(joints))  # [B, H, J, D / H]
        received = (attention.transpose(2, 3) @ sent).transpose(1, 2).flatten(2)  # [B, P, D]
        patches = patches + self.image_out_proj(received)
        if self.image_feed_forward is not None and self.image_norm is not None:
            patches = self.image_norm(patches + self.dropout(self.image_feed_forward(patches)))
        joints = self.finish(joints, attended)
        return (joints, patches, attention.mean((1, 2))) if need_importance else (joints, patches)


class ReferenceLiftByImage(nn.Module):
    """`models.LiftByImage` without custom kernels; `config` and `positions` come from that model.

    `forward` returns (pose_3d, coarse_pose_3d, importance, index). Dropout on the image side of the pose-guided
    layer is the one difference in training mode: here patches receive undropped rows, so compare gradients with
    dropout 0.
    """

    def __init__(self, config: Any, positions: Tensor) -> None:
        super().__init__()
        sizes = (config.dim, config.heads, config.mlp_ratio, config.dropout)
        self.feature_norm = nn.BatchNorm2d(config.image_channels)
        self.embed = nn.Linear(config.image_channels + positions.shape[1], config.dim)
        self.pose_embed = nn.Linear(2, config.dim)
        self.joint_embedding = nn.Parameter(torch.zeros(config.num_joints, config.dim))
        self.stage1 = nn.ModuleList(
            [
                GuidedLayer(*sizes, config.image_feed_forward) if layer == config.pose_guided_layer else Layer(*sizes)
                for layer in range(3)
            ]
        )
        self.coarse_head = nn.Linear(config.dim, 3)
        self.stage2 = nn.ModuleList([Layer(*sizes) for _ in range(3)])
        self.refined_head = nn.Linear(config.dim, 3)
        self.keep = max(1, math.floor(config.retention * positions.shape[0]))
        self.register_buffer("positions", positions.clone(), persistent=False)  # [P, 16]

    def forward(self, features: Tensor, pose_2d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = self.feature_norm(features).flatten(2).transpose(1, 2)  # [B, P, C]
        positions = self.positions.expand(channels.shape[0], -1, -1)
        patches = self.embed(torch.cat([channels, positions], dim=2))  # [B, P, D]
        joints = self.pose_embed(pose_2d) + self.joint_embedding

        *before, last = self.stage1
        for layer in before:
            if isinstance(layer, GuidedLayer):
                joints, patches = layer(joints, patches)
            else:
                joints = layer(joints, patches)
        if isinstance(last, GuidedLayer):
            joints, patches, importance = last(joints, patches, need_importance=True)
        else:
            joints, importance = last(joints, patches, need_importance=True)
        coarse = self.coarse_head(joints)

        index = importance.topk(self.keep, dim=1).indices.sort(dim=1).values  # [B, K]
        kept = patches.detach().gather(1, index[:, :, None].expand(-1, -1, patches.shape[2]))
        joints = joints.detach()
        for layer in self.stage2:
            joints = layer(joints, kept)
        refined = self.refined_head(joints)
        return refined - refined[:, :1], coarse - coarse[:, :1], importance, index
