"""Layer norm of rows as part of other kernels, and its backward pass.

    forward     inside a product          statistics of the rows whose tiles are multiplied
    backward    one program per BLOCK_M rows    gradients of the rows, their normalised values, partial sums

The variance is summed about the mean of a block of columns, and blocks are merged (Chan's formula): one pass over the
row, and a mean far larger than the deviation costs no digits. Partial sums of the parameters' gradients are added in
a fixed order after the launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import COMPILER, on_device, padded, tile

LARGEST_TILE = 8192  # elements of a tile of rows whose statistics are taken


@triton.jit
def row_statistics(pointer, row, row_ok, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and reciprocal deviation of each row."""
    mean = tl.zeros([row.shape[0]], tl.float32)
    squares = tl.zeros([row.shape[0]], tl.float32)
    for first in tl.static_range(0, WIDTH, BLOCK):
        inside = first + tl.arange(0, BLOCK) < WIDTH
        values = tile(pointer, row, row_ok, first, WIDTH, BLOCK).to(tl.float32)
        count = min(BLOCK, WIDTH - first)
        block_mean = tl.sum(values, 1) / count
        centred = tl.where(inside[None, :], values - block_mean[:, None], 0.0)
        block_squares = tl.sum(centred * centred, 1)
        if first == 0:
            mean, squares = block_mean, block_squares
        else:
            shift = block_mean - mean
            mean += shift * (count / (first + count))
            squares += block_squares + shift * shift * (first * count / (first + count))
    return mean, tl.rsqrt(squares / WIDTH + eps)


@triton.jit
def normalized(values, mean, deviation, weight_pointer, bias_pointer, column, WIDTH: tl.constexpr):
    """LayerNorm(values) of some columns in float32; zero outside. `deviation` is reciprocal."""
    inside = column < WIDTH
    weight = tl.load(weight_pointer + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_pointer + column, mask=inside, other=0.0).to(tl.float32)
    normal = (values.to(tl.float32) - mean[:, None]) * deviation[:, None]
    return tl.where(inside[None, :], normal * weight[None, :] + bias[None, :], 0.0)


@triton.jit
def normal_and_gradient(
    tokens_pointer, grad_pointer, row, row_ok, kept, mean, deviation, first,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(x − mean) / deviation and the gradient of what was normalised; zero outside and in rows not kept."""
    inside = kept[:, None] & (first + tl.arange(0, CHUNK) < WIDTH)[None, :]
    values = tile(tokens_pointer, row, row_ok, first, WIDTH, CHUNK).to(tl.float32)
    grad = tile(grad_pointer, row, row_ok, first, WIDTH, CHUNK).to(tl.float32)
    return tl.where(inside, (values - mean[:, None]) * deviation[:, None], 0.0), tl.where(inside, grad, 0.0)


@triton.jit(do_not_specialize=["rows", "count"])
def backward_kernel(
    residual_grad_pointer, grad_pointer, tokens_pointer, statistics_pointer, weight_pointer, bias_pointer,
    scale_pointer, grad_tokens_pointer, normalized_pointer, sums_pointer, rows, count,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    mean = tl.load(statistics_pointer + 2 * row, mask=row_ok, other=0.0)
    deviation = tl.load(statistics_pointer + 2 * row + 1, mask=row_ok, other=0.0)
    kept = row_ok
    if scale_pointer is not None:
        kept = tl.load(scale_pointer + row // count, mask=row_ok, other=0.0).to(tl.float32) != 0

    level = tl.zeros([BLOCK_M], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        normal, grad = normal_and_gradient(
            tokens_pointer, grad_pointer, row, row_ok, kept, mean, deviation, first, WIDTH, CHUNK
        )
        weight = tl.load(weight_pointer + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        level += tl.sum(grad * weight[None, :], 1)
        slope += tl.sum(grad * weight[None, :] * normal, 1)
    level, slope = level / WIDTH, slope / WIDTH

    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = column < WIDTH
        normal, grad = normal_and_gradient(
            tokens_pointer, grad_pointer, row, row_ok, kept, mean, deviation, first, WIDTH, CHUNK
        )
        weight = tl.load(weight_pointer + column, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_pointer + column, mask=inside, other=0.0).to(tl.float32)
        through_norm = (grad * weight[None, :] - level[:, None] - normal * slope[:, None]) * deviation[:, None]
        residual = tile(residual_grad_pointer, row, row_ok, first, WIDTH, CHUNK).to(tl.float32)
        value = tl.where(kept[:, None], normal * weight[None, :] + bias[None, :], 0.0)
        at = row[:, None] * WIDTH + column[None, :]
        mask = row_ok[:, None] & inside[None, :]
        grad_tokens = residual + tl.where(kept[:, None], through_norm, 0.0)
        tl.store(grad_tokens_pointer + at, grad_tokens.to(grad_tokens_pointer.dtype.element_ty), mask=mask)
        tl.store(normalized_pointer + at, value.to(normalized_pointer.dtype.element_ty), mask=mask)
        sums = sums_pointer + program * 2 * WIDTH + column
        tl.store(sums, tl.sum(grad * normal, 0), mask=inside)
        tl.store(sums + WIDTH, tl.sum(grad, 0), mask=inside)


class NormGradients(NamedTuple):
    tokens: Tensor  # [B, T, D], the residual's gradient included
    weight: Tensor  # [D]
    bias: Tensor  # [D]
    normalized: Tensor  # [B, T, D], zero in samples whose branch is dropped


def backward(
    grad_updated: Tensor,  # [B, T, D]
    grad_normalized: Tensor,  # [B, T, D]
    tokens: Tensor,  # [B, T, D]
    statistics: Tensor,  # [B, T, 2] float32
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    branch_scale: Tensor | None,  # [B]
) -> NormGradients:
    """What tokens + branch(LayerNorm(tokens)) gives tokens and the layer norm, and the normalised tokens again."""
    batch, count, width = tokens.shape
    rows, block_m = batch * count, 16
    programs = triton.cdiv(rows, block_m)
    grad_tokens, again = tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape)
    sums = torch.empty(programs, 2, width, dtype=torch.float32, device=tokens.device)
    if rows:
        with on_device(tokens):
            backward_kernel[(programs,)](
                grad_updated.contiguous(), grad_normalized.contiguous(), tokens.contiguous(), statistics.contiguous(),
                weight.contiguous(), bias.contiguous(), None if branch_scale is None else branch_scale.contiguous(),
                grad_tokens, again, sums, rows, count,
                WIDTH=width, BLOCK_M=block_m, CHUNK=padded(width, 128), num_warps=4, **COMPILER,
            )  # fmt: skip
    grad_weight, grad_bias = (part.sum(0).to(tokens.dtype) for part in sums.unbind(1))
    return NormGradients(grad_tokens, grad_weight, grad_bias, again)
