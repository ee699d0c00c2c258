"""Tiles and launch options of the attention kernels: candidates in order of preference, and the one that is used.

The first candidate that the resource model lets through is used, so that bits are the same from run to run; with
LIFTBYIMAGE_AUTOTUNE=1 the fastest of those that it lets through (`_tuning`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from . import _tuning
from ._common import COMPILER, padded
from ._resources import NO_GPU, REGISTERS, Device, Kernel, Tiles, device_of, registers, shared_bytes

TUNER = _tuning.Tuner()
Stage = Literal["forward", "row_statistics", "row_gradients", "token_gradients"]
# The kernels of a stage share a plan: scatter divides by the sums of gather, so both must round logits alike.
KERNELS: dict[Stage, tuple[Kernel, ...]] = {
    "forward": ("gather", "scatter"),
    "row_statistics": ("row_statistics",),
    "row_gradients": ("row_gradients",),
    "token_gradients": ("token_gradients",),
}


class Work(NamedTuple):
    """What a plan is for."""

    dtype: torch.dtype
    group_rows: int
    widths: tuple[int, int, int]  # E, F, D
    value_is_key: bool


class Shape(NamedTuple):
    """What the time of a plan depends on besides; `roles` tell which tensors are there."""

    batch: int
    groups: int
    num_patches: int
    roles: tuple[bool, ...]


class Limits(NamedTuple):
    """The largest tiles of a plan, before they shrink to the rows and widths that are there."""

    block_p: int
    block_r: int
    out: int  # columns of a result
    chunk: int
    whole: bool
    num_warps: int
    num_stages: int

    def tiles(self, work: Work) -> Tiles:
        columns = (padded(width, self.out) for width in work.widths)
        rows = padded(work.group_rows, self.block_r)
        return Tiles(self.block_p, rows, *columns, self.chunk, self.whole, self.num_warps, self.num_stages)


class Plan(NamedTuple):
    """Tile sizes and launch options of one stage for one dtype and set of widths."""

    constants: dict[str, Any]
    options: dict[str, Any]
    out_limit: int
    tiles: Tiles

    def parts(self, width: int) -> int:
        """Programs that share a result of this width."""
        return int(triton.cdiv(width, self.out_limit))


def candidates(stage: Stage, work: Work) -> list[Plan]:
    """Every plan of a stage, without regard to the device: the preferred, smaller ones, then larger ones."""
    preferred = _preferred(stage, work)
    if work.dtype == torch.float32:  # operands pass through registers, which leaves no room for larger tiles
        others = [preferred._replace(num_stages=1), preferred._replace(num_stages=1, out=64)]
    else:
        chunked = preferred._replace(whole=False, num_stages=1)
        others = [
            preferred._replace(num_stages=1),
            chunked,
            chunked._replace(block_r=16, out=128),
            Limits(32, 16, 64, 32, False, 4, 1),
            preferred._replace(block_r=2 * preferred.block_r),
            preferred._replace(block_p=2 * preferred.block_p),
        ]
        if preferred.num_stages > 1:
            others.append(preferred._replace(num_stages=preferred.num_stages + 1))
    distinct: dict[Tiles, Plan] = {}
    for limits in (preferred, *others):
        distinct.setdefault(limits.tiles(work), _plan(stage, work, limits))
    return list(distinct.values())


def chosen(stage: Stage, work: Work, shape: Shape, tensor: Tensor, launch: Callable[[Plan], object]) -> Plan:
    """The plan for the device of `tensor`, which is the current one; `launch` is called to time plans, if at all."""
    plans = fitting(stage, work, device_of(tensor))
    if not _tuning.asked_for() or device_of(tensor) is NO_GPU:
        return plans[0]
    sizes = (_tuning.bucket(shape.batch), shape.groups, _tuning.bucket(shape.num_patches), shape.roles)
    key = (stage, work, *sizes, tensor.device)
    return TUNER.choose(key, plans, launch, torch.cuda.is_current_stream_capturing())


@functools.cache
def fitting(stage: Stage, work: Work, device: Device) -> tuple[Plan, ...]:
    """The candidates that the resource model lets through, the preferred first.

    Raises:
        ValueError: there is none.
    """
    plans = candidates(stage, work)
    found = tuple(plan for plan in plans if _fits(stage, plan, work, device))
    if not found:
        least = min(_shared_bytes(stage, plan, work, device) for plan in plans)
        raise ValueError(
            f"{stage} of attention in {work.dtype} needs {least} bytes of shared memory per block, "
            f"this GPU has {device.shared}"
        )
    return found


def _fits(stage: Stage, plan: Plan, work: Work, device: Device) -> bool:
    return (
        device.pipelines(work.dtype, plan.tiles.num_stages)
        and _registers(stage, plan, work) <= REGISTERS
        and _shared_bytes(stage, plan, work, device) <= device.shared
    )


def _registers(stage: Stage, plan: Plan, work: Work) -> int:
    size = work.dtype.itemsize
    return max(registers(kernel, plan.tiles, size, work.value_is_key) for kernel in KERNELS[stage])


def _shared_bytes(stage: Stage, plan: Plan, work: Work, device: Device) -> int:
    size = work.dtype.itemsize if device.tensor_cores else torch.float32.itemsize
    return max(
        shared_bytes(kernel, plan.tiles, size, work.value_is_key, device.warp_groups) for kernel in KERNELS[stage]
    )


def _preferred(stage: Stage, work: Work) -> Limits:
    """Without spills, and within 163 KiB of shared memory."""
    exact, widest = work.dtype == torch.float32, max(work.widths)
    tokens, one_product = stage == "token_gradients", stage in ("forward", "row_statistics")
    if exact:  # the FMA pipes: operands pass through registers, so contractions must be short
        block_p, block_r, out, chunk = 32, 16, 128, 32
    elif tokens and widest > 128:  # up to two accumulators
        block_p, block_r, out, chunk = 64, 16, 128, 64
    else:
        block_p, block_r, out, chunk = 64, 32, 256, 64
    whole = not exact and widest <= (256 if one_product else 128)
    num_warps = 4 if widest <= 64 and not tokens else 8
    return Limits(block_p, block_r, out, chunk, whole, num_warps, num_stages=2 if one_product else 1)


def _plan(stage: Stage, work: Work, limits: Limits) -> Plan:
    exact = work.dtype == torch.float32
    tiles = limits.tiles(work)
    e, f, d = work.widths
    constants = {
        "E": e, "F": f, "D": d,
        "BLOCK_P": tiles.block_p, "BLOCK_R": tiles.block_r,
        "BLOCK_E": tiles.block_e, "BLOCK_F": tiles.block_f, "BLOCK_D": tiles.block_d,
        "CHUNK": tiles.chunk, "WHOLE": tiles.whole, "PRECISION": "ieee" if exact else "tf32",
    }  # fmt: skip
    options: dict[str, Any] = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    if exact or stage in ("forward", "row_statistics"):  # or ptxas spills a few values for the sake of occupancy
        options["maxnreg"] = 255
    return Plan(constants, options | COMPILER, limits.out, tiles)
