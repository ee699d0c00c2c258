"""The Human3.6M 17-joint skeleton, its mirror map, and the map from COCO's 17 keypoints."""

from __future__ import annotations

import numpy as np

JOINT_NAMES: tuple[str, ...] = (
    "pelvis",
    "right_hip",
    "right_knee",
    "right_ankle",
    "left_hip",
    "left_knee",
    "left_ankle",
    "spine",
    "thorax",
    "nose",
    "head",
    "left_shoulder",
    "left_elbow",
    "left_wrist",
    "right_shoulder",
    "right_elbow",
    "right_wrist",
)

PARENTS: tuple[int, ...] = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15)

BONES: tuple[tuple[int, int], ...] = tuple((parent, child) for child, parent in enumerate(PARENTS) if parent >= 0)

FLIP_PAIRS: tuple[tuple[int, int], ...] = ((4, 1), (5, 2), (6, 3), (11, 14), (12, 15), (13, 16))


def _permutation(pairs: tuple[tuple[int, int], ...], count: int) -> tuple[int, ...]:
    order = list(range(count))
    for left, right in pairs:
        order[left], order[right] = right, left
    return tuple(order)


FLIP_PERMUTATION: tuple[int, ...] = _permutation(FLIP_PAIRS, len(JOINT_NAMES))

# MPI-INF-3DHP's 17 joints in the order of its test set, each under the name of its Human3.6M counterpart: what is
# called the thorax here is its neck, the nose its head, the head its head top.
MPI_INF_3DHP_NAMES: tuple[str, ...] = (
    "head",
    "thorax",
    "right_shoulder",
    "right_elbow",
    "right_wrist",
    "left_shoulder",
    "left_elbow",
    "left_wrist",
    "right_hip",
    "right_knee",
    "right_ankle",
    "left_hip",
    "left_knee",
    "left_ankle",
    "pelvis",
    "spine",
    "nose",
)
MPI_INF_3DHP_ROOT = MPI_INF_3DHP_NAMES.index("pelvis")
# pose_in_mpi_inf_3dhp_order = pose_in_h36m_order[..., H36M_TO_MPI_INF_3DHP, :], and the other way round
H36M_TO_MPI_INF_3DHP: tuple[int, ...] = tuple(JOINT_NAMES.index(name) for name in MPI_INF_3DHP_NAMES)
MPI_INF_3DHP_TO_H36M: tuple[int, ...] = tuple(MPI_INF_3DHP_NAMES.index(name) for name in JOINT_NAMES)
MPI_INF_3DHP_FLIP_PERMUTATION: tuple[int, ...] = _permutation(
    ((5, 2), (6, 3), (7, 4), (11, 8), (12, 9), (13, 10)), len(JOINT_NAMES)
)

COCO_NAMES: tuple[str, ...] = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)

_COCO_SOURCES: dict[str, tuple[str, ...]] = {
    "pelvis": ("left_hip", "right_hip"),
    "spine": ("left_shoulder", "right_shoulder", "left_hip", "right_hip"),
    "thorax": ("left_shoulder", "right_shoulder"),
    "head": ("left_ear", "right_ear"),
}


def _coco_weights() -> np.ndarray:
    weights = np.zeros((len(JOINT_NAMES), len(COCO_NAMES)))  # [17 H36M, 17 COCO]
    for joint, name in enumerate(JOINT_NAMES):
        sources = _COCO_SOURCES.get(name, (name,))
        weights[joint, [COCO_NAMES.index(source) for source in sources]] = 1.0 / len(sources)
    return weights


_COCO_WEIGHTS = _coco_weights()


def coco_to_h36m(keypoints: np.ndarray) -> np.ndarray:
    """Map COCO-17 keypoints to the Human3.6M-17 order.

    Pelvis, spine, thorax and head have no COCO keypoint and are means: of the hips, of hips and shoulders, of
    the shoulders, of the ears. They differ from Human3.6M's own definition of these joints. A third column
    (confidence) is averaged like the coordinates.

    Args:
        keypoints: [..., 17, 2] or [..., 17, 3] in ``COCO_NAMES`` order, any unit; a floating
            dtype is kept, others become float64.

    Returns:
        An array of the same shape in ``JOINT_NAMES`` order.

    Raises:
        ValueError: for another shape.
    """
    keypoints = np.asarray(keypoints)
    if keypoints.ndim < 2 or keypoints.shape[-2] != len(COCO_NAMES) or keypoints.shape[-1] not in (2, 3):
        raise ValueError(f"coco_to_h36m: keypoints must be [..., 17, 2] or [..., 17, 3], got {list(keypoints.shape)}")
    dtype = keypoints.dtype if np.issubdtype(keypoints.dtype, np.floating) else np.dtype(np.float64)
    return (_COCO_WEIGHTS @ keypoints.astype(np.float64)).astype(dtype)  # [..., 17, 2 or 3]
