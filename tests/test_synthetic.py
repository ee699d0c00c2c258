"""Synthetic scenes: geometry, anatomy, pictures, noise, reproducibility, bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from liftbyimage.data import background as backgrounds
from liftbyimage.data import body, render
from liftbyimage.data.camera import project
from liftbyimage.data.crop import apply_affine, box_to_crop_matrix
from liftbyimage.data.scenes import FRAME_SIZE, Scenes
from liftbyimage.data.skeleton import BONES, FLIP_PAIRS, JOINT_NAMES, PARENTS
from liftbyimage.data.synthetic import MOTIONS, SyntheticPeople, generate

JOINT = {name: i for i, name in enumerate(JOINT_NAMES)}


@pytest.fixture(scope="module")
def textured() -> Scenes:
    return generate(96, seed=11)


@pytest.fixture(scope="module")
def laboratory() -> Scenes:
    return generate(24, seed=11, background="laboratory")


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, i]) for i in range(count)]


def angles_of(**changes: float) -> dict[str, np.ndarray]:
    return {name: np.array([changes.get(name, 0.0)]) for name in body.LIMITS}


def sample_poses(people: body.People, draws: list[np.random.Generator], motion: str) -> dict[str, np.ndarray]:
    return body.sample_poses(people, draws, body.sample_activities(draws, motion))


def pose(**changes: float) -> dict[str, np.ndarray]:
    points = body.pose_points(body.sample_people(generators(1)).bones, angles_of(**changes))[0]
    return dict(zip(body.POINT_NAMES, points, strict=True))


def assert_equal_scenes(one: Scenes, other: Scenes) -> None:
    for field in fields(Scenes):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


# --- form and geometry


def test_shapes_and_dtypes(textured: Scenes) -> None:
    joints = len(JOINT_NAMES)
    expected = {
        "image": ((96, 256, 192, 3), torch.uint8),
        "mask": ((96, 256, 192), torch.bool),
        "pose_2d": ((96, joints, 2), torch.float32),
        "pose_2d_clean": ((96, joints, 2), torch.float32),
        "pose_3d": ((96, joints, 3), torch.float32),
        "visible": ((96, joints), torch.bool),
        "K": ((96, 3, 3), torch.float32),
        "R": ((96, 3, 3), torch.float32),
        "t": ((96, 3), torch.float32),
        "root": ((96, 3), torch.float32),
        "crop_matrix": ((96, 2, 3), torch.float32),
    }
    assert {
        f.name: (tuple(getattr(textured, f.name).shape), getattr(textured, f.name).dtype) for f in fields(Scenes)
    } == expected
    assert len(textured) == 96


def test_pose_3d_projects_to_pose_2d_clean(textured: Scenes) -> None:
    assert torch.equal(textured.pose_3d[:, 0], torch.zeros(96, 3))
    points = textured.pose_3d.double() + textured.root.double()[:, None]
    projected = project(points.numpy(), textured.K.double().numpy())
    np.testing.assert_allclose(projected, textured.pose_2d_clean.numpy(), rtol=0, atol=1e-3)


def test_crop_follows_the_box_rule(textured: Scenes) -> None:
    low, high = textured.pose_2d_clean.amin(1), textured.pose_2d_clean.amax(1)
    torch.testing.assert_close((low + high) / 2, torch.tensor([95.5, 127.5]).expand(96, 2), rtol=0, atol=1e-3)
    filled = ((high - low) / torch.tensor([192.0, 256.0])).amax(1)
    torch.testing.assert_close(filled, torch.full((96,), 1 / 1.25), rtol=0, atol=1e-4)


def test_crop_matrix_cuts_the_crop_out_of_the_full_frame(textured: Scenes) -> None:
    """The crop's camera, taken back to the full frame, has its principal point in the middle and square pixels."""
    matrix = textured.crop_matrix.double().numpy()
    assert (matrix[:, 0, 0] == matrix[:, 1, 1]).all() and not matrix[:, [0, 1], [1, 0]].any()
    K = textured.K.double().numpy()
    centre = (K[:, :2, 2] - matrix[:, :, 2]) / matrix[:, :1, 0]
    np.testing.assert_allclose(centre, np.tile((np.array(FRAME_SIZE) - 1) / 2, (96, 1)), rtol=0, atol=1e-3)
    focal = K[:, 0, 0] / matrix[:, 0, 0]
    assert 949 < focal.min() < 1000 and 1500 < focal.max() < 1551
    full = (textured.pose_2d_clean.double().numpy() - matrix[:, None, :, 2]) / matrix[:, None, :1, 0]
    box = np.concatenate([full.min(axis=1), full.max(axis=1)], axis=1)
    np.testing.assert_allclose(box_to_crop_matrix(box), matrix, rtol=0, atol=5e-3)


