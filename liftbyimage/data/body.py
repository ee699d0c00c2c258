"""People for synthetic scenes: proportions, poses within joint limits, forward kinematics, capsule flesh.

Body axes: x forward, y left, z up, metres; angles in degrees. Everything is batched over scenes S, float64;
scene s draws only from its own generator, so that it does not depend on the batch it was made in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liftbyimage.data.skeleton import JOINT_NAMES

Array = NDArray[np.float64]
Length = Array | float
Points = dict[str, Array]
Lengths = Mapping[str, Array]
Angles = Mapping[str, Array]
Generators = Sequence[np.random.Generator]

_LIMB_LIMITS = {
    "hip_flex": (-20.0, 110.0),
    "hip_abduct": (-10.0, 45.0),
    "hip_rotate": (-30.0, 30.0),
    "knee_flex": (0.0, 140.0),
    "ankle_flex": (-20.0, 40.0),
    "shoulder_elevate": (6.0, 165.0),
    "shoulder_plane": (-80.0, 130.0),
    "shoulder_rotate": (-40.0, 60.0),
    "elbow_flex": (0.0, 140.0),
}
LIMITS: dict[str, tuple[float, float]] = {
    "pelvis_pitch": (-25.0, 70.0),
    "pelvis_roll": (-15.0, 15.0),
    "spine_flex": (-20.0, 60.0),
    "spine_side": (-25.0, 25.0),
    "spine_twist": (-35.0, 35.0),
    "neck_flex": (-30.0, 40.0),
    "neck_side": (-25.0, 25.0),
    "neck_twist": (-60.0, 60.0),
    **{f"{side}_{name}": limit for side in ("left", "right") for name, limit in _LIMB_LIMITS.items()},
}
"""Range of every joint angle, degrees. `shoulder_plane` is 0 sideways, 90 forward, negative behind."""

ARM_BEHIND_LIMIT = 60.0
"""Largest shoulder elevation in degrees while the plane of elevation is behind the back."""

_STANDING = {
    "pelvis_pitch": (2.0, 5.0),
    "pelvis_roll": (0.0, 4.0),
    "spine_flex": (4.0, 9.0),
    "spine_side": (0.0, 7.0),
    "spine_twist": (0.0, 12.0),
    "neck_flex": (5.0, 12.0),
    "neck_side": (0.0, 8.0),
    "neck_twist": (0.0, 25.0),
    "hip_flex": (6.0, 11.0),
    "hip_abduct": (6.0, 7.0),
    "hip_rotate": (0.0, 12.0),
    "knee_flex": (9.0, 10.0),
    "ankle_flex": (0.0, 6.0),
    "shoulder_elevate": (24.0, 22.0),
    "shoulder_plane": (40.0, 45.0),
    "shoulder_rotate": (10.0, 25.0),
    "elbow_flex": (40.0, 35.0),
}
_RAISED = {"shoulder_elevate": (105.0, 35.0), "shoulder_plane": (50.0, 40.0), "shoulder_rotate": (-5.0, 25.0)}
_BENDING = {
    "pelvis_pitch": (35.0, 15.0),
    "spine_flex": (32.0, 14.0),
    "hip_flex": (42.0, 14.0),
    "knee_flex": (22.0, 16.0),
    "shoulder_elevate": (55.0, 28.0),
    "shoulder_plane": (80.0, 25.0),
}
_SITTING = {
    "pelvis_pitch": (0.0, 8.0),
    "spine_flex": (12.0, 12.0),
    "hip_flex": (82.0, 12.0),
    "hip_abduct": (12.0, 9.0),
    "knee_flex": (85.0, 18.0),
    "shoulder_elevate": (38.0, 20.0),
    "shoulder_plane": (75.0, 30.0),
    "elbow_flex": (55.0, 35.0),
}
_CROUCHING = {
    "pelvis_pitch": (18.0, 12.0),
    "hip_flex": (72.0, 25.0),
    "hip_abduct": (14.0, 10.0),
    "knee_flex": (80.0, 32.0),
    "shoulder_elevate": (50.0, 28.0),
    "shoulder_plane": (65.0, 35.0),
}
_STRIKING = {
    "hip_flex": (28.0, 30.0),
    "hip_abduct": (15.0, 14.0),
    "knee_flex": (35.0, 35.0),
    "spine_twist": (0.0, 20.0),
    "shoulder_elevate": (75.0, 45.0),
    "shoulder_plane": (45.0, 55.0),
    "elbow_flex": (60.0, 45.0),
}
_REACHING = {
    "pelvis_pitch": (10.0, 9.0),
    "spine_flex": (15.0, 13.0),
    "spine_twist": (0.0, 18.0),
    "hip_flex": (14.0, 16.0),
    "knee_flex": (16.0, 14.0),
}
_POSTURES = tuple(_STANDING | change for change in ({}, _RAISED, _BENDING, _SITTING, _CROUCHING, _STRIKING))
ACTIVITIES = ("standing", "arms raised", "bending", "sitting", "crouching", "striking", "walking", "reaching")
"""What people do: the postures of motion "random", then the other motions."""
_POSTURE_EDGES = np.cumsum((0.25, 0.17, 0.13, 0.15, 0.12))
MOTIONS = ("mixed", "random", "walking", "reaching")
_MIXED_EDGES = np.cumsum((0.6, 0.2))
_CANDIDATES = 4

SIDES = {"left": 1.0, "right": -1.0}
"""Which way each side lies along the body's y axis."""

