"""One linear layer over the rows of few tokens, with what stands before and after it: one launch.

    y = x Wᵀ + b        x [R, K] or LayerNorm(x), W [N, K] as torch.nn.Linear stores it
    out [R, N]          y, gelu(y), or residual + branch_scale · y

A program owns BLOCK_M rows and BLOCK_N columns of the result and walks K in CHUNK columns. It takes the layer norm's
statistics from its rows itself: they are read once more, from cache, by each of the programs that share them, and no
launch stands between norm and product. Tiles are the largest that still give every multiprocessor a program: at one
sample 17 rows meet many narrow column blocks. Sums are float32; float32 operands are multiplied exactly (`ieee`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import COMPILER, on_device, padded, tile
from ._layer_norm import LARGEST_TILE, normalized, row_statistics
from ._resources import fenced

ENOUGH_PROGRAMS = 128  # about the multiprocessors of a large GPU


class Norm(NamedTuple):
    """A layer norm before the product; what is wanted of its statistics and result is written to given tensors."""

    weight: Tensor  # [K]
    bias: Tensor  # [K]
    eps: float
    statistics: Tensor | None = None  # [R, 2], mean and reciprocal deviation
    normalized: Tensor | None = None  # [R, K]


class Residual(NamedTuple):
    """What the product is added to; `scale` [B] is the factor of each sample's `count` rows."""

    tokens: Tensor  # [R, N]
    scale: Tensor | None
    count: int


@triton.jit
def gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["rows", "count", "eps"])
def linear_kernel(
    x_pointer, norm_weight_pointer, norm_bias_pointer, weight_pointer, bias_pointer, residual_pointer, scale_pointer,
    statistics_pointer, normalized_pointer, before_gelu_pointer, out_pointer, rows, count, eps,
    K: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    NORM_BLOCK: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(0) % parts
    row = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    column = part * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < N
    if norm_weight_pointer is not None:
        mean, deviation = row_statistics(x_pointer, row, row_ok, eps, K, NORM_BLOCK)
        stored = row < tl.where(part == 0, rows, 0)  # by one of the programs that share them
        if statistics_pointer is not None:
            tl.store(statistics_pointer + 2 * row, mean, mask=stored)
            tl.store(statistics_pointer + 2 * row + 1, deviation, mask=stored)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, CHUNK):
        weight = tile(weight_pointer, column, column_ok, first, K, CHUNK)
        x = tile(x_pointer, row, row_ok, first, K, CHUNK)
        if norm_weight_pointer is not None:
            inner = first + tl.arange(0, CHUNK)
            x = normalized(x, mean, deviation, norm_weight_pointer, norm_bias_pointer, inner, K).to(weight.dtype)
            if normalized_pointer is not None:
                mask = stored[:, None] & (inner < K)[None, :]
                tl.store(normalized_pointer + row[:, None] * K + inner[None, :], x, mask=mask)
        total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)

    y = total + tl.load(bias_pointer + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    at = row[:, None] * N + column[None, :]
    mask = row_ok[:, None] & column_ok[None, :]
    if before_gelu_pointer is not None:
        tl.store(before_gelu_pointer + at, y.to(before_gelu_pointer.dtype.element_ty), mask=mask)
    if GELU:
        y = gelu(y)
    if residual_pointer is not None:
        residual = tl.load(residual_pointer + at, mask=mask, other=0.0).to(tl.float32)
        if scale_pointer is not None:
            scale = tl.load(scale_pointer + row // count, mask=row_ok, other=0.0).to(tl.float32)[:, None]
            y = tl.where(scale == 0, residual, residual + scale * y)  # 0 · y is NaN where y is not finite
        else:
            y = residual + y
    tl.store(out_pointer + at, y.to(out_pointer.dtype.element_ty), mask=mask)


def plan(dtype: torch.dtype, rows: int, inner: int, columns: int, normalizes: bool) -> dict[str, Any]:
    """Tile sizes and launch options of a product [rows, inner] · [inner, columns], after a layer norm or not."""
    exact = dtype == torch.float32  # the FMA pipes: operands pass through registers
    tiles = ((64, 64), (32, 32)) if exact else ((64, 128), (64, 64), (32, 32))
    block_m, block_n = next((sizes for sizes in tiles if programs(rows, columns, *sizes) >= ENOUGH_PROGRAMS), (32, 16))
    few = block_m < 64
    block_m = padded(rows, block_m)
    chunk = padded(inner, 32 if exact else 128 if few else 64)
    # Or ptxas spills a few values for the sake of occupancy.
    options = {"maxnreg": 255} if normalizes and block_n == 128 else {}
    return {
        "K": inner, "N": columns, "BLOCK_M": block_m, "BLOCK_N": block_n, "CHUNK": chunk,
        "NORM_BLOCK": padded(inner, LARGEST_TILE // block_m), "PRECISION": "ieee" if exact else "tf32",
        "num_warps": 8 if block_n == 128 or (exact and not few) else 4, "num_stages": 2 if exact else 3,
    } | options | COMPILER  # fmt: skip


def programs(rows: int, columns: int, block_m: int, block_n: int) -> int:
    return int(triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n))


def linear(
    x: Tensor,  # [R, K]
    weight: Tensor,  # [N, K]
    bias: Tensor,  # [N]
    *,
    norm: Norm | None = None,
    gelu: bool = False,
    before_gelu: Tensor | None = None,  # [R, N], receives y
    residual: Residual | None = None,
) -> Tensor:
    """out [R, N]; every tensor but `weight` and the parameters is contiguous."""
    (rows, inner), columns = x.shape, weight.shape[0]
    out = x.new_empty(rows, columns)
    if rows:
        launch = fenced(plan(x.dtype, rows, inner, columns, norm is not None), x)
        grid = programs(rows, columns, launch["BLOCK_M"], launch["BLOCK_N"])
        with on_device(x):
            linear_kernel[(grid,)](
                x, *(norm.weight.contiguous(), norm.bias.contiguous()) if norm else (None, None),
                weight.contiguous(), bias.contiguous(), residual.tokens if residual else None,
                residual.scale if residual else None, norm.statistics if norm else None,
                norm.normalized if norm else None, before_gelu, out, rows, residual.count if residual else 1,
                norm.eps if norm else 0.0, GELU=gelu, **launch,
            )  # fmt: skip
    return out
