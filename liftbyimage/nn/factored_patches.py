"""Image tokens that are never formed: channels and the embedding that would make tokens of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liftbyimage.ops._checks import check_dtype


@dataclass(frozen=True, eq=False, repr=False)
class FactoredPatches:
    """Patch tokens T = channels · embedding + bias, kept as their factors.

    Attention reads the few channels instead of the wide tokens: with rows Q against tokens,
    S = Q Tᵀ = (Q embeddingᵀ) channelsᵀ but for a constant per row, which the softmax drops, and
    A T = (A channels) embedding + bias, because rows of A sum to 1. The pose-guided update T + Aᵀ U leaves tokens
    factored: its attention columns become R more channels, and the rows U their embedding (docs/kernels/factored.md).
    Layers of `liftbyimage.nn` take it in place of tokens [B, P, D]; ops take tensors, so give them `dense()`.

    Args:
        channels: [B, P, W], features and position channels, then the attention of every update.
        embedding: [W, D] for all samples, or [B, W, D] once an update has joined.
        bias: [D].

    Raises:
        TypeError: a factor is no tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not fit.

    All three are differentiable through everything that reads them. Rounding apart, nothing depends on whether
    tokens are factored.

    Source: linearity of Lifting by Image (AAAI 2024) in its image tokens, Eq. 1 and 2.
    """

    channels: Tensor
    embedding: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        channels, embedding, bias = self.channels, self.embedding, self.bias
        for name, factor in (("channels", channels), ("embedding", embedding), ("bias", bias)):
            if not isinstance(factor, Tensor):
                raise TypeError(f"FactoredPatches: {name} must be a tensor, got {type(factor).__name__}")
            if factor.device != channels.device:
                raise ValueError(
                    f"FactoredPatches: {name} must be on channels' device {channels.device}, got {factor.device}"
                )
            check_dtype("FactoredPatches", name, factor, "channels'", channels.dtype)
        if channels.dim() != 3:
            raise ValueError(f"FactoredPatches: channels must have shape [B, P, W], got {list(channels.shape)}")
        batch, _, width = channels.shape
        if embedding.dim() not in (2, 3) or tuple(embedding.shape[:-1]) not in ((width,), (batch, width)):
            raise ValueError(
                f"FactoredPatches: embedding must have shape [{width}, D] or [{batch}, {width}, D], "
                f"got {list(embedding.shape)}"
            )
        if tuple(bias.shape) != (embedding.shape[-1],):
            raise ValueError(f"FactoredPatches: bias must have shape [{embedding.shape[-1]}], got {list(bias.shape)}")

    @property
    def shape(self) -> torch.Size:
        """[B, P, D], the shape of the tokens."""
        return torch.Size((*self.channels.shape[:2], self.embedding.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.channels.dtype

    @property
    def device(self) -> torch.device:
        return self.channels.device

    @property
    def width(self) -> int:
        """W: how many channels stand for the D numbers of a token."""
        return self.channels.shape[2]

    @property
    def shared(self) -> bool:
        """Whether all samples have one embedding."""
        return self.embedding.dim() == 2

    def dense(self) -> Tensor:
        """The tokens [B, P, D]."""
        return self._embed(self.channels)

    def gather(self, index: Tensor) -> Tensor:
        """The tokens [B, K, D] of the patches `index` [B, K] (int64) alone."""
        return self._embed(self.channels.gather(1, index[:, :, None].expand(-1, -1, self.width)))

    def replace_channels(self, channels: Tensor) -> FactoredPatches:
        """Other patches [B, K, W] under the same embedding."""
        return FactoredPatches(channels, self.embedding, self.bias)

    def guided(self, channels: Tensor, rows: Tensor) -> FactoredPatches:
        """T + Aᵀ U, for channels with the attention A beside them [B, P, W + H·J], as `guide_patches` gives them, and
        rows U [B, H, J, D]."""
        embedding = torch.cat([self.embedding.expand(rows.shape[0], -1, -1), rows.flatten(1, 2)], dim=1)
        return FactoredPatches(channels, embedding, self.bias)

    def detach(self) -> FactoredPatches:
        return FactoredPatches(self.channels.detach(), self.embedding.detach(), self.bias.detach())

    def to(self, *args: Any, **kwargs: Any) -> FactoredPatches:
        """Every factor by `torch.Tensor.to`: another device or dtype."""
        factors = (self.channels, self.embedding, self.bias)
        return FactoredPatches(*(factor.to(*args, **kwargs) for factor in factors))

    def __repr__(self) -> str:
        shared = "one embedding" if self.shared else "an embedding per sample"
        return f"FactoredPatches({list(self.shape)} as {self.width} channels, {shared}, {self.dtype}, {self.device})"

    def _embed(self, channels: Tensor) -> Tensor:
        if self.shared:
            return torch.addmm(self.bias, channels.flatten(0, 1), self.embedding).unflatten(0, channels.shape[:2])
        return torch.baddbmm(self.bias, channels, self.embedding)
