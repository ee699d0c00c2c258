"""The demonstration: unseen synthetic people are lifted by the packaged model, measured and drawn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from liftbyimage import viewer
from liftbyimage._files import DEMO_CHECKPOINT
from liftbyimage.checkpoint import load_pipeline, load_state, read_checkpoint
from liftbyimage.data.crop import denormalise_keypoints, normalise_image
from liftbyimage.draw import picture_of_person, save_figure
from liftbyimage.metrics import mpjpe
from liftbyimage.models import LiftedPose, Pipeline, PoseOnlyConfig, PoseOnlyLifter
from liftbyimage.nn import FactoredPatches
from liftbyimage.ops import explain
from liftbyimage.reference import ReferenceLiftByImage
from liftbyimage.train_demo import TrainingScenes, evaluate, render_scenes

FIRST_UNSEEN_SEED = 1_000_000  # far from any training seed, so that --seed 0 is not what the model was trained on
MEASURED_PEOPLE = 256
TIMED_BATCH = 8


def run_demo(out: Path, people: int, seed: int, console: Console, html: bool = False) -> dict[str, Any]:
    """Lift unseen synthetic people with the packaged checkpoint, print errors and speed, write one picture each.

    Args:
        out: folder for `person-1.png` …; made if missing.
        people: how many people are drawn; errors are averaged over at least 256.
        seed: which people; no seed gives scenes of the training set.
        html: whether the people who are drawn, at most 100, also get a page, `viewer.html`.

    Returns:
        "mpjpe_mm" (coarse, refined, pose_only), "backends" (op → name), "speedup" (what → ratio), "pictures" (paths)
        and "page" (its path, or None).

    Raises:
        ValueError: more people than a page takes.
    """
    if html:
        viewer.check_people("--html", people)
    pipeline, pose_only = load_demo_models(DEMO_CHECKPOINT)
    count = max(people, MEASURED_PEOPLE)
    console.print(f"Rendering {count} synthetic people the model has never seen …")
    scenes = render_scenes(count, seed=FIRST_UNSEEN_SEED + seed)
    errors = evaluate(pipeline, pose_only, scenes)
    backends, speedup = _measure(pipeline, scenes)
    pictures = _draw(pipeline, scenes, people, out)
    page = write_demo_page(pipeline, scenes, people, out) if html else None
    _print(console, count, errors, backends, speedup)
    console.print(f"{len(pictures)} pictures are in {out}/", markup=False, soft_wrap=True)
    if page is not None:
        console.print(f"Open {page} in a browser to see where each joint looks.", markup=False, soft_wrap=True)
    return {"mpjpe_mm": errors, "backends": backends, "speedup": speedup, "pictures": pictures, "page": page}


def load_demo_models(path: Path) -> tuple[Pipeline, PoseOnlyLifter]:
    """The pipeline and the 2D-only lifter trained alike, in evaluation mode."""
    contents = read_checkpoint(path)
    if "pose_only_state" not in contents:
        raise ValueError(f"checkpoint {path}: holds no 2D-only lifter; make it with `liftbyimage train-demo`")
    pose_only = PoseOnlyLifter(PoseOnlyConfig(**contents["pose_only_config"]))
    load_state(pose_only, contents["pose_only_state"], f"checkpoint {path}: 2D-only lifter")
    return load_pipeline(path), pose_only.eval()


@torch.no_grad()
def _measure(pipeline: Pipeline, scenes: TrainingScenes) -> tuple[dict[str, str], dict[str, float]]:
    """Which backend serves each op on the demo's own tensors, and how much faster the lifter is than the plain one."""
    lifter = pipeline.lifter
    features = pipeline.encoder.features(normalise_image(scenes.image[:TIMED_BATCH]))
    pose_2d = scenes.pose_2d[:TIMED_BATCH]
    reference = ReferenceLiftByImage(lifter.config, lifter.positions).eval()
    reference.load_state_dict(lifter.state_dict())
    _require_equal(lifter(features, pose_2d), reference(features, pose_2d))

    patches = lifter.embed_patches(features)
    assert isinstance(patches, FactoredPatches)
    channels, config = patches.channels, lifter.config  # [B, P, W]
    rows = channels.new_empty(TIMED_BATCH, config.heads, config.num_joints, channels.shape[2])
    joints = channels.new_empty(TIMED_BATCH, config.num_joints, config.dim)
    calls = {
        "attend_patches": (rows, channels[:, None], channels[:, None]),
        "guide_patches": (rows, channels),
        "prune_patches": (channels, channels[..., 0]),
        "joint_queries": (joints,),
        "update_joints": (joints, rows),
    }
    backends = {op: next(s.name for s in explain(op, *tensors) if s.serves) for op, tensors in calls.items()}
    ratios = {}
    for batch in (1, TIMED_BATCH):
        inputs = features[:batch], pose_2d[:batch]
        ratios[f"whole lifter of width {lifter.config.dim}, {batch} crop{'s' if batch > 1 else ''}"] = _ratio(
            lambda inputs=inputs: reference(*inputs), lambda inputs=inputs: lifter(*inputs)
        )
    return backends, ratios