_SIDE_POINTS = ("hand", "heel", "toe", "pelvis", "waist", "chest")
_EXTRA_POINTS = (
    *(f"{side}_{name}" for side in ("left", "right") for name in _SIDE_POINTS),
    "skull_low",
    "skull_high",
    "nose_root",
)
POINT_NAMES: tuple[str, ...] = (*JOINT_NAMES, *_EXTRA_POINTS)
"""The 17 joints, then the points that only flesh needs."""

# name, start point, end point, radius at start and end (metres at a stature of 1.75 m), material
_LIMB_CAPSULES = (
    ("{}_hip", "{}_knee", 0.082, 0.054, "trousers"),
    ("{}_knee", "{}_ankle", 0.054, 0.037, "shank"),
    ("{}_heel", "{}_toe", 0.042, 0.032, "shoes"),
    ("{}_pelvis", "{}_waist", 0.100, 0.090, "shirt"),
    ("{}_waist", "{}_chest", 0.090, 0.102, "shirt"),
    ("{}_chest", "{}_shoulder", 0.095, 0.060, "shirt"),
    ("{}_shoulder", "{}_elbow", 0.052, 0.040, "shirt"),
    ("{}_elbow", "{}_wrist", 0.040, 0.028, "forearm"),
    ("{}_wrist", "{}_hand", 0.032, 0.028, "skin"),
)
_CAPSULES = (
    *((a.format(s), b.format(s), ra, rb, m) for s in ("left", "right") for a, b, ra, rb, m in _LIMB_CAPSULES),
    ("left_pelvis", "right_pelvis", 0.106, 0.106, "trousers"),
    ("spine", "thorax", 0.094, 0.078, "shirt"),
    ("thorax", "skull_low", 0.062, 0.052, "skin"),
    ("skull_low", "skull_high", 0.074, 0.092, "skin"),
    ("nose_root", "nose", 0.016, 0.016, "skin"),
)
MATERIALS = ("skin", "shirt", "forearm", "trousers", "shank", "shoes", "hair")
CAPSULE_MATERIAL = np.array([MATERIALS.index(capsule[4]) for capsule in _CAPSULES])
CAPSULE_ENDS = np.array([[POINT_NAMES.index(name) for name in capsule[:2]] for capsule in _CAPSULES])
_CAPSULE_RADII = np.array([capsule[2:4] for capsule in _CAPSULES])
SKULL = next(i for i, capsule in enumerate(_CAPSULES) if capsule[:2] == ("skull_low", "skull_high"))
"""Index of the one capsule whose back and top are hair."""

