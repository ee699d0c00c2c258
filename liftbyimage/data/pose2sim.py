"""Real person crops of four calibrated cameras: detected 2D poses, triangulated 3D, encoder features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from liftbyimage.data.camera import Camera
from liftbyimage.data.crop import CROP_SIZE, apply_affine, normalise_keypoints, read_image
from liftbyimage.data.source import CorruptRecord, Source

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


def _instants(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Each crop's rank in time among its camera's crops, int [N]."""
    cameras, frames = arrays["camera"], arrays["frame"]
    earlier = (cameras[:, None] == cameras) & (frames[:, None] > frames)  # [N, N]
    return earlier.sum(axis=1)


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

        The cameras run in step, their frame numbers do not: an instant is a rank.
        """
        cameras, instant = self.arrays["camera"], _instants(self.arrays)
        if camera is not None and camera not in range(len(self.cameras)):
            raise ValueError(f"camera must be 0 to {len(self.cameras) - 1}, got {camera}")
        chosen = np.ones(len(self), dtype=bool) if camera is None else cameras == camera
        return np.flatnonzero(chosen & (instant % 2 == 0)), np.flatnonzero(chosen & (instant % 2 == 1))


_INSTANTS = {"all": (0, 1), "even": (0,), "odd": (1,)}


class Pose2SimPeople(Source):
    """The crops as records of 256×192 px, in the order of the files; nobody knows their masks.

    `keypoints` are the detector's, `pose_3d` the triangulated joints. `groups` are the cameras by name.

    Args:
        root: the folder with poses.npz, features.npz and crops/.
        instants: "all", or every other instant of each camera: "even" or "odd".
        cameras: their numbers, as a list, as text such as "0+1", or one number; None takes all.
    """

    def __init__(
        self, root: str | Path, *, instants: str = "all", cameras: Sequence[int] | str | int | None = None
    ) -> None:
        if instants not in _INSTANTS:
            raise ValueError(f"instants: expected one of {', '.join(_INSTANTS)}, got {instants!r}")
        arrays = load(root)
        names = [str(name) for name in arrays["cam_name"]]
        chosen = _camera_numbers(cameras, len(names))
        parity = np.isin(_instants(arrays) % 2, _INSTANTS[instants])
        rows = np.flatnonzero(parity & np.isin(arrays["camera"], chosen))  # [n]
        joints = arrays["joints_3d"][rows]
        camera = arrays["camera"][rows]
        self.size, self.groups = CROP_SIZE, tuple(names[number] for number in chosen)
        self._paths = [Path(root) / "crops" / f"{row:03d}.jpg" for row in rows]
        self._keypoints = arrays["keypoints_h36m"][rows, :, :2].astype(np.float32)
        self._crop_matrix = arrays["crop_matrix"][rows].astype(np.float64)
        self._image_size = arrays["image_size"][camera].astype(np.float32)
        self._pose_3d = (joints - joints[:, :1]).astype(np.float32)
        self._group = [chosen.index(number) for number in camera]
        self.description = {
            "source": "pose2sim",
            "instants": instants,
            "cameras": chosen,
            "bytes": {
                path.name: path.stat().st_size for path in (Path(root) / "poses.npz", *self._paths) if path.exists()
            },
        }

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return {
            "image": self._picture(self._paths[index]),
            "keypoints": self._keypoints[index].copy(),
            "crop_matrix": self._crop_matrix[index].copy(),
            "image_size": self._image_size[index].copy(),
            "pose_3d": self._pose_3d[index].copy(),
            "group": self._group[index],
        }

    def _picture(self, path: Path) -> np.ndarray:
        try:
            image = read_image(path)
        except ValueError as error:
            raise CorruptRecord(str(error)) from None
        if image.shape[:2] != self.size:
            height, width = image.shape[:2]
            raise CorruptRecord(f"image {path}: expected 192 px wide and 256 px high, got {width} and {height}")
        return image


def _camera_numbers(cameras: Sequence[int] | str | int | None, count: int) -> list[int]:
    listed = cameras.split("+") if isinstance(cameras, str) else [cameras] if isinstance(cameras, int) else cameras
    known = {str(number): number for number in range(count)}
    numbers = list(known.values()) if listed is None else [known.get(str(number), -1) for number in listed]
    if -1 in numbers or not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"cameras: expected different numbers from 0 to {count - 1}, such as 0+1, got {cameras!r}")
    return sorted(numbers)
