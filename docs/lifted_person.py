"""Train Context-Aware PoseFormer on real crops of four cameras, lift instants it has not seen, and draw one.

    python docs/lifted_person.py ../shared/data/pose2sim docs/images/lifted_person.png

The maps are those of a Lite-HRNet at four resolutions. The even instants train the lifter, the odd ones are lifted. The
picture shows the 2D pose on white, and the lifted pose beside the one triangulated from all four cameras.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from liftbyimage.data.crop import CROP_SIZE, apply_affine
from liftbyimage.data.pose2sim import Pose2SimDataset
from liftbyimage.data.skeleton import JOINT_NAMES
from liftbyimage.draw import picture_of_person, save_figure
from liftbyimage.metrics import mpjpe, p_mpjpe, root_relative
from liftbyimage.models import ContextAwarePoseFormer, ContextAwarePoseFormerConfig

CHANNELS = (40, 80, 160, 320)
STEPS, BATCH = 300, 16


def read(folder: Path) -> tuple[Pose2SimDataset, list[Tensor], Tensor]:
    """The data, its maps per level [N, C_l, H_l, W_l], and its true poses [N, 17, 3] in metres."""
    levels = [Pose2SimDataset(folder, level) for level in range(len(CHANNELS))]
    maps = [torch.stack([level[i]["features"] for i in range(len(level))]) for level in levels]
    return levels[0], maps, torch.stack([levels[0][i]["pose_3d"] for i in range(len(levels[0]))]).float()


def standardise(maps: list[Tensor], train: Tensor) -> list[Tensor]:
    """Channels of mean 0 and deviation 1 over the training crops: their ranges differ a thousandfold."""
    axes = (0, 2, 3)
    means = [one[train].mean(axes, keepdim=True) for one in maps]
    deviations = [one[train].std(axes, keepdim=True).clamp_min(1e-6) for one in maps]  # some channels are dead
    return [(one - mean) / deviation for one, mean, deviation in zip(maps, means, deviations, strict=True)]


def train_lifter(
    lifter: ContextAwarePoseFormer,
    maps: list[Tensor],
    poses: tuple[Tensor, ...],
    truth: Tensor,
    train: Tensor,
    steps: int,
) -> None:
    """The published loss and optimiser; whole channels are dropped, or 48 crops would be learnt by heart."""
    optimiser = torch.optim.AdamW(lifter.parameters(), lr=6.4e-4, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    lifter.train()
    for _ in range(steps):
        crops = train[torch.randperm(len(train))[:BATCH]]
        lifted = lifter([F.dropout2d(one[crops], 0.3) for one in maps], *(pose[crops] for pose in poses))
        optimiser.zero_grad()
        mpjpe(lifted, truth[crops]).backward()
        optimiser.step()
        schedule.step()
    lifter.eval()


class Held(NamedTuple):
    """The crops that were not trained on."""

    crop: Tensor  # [N] their numbers
    pose_crop: Tensor  # [N, 17, 2], crop px
    lifted: Tensor  # [N, 17, 3] metres, relative to the pelvis
    truth: Tensor  # [N, 17, 3], triangulated from all four cameras
    mean_pose: Tensor  # [17, 3] of the training crops


def lift_held_out(folder: Path, steps: int) -> Held:
    """Train on the even instants, lift the odd ones."""
    torch.manual_seed(0)
    data, maps, truth = read(folder)
    train, test = (torch.as_tensor(part) for part in data.split_even_odd())
    maps = standardise(maps, train)
    arrays = data.arrays
    lifter = ContextAwarePoseFormer(ContextAwarePoseFormerConfig(channels=CHANNELS, dim=64, depth=2, drop_path=0.1))
    keypoints = arrays["keypoints_h36m"][..., :2].astype(np.float64)
    poses = lifter.pose_inputs(keypoints, arrays["crop_matrix"], arrays["image_size"][arrays["camera"]])
    train_lifter(lifter, maps, poses, truth, train, steps)
    with torch.no_grad():
        lifted = root_relative(lifter([one[test] for one in maps], *(pose[test] for pose in poses)))
    pose_crop = torch.from_numpy(apply_affine(arrays["crop_matrix"], keypoints))[test]
    return Held(test, pose_crop, lifted, truth[test], truth[train].mean(0))


def main(folder: Path, picture: Path) -> None:
    held = lift_held_out(folder, STEPS)
    for name, pose in (("mean training pose", held.mean_pose.expand_as(held.truth)), ("lifted", held.lifted)):
        errors = (1000 * metric(pose, held.truth).item() for metric in (mpjpe, p_mpjpe))
        print("{}: MPJPE {:.0f} mm, P-MPJPE {:.0f} mm".format(name, *errors))
    shown = int(mpjpe(held.lifted, held.truth, reduction="none").argsort()[len(held.crop) // 2])
    crop = int(held.crop[shown])
    print(f"crop {crop}, lifted; metres from the pelvis, x right, y down, z forward:")
    for name, joint in zip(JOINT_NAMES, held.lifted[shown].tolist(), strict=True):
        print("{:15} {:6.3f} {:6.3f} {:6.3f}".format(name, *joint))
    white = np.full((*CROP_SIZE, 3), 255, dtype=np.uint8)
    title = f"crop {crop}, not trained on; of median error"
    poses = held.lifted[shown], None, held.truth[shown]
    save_figure(picture_of_person(white, held.pose_crop[shown], None, None, None, *poses, title=title), picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
