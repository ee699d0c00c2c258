"""Context-Aware PoseFormer in plain PyTorch, in the published order of operations.

Every level is sampled with `F.grid_sample`, every sample projected, then weighted and summed; attention is two
products with a softmax between them. It loads the same state dict as `liftbyimage.models.ContextAwarePoseFormer` and
gives equal outputs and gradients. Imports torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK_EPS = 1e-6  # layer norms of level and joint blocks; those of context blocks and head keep PyTorch's 1e-5


class DropPath(nn.Module):
    """Drops a residual branch for a whole row of the batch, and scales the others up."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return branch
        keep = 1 - self.probability
        mask = branch.new_empty(branch.shape[0], *(1,) * (branch.dim() - 1)).bernoulli_(keep)
        return branch * mask / keep


class Mlp(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, round(dim * mlp_ratio))
        self.fc2 = nn.Linear(round(dim * mlp_ratio), dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        parts = self.qkv(tokens).reshape(batch, count, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]  # [B, H, T, D / H]
        attention = (query @ key.transpose(-2, -1) * (dim // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((attention @ value).transpose(1, 2).reshape(batch, count, dim))


class Block(nn.Module):
    """Self-attention and feed-forward, each behind a layer norm and beside a residual."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class ContextBlock(nn.Module):
    """Each level's joint tokens read that level's map at learned offsets about the joints."""

    def __init__(
        self, dim: int, channels: Sequence[int], heads: int, samples: int, mlp_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        self.heads, self.samples = heads, samples
        self.norm1 = nn.LayerNorm(dim)
        self.attention_weights = nn.Linear(dim, heads * samples)
        self.sampling_offsets = nn.Linear(dim, 2 * heads * samples)
        self.embed_proj = nn.ModuleList([nn.Linear(width, dim // heads) for width in channels])
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, reference: Tensor, feature_maps: Sequence[Tensor]) -> Tensor:
        pose, levels = tokens[:, :1], tokens[:, 1:]  # [B, 1, J, D], [B, L, J, D]
        batch, count, joints, _ = levels.shape
        asking = self.norm1(levels + pose)
        weights = self.attention_weights(asking).view(batch, count, joints, self.heads, self.samples).softmax(-1)
        offsets = self.sampling_offsets(asking).view(batch, count, joints, self.heads * self.samples, 2).tanh()
        places = offsets + reference.view(batch, 1, joints, 1, 2)
        sampled = []
        for level, (feature_map, embed) in enumerate(zip(feature_maps, self.embed_proj, strict=True)):
            read = F.grid_sample(feature_map, places[:, level], padding_mode="border", align_corners=True)
            sampled.append(embed(read.permute(0, 2, 3, 1).contiguous()))  # [B, J, H · S, D / H]
        stacked = torch.stack(sampled, dim=1).view(batch, count, joints, self.heads, self.samples, -1)
        gathered = (weights[..., None] * stacked).sum(dim=-2).view(batch, count, joints, -1)  # [B, L, J, D]
        levels = levels + self.drop_path(gathered)
        levels = levels + self.drop_path(self.mlp(self.norm2(levels)))
        return torch.cat([pose, levels], dim=1)


class ReferenceContextAwarePoseFormer(nn.Module):
    """`models.ContextAwarePoseFormer` without custom kernels; `config` is that model's.

    `forward` takes feature maps [B, C_l, H_l, W_l], the normalised full-frame pose [B, J, 2] and the reference points
    [B, J, 2], and returns the pose [B, J, 3] in metres.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, levels, depth = config.dim, len(config.channels), config.depth
        drop = [config.drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.coord_embed = nn.Linear(2, dim)
        self.feat_embed = nn.ModuleList([nn.Linear(width, dim) for width in config.channels])
        self.Spatial_pos_embed = nn.Parameter(torch.zeros(1, 1 + levels, config.num_joints, dim))
        self.context_blocks = nn.ModuleList(
            [
                ContextBlock(dim, config.channels, config.context_heads, config.samples, config.mlp_ratio, drop[i])
                for i in range(depth if config.context else 0)
            ]
        )
        self.res_blocks = nn.ModuleList([Block(dim, config.heads, config.mlp_ratio, drop[i]) for i in range(depth)])
        width = dim * (1 + levels)
        self.joint_blocks = nn.ModuleList([Block(width, config.heads, config.mlp_ratio, drop[i]) for i in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3))

    def forward(self, feature_maps: Sequence[Tensor], pose_2d: Tensor, pose_crop: Tensor) -> Tensor:
        batch, joints, _ = pose_2d.shape
        tokens = [self.coord_embed(pose_2d)]
        for feature_map, embed in zip(feature_maps, self.feat_embed, strict=True):
            read = F.grid_sample(feature_map, pose_crop[:, :, None], align_corners=True)  # [B, C, J, 1]
            tokens.append(embed(read.squeeze(3).permute(0, 2, 1).contiguous()))
        x = torch.stack(tokens, dim=1) + self.Spatial_pos_embed  # [B, 1 + L, J, D]
        for block in self.context_blocks:
            x = block(x, pose_crop, feature_maps)
        x = x.transpose(1, 2).reshape(batch * joints, -1, x.shape[3])  # [B · J, 1 + L, D]
        for block in self.res_blocks:
            x = block(x)
        x = x.reshape(batch, joints, -1)  # [B, J, (1 + L) · D]
        for block in self.joint_blocks:
            x = block(x)
        return self.head(x)
