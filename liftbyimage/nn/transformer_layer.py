"""One decoder layer of the lifter: joints attend to each other, then to the image patches, then feed forward."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from liftbyimage.nn.attention import (
    FeedForward,
    Formulation,
    JointAttention,
    PatchAttention,
    check_formulation,
    check_tokens,
)
from liftbyimage.ops import attend_patches

_DECODER_LAYER_NAMES = {
    "self_attn": "self_attention",
    "multihead_attn": "patch_attention",
    "linear1": "feed_forward.linear1",
    "linear2": "feed_forward.linear2",
}


class TransformerLayer(nn.Module):
    """Self-attention over joints, cross-attention to patches, feed-forward; residual and layer norm after each.

    Numerically equal to `torch.nn.TransformerDecoderLayer(dim, heads, dim_feedforward=mlp_ratio·dim, dropout,
    activation="gelu", batch_first=True, norm_first=False)` in evaluation mode and without dropout; `load_decoder_layer`
    takes that module's state dict. Dropout acts on the residual branches and inside the feed-forward, never on the
    attention matrix.

    Args:
        dim: token width D, a multiple of `heads`.
        heads: attention heads H.
        mlp_ratio: width of the feed-forward over D.
        dropout: probability on residual branches and inside the feed-forward.
        formulation: "projected", "absorbed" or "auto" (the one with fewer multiply-adds); all agree to rounding.

    Source: Lifting by Image (AAAI 2024), TransformerLayer of both stages.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        formulation: Formulation = "auto",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.formulation = check_formulation(formulation)
        self.self_attention = JointAttention(dim, heads)
        self.patch_attention = PatchAttention(dim, heads)
        self.feed_forward = FeedForward(dim, mlp_ratio, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, joints: Tensor, patches: Tensor, need_importance: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """joints [B, J, D], patches [B, P, D] → joints, or (joints, importance [B, P])."""
        check_tokens("TransformerLayer", joints, patches, self.dim)
        joints = self.norm1(joints + self.dropout(self.self_attention(joints)))
        attended, importance = self._attend(joints, patches)
        joints = self.norm2(joints + self.dropout(attended))
        joints = self.norm3(joints + self.dropout(self.feed_forward(joints)))
        return (joints, importance) if need_importance else joints

    def _attend(self, joints: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.patch_attention
        formulation = attention.choose(self.formulation, joints.shape[1])
        if formulation == "absorbed":
            tokens = patches[:, None]  # [B, 1, P, D]: one head shared by all, key and value in one
            result = attend_patches(attention.absorbed(joints), tokens, tokens, scale=attention.scale)
        else:
            result = attend_patches(*attention.projected(joints, patches), scale=attention.scale)
        return attention.output(result.context, formulation), result.importance

    def load_decoder_layer(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the weights of a `torch.nn.TransformerDecoderLayer` of the same sizes, strictly."""
        renamed = {}
        for name, tensor in state_dict.items():
            module, _, rest = name.partition(".")
            renamed[f"{_DECODER_LAYER_NAMES.get(module, module)}.{rest}"] = tensor
        self.load_state_dict(renamed)
