"""The two attentions of a lifting layer: among joints, and from joints to image patches.

`PatchAttention` offers two exact formulations of one multi-head cross-attention
(docs/kernels/pose_guided_attention.md):

    projected   K = T W_k and V = T W_v are formed for all patches; H small attentions follow.
    absorbed    S_h = (q_h W_k,h) Tᵀ and A_h V_h = (A_h T) W_v,h: W_k is folded into the few queries before and W_v is
                applied to the few contexts after, so that the tokens T [B, P, D] themselves are the one shared key and
                value. A key bias only shifts rows of S, which the softmax drops; a value bias passes through unchanged,
                because rows of A sum to 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Formulation = Literal["auto", "projected", "absorbed"]
FORMULATIONS = ("auto", "projected", "absorbed")


def check_formulation(formulation: str) -> Formulation:
    if formulation not in FORMULATIONS:
        raise ValueError(f"formulation must be one of {', '.join(FORMULATIONS)}, got {formulation!r}")
    return formulation  # type: ignore[return-value]


def check_heads(dim: int, heads: int) -> None:
    if heads < 1 or dim < 1 or dim % heads:
        raise ValueError(f"dim must be a positive multiple of heads, got dim = {dim}, heads = {heads}")


def check_tokens(layer: str, joints: Tensor, patches: Tensor, dim: int) -> None:
    for name, tensor, axis in (("joints", joints, "J"), ("patches", patches, "P")):
        if tensor.dim() != 3 or tensor.shape[2] != dim:
            raise ValueError(f"{layer}: {name} must have shape [B, {axis}, {dim}], got {list(tensor.shape)}")
    if joints.shape[0] != patches.shape[0]:
        raise ValueError(f"{layer}: patches must have joints' batch size {joints.shape[0]}, got {patches.shape[0]}")


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


class JointAttention(_Projections):
    """Multi-head self-attention over the joints [B, J, D]."""

    def forward(self, joints: Tensor) -> Tensor:
        query, key, value = F.linear(joints, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=2)
        attended = F.scaled_dot_product_attention(self.split(query), self.split(key), self.split(value))
        return self.out_proj(self.merge(attended))


class PatchAttention(_Projections):
    """What joints ask of the image: queries, keys and values in either formulation, and the way back to joints."""

    def choose(self, formulation: Formulation, num_joints: int) -> Formulation:
        """The formulation with fewer multiply-adds per patch: 2·R·D absorbed against 2·D² + 2·J·D projected."""
        if formulation != "auto":
            return formulation
        return "absorbed" if self.heads * num_joints < self.dim + num_joints else "projected"

    @property
    def scale(self) -> float:
        return float(self.dim // self.heads) ** -0.5

    def projected(self, joints: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query [B, H, J, D / H], key and value [B, H, P, D / H]"""
        query_weight, token_weight = self.in_proj_weight.tensor_split((self.dim,))
        query_bias, token_bias = self.in_proj_bias.tensor_split((self.dim,))
        query = F.linear(joints, query_weight, query_bias)
        key, value = F.linear(patches, token_weight, token_bias).chunk(2, dim=2)
        return self.split(query), self.split(key), self.split(value)

    def absorbed(self, joints: Tensor) -> Tensor:
        """The query rows against bare tokens, [B, H, J, D]: q_h W_k,h."""
        query_weight, key_weight, _ = self.in_proj_weight.chunk(3)
        query = self.split(F.linear(joints, query_weight, self.in_proj_bias[: self.dim]))
        return query @ key_weight.unflatten(0, (self.heads, -1))  # [H, D / H, D]

    def output(self, context: Tensor, formulation: Formulation) -> Tensor:
        """Contexts of either formulation back to joints [B, J, D]."""
        if formulation == "absorbed":
            value_weight = self.in_proj_weight[2 * self.dim :].unflatten(0, (self.heads, -1))  # [H, D / H, D]
            value_bias = self.in_proj_bias[2 * self.dim :].unflatten(0, (self.heads, 1, -1))
            context = context @ value_weight.transpose(1, 2) + value_bias
        return self.out_proj(self.merge(context))


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
