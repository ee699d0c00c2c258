"""Validation by protocols 1 and 2, each process measuring its share of the records."""

from __future__ import annotations

from liftbyimage.data.source import Source
from liftbyimage.evaluate import Measurements, measure, summarise
from liftbyimage.models import Pipeline
from liftbyimage.reading import spread
from liftbyimage.training.config import TrainingConfig
from liftbyimage.training.distributed import Processes
from liftbyimage.training.signals import Stopped, StopRequest
from liftbyimage.training.stages import Stage


def validate(
    pipeline: Pipeline, stage: Stage, source: Source, config: TrainingConfig, group: Processes, stop: StopRequest
) -> dict[str, float] | None:
    """`mpjpe_mm` and `p_mpjpe_mm` of the pose that `stage` trains, over `source`; the same in every process. None if
    any process was asked to stop before it was done."""
    try:
        mine: Measurements | None = measure(
            pipeline.eval(),
            source,
            indices=spread(len(source), config.limit_validation)[group.rank :: group.world],
            workers=config.workers,
            device=group.device,
            flip_test=config.flip_test,
            strict=config.strict,
            on_batch=lambda count: stop.check(),
        )
    except Stopped:
        mine = None
    parts = group.gather(mine)
    if None in parts:
        return None
    measurements = Measurements.join(parts)
    summary = summarise(measurements, source.groups)
    return {name: summary[stage.measured + name] for name in ("mpjpe_mm", "p_mpjpe_mm")}
