"""An encoder small enough for tests, with the branches that a Context-Aware PoseFormer reads."""

from __future__ import annotations

from torch import Tensor, nn


class SmallBranches(nn.Module):
    """Two maps, of 4 and 6 channels at strides 4 and 8."""

    branch_channels = (4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, width, 4 * 2**i, 4 * 2**i) for i, width in enumerate((4, 6)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in self.branch_channels)

    def branches(self, images: Tensor) -> list[Tensor]:
        return [norm(conv(images)) for conv, norm in zip(self.convs, self.norms, strict=True)]
