"""A source of a few random people in memory, and small pipelines of every lifter to lift them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from liftbyimage import models
from liftbyimage.data.crop import box_to_crop_matrix
from liftbyimage.data.source import CorruptRecord, Source

SIZE = (64, 48)
CHANNELS = (4, 8, 16, 32)


class FewPeople(Source):
    """Random pictures and plausible sizes of joints; record i is of group i mod 3."""

    groups = ("walking", "sitting", "eating")
    size = SIZE

    def __init__(
        self, count: int = 12, *, mask: bool = True, truth: bool = True, corrupt: Sequence[int] = (), seed: int = 0
    ) -> None:
        random = np.random.default_rng(seed)
        self.corrupt = corrupt
        box = np.array([100.0, 80.0, 340.0, 500.0])
        pose = random.normal(scale=0.1, size=(count, 17, 3)).astype(np.float32)
        self.columns = {
            "image": random.integers(0, 256, (count, *SIZE, 3), dtype=np.uint8),
            "keypoints": random.uniform(box[:2], box[2:], (count, 17, 2)).astype(np.float32),
            "crop_matrix": np.tile(box_to_crop_matrix(box, SIZE), (count, 1, 1)),
            "image_size": np.tile(np.float32([640, 580]), (count, 1)),
        }
        if truth:
            self.columns["pose_3d"] = pose - pose[:, :1]
        if mask:
            self.columns["mask"] = random.uniform(size=(count, *SIZE)) < np.linspace(0.2, 0.8, count)[:, None, None]
        self.description = {"source": "few", "count": count, "seed": seed, "size": SIZE}

    def __len__(self) -> int:
        return len(self.columns["image"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.corrupt:
            raise CorruptRecord(f"image {index}.jpg: not an image that OpenCV can read")
        return {**{name: values[index] for name, values in self.columns.items()}, "group": index % len(self.groups)}


class Branches(torch.nn.Module):
    """An encoder with maps at four strides, for a ContextAwarePoseFormer."""

    branch_channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.maps = torch.nn.ModuleList(
            [torch.nn.Conv2d(3, width, 3, 4 * 2**level, 1) for level, width in enumerate(CHANNELS)]
        )

    def branches(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [convolution(images) for convolution in self.maps]


def small_pipeline(name: str, skeleton: str = "human3.6m") -> models.Pipeline:
    """Of random weights that give poses of some 0.1 m, in training mode."""
    torch.manual_seed(3)
    encoder: torch.nn.Module | None = None
    if name == "lift-by-image":
        encoder, lifter = models.TinyEncoder(8), models.build(name, image_channels=8, grid=(16, 12), dim=16, heads=2)
        heads = [lifter.coarse_head, lifter.refined_head]
    elif name == "pose-only":
        lifter = models.build(name, dim=16, heads=2, layers=1)
        heads = [lifter.head]
    else:
        sizes = {"dim": 16, "heads": 2, "context_heads": 2, "samples": 2, "depth": 1}
        encoder, lifter = Branches(), models.build(name, channels=CHANNELS, skeleton=skeleton, **sizes)
        torch.nn.init.normal_(lifter.Spatial_pos_embed)  # zeros would make a pose of all joints in one place
        heads = [lifter.head[1]]
    with torch.no_grad():
        for head in heads:
            head.weight *= 0.15
    return models.Pipeline(encoder, lifter)