def test_cameras_are_calibrated_and_all_round(textured: Scenes) -> None:
    R, t = textured.R.double(), textured.t.double()
    torch.testing.assert_close(R @ R.mT, torch.eye(3).double().expand_as(R), rtol=0, atol=1e-6)
    assert (torch.linalg.det(R) > 0.999).all()
    eye = -(R.mT @ t[..., None])[..., 0]
    root = (R.mT @ (textured.root.double() - t)[..., None])[..., 0]
    offset = eye - root
    distance = offset.norm(dim=1)
    elevation = torch.rad2deg(torch.asin(offset[:, 2] / distance))
    azimuth = torch.rad2deg(torch.atan2(offset[:, 1], offset[:, 0]))
    assert 3 - 1e-5 <= distance.min() < 3.4 and 5.6 < distance.max() <= 6 + 1e-5
    assert -10 - 1e-3 <= elevation.min() < -5 and 25 < elevation.max() <= 30 + 1e-3
    assert (torch.histc(azimuth, 8, -180, 180) > 0).all()
    assert (eye[:, 2] > 0.2).all()
    assert (textured.K[:, 0, 0] == textured.K[:, 1, 1]).all()


def test_people_stand_on_the_floor() -> None:
    people = body.sample_people(generators(20))
    points = body.pose_points(people.bones, sample_poses(people, generators(20, 1), "mixed"))
    world = body.stand(points, people.radii, np.linspace(0, 350, 20), np.full((20, 2), 0.25))
    lowest = (world[:, body.CAPSULE_ENDS, 2] - people.radii).min(axis=(1, 2))
    np.testing.assert_allclose(lowest, 0, atol=1e-12)
    np.testing.assert_allclose(world[:, 0, :2], 0.25, atol=1e-12)


# --- anatomy


def test_bones_are_constant_for_a_person_and_alike_left_and_right() -> None:
    person = body.sample_people(generators(1, 3))
    everyone = {name: np.repeat(bone, 50) for name, bone in person.bones.items()}
    many = body.People(np.repeat(person.stature, 50), everyone, person.radii, person.flesh, person.colours)
    joints = body.pose_points(everyone, sample_poses(many, generators(50), "mixed"))[:, : len(JOINT_NAMES)]
    lengths = {child: np.linalg.norm(joints[:, child] - joints[:, parent], axis=1) for parent, child in BONES}
    for child, length in lengths.items():
        np.testing.assert_allclose(length, length[0], rtol=1e-12, err_msg=JOINT_NAMES[child])
    for left, right in FLIP_PAIRS:
        np.testing.assert_allclose(lengths[left], lengths[right], rtol=1e-12, err_msg=JOINT_NAMES[left])
    assert np.ptp(joints[:, JOINT["left_wrist"]], axis=0).min() > 0.5


def test_people_differ_in_stature_and_proportions() -> None:
    people = body.sample_people(generators(300))
    assert 1.5 <= people.stature.min() < 1.52 and 1.93 < people.stature.max() <= 1.95
    share = people.bones["thigh"] / people.stature
    assert 0.02 < share.std() / share.mean() < 0.06
    joints = body.pose_points(people.bones, {name: np.zeros(300) for name in body.LIMITS})
    height = joints[:, JOINT["head"], 2] - joints[:, JOINT["left_ankle"], 2] + people.bones["sole"]
    np.testing.assert_allclose(height, people.stature, rtol=1e-12)


