"""People whose 17 joints are coloured squares, the model that finds them, and lifters that need no weights.

The model is the decoding's counterpart: what it sees is exactly known, also in a crop of any place and size.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from liftbyimage.data import coco_to_h36m, normalise_keypoints
from liftbyimage.data.crop import IMAGENET_MEAN, IMAGENET_STD, apply_affine
from liftbyimage.data.synthetic import generate

SIZE = (200, 240)  # height, width of the pictures
HALF = 5  # px of a square
GREEN = 220
_SLOTS = [(18 * (joint % 5), 34 * (joint // 5) + 5 * (joint % 2)) for joint in range(17)]
JOINTS = np.array(_SLOTS, dtype=np.float64)  # [17, 2], COCO order, 72 x 107 px


def expected_pose(at: tuple[float, float]) -> np.ndarray:
    """Human3.6M joints [17, 2] of a person drawn at a place."""
    return coco_to_h36m(JOINTS + at)


def picture(at: tuple[int, int] | None) -> np.ndarray:
    """RGB [200, 240, 3]: a synthetic scene of which only blue is left, and a person unless `at` is None."""
    image = np.zeros((*SIZE, 3), np.uint8)
    scene = generate(1, seed=3).image[0].numpy()
    image[:, :192, 2] = scene[: SIZE[0], :, 2]
    if at is not None:
        for joint, (x, y) in enumerate((JOINTS + at).astype(int)):
            image[y - HALF : y + HALF + 1, x - HALF : x + HALF + 1, :2] = _red(joint), GREEN
    return image


def _red(joint: int) -> int:
    return 20 + 13 * joint


class MarkerModel:
    """A PoseModel that knows the squares; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        assert images.shape == (1, 3, 256, 192)
        assert images.dtype == torch.float32
        scale, shift = (torch.tensor(values)[:, None, None] for values in (IMAGENET_STD, IMAGENET_MEAN))
        red, green, _ = (255 * (images[0] * scale + shift)).unbind(0)  # [256, 192]
        reds = torch.tensor([_red(joint) for joint in range(17)])[:, None, None]
        match = torch.exp(-(((red - reds) / 4) ** 2) - ((green - GREEN) / 25) ** 2)  # [17, 256, 192]
        return F.avg_pool2d(match[None], 5, stride=4, padding=2)  # [1, 17, 64, 48], pixel u at crop pixel 4u


class ContextLifter(nn.Module):
    """The shape of Context-Aware PoseFormer's lifter: two pose inputs, one tensor out, not root-relative."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_joints=17)

    def pose_inputs(self, keypoints: np.ndarray, crop_matrix: np.ndarray, image_size: np.ndarray) -> tuple[Tensor, ...]:
        in_picture = (keypoints - image_size[:, None] / 2) / image_size[:, None, :1]
        in_crop = normalise_keypoints(apply_affine(crop_matrix, keypoints))
        return torch.from_numpy(in_picture).float(), torch.from_numpy(in_crop).float()


class ContextPipeline(nn.Module):
    """A pose that depends on everything it is given, each row on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.lifter = None, ContextLifter()
        self.batches: list[int] = []

    def forward(self, images: Tensor, in_picture: Tensor, in_crop: Tensor) -> Tensor:
        self.batches.append(len(images))
        depth = in_picture.sum(dim=2, keepdim=True) * images.mean(dim=(1, 2, 3))[:, None, None]
        return torch.cat([in_crop, depth], dim=2) + 5


def write_video(path: Path, places: list[tuple[int, int] | None], fourcc: str = "MJPG", fps: float = 20) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), fps, SIZE[::-1])
    assert writer.isOpened()
    writer.set(cv2.VIDEOWRITER_PROP_QUALITY, 100)
    for at in places:
        writer.write(cv2.cvtColor(picture(at), cv2.COLOR_RGB2BGR))
    writer.release()
    return path
