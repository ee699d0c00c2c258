"""Captured motion before the synthetic scenes' cameras: people who move as someone did.

The skeleton's Human3.6M-17 joints come from the bones of the CMU Graphics Lab database's ASF files: a bone's name
stands for where it ends, and the joints are chosen to lie near Human3.6M's:

- hips, knees, ankles, shoulders and elbows: ends of the hip joints, femurs, tibias, clavicles and humeri;
- wrists: ends of the bones called wrist, which are the part of the forearm that twists;
- pelvis: between the hips; spine: the lower back; thorax: the middle of the lower neck, at the height of the shoulders;
- nose and head: on a rigid head of ordinary proportions that turns as the captured head does, on the end of the upper
  neck. Hands, feet and flesh are of ordinary proportions too, and turn as captured.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from liftbyimage.data import body
from liftbyimage.data.acclaim import Skeleton, forward_kinematics, read_amc, read_asf
from liftbyimage.data.crop import CROP_SIZE, crop_size
from liftbyimage.data.scenes import RenderedPeople, SceneOptions, Scenes, check_integer, photograph

__all__ = ["CAPTURE_RATE", "MocapPeople", "Skeleton", "forward_kinematics", "read_amc", "read_asf"]

Array = NDArray[np.float64]

CAPTURE_RATE = 120
"""Frames per second of the database's clips."""

_LIMBS = {
    "hip": "hipjoint",
    "knee": "femur",
    "ankle": "tibia",
    "shoulder": "clavicle",
    "elbow": "humerus",
    "wrist": "wrist",
}
_TRUNK = ("root", "lowerback", "thorax", "lowerneck", "upperneck", "head")
_BONES = (*_TRUNK, *(f"{side[0]}{bone}" for side in body.SIDES for bone in (*_LIMBS.values(), "foot", "hand")))
_ANKLES_TO_SKULL = 0.864  # of the stature, from the ankles to the end of the upper neck
_BODY_AXES = [2, 0, 1]  # ASF's left, up, forward → the body's forward, left, up


class MocapPeople(RenderedPeople):
    """Frames of captured clips as records, in the order of clips, frames and views; `groups` are the clips.

    Every clip has one person, of the skeleton's stature, whose flesh and clothes a seed draws. The person keeps the
    middle of the floor and on the whole faces its x axis. Camera, light, background and detection noise are drawn as
    for `synthetic.generate`, anew for every record; none depends on which other clips, frames or views there are.

    Args:
        root: the folder with NN/NN.asf and NN/NN_MM.amc.
        clips: their names, as a list or as text such as "02_01+03_01"; None takes all there are.
        fps: frames taken per second, a divisor of the 120 captured.
        views: cameras per frame.
        seed, background, noise, size: as for `synthetic.generate`; size also as text such as "128x96".
        cache: keep what has been rendered, 0.2 MB a record at full size.

    Raises:
        ValueError: for a folder without clips, a clip that is not there, a file that is not ASF or AMC.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        clips: Sequence[str] | str | None = None,
        fps: int = 10,
        views: int = 1,
        seed: int = 0,
        background: str = "textured",
        noise: float = 1.0,
        size: Sequence[int] | str = CROP_SIZE,
        cache: bool = True,
    ) -> None:
        check_integer("fps", fps, 1)
        check_integer("views", views, 1)
        check_integer("seed", seed, 0)
        if CAPTURE_RATE % fps:
            raise ValueError(f"fps: expected a divisor of {CAPTURE_RATE}, got {fps}")
        self._scene = SceneOptions(background, noise, size=crop_size(size))
        self._seed, self._views, step = seed, views, CAPTURE_RATE // fps
        files = _clip_files(Path(root), clips)
        skeletons = [_read_skeleton(_skeleton_file(file)) for file in files]
        # a number of each clip's own, so that its records are the same whichever others there are
        self._clip_seeds = [zlib.crc32(file.stem.encode()) for file in files]
        people = body.sample_people([np.random.default_rng([seed, clip_seed]) for clip_seed in self._clip_seeds])
        self._people = people.resized(np.array([_stature(skeleton) for skeleton in skeletons]))
        points = [
            _world_points(skeleton, read_amc(file, skeleton), self._people.take(np.array([clip])))[::step]
            for clip, (file, skeleton) in enumerate(zip(files, skeletons, strict=True))
        ]
        self._world = np.concatenate(points)  # [F, N, 3]
        self._clip = np.repeat(np.arange(len(files)), [len(frames) for frames in points])  # [F]
        # [F] counted from 1, as the files do; what a seed draws for a clip's person is frame 0's
        self._frame = np.concatenate([1 + step * np.arange(len(frames)) for frames in points])
        super().__init__(views * len(self._world), tuple(file.stem for file in files), self._scene.size, cache)
        self.description = {
            "source": "mocap",
            "files": [[path.name, path.stat().st_size] for file in files for path in (_skeleton_file(file), file)],
            "fps": int(fps),
            "views": int(views),
            "seed": int(seed),
            **self._scene.description(),
        }

    def _make(self, numbers: range) -> tuple[Scenes, NDArray[np.int64]]:
        frame, view = np.divmod(np.array(numbers), self._views)
        clip = self._clip[frame]
        generators = [
            np.random.default_rng([self._seed, self._clip_seeds[c], f, v])
            for c, f, v in zip(clip, self._frame[frame], view, strict=True)
        ]
        return photograph(self._world[frame], self._people.take(clip), generators, self._scene), clip


def _clip_files(root: Path, clips: Sequence[str] | str | None) -> list[Path]:
    known = {path.stem: path for path in sorted(root.glob("*/*_*.amc"))}
    if not known:
        raise ValueError(
            f"root {root}: expected a folder with subjects NN/NN.asf and their clips NN/NN_MM.amc, "
            "such as 02/02.asf and 02/02_01.amc, got none"
        )
    listed = clips.split("+") if isinstance(clips, str) else clips
    names = list(known) if listed is None else list(listed) if isinstance(listed, Sequence) else []
    if not names or len(set(names)) < len(names) or not set(names) <= set(known):
        some = ", ".join(list(known)[:8]) + (", …" if len(known) > 8 else "")
        raise ValueError(f"clips: expected some of {some}, each once, got {clips!r}")
    for name in names:
        if not _skeleton_file(known[name]).is_file():
            raise ValueError(f"root {root}: expected the skeleton {_skeleton_file(known[name])} beside its clip {name}")
    return [known[name] for name in names]


def _skeleton_file(clip: Path) -> Path:
    return clip.with_name(clip.stem.split("_")[0] + ".asf")


def _read_skeleton(path: Path) -> Skeleton:
    skeleton = read_asf(path)
    missing = [name for name in _BONES if name not in skeleton.names]
    if missing:
        raise ValueError(f"{path}: expected the bones of the CMU database, without {', '.join(missing)}")
    return skeleton


def _joints(skeleton: Skeleton, ends: Array) -> dict[str, Array]:
    """Captured joints, skull's base and knuckles, [F, 3] each in the body's axes, of the bones' ends [F, B, 3]."""
    end = dict(zip(skeleton.names, ends[..., _BODY_AXES].swapaxes(0, 1), strict=True))
    at = {f"{side}_{joint}": end[side[0] + bone] for side in body.SIDES for joint, bone in _LIMBS.items()}
    at["pelvis"] = (at["left_hip"] + at["right_hip"]) / 2
    at["spine"] = end["lowerback"]
    at["thorax"] = (end["thorax"] + end["lowerneck"]) / 2
    at["skull_base"] = end["upperneck"]
    at |= {f"{side}_knuckles": end[f"{side[0]}hand"] for side in body.SIDES}
    return at