@pytest.mark.parametrize("motion", MOTIONS)
def test_sampled_angles_keep_the_joint_limits(motion: str) -> None:
    people = body.sample_people(generators(200))
    angles = sample_poses(people, generators(200, 5), motion)
    assert angles.keys() == body.LIMITS.keys()
    for name, angle in angles.items():
        low, high = body.LIMITS[name]
        assert low <= angle.min() and angle.max() <= high, name
        assert angle.std() > 0.1, name
    for side in ("left", "right"):
        behind = angles[f"{side}_shoulder_plane"] < 0
        assert (angles[f"{side}_shoulder_elevate"][behind] <= body.ARM_BEHIND_LIMIT).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_angle_bends_the_right_way(side: str) -> None:
    outward = 1 if side == "left" else -1

    def moved(segment: tuple[str, str], **changes: float) -> np.ndarray:
        at = pose(**{f"{side}_{name}": angle for name, angle in changes.items()})
        step = at[f"{side}_{segment[1]}"] - at[f"{side}_{segment[0]}"]
        return step / np.linalg.norm(step)

    forearm, upper_arm, thigh, shank = (
        ("elbow", "wrist"),
        ("shoulder", "elbow"),
        ("hip", "knee"),
        ("knee", "ankle"),
    )
    close = dict(rtol=0, atol=1e-12)
    np.testing.assert_allclose(moved(forearm, elbow_flex=90), [1, 0, 0], **close)
    np.testing.assert_allclose(moved(forearm, elbow_flex=90, shoulder_rotate=90), [0, -outward, 0], **close)
    np.testing.assert_allclose(moved(upper_arm, shoulder_elevate=90), [0, outward, 0], **close)
    np.testing.assert_allclose(moved(upper_arm, shoulder_elevate=90, shoulder_plane=90), [1, 0, 0], **close)
    np.testing.assert_allclose(moved(shank, knee_flex=90), [-1, 0, 0], **close)
    np.testing.assert_allclose(moved(thigh, hip_flex=90), [1, 0, 0], **close)
    np.testing.assert_allclose(moved(thigh, hip_abduct=90), [0, outward, 0], **close)


def test_trunk_bends_forward_and_head_nods() -> None:
    upright = pose()
    assert upright["thorax"][2] > upright["spine"][2] > 0 and upright["nose"][0] > 0.05
    assert pose(pelvis_pitch=30)["thorax"][0] > 0.2
    assert pose(spine_flex=40)["thorax"][0] > 0.1
    assert pose(neck_flex=30)["head"][0] > upright["head"][0]
    assert pose(neck_twist=60)["nose"][1] > 0.05
    assert upright["left_shoulder"][1] > 0 > upright["right_shoulder"][1]


def test_knees_bend_backward_in_scenes(textured: Scenes) -> None:
    joints = textured.pose_3d.double()
    across = joints[:, JOINT["left_hip"]] - joints[:, JOINT["right_hip"]]
    for side in ("left", "right"):
        hip, knee, ankle = (joints[:, JOINT[f"{side}_{name}"]] for name in ("hip", "knee", "ankle"))
        thigh, shank = knee - hip, ankle - knee
        forward = torch.linalg.cross(thigh, across)
        aside = shank - (shank * thigh).sum(1, keepdim=True) / (thigh * thigh).sum(1, keepdim=True) * thigh
        bent = aside.norm(dim=1) > 0.1
        assert bent.sum() > 20
        assert ((aside * forward).sum(1)[bent] < 0).all()


def test_postures_are_mostly_upright_and_varied(textured: Scenes) -> None:
    world = torch.einsum("sji,snj->sni", textured.R, textured.pose_3d)
    assert (world[:, JOINT["thorax"], 2] > 0.2).float().mean() > 0.85
    seated = world[:, [JOINT["left_knee"], JOINT["right_knee"]], 2].mean(1) > -0.2
    assert 0.03 < seated.float().mean() < 0.35
    wrists = world[:, [JOINT["left_wrist"], JOINT["right_wrist"]], 2].amax(1)
    assert 0.1 < (wrists > world[:, JOINT["thorax"], 2]).float().mean() < 0.7


def test_walking_swings_arm_against_leg() -> None:
    scenes = generate(40, seed=2, motion="walking", size=(32, 24))
    world = torch.einsum("sji,snj->sni", scenes.R, scenes.pose_3d)
    left = world[:, JOINT["left_shoulder"]] - world[:, JOINT["right_shoulder"]]
    forward = torch.stack([left[:, 1], -left[:, 0]], dim=1)

    def lead(name: str) -> torch.Tensor:
        return ((world[:, JOINT[f"left_{name}"], :2] - world[:, JOINT[f"right_{name}"], :2]) * forward).sum(1)

    assert torch.corrcoef(torch.stack([lead("knee"), lead("wrist")]))[0, 1] < -0.7


