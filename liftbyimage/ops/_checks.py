"""Checks at the public edge: every message names the op, the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from liftbyimage.ops._dispatch import autocast_is_on

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def shape_of(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _layout(dims: str) -> str:
    return "[" + ", ".join(dims.split()) + "]"


def check_tensor(op: str, argument: str, value: object, dims: str) -> None:
    """`value` is a floating-point tensor of as many dimensions as `dims` ("B H J E") has names."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor {_layout(dims)}, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{op}: {argument} must be float32, float16, bfloat16 or float64, got {value.dtype}")
    if value.dim() != len(dims.split()):
        raise ValueError(f"{op}: {argument} must have shape {_layout(dims)}, got {shape_of(value)}")


def check_sizes(op: str, argument: str, value: Tensor, expected: tuple[int, ...], dims: str) -> None:
    if value.shape != expected:
        raise ValueError(f"{op}: {argument} must have shape {_layout(dims)} = {list(expected)}, got {shape_of(value)}")


def check_same_device(op: str, first: str, tensors: Mapping[str, Tensor]) -> None:
    device = tensors[first].device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {first}'s device {device}, got {tensor.device}")


def check_same_dtype(op: str, first: str, tensors: Mapping[str, Tensor]) -> None:
    dtype = tensors[first].dtype
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must have {first}'s dtype {dtype}, got {tensor.dtype}")


def check_dtype(owner: str, argument: str, value: Any, whose: str, dtype: torch.dtype) -> None:
    """What a module meets (a tensor, or what has its dtype and device) has `dtype`, unless autocast sees to that."""
    if value.dtype != dtype and not autocast_is_on(value.device.type):
        raise TypeError(f"{owner}: {argument} must have {whose} dtype {dtype}, got {value.dtype}")


def check_positive(op: str, argument: str, tensor: Tensor, dims: str, *names: str) -> None:
    """The named dimensions of `tensor` are at least 1 (the batch alone may be empty)."""
    sizes = tensor.shape
    for dim, name in enumerate(dims.split()):
        if name in names and sizes[dim] < 1:
            raise ValueError(f"{op}: {argument} must have {name} >= 1, got {shape_of(tensor)}")


def check_scale(op: str, scale: float | None, width: int) -> float:
    """The softmax scale: `scale` if given (0.0 included), else width ** -0.5."""
    if scale is None:
        return 1.0 / math.sqrt(width)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale must be a finite float or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be a finite float or None, got {scale}")
    return float(scale)


def check_like(
    op: str, first: str, like: Tensor, argument: str, value: Tensor, expected: tuple[int, ...], dims: str
) -> None:
    """`value` has the sizes `expected` of `dims`, and dtype and device of the argument `first`, which is `like`."""
    usual = isinstance(value, Tensor) and value.shape == expected
    if usual and value.dtype == like.dtype and value.device == like.device:
        return
    check_tensor(op, argument, value, dims)
    check_sizes(op, argument, value, expected, dims)
    check_same_device(op, first, {first: like, argument: value})
    check_same_dtype(op, first, {first: like, argument: value})


def check_heads(op: str, heads: int, dim: int) -> None:
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"{op}: heads must be an int >= 1 that divides D = {dim}, got {type(heads).__name__}")
    if heads < 1 or dim % heads:
        raise ValueError(f"{op}: heads must be an int >= 1 that divides D = {dim}, got {heads}")


def check_eps(op: str, eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a finite float >= 0, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:  # NaN fails too
        raise ValueError(f"{op}: eps must be a finite float >= 0, got {eps}")


def check_attention(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Shapes, dtypes and devices that `attend_patches` and `pose_guided_attention` share."""
    check_tensor(op, "query", query, "B H J E")
    check_tensor(op, "key", key, "B Hk P E")
    check_positive(op, "query", query, "B H J E", "H", "J", "E")
    check_positive(op, "key", key, "B Hk P E", "P")
    batch, heads, _, width = query.shape
    groups, patches = key.shape[1:3]
    if groups not in (1, heads):
        raise ValueError(f"{op}: key must have Hk = 1 or Hk = H = {heads} heads, got {groups}")
    check_like(op, "query", query, "key", key, (batch, groups, patches, width), "B Hk P E")
    if value is not key:
        check_tensor(op, "value", value, "B Hk P F")
        check_positive(op, "value", value, "B Hk P F", "F")
        check_like(op, "query", query, "value", value, (batch, groups, patches, value.shape[3]), "B Hk P F")
