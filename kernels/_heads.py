"""A product of its own for each head: what takes queries to the width of the keys, and contexts back.

    out[b, h, j] = x[b, h, j] W_h + bias_h        x [B, H, J, K], W [H, K, N], bias [H · N]

x and out may be views: heads side by side in a row of width D, or each for itself. W is read as it lies, transposed or
not. A program owns BLOCK_M of the B·J rows and BLOCK_N columns of one head; sums are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import COMPILER, on_device, padded
from ._resources import fenced


@triton.jit(do_not_specialize=["rows", "count"])
def heads_kernel(
    x_pointer, weight_pointer, bias_pointer, out_pointer, rows, count,
    x_sample, x_head, x_token, weight_head, weight_inner, weight_column, out_sample, out_head, out_token,
    HEADS: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    column = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(0) // parts % HEADS
    row = (tl.program_id(0) // parts // HEADS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    column_ok = column < N
    x_row = x_pointer + row // count * x_sample + head * x_head + row % count * x_token
    out_row = out_pointer + row // count * out_sample + head * out_head + row % count * out_token
    weight_pointer += head * weight_head + column * weight_column

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, CHUNK):
        inner = first + tl.arange(0, CHUNK)
        inside = inner < K
        x = tl.load(x_row[:, None] + inner[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
        weight = tl.load(
            weight_pointer[None, :] + inner[:, None] * weight_inner,
            mask=inside[:, None] & column_ok[None, :],
            other=0.0,
        )
        total = tl.dot(x, weight, total, input_precision=PRECISION)
    if bias_pointer is not None:
        total += tl.load(bias_pointer + head * N + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_row[:, None] + column[None, :],
        total.to(out_pointer.dtype.element_ty),
        mask=row_ok[:, None] & column_ok[None, :],
    )


def plan(dtype: torch.dtype, rows: int, inner: int, columns: int) -> dict[str, Any]:
    """Tile sizes and launch options."""
    exact = dtype == torch.float32  # the FMA pipes: operands pass through registers
    side = 64 if rows >= 1024 else 32
    return {
        "K": inner, "N": columns, "BLOCK_M": padded(rows, side), "BLOCK_N": padded(columns, side),
        "CHUNK": padded(inner, 32 if exact else 64), "PRECISION": "ieee" if exact else "tf32",
        "num_warps": 8 if exact and side == 64 else 4, "num_stages": 2,
    } | COMPILER  # fmt: skip


def multiply_heads(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x [B, H, J, K] · weight [H, K, N] + bias [H · N] into `out` [B, H, J, N], any view of dense rows."""
    (batch, heads, count, inner), columns = x.shape, weight.shape[2]
    x = x if x.stride(3) == 1 else x.contiguous()
    if batch * count:
        launch = fenced(plan(x.dtype, batch * count, inner, columns), x)
        grid = triton.cdiv(batch * count, launch["BLOCK_M"]) * heads * triton.cdiv(columns, launch["BLOCK_N"])
        with on_device(x):
            heads_kernel[(grid,)](
                x, weight, None if bias is None else bias.contiguous(), out, batch * count, count,
                *x.stride()[:3], *weight.stride(), *out.stride()[:3], HEADS=heads, **launch,
            )  # fmt: skip