# --- rasteriser


def march(ends: np.ndarray, radii: np.ndarray, ray: np.ndarray) -> float:
    """First hit by brute force: the nearest entry into any of many spheres along the capsule."""
    share = np.linspace(0, 1, 20001)[:, None]
    centre = ends[0] + share * (ends[1] - ends[0])
    radius = radii[0] + share[:, 0] * (radii[1] - radii[0])
    along, dd = centre @ ray, ray @ ray
    square = along**2 - dd * ((centre**2).sum(1) - radius**2)
    if (square <= 0).all():
        return np.inf
    return float(((along - np.sqrt(np.maximum(square, 0))) / dd)[square > 0].min())


@pytest.mark.parametrize(
    "ends, radii",
    [
        ([[-0.3, 0.1, 4.0], [0.3, -0.2, 4.3]], [0.1, 0.1]),
        ([[0.0, 0.3, 3.8], [0.1, -0.3, 4.4]], [0.15, 0.05]),
        ([[0.02, 0.0, 3.5], [0.0, 0.03, 4.5]], [0.05, 0.3]),
        ([[0.02, 0.0, 3.5], [0.0, 0.03, 4.5]], [0.3, 0.05]),
        ([[0.0, 0.0, 3.5], [0.0, 0.0, 4.5]], [0.2, 0.2]),
        ([[0.1, 0.1, 2.0], [0.1, 0.12, 2.5]], [0.02, 0.45]),
    ],
)
def test_ray_capsule_hits_agree_with_brute_force(ends: list[list[float]], radii: list[float]) -> None:
    spheres, sizes = np.array(ends), np.array(radii)
    K = np.array([[45.0, 0, 10.0], [0, 45.0, 12.0], [0, 0, 1]])
    x, y = render.pixel_rays(K, (24, 20))
    hits = render.cast(render.Capsules.between(spheres[None], sizes[None]), (x, y))
    expected = np.array([[march(spheres, sizes, np.array([a, b, 1.0])) for a in x[0]] for b in y[:, 0]])
    assert np.isfinite(expected).sum() > 8
    np.testing.assert_array_equal(np.isfinite(hits.depth), np.isfinite(expected))
    np.testing.assert_allclose(hits.depth, expected, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(hits.part, np.where(np.isfinite(expected), 0, -1))


def test_nearest_capsule_wins_whatever_the_order() -> None:
    ends = np.array([[[-0.5, 0, 4.0], [0.5, 0, 4.0]], [[0, -0.5, 3.5], [0, 0.5, 4.1]], [[0, 0, 5.0], [0, 0.1, 5]]])
    radii = np.array([[0.1, 0.1], [0.1, 0.06], [0.6, 0.6]])
    rays = render.pixel_rays(np.array([[60.0, 0, 24], [0, 60.0, 32], [0, 0, 1]]), (64, 48))
    alone = [render.cast(render.Capsules.between(ends[i : i + 1], radii[i : i + 1]), rays).depth for i in range(3)]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        hits = render.cast(render.Capsules.between(ends[order], radii[order]), rays)
        np.testing.assert_array_equal(hits.depth, np.min(alone, axis=0))
        on_body = hits.part >= 0
        np.testing.assert_array_equal(np.array(order)[hits.part[on_body]], np.argmin(alone, axis=0)[on_body])


def test_normals_are_unit_and_face_the_camera() -> None:
    capsules = render.Capsules.between(np.array([[[0.0, -0.4, 4.0], [0.1, 0.4, 3.6]]]), np.array([[0.15, 0.08]]))
    rays = render.pixel_rays(np.array([[100.0, 0, 30], [0, 100.0, 40], [0, 0, 1]]), (80, 60))
    hits = render.cast(capsules, rays)
    point, normal = render.surface(capsules, hits, rays)
    assert len(point) == (hits.part >= 0).sum() > 100
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, rtol=1e-9)
    assert ((normal * point).sum(1) < 1e-9).all()


