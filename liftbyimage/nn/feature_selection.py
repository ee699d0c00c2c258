"""Adaptive feature selection: keep the patches that mattered."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from liftbyimage.nn.factored_patches import FactoredPatches
from liftbyimage.ops import keep_count, prune_patches


class SelectedPatches(NamedTuple):
    patches: Tensor | FactoredPatches  # [B, K, D], factored if they came factored
    index: Tensor  # [B, K], ascending


class FeatureSelection(nn.Module):
    """Keep the floor(retention · P) most important patches (at least one), in their original order.

    Source: Lifting by Image (AAAI 2024), Adaptive Feature Selection; the paper keeps r = 0.3.
    """

    def __init__(self, retention: float = 0.3) -> None:
        super().__init__()
        keep_count(1, retention)  # checks the range now, not at the first call
        self.retention = retention

    def forward(self, patches: Tensor | FactoredPatches, importance: Tensor) -> SelectedPatches:
        """patches [B, P, D], importance [B, P] → patches [B, K, D], index [B, K] ascending."""
        keep = keep_count(patches.shape[1], self.retention)
        if not isinstance(patches, FactoredPatches):
            return SelectedPatches(*prune_patches(patches, importance, keep))
        kept = prune_patches(patches.channels, importance, keep)
        return SelectedPatches(patches.replace_channels(kept.patches), kept.index)

    def extra_repr(self) -> str:
        return f"retention={self.retention}"
