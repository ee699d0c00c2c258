"""Joints gather context, and each patch receives A U from the joints (Lifting by Image, Eq. 2).

Two launches forward, two or three backward, over the tiles that `_attention` pictures:

    forward     gather            a row block            over patch tiles          context, lse
                scatter           a patch tile           over groups, row blocks   importance, patches + A U
    backward    row_statistics    a row block            over patch tiles          dU = Aᵀ dX, δ
                row_gradients     a row block            over patch tiles          dQ
                token_gradients   a patch tile, a group  over row blocks           dK, dV (+ dX if shared)
"""

from __future__ import annotations

from torch import Tensor

from . import _attention


def forward(
    query: Tensor,  # [B, H, J, E]
    key: Tensor,  # [B, Hk, P, E]
    value: Tensor | None,  # [B, Hk, P, F]; None: value is key, and tokens are read once
    pose_value: Tensor,  # [B, H, J, D]
    patches: Tensor | None,  # [B, P, D]; None: patches is key[:, 0]
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """context [B,H,J,F], patches_out [B,P,D], importance [B,P] float32, lse [B,H,J] float32."""
    context, importance, _, patches_out, lse = _attention.forward(
        query, key, value, pose_value, patches, scale, need_attention=False, need_importance=True
    )
    return context, patches_out, importance, lse


def backward(
    grad_context: Tensor | None,
    grad_patches: Tensor | None,
    grad_importance: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pose_value: Tensor,
    context: Tensor,
    lse: Tensor,
    scale: float,
    need_token_grads: bool,
    patches_is_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_query, grad_key (holds grad_patches if `patches_is_key`), grad_value, grad_pose_value."""
    return _attention.backward(
        grad_context, grad_patches, grad_importance, None,
        query, key, value, pose_value, context, lse, scale, need_token_grads, patches_is_key,
    )  # fmt: skip
