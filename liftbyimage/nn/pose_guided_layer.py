"""The pose-guided layer: joints gather from patches, and patches receive from joints, through one attention map."""

from __future__ import annotations

from torch import Tensor, nn

from liftbyimage.nn.attention import FeedForward, Memory
from liftbyimage.nn.factored_patches import FactoredPatches
from liftbyimage.nn.formulation import Formulation
from liftbyimage.nn.joint_side import JointSide
from liftbyimage.ops import guide_patches, pose_guided_attention
from liftbyimage.ops.attend_patches import statistics_dtype


class PoseGuidedLayer(JointSide):
    """Self-attention over joints, pose-guided attention, feed-forward over joints.

        A = softmax(Q Kᵀ / √d)        Q from joints, K from patches
        joints  ← LN(joints + A V)            then the joints' feed-forward
        patches ← patches + Aᵀ V_J            V_J from joints, through the image-side output projection head by head

    Args:
        dim, heads, mlp_ratio, dropout, formulation: as `TransformerLayer`. Dropout on the image side acts on the
            rows that joints send (J·H rows), never on patches or on the attention matrix.
        image_feed_forward: add a feed-forward with residual and layer norm on the patches (the paper's Figure 5
            shows one while its equations do not).

    Source: Lifting by Image (AAAI 2024), Eq. 2. The paper is silent on biases; the image-side output projection has
        none.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        formulation: Formulation = "auto",
        image_feed_forward: bool = False,
    ) -> None:
        super().__init__(dim, heads, mlp_ratio, dropout, formulation)
        self.pose_value = nn.Linear(dim, dim)
        self.image_out_proj = nn.Linear(dim, dim, bias=False)
        self.image_feed_forward = FeedForward(dim, mlp_ratio, dropout) if image_feed_forward else None
        self.image_norm = nn.LayerNorm(dim) if image_feed_forward else None

    def forward(
        self, joints: Tensor, patches: Tensor | FactoredPatches, need_importance: bool = False
    ) -> tuple[Tensor, Tensor | FactoredPatches] | tuple[Tensor, Tensor | FactoredPatches, Tensor]:
        """joints [B, J, D], patches [B, P, D] → joints and patches, or these and importance [B, P].

        Patches met factored stay factored.
        """
        self.check_tokens(joints, patches)
        patches, formulation = self.choose(joints, patches)
        memory = self.patch_attention.memory(patches, formulation)
        joints, query = self.ask(joints, memory.fold)
        rows = self.dropout(self._pose_rows(joints))  # [B, H, J, D]
        context, patches, importance = self._exchange(memory, query, rows, patches, need_importance)
        joints = self.digest(joints, memory.contexts(context), memory.unfold, memory.value_bias)
        if self.image_feed_forward is not None and self.image_norm is not None:
            tokens = patches.dense() if isinstance(patches, FactoredPatches) else patches
            patches = self.image_norm(tokens + self.dropout(self.image_feed_forward(tokens)))
        return (joints, patches) if importance is None else (joints, patches, importance)

    def _exchange(
        self, memory: Memory, query: Tensor, rows: Tensor, patches: Tensor | FactoredPatches, need_importance: bool
    ) -> tuple[Tensor, Tensor | FactoredPatches, Tensor | None]:
        """What joints gather, [B, H, J, N], the patches after they received `rows`, and the importance if needed."""
        query, scale = memory.rows(query), self.patch_attention.scale
        if isinstance(patches, FactoredPatches):
            guided = guide_patches(query, patches.channels, scale=scale)
            attention = guided.channels[..., patches.channels.shape[2] :]  # [B, P, H · J]
            importance = attention.mean(2, dtype=statistics_dtype(attention.dtype)) if need_importance else None
            return guided.context, patches.guided(guided.channels, rows), importance
        tokens = memory.key if memory.key is memory.value else patches
        result = pose_guided_attention(query, memory.key, memory.value, rows, tokens, scale=scale)
        return result.context, result.patches, result.importance if need_importance else None

    def _pose_rows(self, joints: Tensor) -> Tensor:
        """What each joint sends through each head at full width, [B, H, J, D]: V_J,h times the head's slice of W_g."""
        attention = self.patch_attention
        weight = self.image_out_proj.weight.T.unflatten(0, (attention.heads, -1))  # [H, D / H, D]
        return attention.multiply_heads(self.pose_value(joints), weight)
