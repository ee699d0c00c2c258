"""Pictures of people: posed people, put before random calibrated cameras and rendered with mask and detections.

What 2D joints alone cannot tell is in the picture: a lamp of fixed direction relative to the camera shades
what points towards it or away from it, nearer flesh is lit more and looks wider, limbs hide one another, and
faces differ from hair. The "laboratory" background shows where the camera looks from, hence how a person who faces one
end of the world is probably turned: a model can lean on it, and fail on "textured" ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from liftbyimage.data import background as backgrounds
from liftbyimage.data import body, render
from liftbyimage.data.camera import project, world_to_camera
from liftbyimage.data.crop import CROP_SIZE, apply_affine, box_to_crop_matrix, invert_affine
from liftbyimage.data.skeleton import FLIP_PAIRS, JOINT_NAMES
from liftbyimage.data.source import Source

Array = NDArray[np.float64]

BACKGROUNDS = ("textured", "laboratory")
FRAME_SIZE = (1000, 1000)
"""Width and height of the full frame in px; its centre is the principal point."""

_BATCH = 64  # scenes that are made together: bounds memory, changes no scene
_LAMP_DIRECTION = np.array([-0.50, -0.58, -0.64])  # person to lamp: left, up, camera's side
_LAMP_DISTANCE = 3.2  # metres
_AMBIENT = 0.22
_JOINT_SIGMA = 2.0  # px in the crop at noise 1
_HIDDEN_FACTOR = 2.5
_OUTLIER_RATE, _OUTLIER_FACTOR = 0.03, 6.0


@dataclass(frozen=True)
class Scenes:
    """A batch of S scenes; torch tensors on the CPU. Pixels are crop pixels, (0, 0) the centre of the first.

    `pose_3d` is relative to the root; `pose_3d + root` is in camera axes (x right, y down, z forward) and
    projects by `K` to `pose_2d_clean`. World to camera is `R @ X + t`; the world's z is up, its floor z = 0.
    """

    image: Tensor  # uint8 [S, H, W, 3] RGB
    mask: Tensor  # bool [S, H, W] the person's pixels
    pose_2d: Tensor  # float32 [S, 17, 2] noisy detections, px
    pose_2d_clean: Tensor  # float32 [S, 17, 2] exact projections, px
    pose_3d: Tensor  # float32 [S, 17, 3] metres
    visible: Tensor  # bool [S, 17] not hidden behind another body part
    K: Tensor  # float32 [S, 3, 3] intrinsics of the crop, px
    R: Tensor  # float32 [S, 3, 3]
    t: Tensor  # float32 [S, 3] metres
    root: Tensor  # float32 [S, 3] pelvis in camera axes, metres
    crop_matrix: Tensor  # float32 [S, 2, 3] px of the full frame (`FRAME_SIZE`) to px of the crop

    def __len__(self) -> int:
        return len(self.image)

    def scene(self, index: int) -> dict[str, Tensor]:
        """One scene's tensors by field name, without the leading dimension."""
        return {field.name: getattr(self, field.name)[index] for field in fields(self)}

    @classmethod
    def join(cls, batches: Sequence[Scenes]) -> Scenes:
        """One batch of all, in order."""
        if len(batches) == 1:
            return batches[0]
        return cls(
            **{field.name: torch.cat([getattr(batch, field.name) for batch in batches]) for field in fields(cls)}
        )


@dataclass(frozen=True)
class SceneOptions:
    """How scenes are shown; see `synthetic.generate`. Raises TypeError or ValueError for what cannot be."""

    background: str = "textured"
    noise: float = 1.0
    swap_rate: float = 0.0
    size: tuple[int, int] = CROP_SIZE

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background: expected one of {', '.join(BACKGROUNDS)}, got {self.background!r}")
        if not (_is_number(self.noise) and 0 <= self.noise < float("inf")):
            raise ValueError(f"noise: expected a finite number, 0 or more, got {self.noise!r}")
        if not (_is_number(self.swap_rate) and 0 <= self.swap_rate <= 1):
            raise ValueError(f"swap_rate: expected a probability from 0 to 1, got {self.swap_rate!r}")

    def description(self) -> dict[str, Any]:
        """Plain values for `Source.description`."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"size": list(self.size)}


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_integer(name: str, value: object, least: int) -> None:
    """Raise TypeError or ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def batches_of(start: int, count: int) -> list[range]:
    """`start` … `start + count − 1` in pieces that are made together; one empty piece if there are none."""
    stop = start + count
    return [range(first, min(first + _BATCH, stop)) for first in range(start, max(stop, start + 1), _BATCH)]


