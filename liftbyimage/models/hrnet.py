"""HRNet for 2D pose (K. Sun et al., "Deep High-Resolution Representation Learning for Human Pose Estimation",
CVPR 2019), with the module names of the official `pose_hrnet_w32_256x192.pth` and `…w48_256x192.pth`."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from liftbyimage.models._images import check_images

TAPS = ("final", "heatmaps", "branches")

_WIDTHS = (32, 48)
_BLOCKS = 4
_STAGE_MODULES = {2: 1, 3: 4, 4: 3}


def _conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, relu: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if in_channels == out_channels else _conv_bn(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + residual)


class _BasicBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + residual)


def _fuse_layer(channels: Sequence[int], source: int, target: int) -> nn.Module | None:
    """What carries branch `source` to the size and width of branch `target`; None for the branch itself."""
    if source == target:
        return None
    if source > target:
        layers = _conv_bn(channels[source], channels[target], 1)
        layers.append(nn.Upsample(scale_factor=2 ** (source - target), mode="nearest"))
        return layers
    steps = [_conv_bn(channels[source], channels[source], 3, 2, relu=True) for _ in range(target - source - 1)]
    return nn.Sequential(*steps, _conv_bn(channels[source], channels[target], 3, 2))


class _HighResolutionModule(nn.Module):
    """Parallel branches of basic blocks, then an exchange between them into the first `fused` resolutions."""

    def __init__(self, channels: Sequence[int], fused: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(_BasicBlock(width) for _ in range(_BLOCKS))) for width in channels
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_fuse_layer(channels, source, target) for source in range(len(channels)))
            for target in range(fused)
        )
        self.relu = nn.ReLU(inplace=True)

    def run_branches(self, inputs: list[Tensor]) -> list[Tensor]:
        return [branch(x) for branch, x in zip(self.branches, inputs, strict=True)]

    def fuse(self, branches: list[Tensor]) -> list[Tensor]:
        outputs = []
        for layers in self.fuse_layers:
            # Out of place: `branches` may be handed to the caller as a tap.
            terms = [x if layer is None else layer(x) for layer, x in zip(layers, branches, strict=True)]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            outputs.append(self.relu(total))
        return outputs

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return self.fuse(self.run_branches(inputs))


class HRNet(nn.Module):
    """HRNet-w32 or -w48 with the pose head, weights random until `load_official`.

    Args:
        width: channels of the highest resolution, 32 or 48; the four branches have w, 2w, 4w, 8w channels at
            strides 4, 8, 16, 32.
        num_joints: number of heatmaps (17 for the official COCO weights); None for a backbone without the pose head.

    Attributes:
        channels: channels of the `final` tap (= width).
        branch_channels: channels of the four maps of the `branches` tap.
        stride: image pixels per pixel of the `final` tap (4).

    Source: K. Sun et al., CVPR 2019. At 256x192 w32 takes 7.645 GMAC, w48 15.69 GMAC.
    """

    stride = 4

    def __init__(self, width: int = 32, num_joints: int | None = 17) -> None:
        super().__init__()
        if width not in _WIDTHS:
            raise ValueError(f"HRNet: width must be 32 or 48, got {width!r}")
        if num_joints is not None and (not isinstance(num_joints, int) or num_joints < 1):
            raise ValueError(f"HRNet: num_joints must be an integer of at least 1 or None, got {num_joints!r}")
        self.channels = width
        self.num_joints = num_joints
        widths = [width * 2**branch for branch in range(4)]
        self.branch_channels = tuple(widths)

        self.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        stem = 64 * _Bottleneck.expansion
        self.layer1 = nn.Sequential(_Bottleneck(64, 64), *(_Bottleneck(stem, 64) for _ in range(3)))

        # A new branch is born one Sequential deeper than a branch that only changes width.
        self.transition1 = nn.ModuleList(
            [
                _conv_bn(stem, widths[0], 3, relu=True),
                nn.Sequential(_conv_bn(stem, widths[1], 3, 2, relu=True)),
            ]
        )
        self.stage2 = self._stage(2, widths)
        self.transition2 = self._transition(2, widths)
        self.stage3 = self._stage(3, widths)
        self.transition3 = self._transition(3, widths)
        self.stage4 = self._stage(4, widths, last_fused=1)
        self.final_layer = None if num_joints is None else nn.Conv2d(width, num_joints, 1)

    @staticmethod
    def _stage(stage: int, widths: list[int], last_fused: int | None = None) -> nn.Sequential:
        count = _STAGE_MODULES[stage]
        fused = [stage] * (count - 1) + [last_fused or stage]
        return nn.Sequential(*(_HighResolutionModule(widths[:stage], outputs) for outputs in fused))

    @staticmethod
    def _transition(stage: int, widths: list[int]) -> nn.ModuleList:
        born = nn.Sequential(_conv_bn(widths[stage - 1], widths[stage], 3, 2, relu=True))
        return nn.ModuleList([*([None] * stage), born])

    def forward(self, images: Tensor, taps: Sequence[str] = ("final",)) -> dict[str, Tensor | list[Tensor]]:
        """Compute the named taps, and no layer beyond the deepest of them.

        Args:
            images: [B, 3, H, W], RGB, ImageNet-normalised, H and W multiples of 32 (256x192 for the official
                weights), dtype and device of the weights (any floating dtype under autocast).
            taps: names among
                `final`: highest-resolution output of stage 4, [B, width, H/4, W/4];
                `heatmaps`: pose head on `final`, [B, num_joints, H/4, W/4];
                `branches`: list of the four branch outputs inside `stage4.0` before fusion,
                [B, width*2**i, H/(4*2**i), W/(4*2**i)] for i = 0..3.

        Returns:
            A dict with one entry per tap, in the input's dtype, differentiable in `images` and the weights.

        Raises:
            TypeError, ValueError: wrong type, rank, size, dtype or device of `images`; unknown or no `taps`, or
                heatmaps of a backbone without the pose head.
        """
        check_images("HRNet", images, self.conv1.weight, 32)
        _check_taps(taps)
        if "heatmaps" in taps and self.final_layer is None:
            raise ValueError("HRNet: taps must not name heatmaps, for this backbone has no pose head (num_joints=None)")
        outputs: dict[str, Tensor | list[Tensor]] = {}
        branches = self.stage4[0].run_branches(self._stage4_input(images))
        if "branches" in taps:
            outputs["branches"] = branches
        if "final" in taps or "heatmaps" in taps:
            maps = self.stage4[0].fuse(branches)
            for module in self.stage4[1:]:
                maps = module(maps)
            final = maps[0]
            if "final" in taps:
                outputs["final"] = final
            if self.final_layer is not None and "heatmaps" in taps:
                outputs["heatmaps"] = self.final_layer(final)
        return outputs

    def features(self, images: Tensor) -> Tensor:
        """The `final` tap: images [B, 3, H, W] as in `forward` -> [B, channels, H/4, W/4]."""
        return self(images, ("final",))["final"]

    def branches(self, images: Tensor) -> list[Tensor]:
        """The `branches` tap: images [B, 3, H, W] as in `forward` -> four maps of `branch_channels`."""
        return self(images, ("branches",))["branches"]

    def _stage4_input(self, images: Tensor) -> list[Tensor]:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.layer1(x)  # [B, 256, H/4, W/4]
        branches = self.stage2([transition(x) for transition in self.transition1])
        branches = self.stage3([*branches, self.transition2[-1](branches[-1])])
        return [*branches, self.transition3[-1](branches[-1])]

    def load_official(self, weights: Mapping[str, Tensor] | str | os.PathLike[str]) -> HRNet:
        """Load official weights in place, all or nothing, and return self.

        Args:
            weights: flat state dict, or path of a file that holds one (read with `weights_only=True`).
                Entries `num_batches_tracked` may be missing, and all names may carry the prefix `module.`.

        Raises:
            TypeError: not a state dict.
            ValueError: an unreadable file, or names or shapes of another network (five of each kind named).
        """
        given = _strip_prefix(_read_state_dict(weights))
        own = self.state_dict()
        missing = [name for name in own if name not in given and not name.endswith(".num_batches_tracked")]
        unexpected = [name for name in given if name not in own]
        if missing or unexpected:
            raise ValueError(
                f"HRNet.load_official: weights must have the names of HRNet-w{self.channels}, "
                f"got {len(missing)} missing {_first(missing)} "
                f"and {len(unexpected)} unexpected {_first(unexpected)}"
            )
        misshaped = [
            f"{name} {list(value.shape)} instead of {list(own[name].shape)}"
            for name, value in given.items()
            if value.shape != own[name].shape
        ]
        if misshaped:
            raise ValueError(
                f"HRNet.load_official: weights must have the shapes of HRNet-w{self.channels} with "
                f"{self.num_joints} joints, got {len(misshaped)} other {_first(misshaped)}"
            )
        self.load_state_dict({**own, **given})
        return self


def _check_taps(taps: Sequence[str]) -> None:
    if isinstance(taps, str) or not isinstance(taps, Sequence):
        raise TypeError(f"HRNet: taps must be a sequence of names, got {taps!r}")
    if not taps or any(tap not in TAPS for tap in taps):
        raise ValueError(f"HRNet: taps must be one or more of {', '.join(TAPS)}, got {list(taps)}")


def _read_state_dict(weights: Mapping[str, Tensor] | str | os.PathLike[str]) -> Mapping[str, Tensor]:
    if isinstance(weights, str | os.PathLike):
        try:
            weights = torch.load(weights, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"HRNet.load_official: weights must be a file of tensors saved by torch.save, "
                f"got the unreadable {os.fspath(weights)}"
            ) from error
    if not isinstance(weights, Mapping):
        raise TypeError(f"HRNet.load_official: weights must be a state dict or a path, got {type(weights).__name__}")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(
                f"HRNet.load_official: weights must map names to tensors, got {type(value).__name__} at {name!r}"
            )
    return weights


def _strip_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "module."
    if all(name.startswith(prefix) for name in state_dict):
        return {name.removeprefix(prefix): value for name, value in state_dict.items()}
    return dict(state_dict)


def _first(items: list[str], count: int = 5) -> str:
    return f"({', '.join(items[:count])}{', …' if len(items) > count else ''})" if items else "(none)"


def hrnet_w32(num_joints: int | None = 17) -> HRNet:
    """HRNet-w32 (28,536,113 parameters with 17 joints); None: without the pose head."""
    return HRNet(32, num_joints)


def hrnet_w48(num_joints: int | None = 17) -> HRNet:
    """HRNet-w48 (63,595,745 parameters with 17 joints); None: without the pose head."""
    return HRNet(48, num_joints)