def test_shading_tells_a_limb_towards_the_camera_from_one_away() -> None:
    """Two forearms with the same 2D outline, one end nearer or farther: the nearer one is brighter."""
    K = np.array([[300.0, 0, 48], [0, 300.0, 64], [0, 0, 1]])
    rays = render.pixel_rays(K, (128, 96))
    brightness = []
    for tilt in (-0.2, 0.2):
        wrist = np.array([0, 0.15 / 4, 1]) * (4 + tilt)
        capsules = render.Capsules.between(np.array([[[0, 0, 4.0], wrist]]), np.array([[0.045, 0.035]]))
        hits = render.cast(capsules, rays)
        point, normal = render.surface(capsules, hits, rays)
        lamp = np.array([0, 0, 4.0]) + 3.2 * np.array([-0.5, -0.58, -0.64])
        picture = render.shade(point, normal, np.full((len(point), 3), 0.5), lamp, 3.2, 0.22)
        brightness.append(picture.mean())
    assert brightness[0] > 1.3 * brightness[1]


# --- pictures


def test_visible_joints_lie_on_the_mask(textured: Scenes) -> None:
    column, row = textured.pose_2d_clean.round().long().unbind(-1)
    inside = textured.mask[torch.arange(96)[:, None], row, column]
    assert inside[textured.visible].float().mean() > 0.99
    assert 0.65 < textured.visible.float().mean() < 0.95
    share = textured.mask.float().mean((1, 2))
    assert share.min() > 0.03 and share.max() < 0.6


def test_hidden_joints_lie_behind_another_part(textured: Scenes) -> None:
    nearer = torch.zeros_like(textured.visible)
    depth = textured.pose_3d[..., 2]
    reach = (0.2 * textured.K[:, 0, 0] / textured.root[:, 2])[:, None]  # px that 0.2 m span
    for parent, child in BONES:
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            spot = textured.pose_2d_clean[:, parent].lerp(textured.pose_2d_clean[:, child], share)
            bone_depth = depth[:, parent].lerp(depth[:, child], share)
            close = (spot[:, None] - textured.pose_2d_clean).norm(dim=-1) < reach
            nearer |= close & (bone_depth[:, None] < depth - 0.02)
    # wrists, ankles and the head's top can also hide behind hands, feet and the face, which no bone spans
    ends = [i for i, name in enumerate(JOINT_NAMES) if name.endswith(("wrist", "ankle", "head"))]
    inner = [i for i in range(len(JOINT_NAMES)) if i not in ends]
    hidden = ~textured.visible
    assert hidden[:, inner].sum() > 200
    assert nearer[:, inner][hidden[:, inner]].all()
    assert nearer[:, ends][hidden[:, ends]].float().mean() > 0.6


def test_mask_is_where_the_body_was_drawn(textured: Scenes, laboratory: Scenes) -> None:
    """The same people stand before both backgrounds: equal pixels on the body, different ones beside it."""
    mask = laboratory.mask
    assert torch.equal(textured.mask[:24], mask)
    assert torch.equal(textured.image[:24][mask], laboratory.image[mask])
    differs = (textured.image[:24] != laboratory.image).any(-1)
    assert differs[~mask].float().mean() > 0.98


def test_laboratory_is_a_function_of_the_camera(laboratory: Scenes) -> None:
    for s in range(len(laboratory)):
        K, R, t = (getattr(laboratory, name)[s].double().numpy() for name in ("K", "R", "t"))
        room = torch.from_numpy(backgrounds.laboratory(K, R, t, (256, 192)))
        same = (room == laboratory.image[s]).all(-1)[~laboratory.mask[s]]
        assert same.all()


def test_laboratory_tells_the_azimuth(laboratory: Scenes) -> None:
    K = np.array([[300.0, 0, 95.5], [0, 300.0, 127.5], [0, 0, 1]])
    level = np.array([[0, -1.0, 0], [0, 0, -1], [1, 0, 0]])
    views = []
    for azimuth in np.radians([0, 0, 30, 90, 180, 270]):
        cos, sin = np.cos(azimuth), np.sin(azimuth)
        R = level @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        views.append(backgrounds.laboratory(K, R, R @ -np.array([-4 * cos, -4 * sin, 1.2]), (256, 192)))
    np.testing.assert_array_equal(views[0], views[1])
    for i in range(1, 6):
        for j in range(i + 1, 6):
            assert (views[i] != views[j]).any(-1).mean() > 0.3


