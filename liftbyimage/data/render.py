"""Capsule rasteriser: exact first hits of camera rays with tapered capsules, and their shading."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Hits:
    """What the camera sees: depth z in metres, infinite off the body, and capsule, −1 off the body."""

    depth: Array  # [H, W]
    part: NDArray[np.int16]  # [H, W]


@dataclass(frozen=True)
class Capsules:
    """Tapered capsules (the spheres between two end spheres) of one body, in camera axes, metres."""

    start: Array  # [C, 3]
    axis: Array  # [C, 3] end - start
    radius: Array  # [C] at the start
    taper: Array  # [C] radius at the end minus radius at the start

    @classmethod
    def between(cls, ends: Array, radii: Array) -> Capsules:
        """From `ends` [C, 2, 3] and `radii` [C, 2]."""
        return cls(ends[:, 0], ends[:, 1] - ends[:, 0], radii[:, 0], radii[:, 1] - radii[:, 0])


def pixel_rays(intrinsics: Array, size: tuple[int, int]) -> tuple[Array, Array]:
    """Rays of depth 1 through the pixel centres: x [1, W] and y [H, 1] (no skew, no distortion)."""
    x = (np.arange(size[1]) - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (np.arange(size[0]) - intrinsics[1, 2]) / intrinsics[1, 1]
    return x[None], y[:, None]


def cast(capsules: Capsules, rays: tuple[Array, Array]) -> Hits:
    """Nearest hit of every ray with the body."""
    x, y = rays
    depth = np.full((y.shape[0], x.shape[1]), np.inf)
    part = np.full(depth.shape, -1, dtype=np.int16)
    rows, columns = _windows(capsules, x[0], y[:, 0])
    for i in range(len(capsules.radius)):
        window = (slice(*rows[i]), slice(*columns[i]))
        hit = _first_hit(capsules, i, x[:, window[1]], y[window[0]])
        nearer = hit < depth[window]
        np.copyto(depth[window], hit, where=nearer)
        np.copyto(part[window], np.int16(i), where=nearer)
    return Hits(depth, part)


def _windows(capsules: Capsules, x: Array, y: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns [C, 2] (half open) that can see each capsule: the box of its end spheres' outlines."""
    ends = np.stack([capsules.start, capsules.start + capsules.axis], axis=1)  # [C, 2, 3]
    radius = np.stack([capsules.radius, capsules.radius + capsules.taper], axis=1)
    z = ends[..., 2]
    spans = []
    for along, grid in ((1, y), (0, x)):
        p = ends[..., along]
        reach = radius * np.sqrt(p * p + z * z - radius * radius)
        low = ((p * z - reach) / (z * z - radius * radius)).min(axis=1)
        high = ((p * z + reach) / (z * z - radius * radius)).max(axis=1)
        first, last = np.searchsorted(grid, low, "left"), np.searchsorted(grid, high, "right")
        spans.append(np.stack([first, last], axis=1))
    return spans[0], spans[1]


def _first_hit(capsules: Capsules, i: int, x: Array, y: Array) -> Array:
    """Depth of the first hit of rays d = (x, y, 1) with capsule i, infinite where they miss, [h, w].

    The capsule is the union of spheres of centre c(u) = a + u b and radius r(u) = r + u q, 0 ≤ u ≤ 1. The ray
    point s d is on their envelope where |s d − c(u)|² − r(u)² and its derivative by u vanish together, which
    gives u = (s d·b + k) / m and a quadratic in s. Beyond the ends the end sphere is hit instead.
    """
    a, b, r, q = capsules.start[i], capsules.axis[i], capsules.radius[i], capsules.taper[i]
    m, k = b @ b - q * q, r * q - a @ b
    outside = a @ a - r * r - k * k / m
    da, db, dd = x * a[0] + (y * a[1] + a[2]), x * b[0] + (y * b[1] + b[2]), x * x + (y * y + 1)
    if outside <= 0 and r + k / m * q > 0:
        u = np.full(da.shape, np.clip(k / m, 0, 1))  # the eye lies inside the cone: only the nearer end shows
    else:
        linear = da + db * (k / m)
        square = linear * linear - (dd - db * db / m) * outside
        met = square > 0
        entry = outside / (linear + np.sqrt(np.where(met, square, 1)))
        u = np.where(met, np.clip((entry * db + k) / m, 0, 1), 0)
    centre = da + u * db
    power = (a @ a - r * r) + u * (2 * (a @ b - r * q) + u * m)
    square = centre * centre - dd * power
    return np.where(square > 0, power / (centre + np.sqrt(np.maximum(square, 0))), np.inf)


def surface(capsules: Capsules, hits: Hits, rays: tuple[Array, Array]) -> tuple[Array, Array]:
    """Points and outward unit normals [M, 3] of the M body pixels, in row-major order of the mask."""
    rows, columns = np.nonzero(hits.part >= 0)
    part, depth = hits.part[rows, columns], hits.depth[rows, columns]
    point = np.stack([rays[0][0, columns] * depth, rays[1][rows, 0] * depth, depth], axis=1)  # [M, 3]
    start, axis = capsules.start[part], capsules.axis[part]
    radius, taper = capsules.radius[part], capsules.taper[part]
    m = (capsules.axis**2).sum(1) - capsules.taper**2
    u = np.clip((((point - start) * axis).sum(1) + radius * taper) / m[part], 0, 1)
    return point, (point - start - u[:, None] * axis) / (radius + u * taper)[:, None]


def shade(point: Array, normal: Array, albedo: Array, lamp: Array, reach: float, ambient: float) -> NDArray[np.uint8]:
    """RGB [M, 3] of Lambert light from a lamp, falling off as 1/distance² (1 at `reach` m), plus ambient."""
    towards = lamp - point
    distance = np.sqrt((towards * towards).sum(1))
    facing = np.maximum((normal * towards).sum(1) / distance, 0)
    light = ambient + (1.15 - ambient) * facing * (reach / distance) ** 2
    colour: NDArray[np.uint8] = np.clip(albedo * light[:, None] * 255 + 0.5, 0, 255).astype(np.uint8)
    return colour