def _require_equal(lifted: LiftedPose, plain: tuple[Tensor, ...]) -> None:
    """No speed is reported for an output that differs."""
    for name, ours, theirs in zip(LiftedPose._fields, lifted, plain, strict=True):
        if name == "index":
            continue  # patches of nearly equal importance may change places by rounding
        difference = (ours - theirs).abs().max().item()
        if not difference <= 1e-3 * theirs.abs().max().item():
            raise RuntimeError(f"{name} differs from the plain lifter by {difference:.2e}; no ratio is reported")


def _ratio(plain: Callable[[], object], ours: Callable[[], object], repeats: int = 7) -> float:
    """Median time of `plain` over that of `ours`, measured in turn after a warm-up of both."""
    times: dict[Callable[[], object], list[float]] = {plain: [], ours: []}
    for repeat in range(repeats + 1):
        for function, seconds in times.items():
            started = time.perf_counter()
            function()
            if repeat:
                seconds.append(time.perf_counter() - started)
    return statistics.median(times[plain]) / statistics.median(times[ours])


@torch.no_grad()
def _draw(pipeline: Pipeline, scenes: TrainingScenes, people: int, out: Path) -> list[Path]:
    lifted = pipeline(normalise_image(scenes.image[:people]), scenes.pose_2d[:people])
    size = tuple(scenes.image.shape[1:3])
    pictures = []
    for person in range(people):
        error = 1000 * mpjpe(lifted.pose_3d[person], scenes.pose_3d[person]).item()
        figure = picture_of_person(
            scenes.image[person].numpy(),
            denormalise_keypoints(scenes.pose_2d[person], size),
            lifted.importance[person],
            lifted.index[person],
            pipeline.lifter.config.grid,
            lifted.pose_3d[person],
            lifted.coarse_pose_3d[person],
            scenes.pose_3d[person],
            title=f"Unseen synthetic person {person + 1}: lifted with {error:.0f} mm mean error",
        )
        pictures.append(out / f"person-{person + 1}.png")
        save_figure(figure, pictures[-1])
    return pictures


def write_demo_page(pipeline: Pipeline, scenes: TrainingScenes, people: int, out: Path) -> Path:
    """A page of the first `people` scenes in the folder `out`; its path."""
    size = tuple(scenes.image.shape[1:3])
    shown = [
        viewer.Person(
            f"Unseen synthetic person {person + 1}",
            scenes.image[person].numpy(),
            denormalise_keypoints(scenes.pose_2d[person], size).numpy(),
            (scenes.pose_2d[person],),
            scenes.pose_3d[person].numpy(),
        )
        for person in range(people)
    ]
    path = out / viewer.FILE
    note = "The demonstration model was trained on such scenes, but never saw these people."
    viewer.write_viewer(path, pipeline, shown, "Lifting by Image: unseen synthetic people", note)
    return path


def _print(
    console: Console, count: int, errors: dict[str, float], backends: dict[str, str], speedup: dict[str, float]
) -> None:
    table = Table(title=f"MPJPE over {count} unseen synthetic people", title_justify="left")
    table.add_column("lifter")
    table.add_column("mm", justify="right")
    table.add_row("2D pose only", f"{errors['pose_only']:.1f}")
    table.add_row("Lifting by Image, coarse (stage 1)", f"{errors['coarse']:.1f}")
    table.add_row("Lifting by Image, refined (stage 2)", f"{errors['refined']:.1f}")
    console.print(table)
    table = Table(title="Which backend served", title_justify="left")
    table.add_column("op")
    table.add_column("backend")
    for op, backend in backends.items():
        table.add_row(op, backend)
    console.print(table)
    threads = torch.get_num_threads()
    for what, ratio in speedup.items():
        console.print(
            f"{what}: {ratio:.1f}× as fast as the plain PyTorch lifter, outputs equal ({threads} threads)",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
