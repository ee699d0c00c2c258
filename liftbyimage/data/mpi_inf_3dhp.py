"""MPI-INF-3DHP (D. Mehta et al., 3DV 2017), as MMPose's script converts it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from liftbyimage.data.camera import Camera
from liftbyimage.data.converted import ConvertedPeople, Picture, chosen_names
from liftbyimage.data.crop import CROP_SIZE
from liftbyimage.data.skeleton import MPI_INF_3DHP_TO_H36M

SUBJECTS = {
    "train": ("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8"),
    "test": ("TS1", "TS2", "TS3", "TS4", "TS5", "TS6"),
}

_FILES = {"train": "mpi_inf_3dhp_train.npz", "test": "mpi_inf_3dhp_test_valid.npz"}
_FOLDERS = ("annotations", "annotation_body3d")

# S1_Seq1_Cam0_000001.jpg or TS1_000001.jpg
_PICTURE = re.compile(r"(?:(S\d+)_(Seq\d+)_Cam\d+|(TS\d+))_(\d+)\.\w+$")


class MpiInf3dhp(ConvertedPeople):
    """People of MPI-INF-3DHP: sequences 1 and 2 of subjects 1 to 8 to train, or the valid frames of the test set.

    Joints are put into Human3.6M's order by name: root, neck, head and head top become pelvis, thorax, nose and head.
    `groups` are the sequences, "S1 Seq1" or "TS1". `cameras` has them by the file's keys, "S1_Seq1_Cam0" or "TS1".
    The test set's poses are not those that its authors' evaluation takes (`MpiInf3dhpTest` has both).

    Args:
        root: the folder with ``annotations/mpi_inf_3dhp_train.npz``, ``mpi_inf_3dhp_test_valid.npz``,
            ``cameras_train.pkl`` and ``cameras_test.pkl``, and with ``images/``. The annotations' folder may be called
            ``annotation_body3d`` too.
        split: "train" or "test".
        subjects: some of the split's, as a list or as "S1+S2"; None is all.
        every: every how many frames of a video one is a record.
        keypoints: detected 2D joints instead of the truth, see `ConvertedPeople`.
        annotations: the annotation file; None takes the split's.
        box: "joints" or "annotation", see `ConvertedPeople`.
        size: crop (height, width), px, or as text "256x192".

    Raises:
        ValueError: an option that cannot be, a missing part of the folder, or a file that is not as described.
    """

    layout = "annotations/mpi_inf_3dhp_train.npz and mpi_inf_3dhp_test_valid.npz, and images/S1_Seq1_Cam0_000001.jpg, …"
    joint_order = MPI_INF_3DHP_TO_H36M

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        subjects: str | Sequence[str] | None = None,
        every: int = 1,
        keypoints: str | Path | None = None,
        annotations: str | Path | None = None,
        box: str = "joints",
        size: Sequence[int] | str = CROP_SIZE,
    ) -> None:
        if split not in SUBJECTS:
            raise ValueError(f"split must be one of {', '.join(SUBJECTS)}, got {split!r}")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer, 1 or more, got {every!r}")
        folders = [Path(root) / name for name in _FOLDERS]
        folder = next((folder for folder in folders if folder.exists()), folders[0])
        super().__init__(
            root,
            annotations=folder / _FILES[split] if annotations is None else Path(annotations),
            cameras=folder / f"cameras_{split}.pkl",
            subjects=chosen_names("subjects", subjects, SUBJECTS[split]),
            step=every,
            keypoints=keypoints,
            box=box,
            size=size,
            description={"source": "mpi-inf-3dhp", "split": split, "every": every},
        )

    def parse(self, imgname: str) -> Picture | None:
        found = _PICTURE.search(imgname)
        if found is None:
            return None
        subject, sequence, test, frame = found.groups()
        return Picture(test or subject, test or f"{subject} {sequence}", int(frame))

    def camera(self, values: Mapping[str, Any]) -> Camera:
        """``X_camera = R @ X_world + T``, T in metres, no distortion; the test set's cameras come without R and T."""
        (fx, fy), (cx, cy) = np.ravel(values["f"]), np.ravel(values["c"])
        return Camera(
            K=np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]),
            R=values.get("R", np.eye(3)),
            t=np.ravel(values.get("T", np.zeros(3))),
            image_size=(int(values["w"]), int(values["h"])),
        )
