"""Validation by protocols 1 and 2, each process measuring its share of the records."""

from __future__ import annotations

from liftbyimage.data.source import Source
from liftbyimage.evaluate import Measurements, measure, summarise
from liftbyimage.models import Pipeline
from liftbyimage.training.config import TrainingConfig
from liftbyimage.training.distributed import Processes
from liftbyimage.training.stages import Stage


def validate(
    pipeline: Pipeline, stage: Stage, source: Source, config: TrainingConfig, group: Processes
) -> dict[str, float]:
    """`mpjpe_mm` and `p_mpjpe_mm` of the pose that `stage` trains, over `source`; the same in every process."""
    count = min(len(source), config.limit_validation or len(source))
    share = range(group.rank, count, group.world)
    parts = []
    if share:
        parts = [
            measure(
                pipeline.eval(),
                source,
                indices=share,
                workers=config.workers,
                device=group.device,
                flip_test=config.flip_test,
                strict=config.strict,
            )
        ]
    measurements = Measurements.join([part for parts in group.gather(parts) for part in parts])
    summary = summarise(measurements, source.groups)
    return {name: summary[stage.measured + name] for name in ("mpjpe_mm", "p_mpjpe_mm")}