_JOINT_FLESH = np.array(
    [0.13, 0.12, 0.06, 0.05, 0.12, 0.06, 0.05, 0.13, 0.12, 0.05, 0.07, 0.09, 0.05, 0.04, 0.09, 0.05, 0.04]
)


@dataclass(frozen=True)
class People:
    """One person per scene. Lengths in metres, colours in [0, 1]."""

    stature: Array  # [S]
    bones: Lengths  # name -> [S], left and right alike
    radii: Array  # [S, C, 2] of the capsules' two ends
    flesh: Array  # [S, 17] how deep each joint lies under its own surface
    colours: Array  # [S, len(MATERIALS), 3]

    def resized(self, stature: Array) -> People:
        """The same people, grown or shrunk in proportion to these statures [S]."""
        factor = stature / self.stature
        return People(
            stature=stature,
            bones={name: bone * factor for name, bone in self.bones.items()},
            radii=self.radii * factor[:, None, None],
            flesh=self.flesh * factor[:, None],
            colours=self.colours,
        )

    def take(self, index: NDArray[np.int64]) -> People:
        """The people of these indices [S'], each as often as it is named."""
        bones = {name: bone[index] for name, bone in self.bones.items()}
        return People(self.stature[index], bones, self.radii[index], self.flesh[index], self.colours[index])


def normal(generators: Generators, *shape: int) -> Array:
    """Standard normal numbers [S, *shape], row s from generator s."""
    return np.stack([g.standard_normal(shape) for g in generators]) if generators else np.empty((0, *shape))


def uniform(generators: Generators, *shape: int) -> Array:
    """Uniform numbers in [0, 1), [S, *shape], row s from generator s."""
    return np.stack([g.random(shape) for g in generators]) if generators else np.empty((0, *shape))


# fractions of stature, adult averages
_PROPORTIONS = {
    "sole": 0.039,
    "shank": 0.246,
    "thigh": 0.245,
    "lower_spine": 0.137,
    "upper_spine": 0.148,
    "neck": 0.105,
    "head": 0.115,
    "hip": 0.074,
    "shoulder": 0.096,
    "upper_arm": 0.164,
    "forearm": 0.146,
    "hand": 0.075,
    "foot": 0.130,
}
_RISE = 0.8
_UPRIGHT = {name: 1.0 for name in tuple(_PROPORTIONS)[:5]} | {"neck": _RISE, "head": _RISE}
"""How much each length adds to the stature: neck and head pass by the nose, so only their rise counts."""


def sample_people(generators: Generators) -> People:
    """Draw one person per generator: stature 1.5 to 1.95 m, proportions, build and clothes."""
    draws = uniform(generators, 4)
    stature = 1.5 + 0.45 * draws[:, 0]
    spread = np.clip(normal(generators, len(_PROPORTIONS)), -2, 2) * 0.035 + 1
    fractions = {name: share * spread[:, i] for i, (name, share) in enumerate(_PROPORTIONS.items())}
    upright = sum(share * fractions[name] for name, share in _UPRIGHT.items())
    bones = {name: fraction * stature / upright for name, fraction in fractions.items()}
    scale = stature / 1.75
    build = (0.85 + 0.35 * draws[:, 1]) * scale  # [S]
    radii = _CAPSULE_RADII * build[:, None, None]  # [S, C, 2]
    radii[:, SKULL] = _CAPSULE_RADII[SKULL] * scale[:, None]  # skulls differ less than flesh
    return People(
        stature=stature,
        bones=bones,
        radii=radii,
        flesh=_JOINT_FLESH * build[:, None],
        colours=_sample_colours(uniform(generators, 4, 3), draws[:, 2], draws[:, 3]),
    )


