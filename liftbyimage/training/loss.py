"""The loss of one stage as a module, so that DistributedDataParallel can wrap it."""

from __future__ import annotations

from torch import Tensor, nn

from liftbyimage.batches import Batch
from liftbyimage.metrics import mpjpe
from liftbyimage.models import Pipeline
from liftbyimage.predict import mixed_precision
from liftbyimage.training.feed import Part
from liftbyimage.training.stages import Stage


class StageLoss(nn.Module):
    """A part of a batch in, its loss out, summed over samples; the network computes under autocast to `precision`.

    `kind` is "mse", the mean squared error of a sample's coordinates, m², or "mpjpe", the mean distance of its joints,
    m.
    """

    def __init__(self, pipeline: Pipeline, stage: Stage, kind: str, precision: str) -> None:
        super().__init__()
        self.pipeline, self.stage, self.kind, self.precision = pipeline, stage, kind, precision

    def forward(self, part: Part) -> Tensor:
        inputs, truth = part.inputs, part.pose_3d
        with mixed_precision(truth.device, self.precision):
            if isinstance(inputs, Batch):
                pose = self.stage.pose(self.pipeline, inputs)
            else:
                pose = self.stage.explore(self.pipeline, inputs)
        if self.kind == "mpjpe":
            return mpjpe(pose.float(), truth, reduction="none").sum()
        return (pose.float() - truth).square().mean((1, 2)).sum()
