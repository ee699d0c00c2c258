"""Synthetic people in postures and motions within joint limits, as scenes and as a source of records.

People mostly face one end of the world.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liftbyimage.data import body
from liftbyimage.data.crop import CROP_SIZE, crop_size
from liftbyimage.data.scenes import RenderedPeople, SceneOptions, Scenes, batches_of, check_integer, photograph

Array = NDArray[np.float64]

MOTIONS = body.MOTIONS

_HEADING_SPREAD = 35.0  # degrees about the world's x axis


def generate(
    count: int,
    *,
    seed: int,
    start: int = 0,
    background: str = "textured",
    motion: str = "mixed",
    noise: float = 1.0,
    swap_rate: float = 0.0,
    size: tuple[int, int] = CROP_SIZE,
) -> Scenes:
    """Render scenes `start` … `start + count − 1` of a seed; each depends on seed, number and options alone.

    The person, pose and camera of a scene do not depend on `background`, `noise` or `swap_rate`.

    Args:
        count: number of scenes, 0 or more.
        seed, start: 0 or more.
        background: "textured" (another in every scene) or "laboratory" (one room, a function of the camera).
        motion: "random" (postures within joint limits), "walking", "reaching", or "mixed" of the three.
        noise: scale of the detection noise. 1 is a standard deviation of 2 px per axis for visible joints and
            5 px for hidden ones, six times that for 3 % of the joints; 0 gives the exact projections.
        swap_rate: probability with which each left/right limb pair (legs, arms) of `pose_2d` changes places.
        size: crop (height, width) in px.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_integer("count", count, 0)
    check_integer("start", start, 0)
    options = _Options(seed, motion, SceneOptions(background, noise, swap_rate, crop_size(size)))
    return Scenes.join([_make(numbers, options)[0] for numbers in batches_of(start, count)])


@dataclass(frozen=True)
class _Options:
    seed: int
    motion: str
    scene: SceneOptions

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0)
        if self.motion not in MOTIONS:
            raise ValueError(f"motion: expected one of {', '.join(MOTIONS)}, got {self.motion!r}")


def _make(numbers: range, options: _Options) -> tuple[Scenes, NDArray[np.int64]]:
    """The scenes of these numbers, and what each person does, an index of `body.ACTIVITIES`."""
    generators = [np.random.default_rng([options.seed, number]) for number in numbers]
    people = body.sample_people(generators)
    activity = body.sample_activities(generators, options.motion)
    world = _place_people(people, body.sample_poses(people, generators, activity), generators)
    return photograph(world, people, generators, options.scene), activity


def _place_people(people: body.People, angles: body.Angles, generators: body.Generators) -> Array:
    """World points [S, N, 3] of people near the world's origin, mostly facing along its x axis."""
    heading = _HEADING_SPREAD * body.normal(generators, 1)[:, 0]
    place = 1.2 * body.uniform(generators, 2) - 0.6  # [S, 2]
    return body.stand(body.pose_points(people.bones, angles), people.radii, heading, place)


class SyntheticPeople(RenderedPeople):
    """Scenes 0 … count − 1 of a seed as records; options and errors are those of `generate`.

    `groups` are the postures and motions, `body.ACTIVITIES`.

    Args:
        count: number of records, 1 or more.
        size: crop (height, width) in px, or text such as "128x96".
        cache: keep what has been rendered, 0.2 MB a record at full size.
    """

    def __init__(
        self,
        *,
        count: int = 1024,
        seed: int = 0,
        background: str = "textured",
        motion: str = "mixed",
        noise: float = 1.0,
        swap_rate: float = 0.0,
        size: Sequence[int] | str = CROP_SIZE,
        cache: bool = True,
    ) -> None:
        check_integer("count", count, 1)
        scene = SceneOptions(background, noise, swap_rate, crop_size(size))
        self._options = _Options(seed, motion, scene)
        super().__init__(count, body.ACTIVITIES, scene.size, cache)
        self.description = {
            "source": "synthetic",
            "count": int(count),
            "seed": int(seed),
            "motion": motion,
            **scene.description(),
        }

    def _make(self, numbers: range) -> tuple[Scenes, NDArray[np.int64]]:
        return _make(numbers, self._options)