def photograph(world: Array, people: body.People, generators: body.Generators, options: SceneOptions) -> Scenes:
    """Scenes of these people, each before a camera, a lamp and a background drawn by its generator.

    Args:
        world: float64 [S, N, 3], `body.POINT_NAMES` in metres, z up, the floor z = 0.
        people, generators: one of each per scene.
    """
    full_K, R, t = _sample_cameras(world[:, 0], generators)
    points = world_to_camera(world, R, t)  # [S, N, 3]
    joints = points[:, : len(JOINT_NAMES)]
    crop_matrix = _crop_matrices(project(joints, full_K), options.size)
    K = _as_stored(_crop_intrinsics(full_K, crop_matrix))
    clean = project(joints, K)
    detection = _draw_detection(generators)
    lamps = joints[:, 0] + _lamp_offsets(generators)

    def draw(s: int) -> tuple[NDArray[np.uint8], Array]:
        if options.background == "laboratory":
            image = backgrounds.laboratory(K[s], R[s], t[s], options.size)
        else:
            image = backgrounds.textured(generators[s], options.size)
        capsules = render.Capsules.between(points[s, body.CAPSULE_ENDS], people.radii[s])
        return image, _paint(image, capsules, K[s], points[s], people.colours[s], lamps[s])

    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        pictures = list(pool.map(draw, range(len(generators))))
    image = np.array([picture[0] for picture in pictures], dtype=np.uint8).reshape(-1, *options.size, 3)
    depth = np.array([picture[1] for picture in pictures]).reshape(-1, *options.size)
    visible = _visible(depth, clean, joints, people.flesh)
    return Scenes(
        image=_tensor(image),
        mask=_tensor(np.isfinite(depth)),
        pose_2d=_tensor(_detect(clean, visible, detection, options.noise, options.swap_rate)),
        pose_2d_clean=_tensor(clean),
        pose_3d=_tensor(joints - joints[:, :1]),
        visible=_tensor(visible),
        K=_tensor(K),
        R=_tensor(R),
        t=_tensor(t),
        root=_tensor(joints[:, 0]),
        crop_matrix=_tensor(crop_matrix),
    )


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32) if values.dtype == np.float64 else values)


def _as_stored(values: Array) -> Array:
    """Round to float32, so that the stored camera reproduces the picture exactly."""
    return values.astype(np.float32).astype(np.float64)


def _sample_cameras(root: Array, generators: body.Generators) -> tuple[Array, Array, Array]:
    """Full-frame K, R, t of cameras all round, 3 to 6 m from the root [S, 3], looking roughly at it."""
    draw = body.uniform(generators, 7)
    azimuth, elevation = 2 * np.pi * draw[:, 0], np.radians(-10 + 40 * draw[:, 1])
    distance = 3 + 3 * draw[:, 2]
    above_floor = np.arcsin(np.clip((0.25 - root[:, 2]) / distance, -1, 1))
    elevation = np.maximum(elevation, above_floor)
    flat = np.cos(elevation)
    offset = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=1)
    eye = root + distance[:, None] * offset
    target = np.stack([draw[:, 3], draw[:, 4]], axis=1) * 0.3 - 0.15  # image-plane slopes of the root
    roll = np.radians(6 * draw[:, 5] - 3)
    level = _look_along(-offset)
    R = _as_stored(_turn(roll, target) @ level)
    t = _as_stored(-np.einsum("sij,sj->si", R, eye))
    K = np.zeros((len(root), 3, 3))
    K[:, 0, 0] = K[:, 1, 1] = 950 + 600 * draw[:, 6]
    K[:, :2, 2] = (np.array(FRAME_SIZE) - 1) / 2
    K[:, 2, 2] = 1
    return K, R, t


def _look_along(forward: Array) -> Array:
    """World-to-camera rotations [S, 3, 3] of level cameras looking along unit vectors [S, 3]."""
    right = np.stack([forward[:, 1], -forward[:, 0], np.zeros(len(forward))], axis=1)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    return np.stack([right, np.cross(forward, right), forward], axis=1)


def _turn(roll: Array, slopes: Array) -> Array:
    """Rotations [S, 3, 3] that roll a camera, then turn it so that its old axis appears at these slopes."""
    zero, one, cos, sin = np.zeros_like(roll), np.ones_like(roll), np.cos(roll), np.sin(roll)
    rolled = np.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], axis=1).reshape(-1, 3, 3)
    axis = np.concatenate([slopes, one[:, None]], axis=1)
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    right = np.stack([axis[:, 2], zero, -axis[:, 0]], axis=1)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    turned: Array = np.stack([right, np.cross(axis, right), axis], axis=2) @ rolled
    return turned


def _crop_matrices(pose_2d: Array, size: tuple[int, int]) -> Array:
    """Full frame to crop [S, 2, 3] round the full-frame joints [S, 17, 2], by the same box rule as real crops."""
    return box_to_crop_matrix(np.concatenate([pose_2d.min(axis=1), pose_2d.max(axis=1)], axis=1), size)


def _crop_intrinsics(K: Array, matrix: Array) -> Array:
    cropped: Array = K.copy()
    cropped[:, :2, :2] = matrix[:, :, :2] @ K[:, :2, :2]
    cropped[:, :2, 2] = apply_affine(matrix, K[:, None, :2, 2])[:, 0]
    return cropped


