"""Training Lifting by Image on scenes held in memory, in the paper's two stages, and the demonstration model.

The encoder starts as a detector of joints (the paper's is pretrained on COCO poses). Stage 1 trains the encoder and the
broad query on the coarse pose; then both freeze and stage 2 trains on the refined pose. Loss is the mean squared error
of the joints in metres.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from liftbyimage.checkpoint import cast_state, save_pipeline
from liftbyimage.data.crop import normalise_image, normalise_keypoints
from liftbyimage.data.synthetic import generate
from liftbyimage.metrics import mpjpe, root_relative
from liftbyimage.models import LiftByImage, LiftByImageConfig, Pipeline, PoseOnlyConfig, PoseOnlyLifter, TinyEncoder

CHUNK = 64  # scenes rendered or lifted at a time
DEPTH_WEIGHT = 20.0  # per square metre, beside a cross-entropy in nats


@dataclass(frozen=True)
class TrainingScenes:
    """What training needs of a set of scenes: crops, detected 2D poses and true 3D poses."""

    image: Tensor  # uint8 [N, 256, 192, 3]
    pose_2d: Tensor  # [N, 17, 2] in [-1, 1], as a detector gives it
    pose_2d_clean: Tensor  # [N, 17, 2] in [-1, 1], exact
    pose_3d: Tensor  # [N, 17, 3] metres, root-relative, camera axes

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class DemoRecipe:
    """How the demonstration model is trained; the numbers are its whole configuration besides the model's own."""

    scenes: int = 8192
    held_out: int = 256
    detector_steps: int = 600
    stage1_steps: int = 2400
    stage2_steps: int = 800
    batch_size: int = 16
    learning_rate: float = 5e-3
    dim: int = 64
    heads: int = 4
    dropout: float = 0.0


def render_scenes(count: int, seed: int, background: str = "textured") -> TrainingScenes:
    """`count` synthetic scenes of a seed, as training and evaluation read them."""
    chunks = [
        generate(min(CHUNK, count - start), seed=seed, start=start, background=background)
        for start in range(0, count, CHUNK)
    ]
    size = tuple(chunks[0].image.shape[1:3])
    return TrainingScenes(
        torch.cat([chunk.image for chunk in chunks]),
        torch.cat([normalise_keypoints(chunk.pose_2d, size) for chunk in chunks]),
        torch.cat([normalise_keypoints(chunk.pose_2d_clean, size) for chunk in chunks]),
        torch.cat([chunk.pose_3d for chunk in chunks]),
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to zero."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def optimise(
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    *,
    count: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[float], None] | None = None,
) -> list[float]:
    """Minimise `loss_of(index)` over batches of indices 0 … count − 1 with Adam, by `learning_rate_factor`.

    Every epoch is a new permutation drawn from `seed`; gradients are clipped to norm 1. Returns the loss of every step.
    """
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate_factor(step, steps))
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    losses = []
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        batch, order = order[:batch_size], order[batch_size:]
        loss = loss_of(batch)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(losses[-1])
    return losses


def detection_loss(encoder: nn.Module, head: nn.Module, scenes: TrainingScenes, batch: Tensor) -> Tensor:
    """Pretraining of the encoder: find each joint's patch, and read its depth there.

    `head` gives two maps per joint: scores, whose softmax over patches meets the true patch by cross-entropy, and
    depths, whose mean under that softmax meets the true depth (metres, root-relative) by squared error.
    """
    scores, depths = head(encoder.features(normalise_image(scenes.image[batch]))).chunk(2, dim=1)  # [B, J, Hf, Wf]
    rows, columns = scores.shape[2:]
    size = torch.tensor([columns, rows])
    cell = ((scenes.pose_2d_clean[batch] + 1) / 2 * size).floor().long()  # [B, J, 2]
    x, y = cell.clamp(torch.zeros_like(size), size - 1).unbind(2)
    scores = scores.flatten(2)  # [B, J, P]
    found = nn.functional.cross_entropy(scores.flatten(0, 1), (y * columns + x).flatten())
    depth = (scores.softmax(2) * depths.flatten(2)).sum(2)
    return found + DEPTH_WEIGHT * (depth - scenes.pose_3d[batch][..., 2]).square().mean()


def coarse_loss(pipeline: Pipeline, scenes: TrainingScenes, batch: Tensor) -> Tensor:
    """Stage 1: squared error of the coarse pose, with gradients to the encoder and the broad query."""
    lifter = pipeline.lifter
    features = pipeline.encoder.features(normalise_image(scenes.image[batch]))
    joints, _, _ = lifter.broad_query(features, scenes.pose_2d[batch])
    return (root_relative(lifter.coarse_head(joints)) - scenes.pose_3d[batch]).square().mean()


def refined_loss(pipeline: Pipeline, scenes: TrainingScenes, batch: Tensor) -> Tensor:
    """Stage 2: squared error of the refined pose; encoder and stage 1 are frozen."""
    lifter = pipeline.lifter
    with torch.no_grad():
        features = pipeline.encoder.features(normalise_image(scenes.image[batch]))
        joints, patches, importance = lifter.broad_query(features, scenes.pose_2d[batch])
        kept = lifter.selection(patches, importance)
    return (lifter.explore(joints, kept.patches) - scenes.pose_3d[batch]).square().mean()


