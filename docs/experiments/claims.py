"""The claims of Lifting by Image on synthetic people: trained before one laboratory, tested before it and elsewhere.

    python docs/experiments/claims.py

trains every model of three seeds, writes claims.json beside this file and puts its tables and figures into claims.md.
What is finished is kept in build/claims, so that the command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import claims_page
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import liftbyimage
from liftbyimage._files import write_atomically
from liftbyimage.batches import make_batch
from liftbyimage.checkpoint import load_pipeline, save_atomically, save_pipeline
from liftbyimage.data.crop import normalise_keypoints
from liftbyimage.data.synthetic import SyntheticPeople, generate
from liftbyimage.evaluate import evaluate
from liftbyimage.metrics import background_attention
from liftbyimage.models import LiftByImage, LiftByImageConfig, Pipeline, TinyEncoder
from liftbyimage.nn import FactoredPatches
from liftbyimage.train_demo import TrainingScenes, detection_loss, optimise
from liftbyimage.training import Trained, TrainingConfig, train

HERE = Path(__file__).resolve().parent
LABORATORY, UNSEEN = "laboratory", "unseen"
BACKGROUND = {LABORATORY: "laboratory", UNSEEN: "textured"}  # of the renderer
POSE_ONLY = "2D only"
MEASURED = (  # of what `liftbyimage.evaluate` gives
    "mpjpe_mm",
    "p_mpjpe_mm",
    "coarse_mpjpe_mm",
    "coarse_p_mpjpe_mm",
    "background",
    "background_of_uniform",
)
POSE_GUIDED_LAYER = {"guided": 1, "plain": None, "guided first": 0, "guided last": 2}
RETENTIONS = {"guided": (0.3, 0.1, 0.5, 1.0), "plain": (1.0, 0.3), "guided first": (0.3,), "guided last": (0.3,)}


@dataclass(frozen=True)
class Recipe:
    """Sizes and settings, the same for every model."""

    seeds: tuple[int, ...] = (0, 1, 2)
    crop: tuple[int, int] = (128, 96)
    noise: float = 0.5  # of the detections, relative to the crop as 1 is at 256x192
    people: int = 8192
    detector_people: int = 4096
    test_people: int = 512
    test_seed: int = 9000
    channels: int = 32
    dim: int = 64
    heads: int = 4
    detector_steps: int = 600
    epochs: int = 5
    stage2_epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 5e-3

    def training(self, seed: int, **settings: Any) -> TrainingConfig:
        """What all trainings share: the demonstration model's schedule; no mirroring, for lamp and room are fixed."""
        steps = -(-self.people // self.batch_size) * max(settings["epochs"], settings.get("stage2_epochs", 0))
        return TrainingConfig(
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule="cosine",
            warm_up=steps // 10,
            clip_norm=1.0,
            flip=False,
            seed=seed,
            device="cpu",
            **settings,
        )


QUICK = Recipe(
    crop=(64, 48), people=16, detector_people=8, test_people=6, channels=8, dim=16, heads=2, detector_steps=2, epochs=1
)


@lru_cache(maxsize=6)
def people(recipe: Recipe, count: int, seed: int, background: str) -> SyntheticPeople:
    """Rendered once a process."""
    return SyntheticPeople(count=count, seed=seed, background=background, noise=recipe.noise, size=recipe.crop)


def training_people(recipe: Recipe, seed: int) -> SyntheticPeople:
    return people(recipe, recipe.people, 1000 + seed, "laboratory")


def test_people(recipe: Recipe, where: str) -> SyntheticPeople:
    """The same people, poses and cameras before either background."""
    return people(recipe, recipe.test_people, recipe.test_seed, BACKGROUND[where])


def train_detector(recipe: Recipe, seed: int, out: Path) -> None:
    """The encoder that every model of a seed starts from: it has found joints and their depths before textures."""
    path = out / f"seed-{seed}" / "detector.pt"
    if path.is_file():
        return
    started = time.monotonic()
    scenes = generate(
        recipe.detector_people, seed=2000 + seed, background="textured", noise=recipe.noise, size=recipe.crop
    )
    scenes = TrainingScenes(
        scenes.image,
        normalise_keypoints(scenes.pose_2d, recipe.crop),
        normalise_keypoints(scenes.pose_2d_clean, recipe.crop),
        scenes.pose_3d,
    )
    torch.manual_seed(seed)
    encoder, head = TinyEncoder(recipe.channels), nn.Conv2d(recipe.channels, 2 * scenes.pose_3d.shape[1], 1)
    optimise(
        [*encoder.parameters(), *head.parameters()],
        lambda batch: detection_loss(encoder, head, scenes, batch),
        count=len(scenes),
        steps=recipe.detector_steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        seed=seed,
    )
    save_atomically({"encoder": encoder.state_dict(), "minutes": (time.monotonic() - started) / 60}, path)


def run_pose_only(recipe: Recipe, seed: int, out: Path) -> None:
    """The 2D-only lifter: eight layers of the same width, as many steps as both stages together."""
    folder = out / f"seed-{seed}" / POSE_ONLY.replace(" ", "-")

    def run() -> dict[str, Any]:
        lifter = {"dim": recipe.dim, "heads": recipe.heads, "dropout": 0.0}
        config = recipe.training(
            seed, model="pose-only", lifter=lifter, epochs=recipe.epochs + recipe.stage2_epochs, stage2_epochs=0
        )
        train_whole(config, folder, training_people(recipe, seed))
        return {"model": POSE_ONLY, "lifter": lifter, **measure_both(recipe, folder)}

    once(folder / "result.json", recipe, seed, run)


def run_lift_by_image(recipe: Recipe, seed: int, out: Path, model: str) -> None:
    """One first stage, and a second one for each retention."""
    folder = out / f"seed-{seed}" / model.replace(" ", "-")
    source = training_people(recipe, seed)

    def run_stage1() -> dict[str, Any]:
        start = folder / "start.pt"
        save_start(recipe, seed, model, out / f"seed-{seed}" / "detector.pt", start)
        config = recipe.training(seed, init=str(start), epochs=recipe.epochs, stage2_epochs=0)
        trained = train_whole(config, folder / "stage-1", source, test_people(recipe, UNSEEN))
        unseen = [{key: one[key] for key in ("step", "mpjpe_mm")} for one in trained.curves["validation"]]
        losses = trained.curves["loss"]["stage 1"]
        steps = len(losses) // recipe.epochs
        epochs = [sum(losses[start : start + steps]) / steps for start in range(0, len(losses), steps)]
        return {"model": model, "loss_of_epochs": epochs, UNSEEN: unseen}

    once(folder / "stage-1.json", recipe, seed, run_stage1)
    for retention in RETENTIONS[model]:
        stage2 = folder / f"retention-{retention}"

        def run_stage2(retention: float = retention, stage2: Path = stage2) -> dict[str, Any]:
            lifter = {"retention": retention}
            init = str(folder / "stage-1" / "model.pt")
            config = recipe.training(seed, init=init, lifter=lifter, epochs=0, stage2_epochs=recipe.stage2_epochs)
            train_whole(config, stage2, source)
            lifter = load_pipeline(stage2 / "model.pt").lifter.config.to_dict()
            return {"model": model, "lifter": lifter, **measure_both(recipe, stage2)}

        once(stage2 / "result.json", recipe, seed, run_stage2)


def save_start(recipe: Recipe, seed: int, model: str, detector: Path, path: Path) -> None:
    """The seed's detector with a fresh lifter."""
    torch.manual_seed(seed)
    config = LiftByImageConfig(
        image_channels=recipe.channels,
        grid=tuple(side // TinyEncoder.stride for side in recipe.crop),
        dim=recipe.dim,
        heads=recipe.heads,
        dropout=0.0,
        pose_guided_layer=POSE_GUIDED_LAYER[model],
    )
    pipeline = Pipeline(TinyEncoder(recipe.channels), LiftByImage(config))
    pipeline.encoder.load_state_dict(torch.load(detector, weights_only=True)["encoder"])
    save_pipeline(pipeline, path, encoder="tiny", encoder_config={"channels": recipe.channels})


def train_whole(
    config: TrainingConfig, out: Path, source: SyntheticPeople, validation: SyntheticPeople | None = None
) -> Trained:
    trained = train(config, out, source=source, validation=validation)
    if not trained.finished:
        raise SystemExit(f"stopped; {out} continues when the same command is given again")
    return trained


def once(path: Path, recipe: Recipe, seed: int, run: Callable[[], dict[str, Any]]) -> None:
    """Let `run` make the result at `path`, unless it is there."""
    asked = json.loads(json.dumps(asdict(recipe)))
    if path.is_file():
        if json.loads(path.read_text())["recipe"] != asked:
            raise ValueError(f"{path} is of another recipe, choose another folder with --out")
        return
    started = time.monotonic()
    result = {"seed": seed, **run(), "minutes": (time.monotonic() - started) / 60, "recipe": asked}
    write_json(path, result)
    print(f"{path}: {result['minutes']:.1f} minutes", flush=True)


def measure_both(recipe: Recipe, folder: Path) -> dict[str, dict[str, float]]:
    """By test set: means of `liftbyimage.evaluate`, and of `background_shares`."""
    pipeline = load_pipeline(folder / "model.pt")
    return {where: measure(pipeline, test_people(recipe, where)) for where in BACKGROUND}


@torch.no_grad()
def measure(pipeline: Pipeline, source: SyntheticPeople) -> dict[str, float]:
    means = {name: value for name, value in evaluate(pipeline, source).items() if name in MEASURED}
    if pipeline.encoder is not None:
        parts = []
        for records in DataLoader(source, batch_size=64):
            batch = make_batch(pipeline.lifter, records)
            parts.append(background_shares(pipeline, batch.images, *batch.poses, records["mask"]))
        means |= {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}
    return means


def background_shares(pipeline: Pipeline, images: Tensor, pose_2d: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Share [B] of the selected patches and of the attention of stage 2's last layer that falls outside the person."""
    lifter = pipeline.lifter
    joints, patches, importance = lifter.broad_query(pipeline.read(images), pose_2d)
    kept, index = lifter.selection(patches, importance)
    kept = kept.dense() if isinstance(kept, FactoredPatches) else kept
    for layer in lifter.stage2[:-1]:
        joints = layer(joints, kept)
    _, final = lifter.stage2[-1](joints, kept, need_importance=True)  # [B, K]
    nowhere = torch.zeros_like(importance)  # [B, P]
    attention = {
        "background_selected": nowhere.scatter(1, index, 1.0),
        "background_stage2": nowhere.scatter(1, index, final),
    }
    return {name: background_attention(paid, mask, lifter.config.grid, "none") for name, paid in attention.items()}


def run_all(recipe: Recipe, out: Path, processes: int) -> None:
    """All runs, `processes` of them side by side, each in one thread: their number changes no result."""
    first = [(train, recipe, seed, out) for train in (train_detector, run_pose_only) for seed in recipe.seeds]
    then = [(run_lift_by_image, recipe, seed, out, model) for seed in recipe.seeds for model in POSE_GUIDED_LAYER]
    if processes == 1:
        for job in (*first, *then):
            run_job(job)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        try:
            for jobs in (first, then):
                for future in [pool.submit(run_job, job) for job in jobs]:
                    future.result()
        except BaseException:  # a signal too: what runs stops after its step, and what waits is left for next time
            for process in active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def run_job(job: tuple[Any, ...]) -> None:
    function, *arguments = job
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        function(*arguments)
    finally:
        torch.set_num_threads(threads)


def collect(recipe: Recipe, out: Path) -> dict[str, Any]:
    """All results of finished runs, and what they were made with."""
    runs = [json.loads(path.read_text()) for path in sorted(out.glob("seed-*/**/result.json"))]
    stage1 = [json.loads(path.read_text()) for path in sorted(out.glob("seed-*/*/stage-1.json"))]
    detectors = [torch.load(path, weights_only=True)["minutes"] for path in sorted(out.glob("seed-*/detector.pt"))]
    for run in (*runs, *stage1):
        del run["recipe"]
    return {
        "format": "liftbyimage-claims-1",
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "versions": {
            "liftbyimage": liftbyimage.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "minutes": sum(run["minutes"] for run in (*runs, *stage1)) + sum(detectors),
        "runs": runs,
        "stage1": stage1,
    }


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of the runs; default build/claims")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--quick", action="store_true", help="a minute's rehearsal: tiny, and its page goes to --out")
    given = parser.parse_args(arguments)
    recipe = QUICK if given.quick else Recipe()
    out = given.out or HERE.parent.parent / "build" / ("claims-quick" if given.quick else "claims")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command continues"))
    run_all(recipe, out, given.processes)
    results = collect(recipe, out)
    pages = out if given.quick else HERE
    write_json(pages / "claims.json", results)
    claims_page.publish(
        results, HERE / "claims.md", pages / "claims.md", pages.parent / "images" if pages is HERE else out
    )


if __name__ == "__main__":
    main()
