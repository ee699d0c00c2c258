"""Real person crops of four calibrated cameras: detected 2D poses, triangulated 3D, encoder features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from liftbyimage.data.camera import Camera
from liftbyimage.data.crop import apply_affine, normalise_keypoints

_LEVELS = 4


def load(root: str | Path) -> dict[str, np.ndarray]:
    """The arrays of ``poses.npz``, by name (lengths in metres, pixels of the full frame).

    Raises:
        ValueError: if the folder lacks one of its parts.
    """
    root = Path(root)
    missing = [name for name in ("poses.npz", "features.npz", "crops") if not (root / name).exists()]
    if missing:
        raise ValueError(
            f"root {root}: expected a folder with poses.npz, features.npz and crops/000.jpg, 001.jpg, …, "
            f"missing {', '.join(missing)}"
        )
    with np.load(root / "poses.npz", allow_pickle=False) as arrays:
        return dict(arrays)


class Pose2SimDataset(Dataset[dict[str, Any]]):
    """Items are dicts, in the order of the files:

    - ``features`` float32 [C, Hf, Wf]: the encoder map of ``level`` (0: [40, 64, 48] … 3: [320, 8, 6]), raw;
    - ``pose_2d`` float32 [17, 2]: detected joints, crop coordinates normalised to [-1, 1];
    - ``pose_3d`` float32 [17, 3]: metres, relative to the pelvis, camera axes;
    - ``keypoints_px`` float32 [17, 2]: detected joints in pixels of the full frame;
    - ``image_path`` str: the 192×256 crop; ``camera`` and ``frame`` int.

    Attributes:
        arrays: everything in ``poses.npz``.
        cameras: one ``Camera`` per view, world in metres.

    Args:
        root: the folder with poses.npz, features.npz and crops/.
        level: feature level, 0 (finest) to 3.
    """

    def __init__(self, root: str | Path, level: int = 0) -> None:
        if level not in range(_LEVELS):
            raise ValueError(f"level must be 0, 1, 2 or 3, got {level}")
        self.root = Path(root)
        self.level = level
        self.arrays = load(root)
        self.cameras = tuple(
            Camera(K, R, t, distortion, (int(width), int(height)))
            for K, R, t, distortion, (width, height) in zip(
                *(self.arrays[name] for name in ("cam_K", "cam_R", "cam_t", "cam_dist", "image_size")),
                strict=True,
            )
        )
        keypoints = self.arrays["keypoints_h36m"][..., :2]  # [N, 17, 2]
        crop_px = apply_affine(self.arrays["crop_matrix"], keypoints)
        joints = self.arrays["joints_3d"]  # [N, 17, 3]
        self._keypoints_px = torch.from_numpy(keypoints.copy())
        self._pose_2d = torch.from_numpy(normalise_keypoints(crop_px)).float()
        self._pose_3d = torch.from_numpy(joints - joints[:, :1])
        self._features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.arrays["camera"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return {
            "features": torch.from_numpy(self._feature_maps()[index].astype(np.float32)),
            "pose_2d": self._pose_2d[index],
            "pose_3d": self._pose_3d[index],
            "keypoints_px": self._keypoints_px[index],
            "image_path": str(self.root / "crops" / f"{index:03d}.jpg"),
            "camera": int(self.arrays["camera"][index]),
            "frame": int(self.arrays["frame"][index]),
        }

    def _feature_maps(self) -> np.ndarray:
        if self._features is None:
            with np.load(self.root / "features.npz", allow_pickle=False) as arrays:
                self._features = arrays[f"level{self.level}"]  # [N, C, Hf, Wf] float16
        return self._features

    def split_even_odd(self, camera: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the even and of the odd instants, of one camera or of all.

        An instant is a crop's rank in time among its camera's crops: the cameras run in step, their frame
        numbers do not.
        """
        cameras, frames = self.arrays["camera"], self.arrays["frame"]
        if camera is not None and camera not in range(len(self.cameras)):
            raise ValueError(f"camera must be 0 to {len(self.cameras) - 1}, got {camera}")
        earlier = (cameras[:, None] == cameras) & (frames[:, None] > frames)  # [N, N]
        instant = earlier.sum(axis=1)
        chosen = np.ones(len(self), dtype=bool) if camera is None else cameras == camera
        return np.flatnonzero(chosen & (instant % 2 == 0)), np.flatnonzero(chosen & (instant % 2 == 1))
