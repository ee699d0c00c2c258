"""Adaptive feature selection: keep the patches that mattered."""

from __future__ import annotations

from torch import Tensor, nn

from liftbyimage.ops import PrunedPatches, keep_count, prune_patches


class FeatureSelection(nn.Module):
    """Keep the floor(retention · P) most important patches (at least one), in their original order.

    Source: Lifting by Image (AAAI 2024), Adaptive Feature Selection; the paper keeps r = 0.3.
    """

    def __init__(self, retention: float = 0.3) -> None:
        super().__init__()
        keep_count(1, retention)  # checks the range now, not at the first call
        self.retention = retention

    def forward(self, patches: Tensor, importance: Tensor) -> PrunedPatches:
        """patches [B, P, D], importance [B, P] → patches [B, K, D], index [B, K] ascending."""
        return prune_patches(patches, importance, keep_count(patches.shape[1], self.retention))

    def extra_repr(self) -> str:
        return f"retention={self.retention}"
