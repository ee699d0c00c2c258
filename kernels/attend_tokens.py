"""Self-attention of few tokens, straight from their packed projection: a program holds all of a head's attention.

    forward     one program per sample and head     A [T, T] in registers      attended [T, E]
    backward    one program per sample and head     A again, dA, dS            gradients of query, key and value [T, E]

T is padded to a tile of 16, 32 or 64 rows and the head width E is walked CHUNK columns at a time, twice: once to sum
scores (and dA), once to write what A (and dS) makes of the chunk. Any head width is served so, and 80 is padded to 96
only. Query, key and value are columns of one row-major matrix [B · T, 3D]; nothing is copied or transposed in memory.

With A = softmax(scale · Q Kᵀ): dA = dO Vᵀ, dS = A ∘ (dA − rowsum(A ∘ dA)), dQ = scale · dS K, dK = scale · dSᵀ Q and
dV = Aᵀ dO. Each element has one owner and is summed in a fixed order: bitwise repeatable, and independent of the
rest of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import COMPILER, on_device, padded
from ._resources import fenced

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def columns_of(pointer, row, row_ok, column, column_ok, STRIDE: tl.constexpr):
    """Rows and columns of a row-major matrix; zero outside."""
    mask = row_ok[:, None] & column_ok[None, :]
    return tl.load(pointer + row[:, None] * STRIDE + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_columns(pointer, values, row, row_ok, column, column_ok, STRIDE: tl.constexpr):
    mask = row_ok[:, None] & column_ok[None, :]
    tl.store(pointer + row[:, None] * STRIDE + column[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def softmax(dots, scale, row_ok):
    """A [T, T]; columns beyond the tokens are zero."""
    logits = tl.where(row_ok[None, :], dots * scale, float("-inf"))
    weight = tl.exp2((logits - tl.max(logits, 1)[:, None]) * LOG2E)
    return weight / tl.sum(weight, 1)[:, None]


@triton.jit(do_not_specialize=["tokens", "scale"])
def forward_kernel(
    packed_pointer, attended_pointer, tokens, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dim: tl.constexpr = HEADS * WIDTH
    sample = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    row = tl.arange(0, BLOCK_T)
    row_ok = row < tokens
    packed_pointer += sample * tokens * 3 * dim + head * WIDTH
    attended_pointer += sample * tokens * dim + head * WIDTH

    dots = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = column < WIDTH
        query = columns_of(packed_pointer, row, row_ok, column, inside, 3 * dim)
        key = columns_of(packed_pointer + dim, row, row_ok, column, inside, 3 * dim)
        dots = tl.dot(query, tl.trans(key), dots, input_precision=PRECISION)
    attention = softmax(dots, scale, row_ok).to(packed_pointer.dtype.element_ty)
    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = column < WIDTH
        value = columns_of(packed_pointer + 2 * dim, row, row_ok, column, inside, 3 * dim)
        attended = tl.dot(attention, value, input_precision=PRECISION)
        store_columns(attended_pointer, attended, row, row_ok, column, inside, dim)


@triton.jit(do_not_specialize=["tokens", "scale"])
def backward_kernel(
    grad_pointer, packed_pointer, grad_packed_pointer, tokens, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dim: tl.constexpr = HEADS * WIDTH
    sample = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    row = tl.arange(0, BLOCK_T)
    row_ok = row < tokens
    grad_pointer += sample * tokens * dim + head * WIDTH
    packed_pointer += sample * tokens * 3 * dim + head * WIDTH
    grad_packed_pointer += sample * tokens * 3 * dim + head * WIDTH

    dots = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    grad_attention = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = column < WIDTH
        query = columns_of(packed_pointer, row, row_ok, column, inside, 3 * dim)
        key = columns_of(packed_pointer + dim, row, row_ok, column, inside, 3 * dim)
        value = columns_of(packed_pointer + 2 * dim, row, row_ok, column, inside, 3 * dim)
        grad = columns_of(grad_pointer, row, row_ok, column, inside, dim)
        dots = tl.dot(query, tl.trans(key), dots, input_precision=PRECISION)
        grad_attention = tl.dot(grad, tl.trans(value), grad_attention, input_precision=PRECISION)

    attention = softmax(dots, scale, row_ok)
    delta = tl.sum(attention * grad_attention, 1)
    grad_dots = attention * (grad_attention - delta[:, None]) * scale
    # Rows beyond the tokens have scores and gradients of zero, yet not if a key or value is infinite.
    attention = tl.where(row_ok[:, None], attention, 0.0).to(packed_pointer.dtype.element_ty)
    grad_dots = tl.where(row_ok[:, None], grad_dots, 0.0).to(packed_pointer.dtype.element_ty)
    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = column < WIDTH
        query = columns_of(packed_pointer, row, row_ok, column, inside, 3 * dim)
        key = columns_of(packed_pointer + dim, row, row_ok, column, inside, 3 * dim)
        grad = columns_of(grad_pointer, row, row_ok, column, inside, dim)
        grad_query = tl.dot(grad_dots, key, input_precision=PRECISION)
        grad_key = tl.dot(tl.trans(grad_dots), query, input_precision=PRECISION)
        grad_value = tl.dot(tl.trans(attention), grad, input_precision=PRECISION)
        store_columns(grad_packed_pointer, grad_query, row, row_ok, column, inside, 3 * dim)
        store_columns(grad_packed_pointer + dim, grad_key, row, row_ok, column, inside, 3 * dim)
        store_columns(grad_packed_pointer + 2 * dim, grad_value, row, row_ok, column, inside, 3 * dim)


def plan(query_key_value: Tensor, heads: int) -> dict[str, Any]:
    """Tile sizes and launch options."""
    _, tokens, packed = query_key_value.shape
    width = packed // (3 * heads)
    block_t = padded(tokens)
    exact = query_key_value.dtype == torch.float32  # the FMA pipes: operands pass through registers
    chunk = padded(width, 16 if exact else 64 if width % 64 == 0 else 32)
    launch = {
        "HEADS": heads, "WIDTH": width, "BLOCK_T": block_t, "CHUNK": chunk,
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": block_t // (8 if exact else 16), "num_stages": 1 if exact else 2,
    } | COMPILER  # fmt: skip
    return fenced(launch, query_key_value)


def forward(query_key_value: Tensor, heads: int, scale: float) -> Tensor:
    """attended [B, T, D] of query_key_value [B, T, 3D]."""
    batch, tokens, packed = query_key_value.shape
    attended = query_key_value.new_empty(batch, tokens, packed // 3)
    if batch:
        with on_device(query_key_value):
            forward_kernel[(batch * heads,)](
                query_key_value.contiguous(), attended, tokens, scale, **plan(query_key_value, heads)
            )
    return attended


def backward(grad: Tensor, query_key_value: Tensor, heads: int, scale: float) -> Tensor:
    """The gradient [B, T, 3D] of query_key_value for `grad` [B, T, D]."""
    batch, tokens, _ = query_key_value.shape
    grad_packed = query_key_value.new_empty(query_key_value.shape)
    if batch:
        with on_device(query_key_value):
            backward_kernel[(batch * heads,)](
                grad.contiguous(), query_key_value.contiguous(), grad_packed, tokens, scale,
                **plan(query_key_value, heads),
            )  # fmt: skip
    return grad_packed
