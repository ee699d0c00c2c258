"""torch.compile of the lifter as one graph, in inference and in a training step.

Prints that compiled and eager outputs are equal. The ops stay what they are; the compiler works on what lies between.
"""

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
    print("Inference: one graph, outputs equal.")

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
