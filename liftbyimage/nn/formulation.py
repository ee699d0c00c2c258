"""Which of the exact formulations of a cross-attention is cheapest: a count of multiply-adds.

    projected   K = T W_k and V = T W_v are formed for all patches; H small attentions follow.
    absorbed    S_h = (q_h W_k,h) Tᵀ and A_h V_h = (A_h T) W_v,h: W_k is folded into the few queries before and W_v is
                applied to the few contexts after, so that the tokens T [B, P, D] themselves are the one shared key and
                value. A key bias only shifts rows of S, which the softmax drops; a value bias passes through unchanged,
                because rows of A sum to 1.
    factored    The same with the channels of `FactoredPatches` [B, P, W] in place of the tokens, whose embedding goes
                the way of W_k and W_v. Tokens are never formed.

docs/kernels/factored.md derives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from liftbyimage.nn.factored_patches import FactoredPatches

Formulation = Literal["auto", "projected", "absorbed", "factored"]
FORMED: tuple[Formulation, ...] = ("absorbed", "projected")  # on tokens [B, P, D]
FORMULATIONS = ("auto", "projected", "absorbed", "factored")


def check_formulation(formulation: str) -> Formulation:
    if formulation not in FORMULATIONS:
        raise ValueError(f"formulation must be one of {', '.join(FORMULATIONS)}, got {formulation!r}")
    return formulation  # type: ignore[return-value]


@dataclass(frozen=True)
class AttentionSize:
    """Sizes of one cross-attention from `joints` joints to patches, in the symbols of docs/kernels.

    `guided`: the pose-guided layer, whose patches also receive.
    """

    heads: int
    joints: int
    guided: bool = False

    def multiply_adds(self, formulation: str, patches: Tensor | FactoredPatches) -> int:
        """Products of one forward pass over the whole batch that depend on the formulation."""
        batch, num_patches, dim = patches.shape
        rows = self.heads * self.joints
        if formulation == "factored":
            assert isinstance(patches, FactoredPatches)
            return self._fold(patches) + 2 * batch * rows * num_patches * patches.width
        forming = self._form(patches) if isinstance(patches, FactoredPatches) else 0
        updating = batch * rows * num_patches * dim if self.guided else 0
        if formulation == "absorbed":
            folding = 2 * batch * self.joints * dim * dim
            return forming + updating + folding + 2 * batch * rows * num_patches * dim
        attending = 2 * batch * self.joints * num_patches * dim
        return forming + updating + attending + 2 * batch * num_patches * dim * dim

    @staticmethod
    def _form(patches: FactoredPatches) -> int:
        batch, num_patches, dim = patches.shape
        return batch * num_patches * patches.width * dim

    def _fold(self, patches: FactoredPatches) -> int:
        """W_k and W_v meet a shared embedding once; rows meet a sample's own embedding after W_k and before W_v."""
        batch, _, dim = patches.shape
        width = patches.width
        if patches.shared:
            return 2 * dim * dim * width + 2 * batch * self.joints * dim * width
        return 2 * batch * self.joints * dim * dim + 2 * batch * self.heads * self.joints * dim * width

    def cheapest(self, patches: Tensor | FactoredPatches) -> Formulation:
        candidates = ("factored", *FORMED) if isinstance(patches, FactoredPatches) else FORMED
        costs = [self.multiply_adds(formulation, patches) for formulation in candidates]
        return candidates[costs.index(min(costs))]

    def cheapest_to_read(self, patches: Tensor | FactoredPatches, times: int) -> Tensor | FactoredPatches:
        """`patches` as they are, or formed now where `times` layers that read them are cheaper so."""
        if not isinstance(patches, FactoredPatches):
            return patches
        forming = self._form(patches)
        # What a layer costs on formed tokens: the same count without the forming.
        costs = [self.multiply_adds(formulation, patches) - forming for formulation in FORMED]
        keeps = times * self.multiply_adds(self.cheapest(patches), patches) <= forming + times * min(costs)
        return patches if keeps else patches.dense()
