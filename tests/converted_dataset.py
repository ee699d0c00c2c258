"""Tiny datasets of rendered people in the layouts in which Human3.6M and MPI-INF-3DHP come to a user."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from liftbyimage.data.skeleton import H36M_TO_MPI_INF_3DHP
from liftbyimage.data.synthetic import generate

PICTURE_SIZE = (160, 128)  # width, height
K = np.array([[170.0, 0.0, 81.0], [0.0, 168.0, 62.0], [0.0, 0.0, 1.0]])
_RENDERED = (96, 72)
_TRAIN = ("S1", "S5", "S6", "S7", "S8")


@dataclass(frozen=True)
class People:
    """N people, each in a picture of its own, taken by a camera with intrinsics `K`; Human3.6M's joints."""

    pictures: list[np.ndarray]  # uint8 [128, 160, 3], RGB
    joints_2d: np.ndarray  # [N, 17, 2] px
    joints_3d: np.ndarray  # [N, 17, 3] metres, camera axes


def render_people(count: int, seed: int = 0, background: str = "textured") -> People:
    scenes = generate(count, seed=seed, noise=0.0, size=_RENDERED, background=background)
    joints_3d = (scenes.pose_3d + scenes.root[:, None]).double().numpy()
    projected = joints_3d @ K.T
    # Two pinhole cameras in one place see each other's picture through an affine map.
    maps = K @ np.linalg.inv(scenes.K.double().numpy())
    pictures = [
        cv2.warpAffine(image, matrix[:2], PICTURE_SIZE, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)
        for image, matrix in zip(scenes.image.numpy(), maps, strict=True)
    ]
    return People(pictures, projected[..., :2] / projected[..., 2:], joints_3d)


def write_human36m(
    root: Path,
    subjects: Sequence[str] = ("S1", "S9"),
    *,
    actions: Sequence[str] = ("Directions_1", "WalkingDog"),
    cameras: Sequence[str] = ("54138969",),
    frames: int = 4,
    fps: int = 10,
    seed: int = 0,
    background: str = "textured",
    save: Callable[..., Any] = np.savez,
) -> Path:
    """Human3.6M as MMPose converts it: `frames` pictures of every subject, action and camera, `fps` a second.

    At 5 frames a second every second one of a file of 10 is a record: by default 4 to train (S1), 4 to test (S9).
    """
    root = Path(root)
    for split, members in (
        ("train", [subject for subject in subjects if subject in _TRAIN]),
        ("test", [subject for subject in subjects if subject not in _TRAIN]),
    ):
        videos = [f"{s}_{action}.{camera}" for s in members for action in actions for camera in cameras]
        names = [
            f"{video.split('_')[0]}/{video}/{video}_{1 + frame * (50 // fps):06d}.jpg"
            for video in videos
            for frame in range(frames)
        ]
        if names:
            people = render_people(len(names), seed + (split == "test"), background)
            file = root / "annotation_body3d" / f"fps{fps}" / f"h36m_{split}.npz"
            write_annotations(root, file, names, people.pictures, people.joints_2d, people.joints_3d, save)
    entries = {(subject, camera): human36m_camera(subject, camera) for subject in subjects for camera in cameras}
    write_pickle(root / "annotation_body3d" / "cameras.pkl", entries)
    return root


def human36m_camera(subject: str, camera: str) -> dict[str, Any]:
    """An entry of cameras.pkl; `R` is camera to world, `T` the camera's position in metres, columns throughout."""
    angle = 0.3 + int(subject[1:])
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    return {
        "R": turn,
        "T": np.array([[1.5], [-4.0], [1.6]]),
        "c": K[:2, 2:],
        "f": np.diag(K)[:2, None],
        "k": np.zeros((3, 1)),
        "p": np.zeros((2, 1)),
        "w": PICTURE_SIZE[0],
        "h": PICTURE_SIZE[1],
        "name": "camera1",
        "id": camera,
    }


def write_mpi_inf_3dhp(
    root: Path,
    sequences: Sequence[str] = ("S1_Seq1", "S2_Seq2"),
    *,
    cameras: Sequence[int] = (0,),
    frames: int = 3,
    seed: int = 0,
    save: Callable[..., Any] = np.savez,
) -> Path:
    """The training half of MPI-INF-3DHP as MMPose converts it, in its own order of joints."""
    root = Path(root)
    videos = [f"{sequence}_Cam{camera}" for sequence in sequences for camera in cameras]
    names = [f"{video}_{frame + 1:06d}.jpg" for video in videos for frame in range(frames)]
    people = render_people(len(names), seed)
    order = list(H36M_TO_MPI_INF_3DHP)
    file = root / "annotations" / "mpi_inf_3dhp_train.npz"
    write_annotations(root, file, names, people.pictures, people.joints_2d[:, order], people.joints_3d[:, order], save)
    entry = {"R": np.eye(3)[[0, 2, 1]] * [1, -1, 1], "T": np.array([[0.1], [0.2], [4.0]]), "w": 160, "h": 128}
    entries = {video: {**entry, "c": K[:2, 2:], "f": np.diag(K)[:2, None], "name": "train_cam"} for video in videos}
    write_pickle(root / "annotations" / "cameras_train.pkl", entries)
    return root


def write_mpi_inf_3dhp_test(
    root: Path,
    sequences: Sequence[str] = ("TS1", "TS2"),
    *,
    frames: int = 4,
    invalid: Sequence[int] = (2,),
    seed: int = 0,
) -> Path:
    """The test set as its authors ship it: of every sequence all frames but `invalid` (from 1) are valid."""
    import h5py

    root = Path(root)
    order = list(H36M_TO_MPI_INF_3DHP)
    for number, sequence in enumerate(sequences):
        people = render_people(frames, seed + number)
        millimetres = 1000 * people.joints_3d[:, None, order]  # [N, 1, 17, 3], as MATLAB's 3×17×1×N comes out
        (root / sequence / "imageSequence").mkdir(parents=True)
        for frame, picture in enumerate(people.pictures):
            write_picture(root / sequence / "imageSequence" / f"img_{frame + 1:06d}.jpg", picture)
        with h5py.File(root / sequence / "annot_data.mat", "w") as file:
            file["annot2"] = people.joints_2d[:, None, order]
            file["annot3"] = millimetres
            file["univ_annot3"] = 1.25 * millimetres
            file["valid_frame"] = np.array([[float(frame + 1 not in invalid)] for frame in range(frames)])  # [N, 1]
            file["bb_crop"] = np.zeros((frames, 4))
    return root


def write_annotations(
    root: Path,
    file: Path,
    names: Sequence[str],
    pictures: Sequence[np.ndarray],
    joints_2d: np.ndarray,
    joints_3d: np.ndarray,
    save: Callable[..., Any],
) -> None:
    for name, picture in zip(names, pictures, strict=True):
        write_picture(root / "images" / name, picture)
    low, high = joints_2d.min(axis=1), joints_2d.max(axis=1)
    ones = np.ones((*joints_2d.shape[:2], 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    save(
        file,
        imgname=np.array(names),
        center=(low + high) / 2,
        scale=1.2 * (high - low).max(axis=1) / 200,
        part=np.concatenate([joints_2d, ones], axis=2),
        S=np.concatenate([joints_3d, ones], axis=2),
    )


def write_picture(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))


def write_pickle(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))
