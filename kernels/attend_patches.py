"""Joints query patches: context, importance and, if asked, the attention matrix (patch-major).

Two launches forward, two or three backward, over the tiles that `_attention` pictures, without a pose value:

    forward     gather            a row block            over patch tiles   context, lse
                scatter           a patch tile           over row blocks    importance, attention (if asked for)
    backward    row_statistics    a row block            over patch tiles   δ (16-bit context alone: no tiles)
                row_gradients     a row block            over patch tiles   dQ
                token_gradients   a patch tile, a group  over row blocks    dK, dV (one if shared)
"""

from __future__ import annotations

from torch import Tensor

from . import _attention


def forward(
    query: Tensor,  # [B, H, J, E]
    key: Tensor,  # [B, Hk, P, E]
    value: Tensor | None,  # [B, Hk, P, F]; None: value is key, and tokens are read once
    scale: float,
    need_attention: bool,
    need_importance: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """context [B,H,J,F], importance [B,P] or empty, attention [B,H,J,P] (memory [B,P,R]) or empty, lse [B,H,J]."""
    context, importance, attention, _, lse = _attention.forward(
        query, key, value, None, None, scale, need_attention, need_importance
    )
    return context, importance, attention, lse


def backward(
    grad_context: Tensor | None,
    grad_importance: Tensor | None,
    grad_attention: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    context: Tensor,
    lse: Tensor,
    scale: float,
    need_token_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_query, grad_key, grad_value; the last is empty where value is None, both where not needed."""
    grad_query, grad_key, grad_value, _ = _attention.backward(
        grad_context, None, grad_importance, grad_attention,
        query, key, value, None, context, lse, scale, need_token_grads, False,
    )  # fmt: skip
    return grad_query, grad_key, grad_value