def test_people_mostly_face_one_end_of_the_laboratory(laboratory: Scenes) -> None:
    across = laboratory.pose_3d[:, JOINT["left_hip"]] - laboratory.pose_3d[:, JOINT["right_hip"]]
    left = torch.einsum("sji,sj->si", laboratory.R, across)
    assert (left[:, 1] > 0).float().mean() > 0.9


def test_textured_backgrounds_differ_between_scenes(textured: Scenes) -> None:
    both = ~(textured.mask[:-1] | textured.mask[1:])
    same = (textured.image[:-1] == textured.image[1:]).all(-1)
    assert same[both].float().mean() < 0.01
    assert textured.image.float().std((1, 2)).amin() > 2


# --- detection noise


def test_noise_level(textured: Scenes) -> None:
    error = textured.pose_2d - textured.pose_2d_clean
    robust = error.abs().flatten(0, 1)[textured.visible.flatten()].median() / 0.6745
    hidden = error.abs().flatten(0, 1)[~textured.visible.flatten()].median() / 0.6745
    assert 1.9 < robust < 2.25
    assert 4.5 < hidden < 6.0
    far = (error.norm(dim=-1) > 8)[textured.visible].float().mean()
    assert 0.01 < far < 0.035
    assert abs(error[textured.visible].mean()) < 0.3


def test_noise_scales_and_vanishes() -> None:
    exact, single, double = (generate(4, seed=3, noise=level, size=(64, 48)) for level in (0, 1, 2))
    assert torch.equal(exact.pose_2d, exact.pose_2d_clean)
    torch.testing.assert_close(
        double.pose_2d - double.pose_2d_clean, 2 * (single.pose_2d - single.pose_2d_clean), rtol=0, atol=1e-4
    )
    assert torch.equal(single.pose_3d, double.pose_3d)


def test_swaps_exchange_whole_limb_pairs() -> None:
    swapped = generate(6, seed=4, noise=0, swap_rate=1.0, size=(64, 48))
    order = list(range(17))
    for left, right in FLIP_PAIRS:
        order[left], order[right] = right, left
    assert torch.equal(swapped.pose_2d, swapped.pose_2d_clean[:, order])
    some = generate(200, seed=4, noise=0, swap_rate=0.2, size=(8, 8))
    moved = (some.pose_2d != some.pose_2d_clean).any(-1)
    assert torch.equal(moved[:, JOINT["left_knee"]], moved[:, JOINT["right_ankle"]])
    assert 0.1 < moved[:, JOINT["left_wrist"]].float().mean() < 0.3


# --- reproducibility


@pytest.mark.parametrize("background", ["textured", "laboratory"])
def test_scenes_do_not_depend_on_count_or_chunk(background: str) -> None:
    whole = generate(70, seed=9, background=background, size=(64, 48))
    assert_equal_scenes(whole, generate(70, seed=9, background=background, size=(64, 48)))
    for start, count in ((0, 1), (3, 5), (61, 9)):
        part = generate(count, seed=9, start=start, background=background, size=(64, 48))
        expected = Scenes(**{f.name: getattr(whole, f.name)[start : start + count] for f in fields(Scenes)})
        assert_equal_scenes(part, expected)


def test_scenes_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = generate(5, seed=1, size=(64, 48))
        torch.set_num_threads(4)
        assert_equal_scenes(single, generate(5, seed=1, size=(64, 48)))
    finally:
        torch.set_num_threads(threads)


def test_seeds_give_different_scenes() -> None:
    one, other = (generate(3, seed=seed, size=(64, 48)) for seed in (0, 1))
    assert (one.pose_3d[:, 1:] != other.pose_3d[:, 1:]).all()