def _length(at: dict[str, Array], start: str, end: str) -> Array:
    length: Array = np.linalg.norm(at[start] - at[end], axis=-1)
    return length


def _in_base_pose(skeleton: Skeleton) -> dict[str, Array]:
    ends, _ = forward_kinematics(skeleton, np.zeros((1, skeleton.columns()[-1].stop)))
    return _joints(skeleton, ends)


def _stature(skeleton: Skeleton) -> float:
    """How tall someone of these legs, trunk and neck is, metres."""
    at = _in_base_pose(skeleton)
    legs = sum(
        _length(at, f"{side}_hip", f"{side}_knee") + _length(at, f"{side}_knee", f"{side}_ankle") for side in body.SIDES
    )
    height: Array = legs / 2 + _length(at, "pelvis", "skull_base")
    return float(height[0]) / _ANKLES_TO_SKULL


def _world_points(skeleton: Skeleton, angles: Array, person: body.People) -> Array:
    """`body.POINT_NAMES` [F, N, 3] of the person who moves by these angles [F, D] above the middle of the floor.

    The heights are captured, but for one shift that lets the lowest point of the whole clip touch the floor.
    """
    points, height = _body_points(skeleton, angles, person)
    across = points[:, body.POINT_NAMES.index("left_hip")] - points[:, body.POINT_NAMES.index("right_hip")]
    left = across.mean(axis=0)
    heading = np.degrees(np.arctan2(-left[0], left[1]))
    world: Array = points @ body.about("z", np.array([heading]))
    world[..., 2] += height[:, None]
    world[..., 2] -= (world[:, body.CAPSULE_ENDS, 2] - person.radii).min()
    return world


def _body_points(skeleton: Skeleton, angles: Array, person: body.People) -> tuple[Array, Array]:
    """All points [F, N, 3] about the pelvis, as captured otherwise, and the pelvis's height [F]."""
    ends, rotations = forward_kinematics(skeleton, angles)
    captured = _joints(skeleton, ends)
    pelvis = captured["pelvis"]
    at = {name: points - pelvis for name, points in captured.items()}

    def axes(bone: str, own: Array | None = None) -> Array:
        """Forward, left and up [F, 3, 3] of a part of the body that stands upright in its own axes of the base pose."""
        turned = rotations[:, skeleton.names.index(bone)] @ (np.eye(3) if own is None else own)
        return turned[:, _BODY_AXES][:, :, _BODY_AXES]

    bones = {**person.bones, **_trunk_lengths(skeleton)}
    skull = at["skull_base"] - body.offset(axes("head"), up=body.SKULL_BASE * bones["neck"])
    body.add_head(at, bones, skull, axes("head"))
    for side in body.SIDES:
        body.add_trunk_side(at, bones, side, axes("root"), axes("lowerback"), axes("thorax"))
        # legs are apart in the base pose: what is upright for the foot is so along its shin
        shin = skeleton.axes[skeleton.names.index(f"{side[0]}tibia")]
        body.add_foot(at, bones, side, axes(f"{side[0]}foot", shin))
        fingers = at[f"{side}_knuckles"] - at[f"{side}_wrist"]
        fingers /= np.linalg.norm(fingers, axis=-1, keepdims=True)
        at[f"{side}_hand"] = at[f"{side}_wrist"] + bones["hand"] * fingers
    return np.stack([at[name] for name in body.POINT_NAMES], axis=1), pelvis[:, 2]


def _trunk_lengths(skeleton: Skeleton) -> dict[str, Array]:
    at = _in_base_pose(skeleton)
    return {
        "hip": _length(at, "left_hip", "right_hip") / 2,
        "shoulder": _length(at, "left_shoulder", "right_shoulder") / 2,
        "upper_spine": _length(at, "spine", "thorax"),
    }
