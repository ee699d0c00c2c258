"""Human3.6M (C. Ionescu et al., TPAMI 2014), as MMPose's script converts it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from liftbyimage.data.camera import Camera
from liftbyimage.data.converted import ConvertedPeople, Picture, chosen_names
from liftbyimage.data.crop import CROP_SIZE
from liftbyimage.data.skeleton import JOINT_NAMES

SUBJECTS = {"train": ("S1", "S5", "S6", "S7", "S8"), "test": ("S9", "S11")}

ACTIONS = (
    "Directions",
    "Discussion",
    "Eating",
    "Greeting",
    "Phoning",
    "Photo",
    "Posing",
    "Purchases",
    "Sitting",
    "SittingDown",
    "Smoking",
    "Waiting",
    "WalkDog",
    "Walking",
    "WalkTogether",
)

VIDEO_FPS = 50

# Human3.6M spells three actions in one way for one subject and in another for the next.
_SPELLINGS = {"TakingPhoto": "Photo", "WalkingDog": "WalkDog", "WalkingTogether": "WalkTogether"}

# S9/S9_Directions_1.54138969/S9_Directions_1.54138969_000001.jpg: subject, action, take (if any), camera, frame
_PICTURE = re.compile(r"(S\d+)_([A-Za-z]+)(?:[_ ]\d+)?\.\d+_(\d+)\.\w+$")


class Human36M(ConvertedPeople):
    """People of Human3.6M at 5 frames a second, subjects 1, 5, 6, 7 and 8 to train, 9 and 11 to test.

    The number at the end of a picture's name counts the 50 frames a second of the video from 1; at 5 frames a second
    every tenth is a record: 1, 11, 21, … That serves a file of 50 frames a second and one of 10 alike.

    `groups` are those of the 15 actions (`ACTIONS`) that occur; the two takes of an action are one group.

    Args:
        root: the folder with ``annotation_body3d/fps10/h36m_train.npz``, ``h36m_test.npz`` (or ``fps50/``),
            ``annotation_body3d/cameras.pkl`` and ``images/``.
        split: "train" or "test".
        subjects: some of the split's, as a list or as "S9+S11"; None is all.
        fps: frames a second, a divisor of 50 and of the annotation file's own rate.
        keypoints: detected 2D joints instead of the truth, see `ConvertedPeople`.
        annotations: the annotation file; None takes the split's of ``fps10/``, or of ``fps50/`` where that is missing
            or the rate asks for it.
        box: "joints" or "annotation", see `ConvertedPeople`.
        size: crop (height, width), px, or as text "256x192".

    Raises:
        ValueError: an option that cannot be, a missing part of the folder, or a file that is not as described.
    """

    layout = "annotation_body3d/fps10/h36m_train.npz and h36m_test.npz (or fps50/), and images/S1/…"
    joint_order = tuple(range(len(JOINT_NAMES)))

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        subjects: str | Sequence[str] | None = None,
        fps: int = 5,
        keypoints: str | Path | None = None,
        annotations: str | Path | None = None,
        box: str = "joints",
        size: Sequence[int] | str = CROP_SIZE,
    ) -> None:
        if split not in SUBJECTS:
            raise ValueError(f"split must be one of {', '.join(SUBJECTS)}, got {split!r}")
        if not isinstance(fps, int) or fps < 1 or VIDEO_FPS % fps:
            raise ValueError(f"fps must be a divisor of {VIDEO_FPS}, got {fps!r}")
        folder = Path(root) / "annotation_body3d"
        super().__init__(
            root,
            annotations=_annotation_file(folder, split, fps) if annotations is None else Path(annotations),
            cameras=folder / "cameras.pkl",
            subjects=chosen_names("subjects", subjects, SUBJECTS[split]),
            step=VIDEO_FPS // fps,
            keypoints=keypoints,
            box=box,
            size=size,
            description={"source": "human3.6m", "split": split, "fps": fps},
        )
        stride = math.gcd(VIDEO_FPS, self.frame_stride)
        if self.frame_stride and (VIDEO_FPS // fps) % stride:
            raise ValueError(f"fps {fps}: {self._annotations} has {VIDEO_FPS // stride} frames a second")

    def parse(self, imgname: str) -> Picture | None:
        found = _PICTURE.search(imgname)
        if found is None:
            return None
        subject, action, frame = found.groups()
        action = _SPELLINGS.get(action, action)
        return Picture(subject, action, int(frame)) if action in ACTIONS else None

    def group_order(self, groups: Iterable[str]) -> list[str]:
        return sorted(groups, key=ACTIONS.index)

    def camera(self, values: Mapping[str, Any]) -> Camera:
        """`R` turns camera axes into the world's and `T` is the camera's position, in metres."""
        return Camera.from_human36m(
            f=np.ravel(values["f"]),
            c=np.ravel(values["c"]),
            k=np.ravel(values["k"]),
            p=np.ravel(values["p"]),
            R=np.asarray(values["R"]).T,
            T=np.ravel(values["T"]),
            image_size=(int(values["w"]), int(values["h"])),
        )


def _annotation_file(folder: Path, split: str, fps: int) -> Path:
    slow, full = (folder / rate / f"h36m_{split}.npz" for rate in ("fps10", "fps50"))
    return full if (10 % fps or not slow.exists()) and full.exists() else slow
