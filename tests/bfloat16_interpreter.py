"""bfloat16 in Triton's interpreter, which has none: it keeps the bits as integers, rounds towards zero and multiplies
integers. Here values are bfloat16 arrays of ml_dtypes, rounded to nearest as a GPU does, and products are exact."""

from __future__ import annotations

import importlib
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from liftbyimage.ops._explain import OPS

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
Handle = interpreter.TensorHandle


class Memory:
    """The interpreter's loads and stores, to which bfloat16 is 16 bits."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        if dtype != BFLOAT16:
            return self.plain.load(pointers, mask, other, dtype)
        bits = np.ascontiguousarray(other).view(np.uint16)
        return self.plain.load(pointers, mask, bits, np.dtype(np.uint16)).view(BFLOAT16)

    def store(self, pointers: Any, values: Any, mask: Any) -> Any:
        bits = np.ascontiguousarray(values).view(np.uint16) if values.dtype == BFLOAT16 else values
        return self.plain.store(pointers, bits, mask)


def is_bfloat16(dtype: Any) -> bool:
    return not isinstance(dtype, tl.pointer_type) and dtype.scalar == tl.bfloat16


def install(monkeypatch: Any) -> None:
    """Let interpreted kernels, and the ops that launch them, take bfloat16."""
    builder, plain_dtype = interpreter.InterpreterBuilder, interpreter._get_np_dtype
    casts = {name: getattr(builder, name) for name in ("cast_impl", "create_fp_to_fp")}

    def numpy_dtype(dtype: Any) -> Any:
        return BFLOAT16 if is_bfloat16(dtype) else plain_dtype(dtype)

    def cast_with(plain: Any) -> Any:
        def cast(self: Any, source: Any, dtype: Any, *rounding: Any) -> Any:
            if is_bfloat16(source.dtype) or is_bfloat16(dtype):
                return Handle(source.data.astype(numpy_dtype(dtype)), dtype.scalar)
            return plain(self, source, dtype, *rounding)

        return cast

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
        return Handle(product.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
    monkeypatch.setattr(interpreter, "_interpreter", Memory(interpreter._interpreter))
    monkeypatch.setattr(builder, "create_dot", dot)
    for name, plain in casts.items():
        monkeypatch.setattr(builder, name, cast_with(plain))
    for op in OPS:
        module = importlib.import_module(f"liftbyimage.ops.{op}")
        serving = (
            backend._replace(why_not=lambda *tensors: None) if backend.name == "triton" else backend
            for backend in module.BACKENDS
        )
        monkeypatch.setattr(module, "BACKENDS", tuple(serving))
