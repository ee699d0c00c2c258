"""The pose-guided layer: joints gather from patches, and patches receive from joints, through one attention map."""

from __future__ import annotations

from torch import Tensor, nn

from liftbyimage.nn.attention import (
    FeedForward,
    Formulation,
    JointAttention,
    PatchAttention,
    check_formulation,
    check_tokens,
)
from liftbyimage.ops import pose_guided_attention


class PoseGuidedLayer(nn.Module):
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
        super().__init__()
        self.dim = dim
        self.formulation = check_formulation(formulation)
        self.self_attention = JointAttention(dim, heads)
        self.patch_attention = PatchAttention(dim, heads)
        self.pose_value = nn.Linear(dim, dim)
        self.image_out_proj = nn.Linear(dim, dim, bias=False)
        self.feed_forward = FeedForward(dim, mlp_ratio, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.image_feed_forward = FeedForward(dim, mlp_ratio, dropout) if image_feed_forward else None
        self.image_norm = nn.LayerNorm(dim) if image_feed_forward else None

    def forward(self, joints: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """joints [B, J, D], patches [B, P, D] → joints [B, J, D], patches [B, P, D]."""
        check_tokens("PoseGuidedLayer", joints, patches, self.dim)
        joints = self.norm1(joints + self.dropout(self.self_attention(joints)))
        attended, patches = self._attend(joints, patches)
        joints = self.norm2(joints + self.dropout(attended))
        joints = self.norm3(joints + self.dropout(self.feed_forward(joints)))
        if self.image_feed_forward is not None and self.image_norm is not None:
            patches = self.image_norm(patches + self.dropout(self.image_feed_forward(patches)))
        return joints, patches

    def _attend(self, joints: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.patch_attention
        formulation = attention.choose(self.formulation, joints.shape[1])
        rows = self.dropout(self._pose_rows(joints))
        if formulation == "absorbed":
            tokens = patches[:, None]  # [B, 1, P, D]: key, value and patches in one
            query = attention.absorbed(joints)
            result = pose_guided_attention(query, tokens, tokens, rows, tokens, scale=attention.scale)
        else:
            query, key, value = attention.projected(joints, patches)
            result = pose_guided_attention(query, key, value, rows, patches, scale=attention.scale)
        return attention.output(result.context, formulation), result.patches

    def _pose_rows(self, joints: Tensor) -> Tensor:
        """What each joint sends through each head at full width, [B, H, J, D]: V_J,h times the head's slice of W_g."""
        heads = self.patch_attention.heads
        values = self.patch_attention.split(self.pose_value(joints))  # [B, H, J, D / H]
        return values @ self.image_out_proj.weight.T.unflatten(0, (heads, -1))  # [H, D / H, D]
