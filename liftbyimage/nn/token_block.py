"""The pre-norm transformer block of Context-Aware PoseFormer, over few tokens, with the published parameter names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from liftbyimage.nn.attention import check_heads
from liftbyimage.ops import attend_tokens, residual_attention, residual_feed_forward
from liftbyimage.ops._dispatch import Backend, autocast_is_on, has_kernel
from liftbyimage.ops._residual import add_branch
from liftbyimage.ops.residual_attention import BACKENDS as ATTENTION_BACKENDS
from liftbyimage.ops.residual_feed_forward import BACKENDS as FEED_FORWARD_BACKENDS

PUBLISHED_EPS = 1e-6  # of these blocks' layer norms; elsewhere PyTorch's 1e-5


class Projections(nn.Module):
    """Weights of a multi-head self-attention: query, key and value in one, and the output."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    """Weights of a feed-forward, `mlp_ratio` times as wide inside."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, round(dim * mlp_ratio))
        self.fc2 = nn.Linear(round(dim * mlp_ratio), dim)


def feed_forward(tokens: Tensor, norm: nn.LayerNorm, mlp: Mlp, branch_scale: Tensor | None) -> Tensor:
    """tokens [B, T, D] + branch_scale · mlp(norm(tokens))"""
    if fuses(FEED_FORWARD_BACKENDS, tokens):
        weights = (norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
        return residual_feed_forward(tokens, *weights, branch_scale, eps=norm.eps)
    return add_branch(tokens, mlp.fc2(F.gelu(mlp.fc1(norm(tokens)))), branch_scale)


def fuses(backends: Sequence[Backend], tokens: Tensor) -> bool:
    """Whether half a block is one op: where a kernel serves; but under autocast PyTorch's layers keep tokens float32"""
    return not autocast_is_on(tokens.device.type) and has_kernel(backends, tokens)


def draw_branch_scale(tokens: Tensor, drop_path: float) -> Tensor | None:
    """Stochastic depth: for each row of the batch 0 with probability `drop_path`, else 1 / (1 − drop_path); [B]."""
    if drop_path == 0:
        return None
    keep = 1 - drop_path
    return tokens.new_empty(tokens.shape[0]).bernoulli_(keep) / keep


class TokenBlock(nn.Module):
    """tokens + attention(norm1(tokens)), then the same with a feed-forward: two fused ops, or, where they
    have no kernel, PyTorch's layers about `ops.attend_tokens`.

    Its numbers equal torch.nn.TransformerEncoderLayer(dim, heads, mlp_ratio · dim, dropout=0, activation="gelu",
    norm_first=True, batch_first=True, layer_norm_eps=1e-6) with the same weights.

    Args:
        dim: token width D, a multiple of `heads`.
        drop_path: in training, the probability with which a row of the batch skips a branch (each drawn anew).
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 2.0, drop_path: float = 0.0) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads, self.drop_path = heads, drop_path
        self.norm1 = nn.LayerNorm(dim, eps=PUBLISHED_EPS)
        self.attn = Projections(dim)
        self.norm2 = nn.LayerNorm(dim, eps=PUBLISHED_EPS)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, D] → [B, T, D]"""
        drop_path = self.drop_path if self.training else 0.0
        tokens = self._attend(tokens, draw_branch_scale(tokens, drop_path))
        return feed_forward(tokens, self.norm2, self.mlp, draw_branch_scale(tokens, drop_path))

    def _attend(self, tokens: Tensor, branch_scale: Tensor | None) -> Tensor:
        norm, attn = self.norm1, self.attn
        if fuses(ATTENTION_BACKENDS, tokens):
            weights = (norm.weight, norm.bias, attn.qkv.weight, attn.qkv.bias, attn.proj.weight, attn.proj.bias)
            return residual_attention(tokens, *weights, branch_scale, heads=self.heads, eps=norm.eps)
        return add_branch(tokens, attn.proj(attend_tokens(attn.qkv(norm(tokens)), heads=self.heads)), branch_scale)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, drop_path={self.drop_path:g}"
