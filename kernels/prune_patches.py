"""Keep the `keep` most important patches of each sample, in their order; nothing is sorted.

    select    one program per sample        finds the keep-th largest importance bit by bit (32 counts of order-
                                            preserving integers), then compacts the chosen in index order
    gather    one program per BLOCK_K kept  copies rows through `index`
    scatter   one program per BLOCK_P rows  looks each patch up in the ascending `index` (binary search), writes
                                            its gradient or zero: every element once, no inverse map

Up to LARGEST_BLOCK importances stay in registers; longer rows are read again for each bit, from cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import COMPILER, on_device, padded

LARGEST_BLOCK = 8192
BLOCK_ROWS = 16
LARGEST_COLUMNS = 512


@triton.jit
def ordered_keys(importance_pointer, position, num_patches):
    """Unsigned integers that order as the importances do: NaN (and padding) lowest, -0 equal to +0."""
    inside = position < num_patches
    importance = tl.load(importance_pointer + position, mask=inside, other=0.0).to(tl.float32)
    bits = importance.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    descending = bits ^ 0xFFFFFFFF
    ascending = magnitude | 0x80000000
    key = tl.where((bits > 0x80000000), descending, ascending)
    return tl.where(inside & (magnitude <= 0x7F800000), key, 0)


@triton.jit(do_not_specialize=["num_patches", "keep"])
def select_kernel(
    importance_pointer, index_pointer, num_patches, keep, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    importance_pointer += sample * num_patches
    index_pointer += sample * keep
    if ONE_BLOCK:
        key = ordered_keys(importance_pointer, tl.arange(0, BLOCK), num_patches)

    threshold = tl.full([], 0, tl.uint32)
    for step in range(0, 32):
        candidate = threshold | (tl.full([], 0x80000000, tl.uint32) >> step)
        if ONE_BLOCK:
            reached = tl.sum((key >= candidate).to(tl.int32), 0)
        else:
            reached = tl.full([], 0, tl.int32)
            for first in range(0, num_patches, BLOCK):
                block_key = ordered_keys(importance_pointer, first + tl.arange(0, BLOCK), num_patches)
                reached += tl.sum((block_key >= candidate).to(tl.int32), 0)
        threshold = tl.where(reached >= keep, candidate, threshold)

    above = tl.full([], 0, tl.int32)
    for first in range(0, num_patches, BLOCK):
        block_key = ordered_keys(importance_pointer, first + tl.arange(0, BLOCK), num_patches)
        above += tl.sum((block_key > threshold).to(tl.int32), 0)
    ties_wanted = keep - above

    ties = tl.full([], 0, tl.int32)
    written = tl.full([], 0, tl.int32)
    for first in range(0, num_patches, BLOCK):
        position = first + tl.arange(0, BLOCK)
        block_key = ordered_keys(importance_pointer, position, num_patches)
        tied = ((block_key == threshold) & (position < num_patches)).to(tl.int32)
        tie_rank = ties + tl.cumsum(tied, 0) - tied
        chosen = ((block_key > threshold) | ((tied == 1) & (tie_rank < ties_wanted))).to(tl.int32)
        slot = written + tl.cumsum(chosen, 0) - chosen
        tl.store(index_pointer + slot, position.to(tl.int64), mask=chosen == 1)
        ties += tl.sum(tied, 0)
        written += tl.sum(chosen, 0)


@triton.jit(do_not_specialize=["num_patches", "keep"])
def gather_kernel(
    patches_pointer, index_pointer, kept_pointer, num_patches, keep,
    WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keep, BLOCK_K)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    slot_ok = slot < keep
    patch = tl.load(index_pointer + sample * keep + slot, mask=slot_ok, other=0)
    for first in range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = slot_ok[:, None] & (column < WIDTH)[None, :]
        row = tl.load(patches_pointer + (sample * num_patches + patch)[:, None] * WIDTH + column[None, :], mask=mask)
        tl.store(kept_pointer + (sample * keep + slot)[:, None] * WIDTH + column[None, :], row, mask=mask)


@triton.jit(do_not_specialize=["num_patches", "keep", "search_steps"])
def scatter_kernel(
    grad_kept_pointer, index_pointer, grad_patches_pointer, num_patches, keep, search_steps,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(num_patches, BLOCK_P)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    patch = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    patch_ok = patch < num_patches
    index_pointer += sample * keep
    low = tl.zeros([BLOCK_P], tl.int32)  # the first slot whose patch is not below ours lies in [low, high]
    high = tl.zeros([BLOCK_P], tl.int32) + keep
    for _ in range(0, search_steps):
        middle = (low + high) // 2
        below = tl.load(index_pointer + middle, mask=middle < keep, other=num_patches) < patch
        open_ = low < high
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & ~below, middle, high)
    kept = patch_ok & (tl.load(index_pointer + low, mask=low < keep, other=num_patches) == patch)
    for first in range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (column < WIDTH)[None, :]
        row = tl.load(
            grad_kept_pointer + (sample * keep + low)[:, None] * WIDTH + column[None, :],
            mask=kept[:, None] & inside,
            other=0.0,
        )
        tl.store(
            grad_patches_pointer + (sample * num_patches + patch)[:, None] * WIDTH + column[None, :],
            row,
            mask=patch_ok[:, None] & inside,
        )


def forward(
    patches: Tensor,  # [B, P, D]
    importance: Tensor,  # [B, P]
    keep: int,
) -> tuple[Tensor, Tensor]:
    """kept [B,K,D] and index [B,K] int64, ascending; ties go to the lower index, NaN counts as the lowest."""
    batch, num_patches, width = patches.shape
    patches, importance = patches.contiguous(), importance.contiguous()
    kept = patches.new_empty(batch, keep, width)
    index = torch.empty(batch, keep, dtype=torch.int64, device=patches.device)
    if batch:
        block = padded(num_patches, LARGEST_BLOCK, least=128)
        columns = padded(width, LARGEST_COLUMNS)
        with on_device(patches):
            select_kernel[(batch,)](
                importance, index, num_patches, keep,
                BLOCK=block, ONE_BLOCK=num_patches <= block, num_warps=4 if block <= 1024 else 8, **COMPILER,
            )  # fmt: skip
            gather_kernel[(batch * triton.cdiv(keep, BLOCK_ROWS),)](
                patches, index, kept, num_patches, keep,
                WIDTH=width, BLOCK_K=BLOCK_ROWS, COLUMNS=columns, num_warps=4, **COMPILER,
            )  # fmt: skip
    return kept, index


def backward(
    grad_kept: Tensor,  # [B, K, D]
    index: Tensor,  # [B, K] int64, ascending
    num_patches: int,
) -> Tensor:
    """grad_patches [B,P,D]: the rows of grad_kept at their patches, zero elsewhere."""
    batch, keep, width = grad_kept.shape
    grad_kept, index = grad_kept.contiguous(), index.contiguous()
    grad_patches = grad_kept.new_empty(batch, num_patches, width)
    if batch:
        with on_device(grad_kept):
            scatter_kernel[(batch * triton.cdiv(num_patches, BLOCK_ROWS),)](
                grad_kept, index, grad_patches, num_patches, keep, keep.bit_length(),
                WIDTH=width, BLOCK_P=BLOCK_ROWS, COLUMNS=padded(width, LARGEST_COLUMNS), num_warps=4, **COMPILER,
            )  # fmt: skip
    return grad_patches