def _sample_colours(cloth: Array, tone: Array, sleeves: Array) -> Array:
    skin = np.array([0.93, 0.74, 0.62]) + tone[:, None] * (np.array([0.36, 0.22, 0.15]) - [0.93, 0.74, 0.62])
    shirt, trousers, shoes = (0.12 + 0.8 * cloth[:, i] for i in range(3))  # [S, 3]
    hair = np.array([0.10, 0.07, 0.05]) + cloth[:, 3, :1] ** 2 * np.array([0.65, 0.50, 0.30])
    forearm = np.where((sleeves < 0.5)[:, None], skin, shirt)
    shank = np.where((sleeves % 0.5 < 0.12)[:, None], skin, trousers)
    by_name = {"skin": skin, "shirt": shirt, "forearm": forearm, "trousers": trousers, "shank": shank}
    by_name |= {"shoes": 0.7 * shoes, "hair": hair}
    return np.stack([by_name[name] for name in MATERIALS], axis=1)


def sample_activities(generators: Generators, motion: str) -> NDArray[np.int64]:
    """Draw what each person does within a motion of `MOTIONS`: indices of `ACTIVITIES` [S]."""
    choice = uniform(generators, 2)
    kind = _motion_kind(choice[:, 0], motion)  # [S] 0 random, 1 walking, 2 reaching
    posture = np.searchsorted(_POSTURE_EDGES, choice[:, 1])
    return np.where(kind == 0, posture, len(_POSTURES) - 1 + kind)


def sample_poses(people: People, generators: Generators, activity: NDArray[np.int64]) -> dict[str, Array]:
    """Joint angles in degrees, name -> [S], all within `LIMITS`; `activity` [S] are indices of `ACTIVITIES`.

    Each scene draws a few candidates and keeps the one whose limbs pass least through the rest of the body.
    """
    count, tries = len(generators), _CANDIDATES
    noise = normal(generators, tries, len(LIMITS)).reshape(count * tries, len(LIMITS))
    extra = uniform(generators, tries, 8).reshape(count * tries, 8)
    activity = np.repeat(activity, tries)
    angles = _postures(activity, noise)
    _blend(angles, _walking(extra, noise), activity == ACTIVITIES.index("walking"))
    _blend(angles, _reaching(extra, noise), activity == ACTIVITIES.index("reaching"))
    angles = _within_limits(angles)
    points = pose_points({name: np.repeat(bone, tries) for name, bone in people.bones.items()}, angles)
    overlap = _self_overlap(points).reshape(count, tries)
    best = np.arange(count) * tries + overlap.argmin(axis=1)
    return {name: angle[best] for name, angle in angles.items()}


def _motion_kind(draw: Array, motion: str) -> NDArray[np.int64]:
    if motion == "mixed":
        return np.searchsorted(_MIXED_EDGES, draw)
    return np.full(len(draw), MOTIONS.index(motion) - 1)


def _from_table(table: Mapping[str, tuple[float, float]], noise: Array) -> dict[str, Array]:
    angles = {}
    for i, name in enumerate(LIMITS):
        mean, spread = table.get(name) or table[name.split("_", 1)[1]]
        angles[name] = mean + spread * noise[:, i]
    return angles


def _postures(posture: NDArray[np.int64], noise: Array) -> dict[str, Array]:
    angles = _from_table(_POSTURES[0], noise)
    for i, table in enumerate(_POSTURES[1:], start=1):
        _blend(angles, _from_table(table, noise), posture == i)
    return angles


def _blend(angles: dict[str, Array], other: Angles, where: NDArray[np.bool_]) -> None:
    for name, angle in other.items():
        angles[name] = np.where(where, angle, angles[name])


