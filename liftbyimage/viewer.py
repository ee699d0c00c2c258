"""A page of lifted people: where each joint looked, what was kept at every retention, and a 3D pose to turn.

docs/viewer.md says how to read it; `assets/viewer.js` draws what is embedded here, with `assets/orbit.js`.
"""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from torch import Tensor

from liftbyimage.data.crop import normalise_image
from liftbyimage.data.skeleton import BONES, JOINT_NAMES
from liftbyimage.html import asset, page, write_page
from liftbyimage.lift import LiftedImage
from liftbyimage.metrics import root_relative
from liftbyimage.models import ContextAwarePoseFormer, LiftByImage, Pipeline
from liftbyimage.nn import FeatureSelection
from liftbyimage.ops import keep_count

FILE = "viewer.html"
RETENTIONS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # and the lifter's own
MOST_PEOPLE = 100  # some 0.3 MB each
PEOPLE_WITH_HEADS = 8  # on a page of more, attention is stored as means over the heads alone
FAINTEST = 0.01  # attention below this multiple of uniform is stored as it
_CODES = 255
_METRES, _PIXELS = 5, 2  # decimals


@dataclass(frozen=True, eq=False)
class Person:
    """A person to lift for the page."""

    title: str  # plain text
    crop: np.ndarray  # uint8 [H, W, 3] RGB
    keypoints: np.ndarray  # [17, 2], crop px
    inputs: tuple[Tensor, ...]  # the lifter's 2D poses, [17, 2] each (`lifter.pose_inputs`)
    truth_3d: np.ndarray | None = None  # [17, 3], metres, root-relative, camera axes


def people_of(results: Sequence[LiftedImage], pipeline: Pipeline) -> list[Person]:
    """The people of `lift_images`, with that pipeline."""
    people = []
    for result in results:
        pose_2d, matrix = result.pose_2d[None], result.crop_matrix[None]
        inputs = pipeline.lifter.pose_inputs(pose_2d, matrix, np.array([result.image_size], dtype=np.float64))
        people.append(Person(str(result.image), result.crop, result.keypoints, tuple(one[0] for one in inputs)))
    return people


def check_people(option: str, people: int) -> None:
    """Refuse more people than a browser opens with ease."""
    if people > MOST_PEOPLE:
        raise ValueError(f"{option}: expected at most {MOST_PEOPLE} people on a page, got {people}")


def write_viewer(
    path: str | os.PathLike[str], pipeline: Pipeline, people: Sequence[Person], title: str, note: str = ""
) -> None:
    """Lift people once more, looking at what the lifter attends to, and write the page atomically.

    Args:
        path: the HTML file; it needs nothing beside it.
        pipeline: in evaluation mode. A LiftByImage shows attention, kept patches and poses at several retentions,
            a ContextAwarePoseFormer the places it reads, any other lifter its pose.
        people: at least 1, at most 100.
        title, note: plain text above the people.

    Raises:
        ValueError: no people, too many, or a pipeline in training mode.
    """
    if not people:
        raise ValueError("write_viewer: people must be at least one, got none")
    check_people("write_viewer", len(people))
    if any(module.training for module in pipeline.modules()):
        raise ValueError("write_viewer: pipeline must be in evaluation mode, got training mode; call eval()")
    data = viewer_data(pipeline, people)
    body = _body(title, note, data["grid"] is not None, bool(data.get("blocks")))
    script = asset("orbit.js") + asset("viewer.js")
    write_page(path, page(title, body, style=asset("viewer.css"), script=script, data=data))


@torch.inference_mode()
def viewer_data(pipeline: Pipeline, people: Sequence[Person]) -> dict[str, Any]:
    """What the page embeds: plain values, and arrays as base64 (`_packed`)."""
    lifter = pipeline.lifter
    data: dict[str, Any] = {"joints": list(JOINT_NAMES), "bones": [list(bone) for bone in BONES], "grid": None}
    if not isinstance(lifter, LiftByImage):
        blocks = len(lifter.context_blocks) if isinstance(lifter, ContextAwarePoseFormer) else 0
        levels = len(lifter.config.channels) if blocks else 0
        return data | {"blocks": blocks, "levels": levels, "people": [_lifted(pipeline, one) for one in people]}
    patches = math.prod(lifter.config.grid)
    retentions = sorted({*RETENTIONS, lifter.config.retention})
    heads = lifter.config.heads if len(people) <= PEOPLE_WITH_HEADS else 0
    colours = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3]  # [256, 3]
    return data | {
        "grid": list(lifter.config.grid),
        "retentions": retentions,
        "keep": [keep_count(patches, retention) for retention in retentions],
        "trained": retentions.index(lifter.config.retention),
        "maps": _map_names(lifter, heads),
        "importance": len(lifter.stage1) - 1,  # the map whose mean over joints it is
        "faintest": FAINTEST,
        "colours": _packed(np.ascontiguousarray(colours)),
        "people": [_explored(pipeline, person, retentions, heads > 0) for person in people],
    }


