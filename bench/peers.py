"""Fused attention of PyTorch, used twice: what a library user can do without ever storing the attention matrix.

The second call swaps the roles: patches ask joints, with the bias −LSE_j on joint j. Its softmax over joints is
A_jp / Σ_j A_jp, and the exponential of its own log-sum-exp is the column sum Σ_j A_jp. So it gives Aᵀ V_J and the
importance of patches.
"""

from __future__ import annotations

from typing import NamedTuple

from machine import DEVICE
from torch import Tensor, ops
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from workload import TRAINING, Setting


class TwoWayAttention(NamedTuple):
    context: Tensor  # [B, H, J, E]
    received: Tensor  # [B, H, P, E], Aᵀ sent
    column_sums: Tensor  # [B, H, P]


def two_way_attention(query: Tensor, key: Tensor, value: Tensor, sent: Tensor) -> TwoWayAttention:
    """query, sent [B, H, J, E]; key, value [B, H, P, E]."""
    attend_twice = _flex_twice if DEVICE == "cuda" else _flash_twice
    context, mean_received, lse = attend_twice(query, key, value, sent)
    column_sums = lse.exp()
    return TwoWayAttention(context, (mean_received * column_sums[..., None]).to(sent.dtype), column_sums)


def _flash_twice(query: Tensor, key: Tensor, value: Tensor, sent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # The public function hides the log-sum-exp that its CPU kernel computes anyway.
    attend = ops.aten._scaled_dot_product_flash_attention_for_cpu
    context, lse = attend(query, key, value)
    bias = -lse[:, :, None].expand(-1, -1, key.shape[2], -1)  # [B, H, P, J]
    return context, *attend(key, query, sent, attn_mask=bias)


def _flex_twice(query: Tensor, key: Tensor, value: Tensor, sent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    context, first = flex_attention(query, key, value, return_aux=AuxRequest(lse=True))

    def less_lse(score: Tensor, batch: Tensor, head: Tensor, patch: Tensor, joint: Tensor) -> Tensor:
        return score - first.lse[batch, head, joint]

    mean_received, second = flex_attention(key, query, sent, score_mod=less_lse, return_aux=AuxRequest(lse=True))
    return context, mean_received, second.lse


def why_not_two_way(setting: Setting) -> str | None:
    if DEVICE == "cpu" and setting.direction == TRAINING:
        return "PyTorch's CPU kernel gives no gradient through its log-sum-exp and its bias"
    return None