def _walking(draw: Array, noise: Array) -> dict[str, Array]:
    """One instant of a gait cycle: legs half a period apart, each arm against the leg of its side."""
    stride, swing = 0.7 + 0.6 * draw[:, 1], 0.5 + draw[:, 2]
    angles = _from_table(_STANDING, 0.4 * noise)
    for side, shift in (("left", 0.0), ("right", np.pi)):
        phase = 2 * np.pi * draw[:, 0] + shift
        angles[f"{side}_hip_flex"] = 9 + 25 * stride * np.cos(phase)
        angles[f"{side}_hip_abduct"] = 2 + 2 * noise[:, 0]
        lifted = 0.5 + 0.5 * np.sin(-phase - 0.3)
        angles[f"{side}_knee_flex"] = 8 + 55 * stride * lifted**3
        angles[f"{side}_ankle_flex"] = 18 * lifted**4 - 4
        forward = -22 * swing * np.cos(phase) + 4
        aside = 9 + 3 * np.abs(noise[:, 1])
        angles[f"{side}_shoulder_elevate"] = np.hypot(forward, aside)
        angles[f"{side}_shoulder_plane"] = np.degrees(np.arctan2(forward, aside))
        angles[f"{side}_elbow_flex"] = 22 + 30 * draw[:, 3] + 0.5 * forward
    return angles


def _reaching(draw: Array, noise: Array) -> dict[str, Array]:
    """One or both arms stretched towards a target anywhere in front, up or aside."""
    angles = _from_table(_STANDING | _REACHING, noise)
    elevate, plane = 50 + 95 * draw[:, 0], 15 + 95 * draw[:, 1]
    active = {"left": draw[:, 2] < 0.65, "right": draw[:, 2] > 0.35}
    for side, stretched in active.items():
        wobble = 8 * noise[:, 0 if side == "left" else 1]
        arm = {
            f"{side}_shoulder_elevate": elevate + wobble,
            f"{side}_shoulder_plane": plane + wobble,
            f"{side}_elbow_flex": 50 * draw[:, 3],
        }
        _blend(angles, arm, stretched)
    return angles


def _within_limits(angles: Angles) -> dict[str, Array]:
    limited = {name: np.clip(angle, *LIMITS[name]) for name, angle in angles.items()}
    for side in ("left", "right"):
        elevate = limited[f"{side}_shoulder_elevate"]
        behind = limited[f"{side}_shoulder_plane"] < 0
        limited[f"{side}_shoulder_elevate"] = np.where(behind, np.minimum(elevate, ARM_BEHIND_LIMIT), elevate)
    return limited


def about(axis: str, degrees: Array) -> Array:
    """Right-handed rotations about one axis, "x", "y" or "z", [S, 3, 3]."""
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    radians = np.radians(degrees)
    rotation = np.zeros((len(radians), 3, 3))
    rotation[:] = np.eye(3)
    rotation[:, i, i] = rotation[:, j, j] = np.cos(radians)
    rotation[:, j, i] = np.sin(radians)
    rotation[:, i, j] = -rotation[:, j, i]
    return rotation


def offset(rotation: Array, forward: Length = 0.0, left: Length = 0.0, up: Length = 0.0) -> Array:
    """Steps [S, 3] along axes [S, 3, 3] whose columns point forward, left and up."""
    lengths = (np.asarray(length)[..., None] for length in (forward, left, up))
    return sum((length * rotation[:, :, i] for i, length in enumerate(lengths)), np.zeros(rotation.shape[:2]))


SKULL_BASE = 0.75
"""Where the skull begins, as a share of the neck's length."""


