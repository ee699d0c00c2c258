"""Features computed once and stored in half precision; the lifter then trains without the encoder.

Prints the loss before and after, and how far the trained poses from stored features are from those of the encoder. When
an encoder is frozen anyway, `liftbyimage train --cache` goes further and stores what the first stage makes of every
record.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from liftbyimage.data.crop import normalise_image
from liftbyimage.data.synthetic import generate
from liftbyimage.models import LiftByImage, LiftByImageConfig, TinyEncoder

PEOPLE = 8


def main() -> None:
    torch.manual_seed(0)
    people = generate(PEOPLE, seed=0)
    scenes = [people.scene(i) for i in range(PEOPLE)]
    images = normalise_image(torch.stack([scene["image"] for scene in scenes]))  # [N, 3, 256, 192]
    size = torch.tensor([192.0, 256.0])
    pose_2d = torch.stack([scene["pose_2d"] for scene in scenes]).float() / size * 2 - 1
    pose_3d = torch.stack([scene["pose_3d"] for scene in scenes]).float()
    pose_3d = pose_3d - pose_3d[:, :1]

    encoder = TinyEncoder().eval()
    lifter = LiftByImage(LiftByImageConfig(image_channels=encoder.channels, dim=32, heads=4, dropout=0.0)).eval()
    with torch.no_grad():
        features = encoder.features(images)  # [N, C, 64, 48]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npz"
        np.savez(path, features=features.half().numpy())
        stored = torch.from_numpy(np.load(path, allow_pickle=False)["features"]).float()
    # float16 keeps 11 bits, rounded to the nearest; its smallest step is 2**-24
    assert ((stored - features).abs() <= 2**-11 * features.abs() + 2**-25).all()
    print("Every stored feature is its encoder's, rounded to float16.")

    optimiser = torch.optim.Adam(lifter.train().stage1_parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = F.mse_loss(lifter(stored, pose_2d).coarse_pose_3d, pose_3d)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    print(f"Loss {losses[0]:.3f} before, {losses[-1]:.3f} after 20 steps without the encoder.")

    # an untrained lifter hardly looks at the image, so poses are compared only now
    with torch.no_grad():
        anew, ours, swapped = (
            lifter.eval()(given, pose_2d).coarse_pose_3d for given in (features, stored, stored.roll(1, 0))
        )
    rounding, image = ((poses - anew).abs().max().item() for poses in (ours, swapped))
    assert rounding < image / 1000, (rounding, image)
    print(f"Rounding moves poses by at most {1000 * rounding:.3f} mm, another's image by up to {1000 * image:.0f} mm.")


if __name__ == "__main__":
    main()
