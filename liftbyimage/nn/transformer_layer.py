"""One decoder layer of the lifter: joints attend to each other, then to the image patches, then feed forward."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from liftbyimage.nn.factored_patches import FactoredPatches
from liftbyimage.nn.formulation import Formulation
from liftbyimage.nn.joint_side import JointSide
from liftbyimage.ops import attend_patches

_DECODER_LAYER_NAMES = {
    "self_attn": "self_attention",
    "multihead_attn": "patch_attention",
    "linear1": "feed_forward.linear1",
    "linear2": "feed_forward.linear2",
}


class TransformerLayer(JointSide):
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
        formulation: "projected", "absorbed", "factored" (which needs `FactoredPatches`) or "auto": the one with the
            fewest multiply-adds (`nn.formulation`). All agree to rounding.

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
        super().__init__(dim, heads, mlp_ratio, dropout, formulation)

    def forward(
        self, joints: Tensor, patches: Tensor | FactoredPatches, need_importance: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """joints [B, J, D], patches [B, P, D] → joints, or (joints, importance [B, P])."""
        self.check_tokens(joints, patches)
        memory = self.patch_attention.memory(*self.choose(joints, patches))
        joints, query = self.ask(joints, memory.fold)
        result = attend_patches(
            memory.rows(query),
            memory.key,
            memory.value,
            scale=self.patch_attention.scale,
            need_importance=need_importance,
        )
        joints = self.digest(joints, memory.contexts(result.context), memory.unfold, memory.value_bias)
        return joints if result.importance is None else (joints, result.importance)

    def load_decoder_layer(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the weights of a `torch.nn.TransformerDecoderLayer` of the same sizes, strictly."""
        renamed = {}
        for name, tensor in state_dict.items():
            module, _, rest = name.partition(".")
            renamed[f"{_DECODER_LAYER_NAMES.get(module, module)}.{rest}"] = tensor
        self.load_state_dict(renamed)
