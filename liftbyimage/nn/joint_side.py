"""What both layers of the lifter do to joints, before and after they meet the patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liftbyimage.nn.attention import FeedForward, JointAttention, PatchAttention
from liftbyimage.nn.factored_patches import FactoredPatches
from liftbyimage.nn.formulation import AttentionSize, Formulation, check_formulation
from liftbyimage.ops import attend_patches, joint_queries, update_joints
from liftbyimage.ops._checks import check_dtype
from liftbyimage.ops._dispatch import autocast_is_on, has_kernel
from liftbyimage.ops.joint_queries import BACKENDS


class JointSide(nn.Module):
    """Self-attention over joints, their queries to the patches, and the feed-forward after what came back.

    The base of `TransformerLayer` and `PoseGuidedLayer`: parameters, checks and the choice of the formulation.
    """

    guided = False

    def __init__(self, dim: int, heads: int, mlp_ratio: float, dropout: float, formulation: Formulation) -> None:
        super().__init__()
        self.dim = dim
        self.formulation = check_formulation(formulation)
        self.self_attention = JointAttention(dim, heads)
        self.patch_attention = PatchAttention(dim, heads)
        self.feed_forward = FeedForward(dim, mlp_ratio, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def attention_size(self, joints: int) -> AttentionSize:
        return AttentionSize(self.patch_attention.heads, joints, self.guided)

    def choose(self, joints: Tensor, patches: Tensor | FactoredPatches) -> tuple[Tensor | FactoredPatches, Formulation]:
        """`patches` as joints will meet them, in the formulation asked for or the one with the fewest multiply-adds."""
        if self.formulation == "factored" and not isinstance(patches, FactoredPatches):
            raise TypeError(
                f"{type(self).__name__}: formulation 'factored' needs FactoredPatches, got a tensor of tokens"
            )
        formulation = self.formulation
        if formulation == "auto":
            formulation = self.attention_size(joints.shape[1]).cheapest(patches)
        if isinstance(patches, FactoredPatches) and formulation != "factored":
            return patches.dense(), formulation
        return patches, formulation

    def attention_map(self, joints: Tensor, patches: Tensor | FactoredPatches) -> Tensor:
        """Where `forward` has joints [B, J, D] look in patches [B, P, D]: softmax(Q Kᵀ / √d), [B, H, J, P].

        Computed anew: `forward` never keeps it. In training mode with dropout it is that of another draw.
        """
        self.check_tokens(joints, patches)
        memory = self.patch_attention.memory(*self.choose(joints, patches))
        _, query = self.ask(joints, memory.fold)
        attended = attend_patches(
            memory.rows(query),
            memory.key,
            memory.value,
            scale=self.patch_attention.scale,
            need_attention=True,
            need_importance=False,
        )
        assert attended.attention is not None
        return attended.attention

    def ask(self, joints: Tensor, fold: Tensor | None) -> tuple[Tensor, Tensor]:
        """joints [B, J, D] after self-attention, and their query rows [B, H, J, N]."""
        if self._fuses(joints):
            own, other, norm = self.self_attention, self.patch_attention, self.norm1
            weights = (own.in_proj_weight, own.in_proj_bias, own.out_proj.weight, own.out_proj.bias)
            query = (other.in_proj_weight[: self.dim], other.in_proj_bias[: self.dim])
            return joint_queries(joints, *weights, norm.weight, norm.bias, *query, fold, heads=own.heads, eps=norm.eps)
        joints = self.norm1(joints + self.dropout(self.self_attention(joints)))
        return joints, self.patch_attention.query(joints, fold)

    def digest(self, joints: Tensor, context: Tensor, unfold: Tensor | None, value_bias: Tensor | None) -> Tensor:
        """joints [B, J, D] after what they gathered, contexts [B, H, J, N], and the feed-forward."""
        if self._fuses(joints):
            out, feed, norms = self.patch_attention.out_proj, self.feed_forward, (self.norm2, self.norm3)
            (weight2, bias2), (weight3, bias3) = ((norm.weight, norm.bias) for norm in norms)
            linear = (feed.linear1.weight, feed.linear1.bias, feed.linear2.weight, feed.linear2.bias)
            answer = (context, unfold, value_bias, out.weight, out.bias)
            return update_joints(joints, *answer, weight2, bias2, *linear, weight3, bias3, eps=norms[0].eps)
        attended = self.patch_attention.output(context, unfold, value_bias)
        joints = self.norm2(joints + self.dropout(attended))
        return self.norm3(joints + self.dropout(self.feed_forward(joints)))

    def _fuses(self, joints: Tensor) -> bool:
        """Whether the fused ops have a kernel for `joints` and nothing asks for the steps one by one: no gradient,
        which would recompute them, no dropout, and no autocast, which casts them one by one as it does in training."""
        inference = not torch.is_grad_enabled() and not (self.training and self.dropout.p > 0)
        return inference and not autocast_is_on(joints.device.type) and has_kernel(BACKENDS, joints)

    def check_tokens(self, joints: Tensor, patches: Tensor | FactoredPatches) -> None:
        name = type(self).__name__
        if not isinstance(joints, Tensor):
            raise TypeError(f"{name}: joints must be a tensor, got {type(joints).__name__}")
        if not isinstance(patches, (Tensor, FactoredPatches)):
            raise TypeError(f"{name}: patches must be a tensor or FactoredPatches, got {type(patches).__name__}")
        for argument, tokens, axis in (("joints", joints, "J"), ("patches", patches, "P")):
            if len(tokens.shape) != 3 or tokens.shape[2] != self.dim:
                raise ValueError(
                    f"{name}: {argument} must have shape [B, {axis}, {self.dim}], got {list(tokens.shape)}"
                )
            check_dtype(name, argument, tokens, "the layer's", self.norm1.weight.dtype)
        if joints.shape[0] != patches.shape[0]:
            raise ValueError(f"{name}: patches must have joints' batch size {joints.shape[0]}, got {patches.shape[0]}")
