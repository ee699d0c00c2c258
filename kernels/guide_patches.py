"""Joints guide factored patches: the launches of `attend_patches` with the attention stored, and one copy beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import attend_patches


def forward(
    query: Tensor,  # [B, H, J, W]
    channels: Tensor,  # [B, P, W]
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """context [B,H,J,W], guided [B,P,W+R] (the channels, then the attention), lse [B,H,J]."""
    context, _, attention, lse = attend_patches.forward(query, channels[:, None], None, scale, True, False)
    return context, torch.cat([channels, attention.flatten(1, 2).transpose(1, 2)], dim=2), lse


def backward(
    grad_context: Tensor | None,
    grad_guided: Tensor | None,
    query: Tensor,
    channels: Tensor,
    context: Tensor,
    lse: Tensor,
    scale: float,
    need_channel_grads: bool,
) -> tuple[Tensor, Tensor]:
    """grad_query [B,H,J,W], grad_channels [B,P,W] or empty."""
    width, grad_attention = channels.shape[2], None
    if grad_guided is not None:
        grad_attention = grad_guided[:, :, width:].transpose(1, 2).unflatten(1, query.shape[1:3])  # [B, H, J, P]
    grad_query, grad_key, _ = attend_patches.backward(
        grad_context, None, grad_attention, query, channels[:, None], None, context, lse, scale, need_channel_grads
    )
    if not need_channel_grads:
        return grad_query, grad_key
    grad_channels = grad_key[:, 0]
    return grad_query, grad_channels if grad_guided is None else grad_channels + grad_guided[:, :, :width]