def _lifted(pipeline: Pipeline, person: Person) -> dict[str, Any]:
    """A person lifted by a lifter without patches."""
    images, inputs = _batch(pipeline, person)
    lifter = pipeline.lifter
    if not isinstance(lifter, ContextAwarePoseFormer):
        return _described(person) | {"refined": [_pose(pipeline(images, *inputs))]}
    maps = pipeline.read(images)
    size = person.crop.shape[1], person.crop.shape[0]
    blocks = lifter.context_places(maps, *inputs)
    return _described(person) | {
        "refined": [_pose(root_relative(lifter(maps, *inputs)))],
        "places": [_places(places[0], weights[0], size) for places, weights in blocks],
    }


def _places(places: Tensor, weights: Tensor, size: tuple[int, int]) -> list[list[list[float]]]:
    """Per joint, the level, x and y (crop px) and weight of each place, of places [L, J, H, S, 2] and weights."""
    levels = len(places)
    pixels = (places.float().cpu() + 1) / 2 * torch.tensor(size)
    level = torch.arange(levels).float().view(-1, 1, 1, 1, 1).expand(*weights.shape, 1)
    rows = torch.cat([level, pixels, weights.float().cpu()[..., None]], dim=-1)  # [L, J, H, S, 4]
    return np.round(rows.transpose(0, 1).flatten(1, 3).double().numpy(), _PIXELS).tolist()


def _explored(pipeline: Pipeline, person: Person, retentions: Iterable[float], heads: bool) -> dict[str, Any]:
    """A person lifted at every retention, with where the joints look."""
    lifter = pipeline.lifter
    assert isinstance(lifter, LiftByImage)
    images, inputs = _batch(pipeline, person)
    features = pipeline.read(images)
    joints, patches, importance = lifter.broad_query(features, *inputs)
    refined = []
    for retention in retentions:
        kept = FeatureSelection(retention)(patches, importance)
        refined.append(_pose(lifter.explore(joints, kept.patches)))
    maps = [one[0].float().cpu().numpy() for one in lifter.attention_maps(features, *inputs)]  # [H, J, P] each
    shown = [*(one.mean(axis=0) for one in maps), *(maps[-1] if heads else ())]  # [J, P] each
    return _described(person) | {
        "refined": refined,
        "coarse": _pose(root_relative(lifter.coarse_head(joints))),
        "order": _packed(importance_order(importance[0].cpu().numpy())),
        "attention": [quantised(one) for one in shown],
    }


def _map_names(lifter: LiftByImage, heads: int) -> list[str]:
    guided, layers = lifter.config.pose_guided_layer, len(lifter.stage1)
    names = [f"{layer + 1}, pose-guided" if layer == guided else f"{layer + 1}" for layer in range(layers)]
    return [f"{name}, all heads" for name in names] + [f"{names[-1]}, head {head + 1}" for head in range(heads)]


def importance_order(importance: np.ndarray) -> np.ndarray:
    """All patches [P] in the order in which `ops.prune_patches` would keep them: the first K are those it keeps.

    The largest importance first, ties by the lower index, NaN last.
    """
    order = np.argsort(-importance, kind="stable")
    return order.astype(np.min_scalar_type(max(0, len(order) - 1)))


def quantised(attention: np.ndarray) -> dict[str, Any]:
    """Attention [J, P] as 8-bit codes on a logarithmic scale: code c stands for low · step^c times the uniform 1/P.

    A value is off by at most a factor √step; what is below `FAINTEST` is stored as that.
    """
    ratio = np.maximum(attention.astype(np.float64) * attention.shape[1], FAINTEST)
    low, high = ratio.min(), ratio.max()
    step = max((high / low) ** (1 / _CODES), 1 + 1e-9)
    codes = np.rint(np.log(ratio / low) / math.log(step)).clip(0, _CODES).astype(np.uint8)
    return {"low": float(low), "step": float(step), "codes": _packed(codes)}