@pytest.mark.parametrize("cache", [True, False])
def test_records_are_the_generated_scenes(cache: bool) -> None:
    options = {"seed": 6, "background": "laboratory", "noise": 0.5, "size": (64, 48)}
    scenes = generate(66, **options)
    people = SyntheticPeople(count=66, cache=cache, **options)
    assert len(people) == 66
    for index in (65, 0, 7, -1):
        record = people[index]
        for name in ("image", "mask", "pose_3d"):
            np.testing.assert_array_equal(record[name], getattr(scenes, name)[index].numpy(), err_msg=name)
        crop_px = apply_affine(record["crop_matrix"], record["keypoints"])
        np.testing.assert_allclose(crop_px, scenes.pose_2d[index].numpy(), rtol=0, atol=1e-3)
    with pytest.raises(IndexError, match="^index: expected a record from -66 to 65, got 66$"):
        people[66]


def test_groups_are_what_people_do() -> None:
    """Walking and reaching by the motion asked for; who sits has bent hips, who stands has not."""
    for motion in ("walking", "reaching"):
        people = SyntheticPeople(count=3, motion=motion, size=(8, 8))
        assert {people.groups[record["group"]] for record in (people[i] for i in range(3))} == {motion}
    people = SyntheticPeople(count=128, seed=3, motion="random", size=(8, 8))
    rise: dict[str, list[float]] = {name: [] for name in people.groups}
    for index in range(len(people)):
        joints = people[index]["pose_3d"]
        thighs = [joints[JOINT[f"{side}_knee"]] - joints[JOINT[f"{side}_hip"]] for side in ("left", "right")]
        trunk = joints[JOINT["thorax"]] / np.linalg.norm(joints[JOINT["thorax"]])
        rise[people.groups[people[index]["group"]]].append(np.mean([thigh @ trunk for thigh in thighs]))
    assert not rise["walking"] and not rise["reaching"] and all(len(rise[name]) > 4 for name in people.groups[:6])
    assert np.mean(rise["standing"]) < -0.3 and np.mean(rise["sitting"]) > -0.2


def test_no_scenes_and_other_sizes() -> None:
    nothing = generate(0, seed=0)
    assert nothing.image.shape == (0, 256, 192, 3) and nothing.pose_3d.shape == (0, 17, 3)
    assert nothing.mask.dtype == torch.bool and nothing.pose_2d.dtype == torch.float32
    wide = generate(2, seed=0, size=(40, 90))
    assert wide.image.shape == (2, 40, 90, 3)
    assert wide.mask.any((1, 2)).all()


def test_skeleton_order_is_the_bodys() -> None:
    assert body.POINT_NAMES[:17] == JOINT_NAMES and len(PARENTS) == 17


# --- bad input


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, "count: expected an integer, got float", {"count": 2.0}),
        (TypeError, "count: expected an integer, got bool", {"count": True}),
        (ValueError, "seed: expected at least 0, got -3", {"seed": -3}),
        (TypeError, "seed: expected an integer, got NoneType", {"seed": None}),
        (
            ValueError,
            "background: expected one of textured, laboratory, got 'beach'",
            {"background": "beach"},
        ),
        (
            ValueError,
            "motion: expected one of mixed, random, walking, reaching, got 'dancing'",
            {"motion": "dancing"},
        ),
        (ValueError, "noise: expected a finite number, 0 or more, got -0.5", {"noise": -0.5}),
        (ValueError, "noise: expected a finite number, 0 or more, got nan", {"noise": float("nan")}),
        (ValueError, "swap_rate: expected a probability from 0 to 1, got 1.5", {"swap_rate": 1.5}),
        (
            ValueError,
            "size: expected (height, width), each an integer of at least 8, got (256, 0)",
            {"size": (256, 0)},
        ),
        (
            ValueError,
            "size: expected (height, width), each an integer of at least 8, got (256,)",
            {"size": (256,)},
        ),
    ],
)
@pytest.mark.parametrize("make", [generate, SyntheticPeople])
def test_bad_input(make: Callable[..., object], error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error) as raised:
        make(**({"count": 1, "seed": 0} | changes))
    assert str(raised.value) == message


@pytest.mark.parametrize(("make", "least"), [(generate, 0), (SyntheticPeople, 1)])
def test_too_few(make: Callable[..., object], least: int) -> None:
    with pytest.raises(ValueError, match=f"^count: expected at least {least}, got {least - 1}$"):
        make(count=least - 1, seed=0)


def test_bad_start() -> None:
    with pytest.raises(ValueError, match="^start: expected at least 0, got -1$"):
        generate(1, seed=0, start=-1)
