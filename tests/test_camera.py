from __future__ import annotations

import cv2
import numpy as np
import pytest

from liftbyimage.data import Camera, camera_to_world, project, undistort_points, world_to_camera
from liftbyimage.data.camera import _distort

K = np.array([[1145.0, 0.0, 512.5], [0.0, 1143.8, 515.4], [0.0, 0.0, 1.0]])
# Strong lens, as in a laboratory camera, in OpenCV's order k1, k2, p1, p2, k3.
DISTORTION = np.array([-0.2071, 0.2478, -0.00098, -0.00142, -0.0031])


def _rotation(*rotation_vector: float) -> np.ndarray:
    return cv2.Rodrigues(np.array(rotation_vector))[0]


@pytest.fixture
def points() -> np.ndarray:
    generator = np.random.default_rng(3)
    return generator.uniform([-1.2, -1.2, 3.0], [1.2, 1.2, 6.0], size=(200, 3))


def test_project_equals_opencv(points: np.ndarray) -> None:
    R, t = _rotation(0.2, -0.4, 0.1), np.array([0.1, -0.2, 0.4])
    expected = cv2.projectPoints(points, cv2.Rodrigues(R)[0], t, K, DISTORTION)[0][:, 0]
    camera = Camera(K, R, t, DISTORTION, (1000, 1002))
    np.testing.assert_allclose(camera.project(camera.world_to_camera(points)), expected, rtol=0, atol=1e-9)


def test_project_without_distortion_is_the_pinhole(points: np.ndarray) -> None:
    homogeneous = points @ K.T
    np.testing.assert_allclose(project(points, K), homogeneous[:, :2] / homogeneous[:, 2:], rtol=1e-13)
    np.testing.assert_array_equal(project(points, K, np.zeros(4)), project(points, K))


def test_undistort_inverts_project(points: np.ndarray) -> None:
    ideal = undistort_points(project(points, K, DISTORTION), K, DISTORTION)
    np.testing.assert_allclose(ideal, project(points, K), rtol=0, atol=1e-8)


def test_undistort_agrees_with_opencv(points: np.ndarray) -> None:
    pixels = project(points, K, DISTORTION)
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 200, 1e-13)
    expected = cv2.undistortPoints(pixels[:, None], K, DISTORTION, P=K, criteria=criteria)[:, 0]
    np.testing.assert_allclose(undistort_points(pixels, K, DISTORTION), expected, rtol=0, atol=1e-7)


def test_undistort_beyond_the_invertible_range_is_nan() -> None:
    # x (1 − 0.5 x²) never exceeds 0.545, so no ideal point is seen at 0.9 focal lengths from the centre.
    pixels = np.array([[512.5 + 0.9 * 1145.0, 515.4], [512.5 + 0.3 * 1145.0, 515.4]])
    barrel = [-0.5, 0.0, 0.0, 0.0, 0.0]
    ideal = undistort_points(pixels, K, barrel)
    assert np.isnan(ideal[0]).all()
    ray = np.linalg.solve(K, np.append(ideal[1], 1.0))
    np.testing.assert_allclose(project(ray, K, barrel), pixels[1], rtol=0, atol=1e-8)


def test_distortion_jacobian_matches_finite_differences() -> None:
    xy = np.random.default_rng(8).uniform(-0.6, 0.6, size=(50, 2))
    step = 1e-6
    columns = [
        (_distort(xy + step * axis, DISTORTION)[0] - _distort(xy - step * axis, DISTORTION)[0]) / (2 * step)
        for axis in np.eye(2)
    ]
    np.testing.assert_allclose(_distort(xy, DISTORTION)[1], np.stack(columns, axis=-1), rtol=0, atol=1e-9)


def test_points_not_in_front_are_nan_and_leave_the_others() -> None:
    pixels = project([[0.1, 0.2, -2.0], [0.1, 0.2, 0.0], [0.1, 0.2, 2.0]], K, DISTORTION)
    assert np.isnan(pixels[:2]).all() and np.isfinite(pixels[2]).all()


def test_world_and_camera_axes_are_inverse(points: np.ndarray) -> None:
    R, t = _rotation(1.0, -0.7, 2.0), np.array([0.3, 1.1, 4.0])
    np.testing.assert_allclose(world_to_camera(points[0], R, t), R @ points[0] + t, rtol=1e-14)
    np.testing.assert_allclose(camera_to_world(world_to_camera(points, R, t), R, t), points, rtol=0, atol=1e-13)


def test_batched_cameras_equal_one_by_one(points: np.ndarray) -> None:
    points = points[:34].reshape(2, 17, 3)
    R = np.stack([_rotation(0.1, 0.2, 0.3), _rotation(-0.2, 0.1, 0.0)])
    t = np.array([[0.0, 0.1, 0.5], [0.2, 0.0, 1.0]])
    intrinsics = np.stack([K, K * [[1.1, 1.0, 1.0], [1.0, 0.9, 1.0], [1.0, 1.0, 1.0]]])
    distortion = np.stack([DISTORTION, 0.5 * DISTORTION])
    in_camera = world_to_camera(points, R, t)
    pixels = project(in_camera, intrinsics, distortion)
    ideal = undistort_points(pixels, intrinsics, distortion)
    for index in range(2):
        camera = Camera(intrinsics[index], R[index], t[index], distortion[index])
        np.testing.assert_allclose(camera.world_to_camera(points[index]), in_camera[index], rtol=1e-13)
        np.testing.assert_allclose(camera.project(in_camera[index]), pixels[index], rtol=1e-13)
        np.testing.assert_allclose(camera.undistort_points(pixels[index]), ideal[index], rtol=1e-12)
    np.testing.assert_allclose(camera_to_world(in_camera, R, t), points, rtol=0, atol=1e-13)


def test_human36m_convention(points: np.ndarray) -> None:
    R, T = _rotation(0.3, 0.2, -0.5), np.array([1.8, 4.9, -1.6])
    camera = Camera.from_human36m(
        f=[1145.0, 1143.8],
        c=[512.5, 515.4],
        k=DISTORTION[[0, 1, 4]],
        p=DISTORTION[[2, 3]],
        R=R,
        T=T,
        image_size=(1000, 1002),
    )
    np.testing.assert_allclose(camera.world_to_camera(points), (points - T) @ R.T, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(camera.distortion, DISTORTION)
    np.testing.assert_array_equal(camera.K, K)


def test_four_coefficients_leave_k3_zero() -> None:
    camera = Camera(K, np.eye(3), np.zeros(3), DISTORTION[:4])
    np.testing.assert_array_equal(camera.distortion, [*DISTORTION[:4], 0.0])
    np.testing.assert_array_equal(Camera(K, np.eye(3), np.zeros(3)).distortion, np.zeros(5))


def test_bad_shapes_say_what_came() -> None:
    cases = {
        "project: points_camera must be [..., 3], got [4, 2]": lambda: project(np.zeros((4, 2)), K),
        "undistort_points: pixels must be [..., 2], got [3]": lambda: undistort_points(np.zeros(3), K),
        "world_to_camera: points must be [..., 3], got [2]": lambda: world_to_camera(
            np.zeros(2), np.eye(3), np.zeros(3)
        ),
        "Camera: K must be [3, 3], got [2, 3]": lambda: Camera(np.zeros((2, 3)), np.eye(3), np.zeros(3)),
        "Camera: t must be [3], got [3, 1]": lambda: Camera(K, np.eye(3), np.zeros((3, 1))),
        "distortion must be [..., 5] (k1, k2, p1, p2, k3) or [..., 4] without k3, got [3]": lambda: project(
            np.ones(3), K, np.zeros(3)
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message
