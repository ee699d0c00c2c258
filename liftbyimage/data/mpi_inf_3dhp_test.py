"""The test set of MPI-INF-3DHP (D. Mehta et al., 3DV 2017), as its authors ship it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from liftbyimage.data.converted import chosen_names, file_state
from liftbyimage.data.crop import CROP_SIZE, crop_size
from liftbyimage.data.picture_record import bounding_box, picture_record
from liftbyimage.data.skeleton import JOINT_NAMES, MPI_INF_3DHP_TO_H36M
from liftbyimage.data.source import Source

SEQUENCES = ("TS1", "TS2", "TS3", "TS4", "TS5", "TS6")

_NOT_EVALUATED = ("pelvis", "spine", "nose")
_METRES = 1e-3


class MpiInf3dhpTest(Source):
    """The valid frames of sequences TS1 … TS6, which are the groups; joints by name in Human3.6M's order.

    Of an ``annot_data.mat`` (HDF5) `valid_frame`, `annot2` (px) and `univ_annot3` or `annot3` (mm) of the valid frames
    are read on opening, 2 MB in all; `bb_crop` is not: the crop is cut round the smallest box of the true 2D joints.

    Attributes:
        evaluated_joints: the 14 joints over which the authors' evaluation takes PCK and AUC: all but pelvis, spine and
            nose (their "root", "spine" and "head"). Its MPJPE is over all 17.

    Args:
        root: the folder with ``TS1/annot_data.mat``, ``TS1/imageSequence/img_000001.jpg``, … to TS6.
        universal: the poses of `univ_annot3`, scaled to the height of one universal skeleton, as the authors evaluate;
            otherwise `annot3`, true to size.
        sequences: some of TS1 … TS6, as a list or as "TS1+TS2"; None is all.
        size: crop (height, width), px, or as text "256x192".

    Raises:
        ValueError: an option that cannot be, a missing part of the folder, a file that is not as described, or h5py
            not installed.
    """

    evaluated_joints: tuple[int, ...] = tuple(
        joint for joint, name in enumerate(JOINT_NAMES) if name not in _NOT_EVALUATED
    )

    def __init__(
        self,
        root: str | Path,
        *,
        universal: bool = True,
        sequences: str | Sequence[str] | None = None,
        size: Sequence[int] | str = CROP_SIZE,
    ) -> None:
        if not isinstance(universal, bool):
            raise ValueError(f"universal must be true or false, got {universal!r}")
        self.root, self.size = Path(root), crop_size(size)
        self.groups = chosen_names("sequences", sequences, SEQUENCES)
        files = [self.root / name / "annot_data.mat" for name in self.groups]
        missing = [path for path in files for path in (path, path.parent / "imageSequence") if not path.exists()]
        if missing:
            raise ValueError(
                f"root {root}: expected a folder with TS1/annot_data.mat, TS1/imageSequence/img_000001.jpg, … to TS6, "
                f"missing {', '.join(map(str, missing))}"
            )
        read = [_read_sequence(path, "univ_annot3" if universal else "annot3") for path in files]
        self._frame, self._joints, self._joints_3d = (np.concatenate(parts) for parts in zip(*read, strict=True))
        self._group = np.repeat(np.arange(len(files)), [len(frames) for frames, _, _ in read])
        self.description = {
            "source": "mpi-inf-3dhp-test",
            "universal": universal,
            "sequences": list(self.groups),
            "size": list(self.size),
            "annotations": [file_state(path) for path in files],
        }

    def __len__(self) -> int:
        return len(self._frame)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        group, frame = int(self._group[index]), int(self._frame[index])
        folder = self.root / self.groups[group]
        return picture_record(
            folder / "imageSequence" / f"img_{frame:06d}.jpg",
            self._joints[index],
            bounding_box(self._joints[index]),
            self._joints_3d[index],
            group,
            self.size,
            f"{folder / 'annot_data.mat'}: frame {frame}",
        )


def _read_sequence(path: Path, pose: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The valid frames' numbers from 1 [V], joints [V, 17, 2] px and [V, 17, 3] metres, Human3.6M's order."""
    try:
        import h5py
    except ImportError:
        raise ValueError('the test set of MPI-INF-3DHP needs h5py: pip install -e ".[data]"') from None
    try:
        with h5py.File(path, "r") as file:
            valid = np.ravel(file["valid_frame"][()]) != 0  # [N]
            joints, joints_3d = (
                _read_joints(path, file, name, axes, valid) for name, axes in (("annot2", 2), (pose, 3))
            )
    except (OSError, KeyError) as error:
        raise ValueError(f"{path}: not an annotation file of the test set ({error})") from None
    return np.flatnonzero(valid) + 1, joints, joints_3d * _METRES


def _read_joints(path: Path, file: Any, name: str, axes: int, valid: np.ndarray) -> np.ndarray:
    """[V, 17, axes]; MATLAB wrote axes × 17 × 1 × N, and HDF5 has the axes of MATLAB's arrays in reverse."""
    stored = file[name]
    if stored.shape not in ((len(valid), 1, 17, axes), (len(valid), 17, axes)):
        raise ValueError(f"{path}: {name} must be [{len(valid)}, 1, 17, {axes}], got {list(stored.shape)}")
    joints: np.ndarray = stored[()].reshape(len(valid), 17, axes)[valid].astype(np.float64)
    return joints[:, list(MPI_INF_3DHP_TO_H36M)]
