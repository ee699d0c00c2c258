"""What a launch of an attention kernel needs of a multiprocessor, estimated from its tiles before it is compiled.

Shared memory is an upper bound, which tests hold the compiler to: the operands of the matrix products in one turn of
the loop and what passes between threads beside them; or, where that is more, a result on its way to memory.

    held         tiles that every turn reads, once
    streamed     tiles that the innermost loop loads, once per buffer of its pipeline
    squares      attention [P, R] and its gradients on their way from one product to the next
    reductions   a number per row and warp

Registers are no bound but a mark, above which compiled candidates spill: they count accumulators, logits, gradients
and chunks, not addresses and the operands of a product.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

Kernel = Literal["gather", "scatter", "row_statistics", "row_gradients", "token_gradients"]
ALIGNMENT = 1024  # bytes, of a tile that the tensor cores read from shared memory
REGISTERS = 95  # of a thread's 255: beyond, compiled candidates spill for want of room for addresses and operands


# Products of warp groups (wgmma, tcgen05) read shared memory past the path that cp.async writes it by: between the wait
# for a copy and the product must stand a proxy fence, or the product may read what was there before. The first Triton
# that puts one into loops with prefetched loads (num_stages above 1), by major compute capability, as found in compiled
# code: 3.5.0 to 3.7.0 never do for 9, and up to 3.8.0 some are missing for 10 and 11. Loops without prefetching have it
# in every version. Other GPUs have no such products.
FENCED_SINCE = {9: (3, 7, 1), 10: (3, 9), 11: (3, 9)}


def fences_prefetched(major: int, version: str = triton.__version__) -> bool:
    """Whether tensor cores of this compute capability read prefetched tiles safely, as that Triton compiles them."""
    release = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    return release >= FENCED_SINCE.get(major, ())


class Device(NamedTuple):
    """What tiles must fit."""

    shared: int  # bytes that one block may have
    warp_groups: bool  # products still read a tile while the next is loaded: one buffer more (Hopper, B200)
    tensor_cores: bool = True  # False: products in float32, for which half precision is widened (before Ampere)
    fenced: bool = True  # False: tensor cores must not read tiles that are loaded ahead (`FENCED_SINCE`)

    def pipelines(self, dtype: torch.dtype, num_stages: int) -> bool:
        """Whether a loop with products of this dtype may have so many stages; float32 has no tensor cores here."""
        return num_stages == 1 or self.fenced or dtype == torch.float32


# For tensors on no GPU (interpreted, or compiled ahead of time): the memory of an A100, buffers and fences of an H100.
NO_GPU = Device(163 * 1024, warp_groups=True, fenced=fences_prefetched(9))


class Tiles(NamedTuple):
    """One configuration of an attention kernel: tile sizes and launch options."""

    block_p: int
    block_r: int
    block_e: int
    block_f: int
    block_d: int
    chunk: int
    whole: bool
    num_warps: int
    num_stages: int


def device_of(tensor: Tensor) -> Device:
    if not tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        return NO_GPU
    return _device(tensor.device.index)


@functools.cache
def _device(index: int) -> Device:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    major, _ = torch.cuda.get_device_capability(index)
    return Device(properties["max_shared_mem"], major in (9, 10, 11), major >= 8, fences_prefetched(major))


def fenced(launch: dict[str, Any], tensor: Tensor) -> dict[str, Any]:
    """Constants and options of a launch whose products are in the dtype of `tensor`: without prefetching where the
    device must not."""
    if device_of(tensor).pipelines(tensor.dtype, launch["num_stages"]):
        return launch
    return launch | {"num_stages": 1}


def shared_bytes(kernel: Kernel, tiles: Tiles, itemsize: int, value_is_key: bool, warp_groups: bool) -> int:
    """Upper bound of the bytes of one block; `itemsize` is that of operands of products."""
    p, r = tiles.block_p, tiles.block_r
    buffers = max(1, tiles.num_stages if warp_groups else tiles.num_stages - 1)
    held, streamed = _whole_operands(kernel, tiles, value_is_key)
    if not tiles.whole:
        held, streamed, chunks = 0, _outer_operands(kernel, tiles), (p + r) * tiles.chunk
        if tiles.block_e > tiles.chunk:  # the loop over chunks is the innermost, and alone has buffers
            held, streamed = streamed, chunks
        else:
            streamed += PRODUCTS[kernel] * chunks
    in_loop = held + buffers * streamed + SQUARES[kernel] * p * r
    reductions = 4 * tiles.num_warps * max(p, r)
    return max(in_loop * itemsize + reductions, 4 * _result(kernel, tiles)) + ALIGNMENT


def registers(kernel: Kernel, tiles: Tiles, itemsize: int, value_is_key: bool) -> int:
    """Registers of one thread for the tiles that live through a product, and for the chunks on their way to it."""
    p, r = tiles.block_p, tiles.block_r
    words = _result(kernel, tiles) + SQUARES[kernel] * p * r
    if kernel == "token_gradients" and not value_is_key:
        words += p * tiles.block_f
    if not tiles.whole:
        words += (p + r) * tiles.chunk * itemsize // 4
    return int(triton.cdiv(words, 32 * tiles.num_warps))


# Products over a whole width; and tiles [P, R] that pass between threads: attention, its gradient, what comes in.
PRODUCTS = {"gather": 1, "scatter": 1, "row_statistics": 1, "row_gradients": 3, "token_gradients": 3}
SQUARES = {"gather": 1, "scatter": 2, "row_statistics": 2, "row_gradients": 3, "token_gradients": 3}


def _whole_operands(kernel: Kernel, tiles: Tiles, value_is_key: bool) -> tuple[int, int]:
    """Elements held and streamed where tiles are as wide as the tensors."""
    p, r, e, f, d = tiles.block_p, tiles.block_r, tiles.block_e, tiles.block_f, tiles.block_d
    value = 0 if value_is_key else f
    return {
        "gather": (r * e, p * (e + value)),
        "scatter": (p * e, r * (e + d)),
        "row_statistics": (r * e, p * (e + d)),
        "row_gradients": (r * (e + f + d), p * (e + value + d)),
        "token_gradients": (p * (e + value + d), r * (e + f + d)),
    }[kernel]


def _outer_operands(kernel: Kernel, tiles: Tiles) -> int:
    """Elements that stand beside the chunks of a contraction, for the product that follows it."""
    p, r = tiles.block_p, tiles.block_r
    return {
        "gather": p * tiles.block_f,
        "scatter": r * tiles.block_d,
        "row_statistics": p * tiles.block_d,
        "row_gradients": p * tiles.block_e,
        "token_gradients": r * (tiles.block_e + tiles.block_f),
    }[kernel]


def _result(kernel: Kernel, tiles: Tiles) -> int:
    """Elements of the tile that one program adds up."""
    return {
        "gather": tiles.block_r * tiles.block_f,
        "scatter": tiles.block_p * tiles.block_d,
        "row_statistics": tiles.block_r * tiles.block_d,
        "row_gradients": tiles.block_r * tiles.block_e,
        "token_gradients": tiles.block_p * max(tiles.block_e, tiles.block_f),
    }[kernel]
