"""Calibrated pinhole camera with Brown–Conrady lens distortion, on NumPy arrays in float64.

Camera axes: x right, y down, z forward. ``X_camera = R @ X_world + t``. Pixel (0, 0) is the centre of the
first pixel. Distortion coefficients follow OpenCV's order (k1, k2, p1, p2, k3).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

# A Newton step converges quadratically, so what has not met this by then lies outside the invertible range.
_UNDISTORT_TOLERANCE = 1e-10


def _points(values: ArrayLike, size: int, function: str, name: str) -> np.ndarray:
    points = np.asarray(values, dtype=np.float64)
    if points.ndim < 1 or points.shape[-1] != size:
        raise ValueError(f"{function}: {name} must be [..., {size}], got {list(points.shape)}")
    return points


def _per_point(values: np.ndarray, core_dims: int) -> np.ndarray:
    """Insert the axis of points, so that parameters [..., *core] serve points [..., N, d]."""
    return values if values.ndim == core_dims else np.expand_dims(values, -1 - core_dims)


def _linear(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return points @ np.swapaxes(matrix, -1, -2)


def _coefficients(distortion: ArrayLike | None) -> np.ndarray:
    if distortion is None:
        return np.zeros(5)
    values = np.asarray(distortion, dtype=np.float64)
    if values.ndim < 1 or values.shape[-1] not in (4, 5):
        raise ValueError(
            f"distortion must be [..., 5] (k1, k2, p1, p2, k3) or [..., 4] without k3, got {list(values.shape)}"
        )
    if values.shape[-1] == 4:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return values


def world_to_camera(points: ArrayLike, R: ArrayLike, t: ArrayLike) -> np.ndarray:
    """World to camera axes: ``R @ X + t``.

    Args:
        points: [..., 3], in the unit of ``t``.
        R: rotation [3, 3], or [..., 3, 3] for points [..., N, 3].
        t: translation [3], or [..., 3] likewise.

    Returns:
        float64 [..., 3].
    """
    points = _points(points, 3, "world_to_camera", "points")
    R, t = np.asarray(R, dtype=np.float64), np.asarray(t, dtype=np.float64)
    return _linear(points, R) + _per_point(t, 1)


def camera_to_world(points: ArrayLike, R: ArrayLike, t: ArrayLike) -> np.ndarray:
    """Camera to world axes, the inverse of ``world_to_camera`` with the same arguments: ``Rᵀ @ (X − t)``."""
    points = _points(points, 3, "camera_to_world", "points")
    R, t = np.asarray(R, dtype=np.float64), np.asarray(t, dtype=np.float64)
    return (points - _per_point(t, 1)) @ R


def _distort(xy: np.ndarray, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distort ideal image-plane points [..., 2]; also the Jacobian [..., 2, 2]."""
    k1, k2, p1, p2, k3 = np.moveaxis(_per_point(coefficients, 1), -1, 0)
    x, y = xy[..., 0], xy[..., 1]
    r2 = x * x + y * y
    radial = 1.0 + r2 * (k1 + r2 * (k2 + r2 * k3))
    slope = k1 + r2 * (2.0 * k2 + 3.0 * r2 * k3)  # d radial / d r²
    distorted = np.stack(
        [
            x * radial + 2.0 * p1 * x * y + p2 * (r2 + 2.0 * x * x),
            y * radial + p1 * (r2 + 2.0 * y * y) + 2.0 * p2 * x * y,
        ],
        axis=-1,
    )  # [..., 2]
    cross = 2.0 * (x * y * slope + p1 * x + p2 * y)
    jacobian = np.stack(
        [
            np.stack([radial + 2.0 * x * x * slope + 2.0 * p1 * y + 6.0 * p2 * x, cross], axis=-1),
            np.stack([cross, radial + 2.0 * y * y * slope + 6.0 * p1 * y + 2.0 * p2 * x], axis=-1),
        ],
        axis=-2,
    )  # [..., 2, 2]
    return distorted, jacobian


def _to_pixels(xy: np.ndarray, K: np.ndarray) -> np.ndarray:
    return _linear(xy, K[..., :2, :2]) + _per_point(K[..., :2, 2], 1)


def _from_pixels(pixels: np.ndarray, K: np.ndarray) -> np.ndarray:
    return _linear(pixels - _per_point(K[..., :2, 2], 1), np.linalg.inv(K[..., :2, :2]))


def project(points_camera: ArrayLike, K: ArrayLike, distortion: ArrayLike | None = None) -> np.ndarray:
    """Project points in camera axes to distorted pixels (Brown–Conrady; D. C. Brown, 1966).

    With x = X/Z, y = Y/Z, r² = x² + y² and L = 1 + k1 r² + k2 r⁴ + k3 r⁶:
    x' = x L + 2 p1 x y + p2 (r² + 2 x²), y' = y L + p1 (r² + 2 y²) + 2 p2 x y, pixels = K [x', y', 1].

    Args:
        points_camera: [..., 3], any unit.
        K: intrinsics [3, 3] px, or [..., 3, 3] for points [..., N, 3].
        distortion: (k1, k2, p1, p2[, k3]) as [5] or [4], or with leading dimensions likewise; None is none.

    Returns:
        float64 pixels [..., 2]; NaN where a point is not in front of the camera (Z ≤ 0).
    """
    points = _points(points_camera, 3, "project", "points_camera")
    depth = points[..., 2:]
    xy = points[..., :2] / np.where(depth > 0, depth, np.nan)
    distorted, _ = _distort(xy, _coefficients(distortion))
    return _to_pixels(distorted, np.asarray(K, dtype=np.float64))