def pose_points(bones: Lengths, angles: Angles) -> Array:
    """Forward kinematics: all `POINT_NAMES` in body axes, pelvis at the origin, [S, N, 3], metres."""
    pelvis = about("y", angles["pelvis_pitch"]) @ about("x", angles["pelvis_roll"])
    at = {"pelvis": np.zeros(pelvis.shape[:2])}
    half = {name: angles[f"spine_{name}"] / 2 for name in ("flex", "side", "twist")}
    bend = about("y", half["flex"]) @ about("x", half["side"]) @ about("z", half["twist"])
    waist = pelvis @ bend
    chest = waist @ bend
    at["spine"] = offset(waist, up=bones["lower_spine"])
    at["thorax"] = at["spine"] + offset(chest, up=bones["upper_spine"])
    _pose_head(at, bones, angles, chest)
    for side, sign in SIDES.items():
        at[f"{side}_hip"] = offset(pelvis, left=sign * bones["hip"])
        at[f"{side}_shoulder"] = at["thorax"] + offset(
            chest, left=sign * bones["shoulder"], up=-0.08 * bones["upper_spine"]
        )
        add_trunk_side(at, bones, side, pelvis, waist, chest)
        _pose_leg(at, bones, angles, side, sign, pelvis)
        _pose_arm(at, bones, angles, side, sign, chest)
    return np.stack([at[name] for name in POINT_NAMES], axis=1)


def _pose_head(at: Points, bones: Lengths, angles: Angles, chest: Array) -> None:
    flex, side, twist = (angles[f"neck_{name}"] for name in ("flex", "side", "twist"))
    turn = about("y", flex) @ about("x", side) @ about("z", twist)
    add_head(at, bones, at["thorax"], chest @ turn)


def add_head(at: Points, bones: Lengths, base: Array, head: Array) -> None:
    """Nose, head and the skull's points, from the base [S, 3] of the neck and the head's axes [S, 3, 3]."""
    neck, length = bones["neck"], bones["head"]
    lean = np.sqrt(1 - _RISE**2)
    at["nose"] = base + offset(head, forward=lean * neck, up=_RISE * neck)
    at["head"] = at["nose"] + offset(head, forward=-lean * length, up=_RISE * length)
    at["skull_low"] = base + offset(head, forward=0.12 * neck, up=SKULL_BASE * neck)
    at["skull_high"] = at["head"] + offset(head, forward=0.05 * length, up=-0.4 * length)
    at["nose_root"] = at["nose"] + offset(head, forward=-0.15 * length, up=0.15 * length)


def add_trunk_side(at: Points, bones: Lengths, side: str, pelvis: Array, waist: Array, chest: Array) -> None:
    """One side's points of the trunk's flesh, from spine, thorax, and the axes [S, 3, 3] of the trunk's parts."""
    hip, shoulder, upper = bones["hip"], bones["shoulder"], bones["upper_spine"]
    sign = SIDES[side]
    at[f"{side}_pelvis"] = offset(pelvis, left=sign * 0.5 * hip, up=0.1 * upper)
    at[f"{side}_waist"] = at["spine"] + offset(waist, left=sign * 0.36 * hip)
    at[f"{side}_chest"] = at["thorax"] + offset(chest, left=sign * 0.42 * shoulder, up=-0.36 * upper)


def _pose_leg(at: Points, bones: Lengths, angles: Angles, side: str, sign: float, pelvis: Array) -> None:
    angle = {name: angles[f"{side}_{name}"] for name in ("hip_flex", "hip_abduct", "hip_rotate", "knee_flex")}
    swing = about("y", -angle["hip_flex"]) @ about("x", sign * angle["hip_abduct"])
    thigh = pelvis @ swing @ about("z", sign * angle["hip_rotate"])
    shank = thigh @ about("y", angle["knee_flex"])
    at[f"{side}_knee"] = at[f"{side}_hip"] + offset(thigh, up=-bones["thigh"])
    at[f"{side}_ankle"] = at[f"{side}_knee"] + offset(shank, up=-bones["shank"])
    add_foot(at, bones, side, shank @ about("y", angles[f"{side}_ankle_flex"]))


