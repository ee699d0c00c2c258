"""How a branch joins its residual under stochastic depth: one definition for the residual ops and for the layers."""

from __future__ import annotations

import torch
from torch import Tensor


def add_branch(tokens: Tensor, branch: Tensor, branch_scale: Tensor | None) -> Tensor:
    """tokens [B, …] + branch_scale [B] · branch; a sample at 0 keeps its tokens. The scale gets no gradient."""
    if branch_scale is None:
        return tokens + branch
    scale = branch_scale.detach().to(tokens.dtype).view(-1, *(1,) * (tokens.dim() - 1))
    # Not 0 · branch: that is NaN where the branch is not finite.
    return torch.where(scale == 0, tokens, tokens + scale * branch)
