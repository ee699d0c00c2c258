"""What all Triton kernels share: masked tiles, inner products of tiles, widths padded to powers of two, the device
to launch on, and the dtype of PyTorch's products beside them."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

SMALLEST_DOT = 16
COMPILER = {"enable_fp_fusion": True}  # said aloud: the default differs between Triton versions


def padded(size: int, limit: int | None = None, least: int = SMALLEST_DOT) -> int:
    """The power of two that holds `size`, at least `least` and at most `limit`."""
    width = max(triton.next_power_of_2(size), least)
    return width if limit is None else min(width, limit)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; make it the one that holds `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Products in the dtype of their operands, whatever autocast says where they are called."""
    device = tensor.device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


@triton.jit
def tile(pointer, row, row_ok, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `row`, BLOCK columns from `column` of a row-major matrix of WIDTH columns; zero outside."""
    columns = column + tl.arange(0, BLOCK)
    mask = row_ok[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + row[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)


@triton.jit
def resident(pointer, row, row_ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Whole rows where tiles hold a whole width; otherwise a placeholder, and `product` streams."""
    if WHOLE:
        return tile(pointer, row, row_ok, 0, WIDTH, BLOCK)
    else:
        return row


@triton.jit
def product(
    x, x_pointer, x_row, x_ok, y, y_pointer, y_row, y_ok,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X Yᵀ in float32 [x rows, y rows], from the resident tiles or CHUNK columns at a time."""
    if WHOLE:
        return tl.dot(x, tl.trans(y), input_precision=PRECISION)
    else:
        total = tl.zeros([x_row.shape[0], y_row.shape[0]], tl.float32)
        for column in range(0, WIDTH, CHUNK):
            x_chunk = tile(x_pointer, x_row, x_ok, column, WIDTH, CHUNK)
            y_chunk = tile(y_pointer, y_row, y_ok, column, WIDTH, CHUNK)
            total = tl.dot(x_chunk, tl.trans(y_chunk), total, input_precision=PRECISION)
        return total
