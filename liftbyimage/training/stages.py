"""What each stage of training optimises, and the pose whose error it minimises.

Lifting by Image is trained in two stages: the encoder and the broad query on the coarse pose; then both freeze, and the
focused exploration is trained on the refined pose. Every other lifter has one stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from liftbyimage.batches import Batch
from liftbyimage.metrics import root_relative
from liftbyimage.models import LiftByImage, Pipeline
from liftbyimage.models.pipeline import Lifter
from liftbyimage.nn import PoseGuidedLayer


class Kept(NamedTuple):
    """What stage 2 starts from: all that the frozen first stage makes of a batch."""

    joints: Tensor  # [B, J, D]
    patches: Tensor  # [B, K, D] (FactoredPatches where they were not formed)
    coarse_pose_3d: Tensor  # [B, J, 3] metres


class Stage(ABC):
    """One stage of training.

    Attributes:
        name: as it appears in curves, checkpoints and messages.
        measured: what the names of errors of its pose begin with in `evaluate.summarise`.
    """

    name: str
    measured = ""

    @abstractmethod
    def parameters(self, pipeline: Pipeline) -> list[nn.Parameter]:
        """What it optimises."""

    def has_idle_parameters(self, pipeline: Pipeline) -> bool:
        """Whether some of them never get a gradient."""
        return False

    @abstractmethod
    def train(self, pipeline: Pipeline) -> None:
        """Put the modules it optimises into training mode and all others into evaluation mode."""

    @abstractmethod
    def pose(self, pipeline: Pipeline, batch: Batch) -> Tensor:
        """The pose [B, J, 3] that is compared with the truth."""


class WholeLifter(Stage):
    """All of a lifter of one stage, and its encoder unless the lifter wants that frozen."""

    name = "lifter"

    def parameters(self, pipeline: Pipeline) -> list[nn.Parameter]:
        frozen = pipeline.encoder is None or pipeline.lifter.encoder_is_frozen
        return [*(() if frozen else pipeline.encoder.parameters()), *pipeline.lifter.parameters()]

    def train(self, pipeline: Pipeline) -> None:
        pipeline.train()

    def pose(self, pipeline: Pipeline, batch: Batch) -> Tensor:
        return pipeline(batch.images, *batch.poses)


class BroadQuery(Stage):
    """Stage 1 of Lifting by Image, with the encoder."""

    name = "stage 1"
    measured = "coarse_"

    def parameters(self, pipeline: Pipeline) -> list[nn.Parameter]:
        return [*pipeline.encoder.parameters(), *pipeline.lifter.stage1_parameters()]

    def has_idle_parameters(self, pipeline: Pipeline) -> bool:
        """The head of an HRNet, and what guides patches in the last layer, for nobody reads them again."""
        head = getattr(pipeline.encoder, "final_layer", None)
        return head is not None or isinstance(pipeline.lifter.stage1[-1], PoseGuidedLayer)

    def train(self, pipeline: Pipeline) -> None:
        pipeline.train()

    def pose(self, pipeline: Pipeline, batch: Batch) -> Tensor:
        lifter = pipeline.lifter
        joints, _, _ = lifter.broad_query(pipeline.read(batch.images), *batch.poses)
        return root_relative(lifter.coarse_head(joints))


class FocusedExploration(Stage):
    """Stage 2 of Lifting by Image; encoder and stage 1 are frozen and no gradient flows into them."""

    name = "stage 2"

    def parameters(self, pipeline: Pipeline) -> list[nn.Parameter]:
        return pipeline.lifter.stage2_parameters()

    def train(self, pipeline: Pipeline) -> None:
        pipeline.eval()
        pipeline.lifter.stage2.train()

    def pose(self, pipeline: Pipeline, batch: Batch) -> Tensor:
        return self.explore(pipeline, self.keep(pipeline, batch))

    @torch.no_grad()
    def keep(self, pipeline: Pipeline, batch: Batch) -> Kept:
        """What the frozen first stage makes of a batch."""
        lifter = pipeline.lifter
        joints, patches, importance = lifter.broad_query(pipeline.read(batch.images), *batch.poses)
        kept = lifter.selection(patches, importance)
        return Kept(joints, kept.patches, root_relative(lifter.coarse_head(joints)))

    def explore(self, pipeline: Pipeline, kept: Kept) -> Tensor:
        """The refined pose [B, J, 3]."""
        return pipeline.lifter.explore(kept.joints, kept.patches)


def stages_of(lifter: Lifter) -> tuple[Stage, ...]:
    """The stages in which a lifter is trained, in order."""
    return (BroadQuery(), FocusedExploration()) if isinstance(lifter, LiftByImage) else (WholeLifter(),)
