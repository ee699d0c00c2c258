"""Image context around joints: each level's map read bilinearly at learned places, weighted and summed, per head.

One launch serves all levels. Pointers and sizes of the levels are tuples, unrolled at compile time, and a program runs
the branch of the level it belongs to, where the number of channels is a constant:

    kernel     one program owns                            it loops over                result
    gather     a joint, a level, a block of channels       samples                      context of all heads
    places     a joint, a level                            samples, channel blocks      gradients of offsets, weights
    scatter    a tile of pixels × channels of a level      joints, heads                gradient of the map

    heads H ┌──────────────┐          the tile of `gather` and `places`: a row per head, and each of the four corners
            │ BLOCK_C of C │          of its place is a row of channels, contiguous in a channels-last map
            └──────────────┘

`scatter` asks of every row of places whether it reaches the lines of its tile, and adds those that do, in order: every
pixel is written once, without atomics, without clearing first, and in float32 until it is stored. Strides of the maps
are honoured, so none is copied.

Places are clamped before they become integers, so no index leaves the map. A place that is not a number becomes
index 0 with a fraction that is not a number, which spoils its own row; that row hands on no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._common import COMPILER, on_device, padded

FAR_OUTSIDE = tl.constexpr(4.0)  # grid units: outside any map of more than one pixel
GATHER_BYTES = 1024  # of a tile of `gather` and `places`: 16 bytes in each of 64 threads
SCATTER_ELEMENTS = 4096  # of a tile of `scatter`: 16 float32 sums in each of 256 threads


@triton.jit
def along_axis(place, size, ZEROS: tl.constexpr):
    """The pixel at or below a place of [-1, 1] on an axis of `size` pixels, the fraction beyond, d pixel / d place."""
    reach: tl.constexpr = FAR_OUTSIDE if ZEROS else 1.0
    place = tl.where(place > reach, reach, tl.where(place < -reach, -reach, place))  # keeps what is not a number
    last = size - 1
    pixel = (place + 1) / 2 * last
    below = tl.floor(pixel)
    sloped = tl.full(pixel.shape, True, tl.int1) if ZEROS else (pixel > 0) & (pixel < last)
    slope = tl.where(sloped, last / 2, 0.0)
    return tl.where(pixel == pixel, below, 0.0).to(tl.int32), pixel - below, slope


@triton.jit
def read_places(reference_pointer, offsets_pointer, index, ok):
    """(x, y) in float32: the joint's reference plus the offsets numbered `index`."""
    x = tl.load(reference_pointer).to(tl.float32)
    y = tl.load(reference_pointer + 1).to(tl.float32)
    x += tl.load(offsets_pointer + 2 * index, mask=ok, other=0.0).to(tl.float32)
    y += tl.load(offsets_pointer + 2 * index + 1, mask=ok, other=0.0).to(tl.float32)
    return x, y


@triton.jit
def are_numbers(x, y, ok):
    """Along the last axis: whether all places are numbers, those that are not `ok` aside."""
    return tl.min(((x == x) & (y == y) | ~ok).to(tl.int32), len(x.shape) - 1) == 1