def pose_only_loss(lifter: PoseOnlyLifter, scenes: TrainingScenes, batch: Tensor) -> Tensor:
    return (lifter(scenes.pose_2d[batch]) - scenes.pose_3d[batch]).square().mean()


@torch.no_grad()
def evaluate(pipeline: Pipeline, pose_only: PoseOnlyLifter, scenes: TrainingScenes) -> dict[str, float]:
    """MPJPE in millimetres of the coarse, the refined and the 2D-only pose over `scenes`."""
    pipeline.eval()
    pose_only.eval()
    coarse, refined, flat = [], [], []
    for batch in torch.arange(len(scenes)).split(CHUNK):
        lifted = pipeline(normalise_image(scenes.image[batch]), scenes.pose_2d[batch])
        coarse.append(lifted.coarse_pose_3d)
        refined.append(lifted.pose_3d)
        flat.append(pose_only(scenes.pose_2d[batch]))
    poses = {"coarse": coarse, "refined": refined, "pose_only": flat}
    return {name: 1000 * mpjpe(torch.cat(parts), scenes.pose_3d).item() for name, parts in poses.items()}


def build_demo_models(recipe: DemoRecipe) -> tuple[Pipeline, PoseOnlyLifter]:
    """The untrained pipeline, and the 2D-only lifter of about as many weights."""
    config = LiftByImageConfig(dim=recipe.dim, heads=recipe.heads, dropout=recipe.dropout)
    pose_only = PoseOnlyLifter(PoseOnlyConfig(dim=recipe.dim, heads=recipe.heads, dropout=recipe.dropout))
    pipeline = Pipeline(TinyEncoder(config.image_channels), LiftByImage(config))
    return pipeline, pose_only


def train_demo(
    out: Path, seed: int = 0, console: Console | None = None, recipe: DemoRecipe | None = None
) -> dict[str, Any]:
    """Train the demonstration model and the 2D-only lifter on the same synthetic scenes, and write both to `out`.

    Returns:
        MPJPE in mm of "coarse", "refined" and "pose_only" on held-out scenes, and "minutes" it took.
    """
    recipe = recipe or DemoRecipe()
    console = console or Console()
    started = time.monotonic()
    torch.manual_seed(seed)
    pipeline, pose_only = build_demo_models(recipe)

    console.print(f"Rendering {recipe.scenes} scenes for training and {recipe.held_out} to hold out …")
    scenes = render_scenes(recipe.scenes, seed=seed)
    held_out = render_scenes(recipe.held_out, seed=seed + 1)
    with _progress(console) as progress:

        def train_part(
            name: str, steps: int, parameters: list[nn.Parameter], loss_of: Callable[[Tensor], Tensor]
        ) -> None:
            task = progress.add_task(name, total=steps, loss="")
            optimise(
                parameters,
                loss_of,
                count=len(scenes),
                steps=steps,
                batch_size=recipe.batch_size,
                learning_rate=recipe.learning_rate,
                seed=seed,
                on_step=lambda loss: progress.update(task, advance=1, loss=f"loss {loss:.4f}"),
            )

        encoder, lifter = pipeline.encoder, pipeline.lifter
        head = nn.Conv2d(lifter.config.image_channels, 2 * lifter.config.num_joints, 1)
        detector = [*encoder.parameters(), *head.parameters()]
        train_part(
            "encoder", recipe.detector_steps, detector, lambda batch: detection_loss(encoder, head, scenes, batch)
        )
        stage1 = [*encoder.parameters(), *lifter.stage1_parameters()]
        train_part("stage 1", recipe.stage1_steps, stage1, lambda batch: coarse_loss(pipeline, scenes, batch))
        pipeline.eval()
        lifter.stage2.train()
        stage2 = lifter.stage2_parameters()
        train_part("stage 2", recipe.stage2_steps, stage2, lambda batch: refined_loss(pipeline, scenes, batch))
        steps = recipe.stage1_steps + recipe.stage2_steps
        parameters = list(pose_only.parameters())
        train_part("2D only", steps, parameters, lambda batch: pose_only_loss(pose_only, scenes, batch))

    errors = evaluate(pipeline, pose_only, held_out)
    minutes = (time.monotonic() - started) / 60
    save_pipeline(
        pipeline,
        out,
        encoder="tiny",
        encoder_config={"channels": pipeline.lifter.config.image_channels},
        dtype=torch.float16,
        extra={
            "pose_only_config": pose_only.config.to_dict(),
            "pose_only_state": cast_state(pose_only, torch.float16),
            "training": {
                "recipe": asdict(recipe),
                "seed": seed,
                "minutes": minutes,
                "mpjpe_mm": errors,
                "torch": str(torch.__version__),
                "threads": torch.get_num_threads(),
            },
        },
    )
    return {**errors, "minutes": minutes}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
