"""Frames of a lifted video: the picture with its 2D skeleton beside the pose in 3D, drawn by OpenCV in milliseconds."""

from __future__ import annotations

import cv2
import numpy as np

from liftbyimage.data.skeleton import BONES, JOINT_NAMES
from liftbyimage.draw import FLOOR, INK, joint_colour

TALLEST = 720  # px
SPAN = 2.6  # metres that the 3D panel shows

_AZIMUTH, _ELEVATION = np.radians(28.0), np.radians(12.0)
_FLOOR_REACH, _FLOOR_CELL = 0.75, 0.25  # metres
_FRACTION_BITS = 4  # of a pixel, so that slow motion does not jump from pixel to pixel


def _view() -> np.ndarray:
    """[2, 3]: camera axes (x right, y down, z forward) to panel axes (right, down), seen from the camera's right."""
    turn = np.array([[np.cos(_AZIMUTH), 0, np.sin(_AZIMUTH)], [0, 1, 0], [-np.sin(_AZIMUTH), 0, np.cos(_AZIMUTH)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(_ELEVATION), -np.sin(_ELEVATION)]])
    return tilt @ turn


_VIEW = _view()


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


_JOINT_COLOURS = [_rgb(joint_colour(joint)) for joint in range(len(JOINT_NAMES))]


def draw_frame(image: np.ndarray, pose_2d: np.ndarray | None, pose_3d: np.ndarray | None) -> np.ndarray:
    """A picture and, to its right, the pose seen orthographically from the camera's right and a little above.

    The scale of the 3D panel is fixed, its middle is the pelvis, and its floor lies under the lowest joint.

    Args:
        image: uint8 [H, W, 3], RGB.
        pose_2d: [17, 2], px of the picture, or None.
        pose_3d: [17, 3], metres, root-relative, camera axes, or None.

    Returns:
        uint8 [h, w + h, 3], RGB, where (h, w) is the picture's size, shrunk to at most 720 high and made even for video
        encoders.
    """
    picture = draw_picture(image, pose_2d)
    return np.concatenate([picture, _draw_panel(picture.shape[0], pose_3d)], axis=1)


def draw_picture(image: np.ndarray, pose_2d: np.ndarray | None) -> np.ndarray:
    """The left part of `draw_frame`: a picture, uint8 [h, w, 3] RGB, with its 2D skeleton."""
    shrink = min(1.0, TALLEST / image.shape[0])
    height, width = (max(2, 2 * round(side * shrink / 2)) for side in image.shape[:2])
    picture = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if pose_2d is not None:
        scale = np.array([width / image.shape[1], height / image.shape[0]])
        _draw_skeleton(picture, (pose_2d + 0.5) * scale - 0.5)
    return picture


def _draw_panel(side: int, pose: np.ndarray | None) -> np.ndarray:
    panel = np.full((side, side, 3), 255, dtype=np.uint8)
    if pose is None:
        cv2.putText(panel, "no person", (side // 20, side // 2), cv2.FONT_HERSHEY_SIMPLEX, side / 600, _rgb(INK), 1)
        return panel
    middle = np.array([side / 2, 0.48 * side])

    def place(points: np.ndarray) -> np.ndarray:
        return points @ _VIEW.T * (side / SPAN) + middle

    for line in place(_floor_lines(pose[:, 1].max() + 0.02)):
        _draw_line(panel, line, _rgb(FLOOR), 1)
    _draw_skeleton(panel, place(pose))
    return panel


def _floor_lines(y: float) -> np.ndarray:
    """The ends [lines, 2, 3] of a square grid about the pelvis, y metres below it."""
    steps = np.arange(-_FLOOR_REACH, _FLOOR_REACH + 1e-6, _FLOOR_CELL)
    along_z = [[[x, y, -_FLOOR_REACH], [x, y, _FLOOR_REACH]] for x in steps]
    along_x = [[[-_FLOOR_REACH, y, z], [_FLOOR_REACH, y, z]] for z in steps]
    return np.array(along_z + along_x)


def _draw_skeleton(image: np.ndarray, points: np.ndarray) -> None:
    thickness = max(1, round(min(image.shape[:2]) / 160))
    for parent, child in BONES:
        _draw_line(image, points[[parent, child]], (255, 255, 255), thickness + 2)
    for parent, child in BONES:
        _draw_line(image, points[[parent, child]], _JOINT_COLOURS[child], thickness)


def _draw_line(image: np.ndarray, ends: np.ndarray, colour: tuple[int, ...], thickness: int) -> None:
    # Far outside the picture OpenCV's fixed-point coordinates would overflow.
    (x0, y0), (x1, y1) = np.rint(ends.clip(-1e4, 1e4) * (1 << _FRACTION_BITS)).astype(int).tolist()
    cv2.line(image, (x0, y0), (x1, y1), colour, thickness, cv2.LINE_AA, _FRACTION_BITS)
