"""torch.compile of the lifter as one graph, in inference and in a training step.

Prints that compiled and eager outputs are equal, and the ratio of their times. The ops stay what they are; the compiler
works on what lies between.
"""

import statistics
import timeit
from functools import partial

import torch

from liftbyimage.models import LiftByImage, LiftByImageConfig

CONFIG = LiftByImageConfig(image_channels=8, grid=(8, 6), dim=32, heads=4, dropout=0.0)


def main() -> None:
    torch.manual_seed(0)
    features, pose_2d = torch.randn(2, 8, 8, 6), torch.rand(2, 17, 2) * 2 - 1

    lifter = LiftByImage(CONFIG).eval()
    compiled = torch.compile(lifter, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(features, pose_2d).pose_3d, lifter(features, pose_2d).pose_3d)
        in_turn = [partial(each, features, pose_2d) for each in (lifter, compiled)]
        seconds = [[timeit.timeit(function, number=1) for function in in_turn] for _ in range(20)]
    before, after = (statistics.median(taken) for taken in zip(*seconds, strict=True))
    print(f"Inference: one graph, outputs equal, {before / after:.1f}x as fast as eager here.")

    gradients = []
    for step in (lifter, torch.compile(lifter, fullgraph=True)):
        lifter.zero_grad()
        out = step(features, pose_2d)
        (out.pose_3d.square().mean() + out.coarse_pose_3d.square().mean()).backward()
        gradients.append([p.grad.clone() for p in lifter.parameters() if p.grad is not None])
    for eager, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-3, atol=1e-5)
    print(f"Training step: one graph, {len(gradients[0])} gradients equal.")


if __name__ == "__main__":
    main()
