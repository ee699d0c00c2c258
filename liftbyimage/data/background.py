"""Backgrounds for synthetic scenes: one fixed laboratory room, and textures never seen twice."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Image = NDArray[np.uint8]

_HALF_WIDTH = 7.0  # the room spans -7 … 7 m in x and y, and 0 … 5 m in z
_HEIGHT = 5.0
_TEXELS = 448  # per face side
_FACES = 6  # walls +x, -x, +y, -y; floor; ceiling


def laboratory(intrinsics: Array, rotation: Array, translation: Array, size: tuple[int, int]) -> Image:
    """The laboratory as a camera sees it: a function of the camera alone.

    Args:
        intrinsics: [3, 3] px, of the crop.
        rotation, translation: world to camera, [3, 3] and [3] metres; world z is up, the floor is z = 0.
        size: crop (height, width) in px.

    Returns:
        RGB uint8 [height, width, 3].
    """
    height, width = size
    x = ((np.arange(width) - intrinsics[0, 2]) / intrinsics[0, 0]).astype(np.float32)[None]
    y = ((np.arange(height) - intrinsics[1, 2]) / intrinsics[1, 1]).astype(np.float32)[:, None]
    eye = (-rotation.T @ translation).astype(np.float32)
    to_world = rotation.T.astype(np.float32)
    ray = [to_world[i, 0] * x + (to_world[i, 1] * y + to_world[i, 2]) for i in range(3)]  # 3 x [H, W]
    low, high = (-_HALF_WIDTH, -_HALF_WIDTH, 0.0), (_HALF_WIDTH, _HALF_WIDTH, _HEIGHT)
    with np.errstate(divide="ignore"):
        reach = [np.where(d > 0, high[i] - eye[i], eye[i] - low[i]) / np.abs(d) for i, d in enumerate(ray)]
    nearest = np.minimum(np.minimum(reach[0], reach[1]), reach[2])
    side, end = nearest == reach[0], nearest == reach[2]
    across, along = eye[0] + nearest * ray[0], eye[1] + nearest * ray[1]
    up = eye[2] + nearest * ray[2]
    face = np.where(end, 4 + (ray[2] > 0), np.where(side, ray[0] < 0, 2 + (ray[1] < 0)))
    u = (np.where(side & ~end, along, across) + _HALF_WIDTH) / (2 * _HALF_WIDTH)
    v = np.where(end, (along + _HALF_WIDTH) / (2 * _HALF_WIDTH), 1 - up / _HEIGHT)
    column, row = (np.clip(share * _TEXELS, 0, _TEXELS - 1).astype(np.int32) for share in (u, v))
    picture: Image = _room().reshape(-1, 3)[(face * _TEXELS + row) * _TEXELS + column]
    return picture


@lru_cache(maxsize=1)
def _room() -> Image:
    """Textures of the room's faces, [6, T, T, 3]; walls have z downwards along the rows."""
    draw = np.random.default_rng(20240229)
    faces = np.zeros((_FACES, _TEXELS, _TEXELS, 3), dtype=np.uint8)
    walls = ((176, 182, 190), (150, 170, 160), (196, 180, 158), (128, 140, 168))
    for face, colour in zip(faces, walls, strict=False):
        face[:] = colour
        for left in range(0, _TEXELS, 32):
            cv2.line(face, (left, 0), (left, _TEXELS), _darker(colour, 0.85), 1)
        cv2.rectangle(face, (0, _TEXELS - 12), (_TEXELS, _TEXELS), _darker(colour, 0.5), -1)
        for _ in range(9):
            corner = draw.integers((0, 120), (_TEXELS - 60, 330))
            opposite = corner + draw.integers((15, 30), (60, 110))
            cv2.rectangle(face, corner.tolist(), opposite.tolist(), draw.integers(30, 220, 3).tolist(), -1)
            cv2.rectangle(face, corner.tolist(), opposite.tolist(), (40, 40, 40), 1)
        door = int(draw.integers(40, _TEXELS - 80))
        cv2.rectangle(face, (door, 250), (door + 34, _TEXELS), draw.integers(60, 160, 3).tolist(), -1)
    faces[4], faces[5] = _floor(), _ceiling()
    return faces


def _darker(colour: tuple[int, int, int], share: float) -> tuple[int, ...]:
    return tuple(int(share * channel) for channel in colour)


def _floor() -> Image:
    tile = np.indices((_TEXELS, _TEXELS)) // 32
    floor = np.where((tile.sum(0) % 2)[..., None], (120, 112, 104), (134, 126, 116)).astype(np.uint8)
    centre = _TEXELS // 2
    cv2.rectangle(floor, (centre - 64, centre - 48), (centre + 64, centre + 48), (86, 104, 140), -1)
    cv2.rectangle(floor, (centre - 64, centre - 48), (centre + 64, centre + 48), (220, 220, 210), 2)
    cv2.line(floor, (centre - 64, centre), (centre + 64, centre), (200, 80, 60), 2)
    cv2.line(floor, (centre, centre - 48), (centre, centre + 48), (70, 160, 80), 2)
    return floor


def _ceiling() -> Image:
    ceiling = np.full((_TEXELS, _TEXELS, 3), 205, dtype=np.uint8)
    for left in range(32, _TEXELS, 96):
        cv2.rectangle(ceiling, (left, 0), (left + 12, _TEXELS), (245, 245, 235), -1)
    return ceiling


def textured(generator: np.random.Generator, size: tuple[int, int]) -> Image:
    """Coloured noise of several octaves and a few random shapes: RGB uint8 [height, width, 3]."""
    height, width = size
    canvas = np.zeros((height, width, 3), dtype=np.float32)
    roughness = generator.uniform(0.45, 0.95)
    for octave in range(6):
        grid = generator.standard_normal((4 << octave, 3 << octave, 3), dtype=np.float32)
        smooth = cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
        canvas += np.float32(roughness**octave) * smooth
    # a random mix of the three noises per channel: from grey to colourful
    mix = generator.normal(0, 1, (3, 3)) * generator.uniform(5, 34) + generator.uniform(-30, 30, (1, 3))
    tint = generator.uniform(40, 215, 3)
    canvas = canvas.reshape(-1, 3) @ mix.astype(np.float32) + tint.astype(np.float32)
    image = np.clip(canvas, 0, 255).astype(np.uint8).reshape(height, width, 3)
    for _ in range(generator.integers(0, 9)):
        _draw_shape(image, generator)
    return image


def _draw_shape(image: Image, generator: np.random.Generator) -> None:
    height, width = image.shape[:2]
    colour = generator.integers(0, 256, 3).tolist()
    corner = generator.integers((-40, -40), (width, height))
    extent = generator.integers((8, 8), (width // 2 + 9, height // 2 + 9))
    kind = generator.integers(4)
    if kind == 0:
        cv2.rectangle(image, corner.tolist(), (corner + extent).tolist(), colour, -1)
    elif kind == 1:
        angle = generator.uniform(0, 180)
        cv2.ellipse(image, corner.tolist(), (extent // 3).tolist(), angle, 0, 360, colour, -1)
    elif kind == 2:
        points = corner + generator.integers((-60, -60), (60, 60), (5, 2))
        cv2.fillPoly(image, [points.astype(np.int32)], colour)
    else:
        # limb-like bars, so that a limb is told by its shading and not by its outline alone
        end = corner + 2 * extent - extent[::-1]
        cv2.line(image, corner.tolist(), end.tolist(), colour, int(generator.integers(3, 18)))
