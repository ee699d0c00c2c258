"""Evaluation by the field's protocols: errors of every record, then their means by group.

Protocol 1 is MPJPE after the roots are aligned, protocol 2 P-MPJPE (after a similarity transform). PCK at 150 mm and
AUC are those of MPI-INF-3DHP; for a source with `evaluated_joints`, as its test set has, they are over these joints,
and over all 17 as `pck_all_joints` and `auc_all_joints`. Errors are always over all 17.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liftbyimage import metrics
from liftbyimage.batches import check_crop_size, make_batch
from liftbyimage.data.crop import apply_affine
from liftbyimage.data.skeleton import JOINT_NAMES
from liftbyimage.data.source import Source, check_source
from liftbyimage.lift import check_batch_size
from liftbyimage.models import Pipeline
from liftbyimage.predict import Prediction, chosen_device, evaluating, predict
from liftbyimage.reading import Problem, in_batches, read_batches

SCHEMA = "liftbyimage-evaluation-1"
LENGTHS = ("mpjpe", "p_mpjpe", "n_mpjpe", "coarse_mpjpe", "coarse_p_mpjpe")
SHARES = ("pck", "auc", "pck_all_joints", "auc_all_joints", "background", "background_of_uniform")
_MILLIMETRES = 1000


@dataclass(frozen=True, eq=False)
class Measurements:
    """What was measured of N records, on the CPU, in the order of their index; lengths in metres, shares 0 … 1.

    Attributes:
        index, group: int64 [N], the record's number and that of its group.
        joint_errors: float64 [N, 17], the distance of each joint after the roots are aligned.
        mpjpe, p_mpjpe, n_mpjpe, pck, auc: float64 [N], as the functions in `metrics`.
        pck_all_joints, auc_all_joints: float64 [N], None where `pck` and `auc` are over all joints themselves.
        coarse_mpjpe, coarse_p_mpjpe: float64 [N] of stage 1's pose, None for a lifter of one stage.
        background: float64 [N], the share of importance outside the person's mask, or where none is known outside
            `metrics.hull_mask` of the 2D joints; None for a lifter without importance.
        background_of_uniform: float64 [N], what it would be of importance spread evenly.
        skipped: the records that could not be read, by index.
    """

    index: Tensor
    group: Tensor
    joint_errors: Tensor
    mpjpe: Tensor
    p_mpjpe: Tensor
    n_mpjpe: Tensor
    pck: Tensor
    auc: Tensor
    pck_all_joints: Tensor | None = None
    auc_all_joints: Tensor | None = None
    coarse_mpjpe: Tensor | None = None
    coarse_p_mpjpe: Tensor | None = None
    background: Tensor | None = None
    background_of_uniform: Tensor | None = None
    skipped: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def join(cls, parts: Sequence[Measurements]) -> Measurements:
        """Parts of one evaluation, in any order, as one; a record that several parts measured counts once."""
        skipped = tuple(sorted({problem.index: problem for part in parts for problem in part.skipped}.values()))
        parts = [part for part in parts if len(part)]  # the others cannot tell which measurements there are
        if not parts:
            return cls(*_nothing(), skipped=skipped)
        index = torch.cat([part.index for part in parts])
        order = index.argsort(stable=True)
        order = order[torch.cat([order.new_ones(1), index[order].diff()]) != 0]
        columns = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            if field.name != "skipped" and values[0] is not None:
                columns[field.name] = torch.cat(values)[order]
        return cls(**columns, skipped=skipped)


def _nothing() -> tuple[Tensor, ...]:
    """The columns that all measurements have, of no record."""
    numbers, each = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    return numbers, numbers, each.reshape(0, len(JOINT_NAMES)), each, each, each, each, each


def evaluate(pipeline: Pipeline, source: Source, *, per_joint: bool = False, **options: Any) -> dict[str, Any]:
    """`summarise` what `measure` measures; `options` are those of `measure`."""
    return summarise(measure(pipeline, source, **options), source.groups, per_joint=per_joint)


def measure(
    pipeline: Pipeline,
    source: Source,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: str | torch.device = "cpu",
    flip_test: bool = False,
    precision: str = "float32",
    strict: bool = False,
    on_batch: Callable[[int], object] | None = None,
) -> Measurements:
    """Lift records and measure each; batch size and workers change nothing but rounding.

    The pipeline is moved to `device`; its modules' training flags are afterwards as before.

    Args:
        pipeline: of any registered lifter.
        source: whose records have `pose_3d`.
        indices: which records, by default all. Several processes may each measure some, and one of them `join` all.
        batch_size: records per pass, at least 1.
        workers: processes that read records.
        device: where to compute; "auto" is the GPU where there is one.
        flip_test: average each pose with that of the mirrored crop.
        precision: "float32", "bfloat16", or "float16" on a GPU.
        strict: raise for a record that cannot be read, instead of leaving it out and counting it.
        on_batch: called after each batch with the number of its records.

    Raises:
        TypeError, ValueError: options of another kind than said, or a source without true poses.
        CorruptRecord: with `strict`, a record that cannot be read.
    """
    check_batch_size("measure", batch_size)
    device = chosen_device("measure", device, precision)
    check_source("measure: source", source)
    check_crop_size("measure: records", pipeline, source.size)
    indices = range(len(source)) if indices is None else _checked(indices, len(source))
    joints = getattr(source, "evaluated_joints", None)
    parts, skipped = [], []
    with evaluating(pipeline.to(device)):
        for records, problems in read_batches(source, in_batches(indices, batch_size), workers, strict):
            skipped += problems
            if records is not None:
                batch = make_batch(pipeline.lifter, records, device)
                predicted = predict(pipeline, batch, flip_test=flip_test, precision=precision)
                parts.append(_measure(pipeline, predicted, records, joints))
            if on_batch is not None:
                on_batch(len(problems) + (0 if records is None else len(records["index"])))
    return Measurements.join([*parts, Measurements(*_nothing(), skipped=tuple(skipped))])


def _checked(indices: Sequence[int], count: int) -> Sequence[int]:
    wrong = [index for index in indices if not 0 <= index < count]
    if wrong:
        raise ValueError(f"measure: indices must lie in 0 … {count - 1}, got {wrong[0]}")
    return indices


def _measure(
    pipeline: Pipeline, predicted: Prediction, records: Mapping[str, Any], joints: Sequence[int] | None
) -> Measurements:
    if "pose_3d" not in records:
        raise ValueError("measure: source must know the true poses, got records without pose_3d")
    truth = metrics.root_relative(records["pose_3d"].double())
    pose = predicted.pose_3d.cpu().double()
    each = {name: getattr(metrics, name)(pose, truth, reduction="none") for name in ("mpjpe", "p_mpjpe", "n_mpjpe")}
    over_all = {name: getattr(metrics, name)(pose, truth, reduction="none") for name in ("pck", "auc")}
    if joints is None:
        each |= over_all
    else:
        some = list(joints)
        each |= {name: getattr(metrics, name)(pose[:, some], truth[:, some], reduction="none") for name in over_all}
        each |= {f"{name}_all_joints": values for name, values in over_all.items()}
    if predicted.coarse_pose_3d is not None:
        coarse = predicted.coarse_pose_3d.cpu().double()
        each["coarse_mpjpe"] = metrics.mpjpe(coarse, truth, reduction="none")
        each["coarse_p_mpjpe"] = metrics.p_mpjpe(coarse, truth, reduction="none")
    if predicted.importance is not None:
        each |= _background(predicted.importance.cpu().double(), records, pipeline.lifter.config.grid)
    errors = torch.linalg.vector_norm(pose - truth, dim=-1)
    return Measurements(records["index"], records["group"].long(), errors, **each)


def _background(importance: Tensor, records: Mapping[str, Any], grid: tuple[int, int]) -> dict[str, Tensor]:
    mask = records.get("mask")
    if mask is None:
        size = tuple(records["image"].shape[1:3])
        keypoints = apply_affine(records["crop_matrix"].numpy(), records["keypoints"].numpy())  # [B, 17, 2] crop px
        mask = torch.stack([metrics.hull_mask(joints, size) for joints in keypoints])
    return {
        "background": metrics.background_attention(importance, mask, grid, "none"),
        "background_of_uniform": metrics.background_attention(torch.ones_like(importance), mask, grid, "none"),
    }


def summarise(measurements: Measurements, groups: Sequence[str], *, per_joint: bool = False) -> dict[str, Any]:
    """Means of measurements, as plain values for JSON.

    Lengths are in mm and named so (`mpjpe_mm`), shares 0 … 1; only what was measured is there.

    Args:
        groups: the source's names of groups; those without a record are left out.
        per_joint: add `per_joint_mm`, the mean error of each joint by its name.

    Returns:
        The means over all records and their number, `records`; `average`, the mean of the groups' means, which is what
        the field reports; `groups`, the same as for all records for each group by name; `skipped`, how many could not
        be read, with the first `problems`; and `schema`.

    Raises:
        ValueError: nothing was measured, an error is not finite, or a record is of a group that `groups` lacks.
    """
    if not len(measurements):
        problems = [f"; {skipped.problem}" for skipped in measurements.skipped[:1]]
        raise ValueError(f"summarise: no record was measured{''.join(problems)}")
    broken = measurements.index[~measurements.mpjpe.isfinite()]
    if len(broken):
        raise ValueError(f"summarise: the pose of record {int(broken[0])} is not finite: the weights are broken")
    last = int(measurements.group.max())
    if last >= len(groups):
        raise ValueError(f"summarise: groups must name every record's group, got {len(groups)} names and group {last}")
    of_group = {
        groups[group]: _means(measurements, measurements.group == group, per_joint)
        for group in measurements.group.unique().tolist()
    }
    everything = _means(measurements, torch.ones(len(measurements), dtype=torch.bool), per_joint)
    return {
        "schema": SCHEMA,
        **everything,
        "average": _average(list(of_group.values())),
        "groups": of_group,
        "skipped": len(measurements.skipped),
        "problems": [problem.problem for problem in measurements.skipped[:10]],
    }


def _means(measurements: Measurements, chosen: Tensor, per_joint: bool) -> dict[str, Any]:
    means: dict[str, Any] = {"records": int(chosen.sum())}
    for name in (*LENGTHS, *SHARES):
        values = getattr(measurements, name)
        if values is not None:
            mean = values[chosen].mean().item()
            means |= {f"{name}_mm": _MILLIMETRES * mean} if name in LENGTHS else {name: mean}
    if per_joint:
        errors = _MILLIMETRES * measurements.joint_errors[chosen].mean(dim=0)
        means["per_joint_mm"] = dict(zip(JOINT_NAMES, errors.tolist(), strict=True))
    return means


def _average(means: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over groups of each of their means."""
    average = {}
    for name, first in means[0].items():
        if isinstance(first, Mapping):
            average[name] = _average([group[name] for group in means])
        elif name != "records":
            average[name] = float(np.mean([group[name] for group in means]))
    return average