@triton.jit
def corner(map_pointer, y, x, ok, column, column_ok, size):
    """Rows of channels in float32 at pixels (y, x): one per head; zero outside the map."""
    height, width, _, stride_c, stride_y, stride_x = size
    inside = ok & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    pixel = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    channel = column.to(tl.int64) * stride_c
    mask = inside[:, None] & column_ok[None, :]
    return tl.load(map_pointer + pixel[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def gather_level(
    map_pointer, size, context_pointer, reference_pointer, offsets_pointer, weights_pointer,
    sample, joint, joints, level, levels, block,
    HEADS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """context [H, BLOCK_C] of one joint and one level."""
    head = tl.arange(0, BLOCK_H)
    head_ok = head < HEADS
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = column < CHANNELS
    map_pointer += sample * size[2]
    reference_pointer += (sample * joints + joint) * 2
    first = (((sample * levels + level) * joints + joint) * HEADS + head) * SAMPLES
    context = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    for s in tl.range(0, SAMPLES, loop_unroll_factor=4):
        place_x, place_y = read_places(reference_pointer, offsets_pointer, first + s, head_ok)
        weight = tl.load(weights_pointer + first + s, mask=head_ok, other=0.0).to(tl.float32)
        x, right, _ = along_axis(place_x, size[1], ZEROS)
        y, lower, _ = along_axis(place_y, size[0], ZEROS)
        context += (weight * (1 - lower) * (1 - right))[:, None] * corner(
            map_pointer, y, x, head_ok, column, column_ok, size
        )
        context += (weight * (1 - lower) * right)[:, None] * corner(
            map_pointer, y, x + 1, head_ok, column, column_ok, size
        )
        context += (weight * lower * (1 - right))[:, None] * corner(
            map_pointer, y + 1, x, head_ok, column, column_ok, size
        )
        context += (weight * lower * right)[:, None] * corner(
            map_pointer, y + 1, x + 1, head_ok, column, column_ok, size
        )
    row = (sample * joints + joint) * HEADS + head
    tl.store(
        context_pointer + row[:, None] * CHANNELS + column[None, :],
        context.to(context_pointer.dtype.element_ty),
        mask=head_ok[:, None] & column_ok[None, :],
    )


@triton.jit(do_not_specialize=["joints"])
def gather_kernel(
    map_pointers, sizes, context_pointers, reference_pointer, offsets_pointer, weights_pointer, joints,
    HEADS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """One program per sample, joint and channel block; blocks FIRST[l] … FIRST[l + 1] are those of level l."""
    levels: tl.constexpr = len(map_pointers)
    block = tl.program_id(0) % FIRST[levels]
    joint = tl.program_id(0) // FIRST[levels] % joints
    sample = (tl.program_id(0) // FIRST[levels] // joints).to(tl.int64)
    for level in tl.static_range(levels):
        if (block >= FIRST[level]) & (block < FIRST[level + 1]):
            gather_level(
                map_pointers[level], sizes[level], context_pointers[level],
                reference_pointer, offsets_pointer, weights_pointer,
                sample, joint, joints, level, levels, block - FIRST[level],
                HEADS, SAMPLES, CHANNELS[level], BLOCK_H, BLOCK_C[level], ZEROS,
            )  # fmt: skip


@triton.jit
def places_level(
    grad_pointer, map_pointer, size, reference_pointer, offsets_pointer, weights_pointer,
    grad_offsets_pointer, grad_weights_pointer, sample, joint, joints, level, levels,
    HEADS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Gradients of a joint and level: [H, S] of the weights, [H, S, 2] of the offsets; either pointer may be None."""
    head = tl.arange(0, BLOCK_H)
    head_ok = head < HEADS
    map_pointer += sample * size[2]
    reference_pointer += (sample * joints + joint) * 2
    row = (sample * joints + joint) * HEADS + head
    first = (((sample * levels + level) * joints + joint) * HEADS + head) * SAMPLES
    every = tl.arange(0, BLOCK_S)[None, :]
    every_ok = head_ok[:, None] & (every < SAMPLES)
    every_x, every_y = read_places(reference_pointer, offsets_pointer, first[:, None] + every, every_ok)
    known = are_numbers(every_x, every_y, every_ok)  # [BLOCK_H]
    for s in range(0, SAMPLES):
        place_x, place_y = read_places(reference_pointer, offsets_pointer, first + s, head_ok)
        x, right, slope_x = along_axis(place_x, size[1], ZEROS)
        y, lower, slope_y = along_axis(place_y, size[0], ZEROS)
        right, lower = right[:, None], lower[:, None]
        read = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
        along_x = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
        along_y = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
        for channel in range(0, CHANNELS, BLOCK_C):
            column = channel + tl.arange(0, BLOCK_C)
            column_ok = column < CHANNELS
            grad = tl.load(
                grad_pointer + row[:, None] * CHANNELS + column[None, :],
                mask=head_ok[:, None] & column_ok[None, :],
                other=0.0,
            ).to(tl.float32)
            upper_left = corner(map_pointer, y, x, head_ok, column, column_ok, size)
            upper_right = corner(map_pointer, y, x + 1, head_ok, column, column_ok, size)
            lower_left = corner(map_pointer, y + 1, x, head_ok, column, column_ok, size)
            lower_right = corner(map_pointer, y + 1, x + 1, head_ok, column, column_ok, size)
            upper = upper_left * (1 - right) + upper_right * right
            under = lower_left * (1 - right) + lower_right * right
            read += grad * (upper * (1 - lower) + under * lower)
            # Differences before sums: what neighbours have in common cancels exactly.
            along_x += grad * ((upper_right - upper_left) * (1 - lower) + (lower_right - lower_left) * lower)
            along_y += grad * ((lower_left - upper_left) * (1 - right) + (lower_right - upper_right) * right)
        if grad_weights_pointer is not None:
            dtype = grad_weights_pointer.dtype.element_ty
            grad_weight = tl.where(known, tl.sum(read, 1), 0.0)
            tl.store(grad_weights_pointer + first + s, grad_weight.to(dtype), mask=head_ok)
        if grad_offsets_pointer is not None:
            dtype = grad_offsets_pointer.dtype.element_ty
            weight = tl.load(weights_pointer + first + s, mask=head_ok, other=0.0).to(tl.float32)
            # Where the slope is zero, so is the gradient, whatever the corners hold.
            grad_x = tl.where(known & (slope_x != 0), tl.sum(along_x, 1) * weight * slope_x, 0.0)
            grad_y = tl.where(known & (slope_y != 0), tl.sum(along_y, 1) * weight * slope_y, 0.0)
            tl.store(grad_offsets_pointer + 2 * (first + s), grad_x.to(dtype), mask=head_ok)
            tl.store(grad_offsets_pointer + 2 * (first + s) + 1, grad_y.to(dtype), mask=head_ok)


@triton.jit(do_not_specialize=["joints"])
def places_kernel(
    grad_pointers, map_pointers, sizes, reference_pointer, offsets_pointer, weights_pointer,
    grad_offsets_pointer, grad_weights_pointer, joints,
    HEADS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """One program per sample, joint and level."""
    levels: tl.constexpr = len(map_pointers)
    mine = tl.program_id(0) % levels
    joint = tl.program_id(0) // levels % joints
    sample = (tl.program_id(0) // levels // joints).to(tl.int64)
    for level in tl.static_range(levels):
        if mine == level:
            places_level(
                grad_pointers[level], map_pointers[level], sizes[level],
                reference_pointer, offsets_pointer, weights_pointer, grad_offsets_pointer, grad_weights_pointer,
                sample, joint, joints, level, levels,
                HEADS, SAMPLES, CHANNELS[level], BLOCK_H, BLOCK_S, BLOCK_C[level], ZEROS,
            )  # fmt: skip


@triton.jit
def scatter_level(
    grad_pointer, grad_map_pointer, height, width, reference_pointer, offsets_pointer, weights_pointer,
    sample, joints, level, levels, tile,
    HEADS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """The gradient [BLOCK_P, BLOCK_C] of consecutive pixels of a map, channels last."""
    blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    column = tile % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = column < CHANNELS
    pixel = tile // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    first_line = tile // blocks * BLOCK_P // width
    last_line = (tile // blocks * BLOCK_P + BLOCK_P - 1) // width
    right_of = (pixel % width)[:, None] - 1  # a pixel takes part in places from one pixel before it
    below_of = (pixel // width)[:, None] - 1
    s = tl.arange(0, BLOCK_S)
    s_ok = s < SAMPLES
    grad_map = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for row in range(0, joints * HEADS):
        joint = sample * joints + row // HEADS
        index = (((sample * levels + level) * joints * HEADS) + row) * SAMPLES + s
        place_x, place_y = read_places(reference_pointer + joint * 2, offsets_pointer, index, s_ok)
        x, right, _ = along_axis(place_x, width, ZEROS)
        y, lower, _ = along_axis(place_y, height, ZEROS)
        reaches = s_ok & (y + 1 >= first_line) & (y <= last_line)
        if are_numbers(place_x, place_y, s_ok) & (tl.max(reaches.to(tl.int32), 0) == 1):
            weight = tl.load(weights_pointer + index, mask=s_ok, other=0.0).to(tl.float32)
            beyond_x = x[None, :] - right_of  # 1: the pixel is the place's left corner, 0: its right one
            beyond_y = y[None, :] - below_of
            share_x = tl.where(beyond_x == 1, 1 - right[None, :], right[None, :])
            share_y = tl.where(beyond_y == 1, 1 - lower[None, :], lower[None, :])
            touches_x = (beyond_x == 0) | (beyond_x == 1)
            touches = s_ok[None, :] & touches_x & ((beyond_y == 0) | (beyond_y == 1))  # [BLOCK_P, BLOCK_S]
            share = tl.sum(tl.where(touches, weight[None, :] * share_x * share_y, 0.0), 1)
            touched = tl.max(touches.to(tl.int32), 1) == 1
            grad = tl.load(
                grad_pointer + (sample * joints * HEADS + row) * CHANNELS + column, mask=column_ok, other=0.0
            ).to(tl.float32)
            # Selected, not multiplied by zero: a gradient that is not a number stays where its place is.
            grad_map += tl.where(touched[:, None], share[:, None] * grad[None, :], 0.0)
    target = grad_map_pointer + (sample * height * width + pixel) * CHANNELS
    tl.store(
        target[:, None] + column[None, :],
        grad_map.to(grad_map_pointer.dtype.element_ty),
        mask=(pixel < height * width)[:, None] & column_ok[None, :],
    )


@triton.jit(do_not_specialize=["joints", "levels", "tiles"])
def scatter_kernel(
    grad_pointers, grad_map_pointers, sizes, first_tiles, reference_pointer, offsets_pointer, weights_pointer,
    joints, levels, tiles,
    HEADS: tl.constexpr, SAMPLES: tl.constexpr, LEVELS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """One program per tile of a sample; tiles first_tiles[i] … first_tiles[i + 1] are those of level LEVELS[i]."""
    tile = tl.program_id(0) % tiles
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    for i in tl.static_range(len(grad_map_pointers)):
        if (tile >= first_tiles[i]) & (tile < first_tiles[i + 1]):
            scatter_level(
                grad_pointers[i], grad_map_pointers[i], sizes[i][0], sizes[i][1],
                reference_pointer, offsets_pointer, weights_pointer,
                sample, joints, LEVELS[i], levels, tile - first_tiles[i],
                HEADS, SAMPLES, CHANNELS[i], BLOCK_S, BLOCK_P[i], BLOCK_C[i], ZEROS,
            )  # fmt: skip


def size_of(feature_map: Tensor) -> tuple[int, ...]:
    """height, width, and the strides of sample, channel, y and x."""
    return (*feature_map.shape[2:], *feature_map.stride())


def running_sum(counts: Sequence[int]) -> tuple[int, ...]:
    """Where each part begins, and last where all end."""
    return tuple(sum(counts[:i]) for i in range(len(counts) + 1))


def column_blocks(feature_maps: Sequence[Tensor], block_h: int) -> tuple[int, ...]:
    """Channels per program of each level, for tiles of GATHER_BYTES."""
    limit = max(GATHER_BYTES // block_h // feature_maps[0].element_size(), 16)
    return tuple(padded(feature_map.shape[1], limit) for feature_map in feature_maps)


def channels_last(feature_map: Tensor) -> Tensor:
    """Memory for a tensor like `feature_map` [B, C, Hf, Wf] whose channels are contiguous."""
    batch, channels, height, width = feature_map.shape
    return feature_map.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def forward(
    feature_maps: Sequence[Tensor],  # L maps [B, C_l, H_l, W_l]
    reference: Tensor,  # [B, J, 2]
    offsets: Tensor,  # [B, L, J, H, S, 2]
    weights: Tensor,  # [B, L, J, H, S]
    zeros: bool,
) -> list[Tensor]:
    """L contexts [B, J, H, C_l]."""
    batch, _, joints, heads, samples, _ = offsets.shape
    channels = tuple(feature_map.shape[1] for feature_map in feature_maps)
    contexts = [offsets.new_empty(batch, joints, heads, width) for width in channels]
    block_h = padded(heads, least=1)
    columns = column_blocks(feature_maps, block_h)
    first = running_sum([triton.cdiv(width, block) for width, block in zip(channels, columns, strict=True)])
    if batch:
        with on_device(offsets):
            gather_kernel[(batch * joints * first[-1],)](
                tuple(feature_maps), tuple(map(size_of, feature_maps)), tuple(contexts),
                reference.contiguous(), offsets.contiguous(), weights.contiguous(), joints,
                HEADS=heads, SAMPLES=samples, CHANNELS=channels, FIRST=first,
                BLOCK_H=block_h, BLOCK_C=columns, ZEROS=zeros, num_warps=2, **COMPILER,
            )  # fmt: skip
    return contexts


def backward(
    grad_contexts: Sequence[Tensor],  # L gradients [B, J, H, C_l]
    feature_maps: Sequence[Tensor],
    reference: Tensor,
    offsets: Tensor,
    weights: Tensor,
    zeros: bool,
    need_places: bool,
    need_weights: bool,
    need_maps: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of offsets, weights and maps (channels last in memory); [0] where they are not wanted."""
    batch, levels, joints, heads, samples, _ = offsets.shape
    places = (reference.contiguous(), offsets.contiguous(), weights.contiguous())
    grads = tuple(grad.contiguous() for grad in grad_contexts)
    channels = tuple(feature_map.shape[1] for feature_map in feature_maps)
    grad_offsets = offsets.new_empty(offsets.shape if need_places else (0,))
    grad_weights = weights.new_empty(weights.shape if need_weights else (0,))
    grad_maps = [
        channels_last(feature_map) if need else feature_map.new_empty(0)
        for feature_map, need in zip(feature_maps, need_maps, strict=True)
    ]
    shared = {"HEADS": heads, "SAMPLES": samples, "BLOCK_S": padded(samples, least=1), "ZEROS": zeros} | COMPILER
    if batch and (need_places or need_weights):
        block_h = padded(heads, least=1)
        with on_device(offsets):
            places_kernel[(batch * joints * levels,)](
                grads, tuple(feature_maps), tuple(map(size_of, feature_maps)), *places,
                grad_offsets if need_places else None, grad_weights if need_weights else None, joints,
                CHANNELS=channels, BLOCK_H=block_h, BLOCK_C=column_blocks(feature_maps, block_h),
                num_warps=2, **shared,
            )  # fmt: skip
    wanted = tuple(level for level, need in enumerate(need_maps) if need)
    if batch and wanted:
        maps = tuple(grad_maps[level] for level in wanted)
        columns = tuple(padded(grad_map.shape[1], 256) for grad_map in maps)
        pixels = tuple(SCATTER_ELEMENTS // width for width in columns)
        first = running_sum(
            [
                triton.cdiv(grad_map.shape[2] * grad_map.shape[3], block) * triton.cdiv(grad_map.shape[1], width)
                for grad_map, block, width in zip(maps, pixels, columns, strict=True)
            ]
        )
        with on_device(offsets):
            scatter_kernel[(batch * first[-1],)](
                tuple(grads[level] for level in wanted), maps, tuple(tuple(grad_map.shape[2:]) for grad_map in maps),
                first, *places, joints, levels, first[-1],
                LEVELS=wanted, CHANNELS=tuple(channels[level] for level in wanted),
                BLOCK_P=pixels, BLOCK_C=columns, num_warps=8, **shared,
            )  # fmt: skip
    return grad_offsets, grad_weights, grad_maps
