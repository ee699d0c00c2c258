"""The backward of attention to one head of tokens that are key and value, on tensor cores.

    A = exp(scale · T Qᵀ − lse)                        weigh_patches
    dU = Aᵀ dX                                         a matrix product
    δ = ⟨O, dO⟩ + ⟨U, dU⟩ + Σ_p A (g/R + dAttention)   per row
    dS = scale · A ∘ (T dOᵀ + dX Uᵀ + g/R + dAttention − δ)
                                                       differentiate_scores
    dQ = dSᵀ T                                         a matrix product
    dT = [A | dS] [dO ; Q] + dX                        a matrix product

A and dS lie side by side in one buffer of the size of the attention of `SAMPLES_AT_ONCE` samples, whatever the batch;
forward keeps nothing of that size. The matrix products are the vendor's, and sum in float32. The two kernels are those
of csrc/cuda/tensor_attention.cu and tensor_gradient.cu on Hopper, else of mma_attention.cu and mma_gradient.cu.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

SAMPLES_AT_ONCE = 64


class TokenGradients(NamedTuple):
    query: Tensor  # [B, H, J, W]
    tokens: Tensor | None  # [B, P, W], grad_patches included
    pose_value: Tensor | None  # [B, H, J, W]


class Incoming(NamedTuple):
    """Gradients that arrive; None counts as zero."""

    context: Tensor | None = None  # [B, H, J, W]
    patches: Tensor | None = None  # [B, P, W]
    importance: Tensor | None = None  # [B, P] float32
    attention: Tensor | None = None  # [B, P, R]

    def of(self, samples: slice) -> Incoming:
        return Incoming(*(None if gradient is None else gradient[samples] for gradient in self))


def backward(
    incoming: Incoming,
    query: Tensor,  # [B, H, J, W]
    tokens: Tensor,  # [B, P, W]
    pose_value: Tensor | None,  # [B, H, J, W]
    context: Tensor,  # [B, H, J, W]
    lse: Tensor,  # [B, H, J] float32
    scale: float,
    need_token_grads: bool,
    kernels: Any = torch.ops.liftbyimage,
) -> TokenGradients:
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_tokens = torch.empty_like(tokens, memory_format=torch.contiguous_format) if need_token_grads else None
    grad_pose_value = None if pose_value is None else torch.zeros_like(pose_value)
    for first in range(0, query.shape[0], SAMPLES_AT_ONCE):
        samples = slice(first, first + SAMPLES_AT_ONCE)
        given = (query[samples], tokens[samples], None if pose_value is None else pose_value[samples])
        arrived = incoming.of(samples)
        weights = kernels.weigh_patches(*given[:2], lse[samples], scale)  # [b, P, 2, padded rows]: A and, later, dS
        rows = query.shape[1] * query.shape[2]
        attention, grad_scores = weights[:, :, 0, :rows], weights[:, :, 1, :rows]
        delta = _delta(arrived, attention, context[samples])  # [b, R] float32
        if pose_value is not None and grad_pose_value is not None and arrived.patches is not None:
            grad_rows = _product(attention.transpose(1, 2), arrived.patches)  # [b, R, W] float32
            delta += (grad_rows * pose_value[samples].flatten(1, 2)).sum(2)
            grad_pose_value[samples] = grad_rows.view_as(pose_value[samples])
        kernels.differentiate_scores(
            weights, *arrived, given[1], given[2], delta.view(delta.shape[0], *query.shape[1:3]), scale
        )
        grad_query[samples] = _product(grad_scores.transpose(1, 2), given[1]).view_as(given[0])
        if grad_tokens is not None:
            _write_token_gradient(grad_tokens[samples], weights, arrived, given[0])
    return TokenGradients(grad_query, grad_tokens, grad_pose_value)


def _delta(incoming: Incoming, attention: Tensor, context: Tensor) -> Tensor:
    """δ [b, R] without what updated patches add."""
    delta = attention.new_zeros(attention.shape[0], attention.shape[2], dtype=torch.float32)
    if incoming.context is not None:
        delta += (context.float() * incoming.context).sum(3).flatten(1)
    if incoming.importance is not None:
        delta += (attention.float() * incoming.importance[:, :, None]).sum(1) / attention.shape[2]
    if incoming.attention is not None:
        delta += (attention.float() * incoming.attention).sum(1)
    return delta


def _write_token_gradient(out: Tensor, weights: Tensor, incoming: Incoming, query: Tensor) -> None:
    """[A | dS] [dO ; Q] + dX of one chunk, [b, P, W]."""
    padded_rows, rows = weights.shape[3], query.flatten(1, 2)
    if incoming.context is None:
        left, right = weights[:, :, 1, : rows.shape[1]], rows
    else:
        left = weights.flatten(2)
        right = rows.new_zeros(rows.shape[0], 2 * padded_rows, rows.shape[2])
        right[:, : rows.shape[1]] = incoming.context.flatten(1, 2)
        right[:, padded_rows : padded_rows + rows.shape[1]] = rows
    if incoming.patches is None:
        torch.bmm(left, right, out=out)
    else:
        out.copy_(incoming.patches).baddbmm_(left, right)  # baddbmm(out=…) was seen to copy twice on CUDA


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A batch of matrix products with a float32 result: what cuBLAS sums in parts is not rounded in between."""
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