def _lamp_offsets(generators: body.Generators) -> Array:
    direction = _LAMP_DIRECTION + 0.08 * body.normal(generators, 3)
    direction *= _LAMP_DISTANCE / np.linalg.norm(direction, axis=1, keepdims=True)
    return direction


def _paint(
    image: NDArray[np.uint8], capsules: render.Capsules, K: Array, points: Array, colours: Array, lamp: Array
) -> Array:
    """Draw one person over the picture; returns the body's depth [H, W], infinite beside it."""
    rays = render.pixel_rays(K, image.shape[:2])
    hits = render.cast(capsules, rays)
    on_body = hits.part >= 0
    point, normal = render.surface(capsules, hits, rays)
    part = hits.part[on_body]
    albedo = colours[body.CAPSULE_MATERIAL[part]]  # [M, 3]
    hair = (part == body.SKULL) & (normal @ body.face_direction(points) < body.HAIR_LINE)
    albedo[hair] = colours[body.MATERIALS.index("hair")]
    image[on_body] = render.shade(point, normal, albedo, lamp, _LAMP_DISTANCE, _AMBIENT)
    return hits.depth


def _visible(depth: Array, clean: Array, joints: Array, flesh: Array) -> NDArray[np.bool_]:
    """Whether the surface in front of each joint is no farther from it than its own flesh, [S, 17]."""
    scenes, height, width = depth.shape
    nearest = np.rint(clean).astype(np.int64)  # [S, 17, 2]
    column, row = np.clip(nearest[..., 0], 0, width - 1), np.clip(nearest[..., 1], 0, height - 1)
    in_front = depth[np.arange(scenes)[:, None], row, column]
    return in_front >= joints[..., 2] - 1.25 * flesh


def _draw_detection(generators: body.Generators) -> tuple[Array, Array, Array]:
    joints = len(JOINT_NAMES)
    return body.normal(generators, joints, 2), body.uniform(generators, joints), body.uniform(generators, 2)


def _detect(
    clean: Array,
    visible: NDArray[np.bool_],
    draws: tuple[Array, Array, Array],
    noise: float,
    swap_rate: float,
) -> Array:
    """Exact joints to what a 2D detector would give, [S, 17, 2]."""
    deviation, outlier, swap = draws
    sigma = noise * _JOINT_SIGMA * np.where(visible, 1.0, _HIDDEN_FACTOR)
    sigma = sigma * np.where(outlier < _OUTLIER_RATE, _OUTLIER_FACTOR, 1.0)
    detected = clean + sigma[..., None] * deviation
    for chance, pairs in zip((swap[:, 0], swap[:, 1]), (FLIP_PAIRS[:3], FLIP_PAIRS[3:]), strict=True):
        left, right = (list(side) for side in zip(*pairs, strict=True))
        swapped = np.flatnonzero(chance < swap_rate)[:, None]
        detected[swapped, left], detected[swapped, right] = detected[swapped, right], detected[swapped, left]
    return detected


class RenderedPeople(Source):
    """A source whose records are scenes, rendered when first asked for.

    With `cache` they come in batches that stay in memory, 0.2 MB each at full size; without, each access renders its
    record anew. A copy sent to another process starts empty.
    """

    def __init__(self, count: int, groups: tuple[str, ...], size: tuple[int, int], cache: bool) -> None:
        if not isinstance(cache, bool):
            raise TypeError(f"cache: expected true or false, got {cache!r}")
        self.groups, self.size = groups, size
        self._count, self._cache = count, cache
        self._batches: dict[int, dict[str, NDArray[Any]]] = {}

    def _make(self, numbers: range) -> tuple[Scenes, NDArray[np.int64]]:
        """The scenes of these records, and the group of each [S]."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = index + self._count if index < 0 else index
        if not 0 <= position < self._count:
            raise IndexError(f"index: expected a record from {-self._count} to {self._count - 1}, got {index}")
        if not self._cache:
            return self._record(self._fields(range(position, position + 1)), 0)
        batch, offset = divmod(position, _BATCH)
        if batch not in self._batches:
            first = batch * _BATCH
            self._batches[batch] = self._fields(range(first, min(first + _BATCH, self._count)))
        return self._record(self._batches[batch], offset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": {}}

    def _fields(self, numbers: range) -> dict[str, NDArray[Any]]:
        scenes, groups = self._make(numbers)
        crop_matrix = scenes.crop_matrix.numpy().astype(np.float64)
        keypoints = apply_affine(invert_affine(crop_matrix), scenes.pose_2d.numpy())
        return {
            "image": scenes.image.numpy(),
            "keypoints": keypoints.astype(np.float32),
            "crop_matrix": crop_matrix,
            "image_size": np.tile(np.array(FRAME_SIZE, np.float32), (len(numbers), 1)),
            "pose_3d": scenes.pose_3d.numpy(),
            "group": groups,
            "mask": scenes.mask.numpy(),
        }

    def _record(self, fields: dict[str, NDArray[Any]], offset: int) -> dict[str, Any]:
        record: dict[str, Any] = {name: values[offset].copy() for name, values in fields.items()}
        record["group"] = int(record["group"])
        return record
