"""The lifter replayed from a CUDA graph: one launch instead of some hundred. Needs a CUDA device.

Prints that replayed and eager outputs are equal, or that there is no device.
"""

import torch

from liftbyimage.models import LiftByImage, LiftByImageConfig, capture

CONFIG = LiftByImageConfig(image_channels=8, grid=(8, 6), dim=32, heads=4)


def main() -> None:
    if not torch.cuda.is_available():
        print("skipped: a CUDA graph needs a CUDA device.")
        return
    torch.manual_seed(0)
    lifter = LiftByImage(CONFIG).eval().cuda()
    features, pose_2d = torch.randn(1, 8, 8, 6, device="cuda"), torch.rand(1, 17, 2, device="cuda") * 2 - 1
    graph = capture(lifter, features, pose_2d)
    features, pose_2d = torch.randn_like(features), torch.rand_like(pose_2d)
    with torch.no_grad():
        torch.testing.assert_close(graph(features, pose_2d).pose_3d, lifter(features, pose_2d).pose_3d)
    print("Replayed outputs equal the eager ones.")


if __name__ == "__main__":
    main()
