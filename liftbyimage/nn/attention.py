"""The two attentions of a lifting layer: among joints, and from joints to image patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from liftbyimage.nn.factored_patches import FactoredPatches
from liftbyimage.nn.formulation import Formulation
from liftbyimage.ops import attend_tokens
from liftbyimage.ops._dispatch import has_kernel
from liftbyimage.ops.attend_tokens import BACKENDS


def check_heads(dim: int, heads: int) -> None:
    if heads < 1 or dim < 1 or dim % heads:
        raise ValueError(f"dim must be a positive multiple of heads, got dim = {dim}, heads = {heads}")


class _Projections(nn.Module):
    """Query, key, value and output projections, stored as torch.nn.MultiheadAttention stores them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.dim, self.heads = dim, heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        for projection in self.in_proj_weight.chunk(3):
            nn.init.xavier_uniform_(projection)
        nn.init.zeros_(self.out_proj.bias)

    def split(self, tokens: Tensor) -> Tensor:
        """[B, N, D] → [B, H, N, D / H]"""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def merge(self, tokens: Tensor) -> Tensor:
        """[B, H, N, D / H] → [B, N, D]"""
        return tokens.transpose(1, 2).flatten(2)

    def multiply_heads(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Each head's share of tokens [B, J, D] by its own weight [H, D / H, N] → [B, H, J, N]"""
        by_head = tokens.flatten(0, 1).unflatten(1, (self.heads, -1)).transpose(0, 1)  # [H, B·J, D / H]
        return torch.bmm(by_head, weight).unflatten(1, tokens.shape[:2]).transpose(0, 1)


class JointAttention(_Projections):
    """Multi-head self-attention over the joints [B, J, D]."""

    def forward(self, joints: Tensor) -> Tensor:
        projected = F.linear(joints, self.in_proj_weight, self.in_proj_bias)
        if has_kernel(BACKENDS, projected):
            return self.out_proj(attend_tokens(projected, heads=self.heads))
        query, key, value = projected.chunk(3, dim=2)
        attended = F.scaled_dot_product_attention(self.split(query), self.split(key), self.split(value))
        return self.out_proj(self.merge(attended))


class Memory(NamedTuple):
    """What joints meet in one formulation, and what stands between a head's query or value and the rows that meet it.

    A head's query [J, D / H] becomes rows by `fold`, then by `embedding`ᵀ; contexts come back by `embedding`, then by
    `unfold` and `value_bias`. None: nothing to do.
    """

    key: Tensor  # [B, Hk, P, W]
    value: Tensor  # [B, Hk, P, W], key itself unless projected
    fold: Tensor | None = None  # [H, D / H, N]
    unfold: Tensor | None = None  # [H, N, D / H]
    value_bias: Tensor | None = None  # [D]
    embedding: Tensor | None = None  # [B, W, N], where every sample has its own

    def rows(self, query: Tensor) -> Tensor:
        """[B, H, J, N] → [B, H, J, W]"""
        if self.embedding is None:
            return query
        return (query.flatten(1, 2) @ self.embedding.transpose(1, 2)).unflatten(1, query.shape[1:3])

    def contexts(self, rows: Tensor) -> Tensor:
        """[B, H, J, W] → [B, H, J, N]"""
        if self.embedding is None:
            return rows
        return (rows.flatten(1, 2) @ self.embedding).unflatten(1, rows.shape[1:3])


class PatchAttention(_Projections):
    """What joints ask of the image, in any formulation (`nn.formulation`)."""

    @property
    def scale(self) -> float:
        return float(self.dim // self.heads) ** -0.5

    def memory(self, patches: Tensor | FactoredPatches, formulation: Formulation) -> Memory:
        """patches [B, P, D] as `formulation` has joints meet them; FactoredPatches go with "factored"."""
        if isinstance(patches, FactoredPatches):
            return self._factored(patches)
        if formulation == "projected":
            token_weight, token_bias = self.in_proj_weight[self.dim :], self.in_proj_bias[self.dim :]
            key, value = F.linear(patches, token_weight, token_bias).chunk(2, dim=2)
            return Memory(self.split(key), self.split(value))
        shared = patches[:, None]  # [B, 1, P, D]: one head shared by all, key and value in one
        return Memory(shared, shared, *self._folds(), self.in_proj_bias[2 * self.dim :])

    def query(self, joints: Tensor, fold: Tensor | None) -> Tensor:
        """joints [B, J, D] → rows [B, H, J, N], or plain queries [B, H, J, D / H]"""
        query = F.linear(joints, self.in_proj_weight[: self.dim], self.in_proj_bias[: self.dim])
        if fold is None:
            return self.split(query)
        return self.multiply_heads(query, fold)

    def output(self, context: Tensor, unfold: Tensor | None, value_bias: Tensor | None) -> Tensor:
        """contexts [B, H, J, N] → joints [B, J, D]"""
        if unfold is None:
            merged = self.merge(context)
        else:
            by_head = torch.bmm(context.transpose(0, 1).flatten(1, 2), unfold)  # [H, B·J, D / H]
            merged = by_head.transpose(0, 1).reshape(context.shape[0], context.shape[2], self.dim)
        return self.out_proj(merged if value_bias is None else merged + value_bias)

    def _folds(self) -> tuple[Tensor, Tensor]:
        """W_k [H, D / H, D] and W_v [H, D, D / H]"""
        _, key_weight, value_weight = self.in_proj_weight.chunk(3)
        heads = (self.heads, -1)
        return key_weight.unflatten(0, heads), value_weight.unflatten(0, heads).transpose(1, 2)

    def _factored(self, patches: FactoredPatches) -> Memory:
        channels = patches.channels[:, None]  # [B, 1, P, W]
        value_bias = self.in_proj_bias[2 * self.dim :]
        value_bias = torch.addmv(value_bias, self.in_proj_weight[2 * self.dim :], patches.bias)
        if not patches.shared:
            return Memory(channels, channels, *self._folds(), value_bias, patches.embedding)
        # Both weights meet the embedding in one product: [2·D, D] × [D, W]
        folded = self.in_proj_weight[self.dim :] @ patches.embedding.T
        fold, unfold = folded.unflatten(0, (2, self.heads, -1)).unbind()  # [H, D / H, W]
        return Memory(channels, channels, fold, unfold.transpose(1, 2), value_bias)


class FeedForward(nn.Module):
    """Linear, GELU, dropout, linear over [B, N, D]; `mlp_ratio` times as wide inside."""

    def __init__(self, dim: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.linear1 = nn.Linear(dim, hidden)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.gelu(self.linear1(tokens))))