def add_foot(at: Points, bones: Lengths, side: str, foot: Array) -> None:
    """Heel and toe, from the ankle and the foot's axes [S, 3, 3]."""
    length, drop = bones["foot"], bones["sole"]
    at[f"{side}_heel"] = at[f"{side}_ankle"] + offset(foot, forward=-0.08 * length, up=-0.4 * drop)
    at[f"{side}_toe"] = at[f"{side}_ankle"] + offset(foot, forward=0.65 * length, up=-0.55 * drop)


def _pose_arm(at: Points, bones: Lengths, angles: Angles, side: str, sign: float, chest: Array) -> None:
    plane = sign * angles[f"{side}_shoulder_plane"]
    lift = about("x", sign * angles[f"{side}_shoulder_elevate"])
    swing = about("z", -plane) @ lift @ about("z", plane)
    upper = chest @ swing @ about("z", -sign * angles[f"{side}_shoulder_rotate"])
    lower = upper @ about("y", -angles[f"{side}_elbow_flex"])
    at[f"{side}_elbow"] = at[f"{side}_shoulder"] + offset(upper, up=-bones["upper_arm"])
    at[f"{side}_wrist"] = at[f"{side}_elbow"] + offset(lower, up=-bones["forearm"])
    at[f"{side}_hand"] = at[f"{side}_wrist"] + offset(lower, up=-bones["hand"])


def _segment_distance(point: Array, start: Array, end: Array) -> Array:
    along = end - start
    share = ((point - start) * along).sum(-1) / (along * along).sum(-1)
    distance: Array = np.linalg.norm(point - start - np.clip(share, 0, 1)[..., None] * along, axis=-1)
    return distance


_TRUNK = ("pelvis", "thorax", 0.15)
_THIGHS = (("left_hip", "left_knee", 0.10), ("right_hip", "right_knee", 0.10))
_OBSTACLES = {
    "elbow": (_TRUNK,),
    "wrist": (_TRUNK, *_THIGHS, ("thorax", "head", 0.13)),
    "hand": (_TRUNK, *_THIGHS, ("thorax", "head", 0.13)),
    "knee": (_TRUNK, ("{}_hip", "{}_knee", 0.12), ("{}_knee", "{}_ankle", 0.10)),
    "ankle": (("{}_hip", "{}_knee", 0.12), ("{}_knee", "{}_ankle", 0.09)),
}


def _self_overlap(points: Array) -> Array:
    """How far limb points lie inside trunk, head, thighs and the other leg, summed, metres, [S]."""
    at = {name: points[:, i] for i, name in enumerate(POINT_NAMES)}
    total = np.zeros(len(points))
    for side, other in (("left", "right"), ("right", "left")):
        for name, obstacles in _OBSTACLES.items():
            for start, end, reach in obstacles:
                start, end = start.format(other), end.format(other)
                distance = _segment_distance(at[f"{side}_{name}"], at[start], at[end])
                total += np.maximum(reach - distance, 0)
    return total


def stand(points: Array, radii: Array, heading: Array, place: Array) -> Array:
    """World points, z up: people turned by `heading` degrees, standing on the floor at `place` [S, 2]."""
    world: Array = points @ about("z", heading).transpose(0, 2, 1)
    lowest = (world[:, CAPSULE_ENDS, 2] - radii).min(axis=(1, 2))
    world += np.concatenate([place, -lowest[:, None]], axis=1)[:, None]
    return world


HAIR_LINE = -0.1
"""Skull surface whose normal has less than this along `face_direction` is hair."""


def face_direction(points: Array) -> Array:
    """Unit vector [3] from the middle of the hair to that of the face, of one person's points [N, 3]."""
    nose, head, low = (points[POINT_NAMES.index(name)] for name in ("nose", "head", "skull_low"))
    up = (head - low) / np.linalg.norm(head - low)
    forward = nose - low - ((nose - low) @ up) * up
    face: Array = forward / np.linalg.norm(forward) - 0.7 * up
    face /= np.linalg.norm(face)
    return face