def _batch(pipeline: Pipeline, person: Person) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The crop [1, 3, H, W] and the 2D poses [1, 17, 2] on the lifter's device."""
    device = next(pipeline.lifter.parameters()).device
    return normalise_image(person.crop)[None].to(device), tuple(pose[None].to(device) for pose in person.inputs)


def _described(person: Person) -> dict[str, Any]:
    height, width = person.crop.shape[:2]
    return {
        "title": person.title,
        "size": [width, height],
        "crop": _jpeg(person.crop),
        "pose_2d": np.round(person.keypoints, _PIXELS).tolist(),
        "coarse": None,
        "truth": None if person.truth_3d is None else np.round(person.truth_3d, _METRES).tolist(),
    }


def _pose(pose_3d: Tensor) -> list[list[float]]:
    """[1, 17, 3] as plain metres, to a hundredth of a millimetre."""
    return np.round(pose_3d[0].double().cpu().numpy(), _METRES).tolist()


def _jpeg(crop: np.ndarray) -> str:
    _, encoded = cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode("ascii")


def _packed(array: np.ndarray) -> dict[str, str]:
    """Unsigned integers for the script: little-endian bytes in base64, and how wide each is."""
    plain = array.astype(array.dtype.newbyteorder("<"))
    return {"type": array.dtype.name, "base64": base64.b64encode(plain.tobytes()).decode("ascii")}


def _body(title: str, note: str, patches: bool, places: bool) -> str:
    look = "Where it looks" if patches or places else "The crop and its joints"
    choice = _MAP_CHOICE if patches else _PLACE_CHOICE if places else ""
    return f"""<h1>{html.escape(title)}</h1>
{f'<p class="faint">{html.escape(note)}</p>' if note else ""}
<noscript><p>This page draws with JavaScript, which is switched off.</p></noscript>
<nav aria-label="People">
<button id="previous" title="Previous person (left arrow key)">← previous</button>
<select id="person" aria-label="Person"></select>
<button id="next" title="Next person (right arrow key)">next →</button>
</nav>
<main>
<section class="panel" aria-label="{look}">
<h2>{look}</h2>
{choice}<div class="picture" id="look"><img alt="The crop"><canvas></canvas><svg></svg></div>
{_COLOUR_SCALE if patches else _MAP_KEY if places else ""}<p id="looking" role="status"></p>
</section>
{_KEPT if patches else ""}<section class="panel" id="pose" aria-label="3D pose">
<h2>3D pose</h2>
{_SPACE}</section>
</main>
{asset("viewer-help.html")}"""


_MAP_CHOICE = '<p class="row"><label>Layer <select id="map"></select></label></p>\n'
_PLACE_CHOICE = """<p class="row"><label>Block <select id="block"></select></label>
<label>Map <select id="level"></select></label></p>
"""
_COLOUR_SCALE = '<div class="scale"><div id="colours"></div><span id="low"></span><span id="high"></span></div>\n'
_MAP_KEY = '<p class="row" id="maps"></p>\n'
_KEPT = """<section class="panel" aria-label="What stage 2 sees">
<h2>What stage 2 sees</h2>
<p class="row"><label>Retention <input id="retention" type="range" min="0" step="1"></label></p>
<div class="picture" id="kept"><img alt="The crop, dimmed where patches are dropped"><canvas></canvas></div>
<p id="keeping" role="status"></p>
<svg id="trend" role="img"></svg>
</section>
"""
_SPACE = """<div class="row" id="switches" role="group" aria-label="Shown poses"></div>
<svg id="space" tabindex="0" role="application"
 aria-label="3D pose. Drag or use the arrow keys to turn, wheel or plus and minus to zoom, 0 to reset."></svg>
<p class="row" role="group" aria-label="View">
<button id="reset">Reset view</button>
<button id="camera">As the camera saw it</button>
<button id="closer" aria-label="Zoom in" title="Zoom in">+</button>
<button id="farther" aria-label="Zoom out" title="Zoom out">−</button>
</p>
<div id="errors" role="status"></div>
"""