def undistort_points(
    pixels: ArrayLike, K: ArrayLike, distortion: ArrayLike | None = None, iterations: int = 20
) -> np.ndarray:
    """Remove lens distortion from pixels: where an ideal pinhole camera with the same ``K`` would see them.

    Newton's method on the Brown–Conrady model, to about 1e-10 of the focal length.

    Args:
        pixels: distorted pixels [..., 2].
        K, distortion: as in ``project``.
        iterations: Newton steps.

    Returns:
        float64 pixels [..., 2]; NaN where the model cannot be inverted (far outside the image).
    """
    pixels = _points(pixels, 2, "undistort_points", "pixels")
    K = np.asarray(K, dtype=np.float64)
    coefficients = _coefficients(distortion)
    target = _from_pixels(pixels, K)
    xy = target
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for _ in range(iterations):
            distorted, jacobian = _distort(xy, coefficients)
            xy = xy - _solve(jacobian, distorted - target)
        residual = np.abs(_distort(xy, coefficients)[0] - target).max(axis=-1, keepdims=True)
    return _to_pixels(np.where(residual < _UNDISTORT_TOLERANCE, xy, np.nan), K)


def _solve(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Solve 2×2 systems by Cramer's rule; a singular one gives Inf or NaN instead of an exception."""
    (a, b), (c, d) = np.moveaxis(matrix, (-2, -1), (0, 1))
    u, v = vector[..., 0], vector[..., 1]
    return np.stack([d * u - b * v, a * v - c * u], axis=-1) / (a * d - b * c)[..., None]


@dataclass(frozen=True, eq=False)
class Camera:
    """One calibrated camera.

    Attributes:
        K: intrinsics [3, 3], px.
        R: world-to-camera rotation [3, 3].
        t: world-to-camera translation [3], in the unit of the world (metres in this library).
        distortion: (k1, k2, p1, p2, k3); four values leave k3 at 0.
        image_size: (width, height), px.
    """

    K: np.ndarray
    R: np.ndarray
    t: np.ndarray
    distortion: np.ndarray = field(default_factory=lambda: np.zeros(5))
    image_size: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name, shape in (("K", (3, 3)), ("R", (3, 3)), ("t", (3,))):
            value = np.asarray(getattr(self, name), dtype=np.float64)
            if value.shape != shape:
                raise ValueError(f"Camera: {name} must be {list(shape)}, got {list(value.shape)}")
            object.__setattr__(self, name, value)
        coefficients = _coefficients(self.distortion)
        if coefficients.ndim != 1:
            raise ValueError(f"Camera: distortion must be [5] or [4], got {list(coefficients.shape)}")
        object.__setattr__(self, "distortion", coefficients)

    @classmethod
    def from_human36m(
        cls,
        f: ArrayLike,
        c: ArrayLike,
        k: ArrayLike,
        p: ArrayLike,
        R: ArrayLike,
        T: ArrayLike,
        image_size: tuple[int, int],
    ) -> Camera:
        """Build from Human3.6M's parameters: focal length f [2] and centre c [2] in px, radial k [3],
        tangential p [2], and the camera's position T in ``X_camera = R @ (X_world − T)``.

        Human3.6M's own projection halves the term 2 x (p1 y + p2 x) of the Brown–Conrady model (and its y
        counterpart), so pixels may differ from it by a fraction of a pixel.
        """
        (fx, fy), (cx, cy) = np.asarray(f, dtype=np.float64), np.asarray(c, dtype=np.float64)
        (k1, k2, k3), (p1, p2) = np.asarray(k, dtype=np.float64), np.asarray(p, dtype=np.float64)
        R = np.asarray(R, dtype=np.float64)
        return cls(
            K=np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]),
            R=R,
            t=-R @ np.asarray(T, dtype=np.float64),
            distortion=np.array([k1, k2, p1, p2, k3]),
            image_size=image_size,
        )

    def world_to_camera(self, points: ArrayLike) -> np.ndarray:
        """World [..., 3] to camera axes [..., 3]."""
        return world_to_camera(points, self.R, self.t)

    def camera_to_world(self, points: ArrayLike) -> np.ndarray:
        """Camera axes [..., 3] to world [..., 3]."""
        return camera_to_world(points, self.R, self.t)

    def project(self, points_camera: ArrayLike) -> np.ndarray:
        """Camera axes [..., 3] to distorted pixels [..., 2]; NaN behind the camera."""
        return project(points_camera, self.K, self.distortion)

    def undistort_points(self, pixels: ArrayLike, iterations: int = 20) -> np.ndarray:
        """Distorted pixels [..., 2] to ideal pinhole pixels [..., 2]."""
        return undistort_points(pixels, self.K, self.distortion, iterations)
