"""What the CUDA launchers ask for: they run on the CPU, and a recorder stands in for CUDA's runtime."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from ctypes import c_bool, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cuda_emulation import emulated

RECORDER = Path(emulated.__file__).with_name("recorder.cpp")


@dataclass(frozen=True)
class Launch:
    symbol: str  # mangled, of a compilation of its own
    threads: int
    shared: int  # bytes of dynamic shared memory


def call_attention(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Absorbed, at width 256: one token tensor for all roles."""
    op = emulated.PoseGuidedAttention(library)
    rows = torch.zeros(1, 8, 17, 256, dtype=dtype)
    tokens, lse = torch.zeros(1, 1, 3072, 256, dtype=dtype), torch.zeros(1, 8, 17)
    op.forward(rows, tokens, None, rows, None, 0.0625)
    op.backward(rows, tokens[:, 0], torch.zeros(1, 3072), rows, tokens, None, rows, rows, lse, 0.0625, True, True)


def call_prune(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    op = emulated.PrunePatches(library)
    patches, importance = torch.zeros(1, 3072, 256, dtype=dtype), torch.zeros(1, 3072, dtype=dtype)
    op.forward(patches, importance, 921)
    op.backward(patches[:, :921], torch.zeros(1, 921, dtype=torch.int64), 3072)


def call_context(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """The maps of an HRNet that sees 256 × 192 pixels."""
    op = emulated.SampleContext(library)
    channels = [32, 64, 128, 256]
    maps = [torch.zeros(1, width, 64 >> level, 48 >> level, dtype=dtype) for level, width in enumerate(channels)]
    maps = [values.to(memory_format=torch.channels_last) for values in maps]
    offsets, weights = torch.zeros(1, 4, 17, 4, 4, 2, dtype=dtype), torch.zeros(1, 4, 17, 4, 4, dtype=dtype)
    places = (torch.zeros(1, 17, 2, dtype=dtype), offsets, weights)
    op.forward(maps, *places, False)
    grads = [torch.zeros(1, 17, 4, width, dtype=dtype) for width in channels]
    op.backward(grads, maps, *places, False, True, True, [True] * 4)


class TensorAttention(ctypes.Structure):
    """As in csrc/cuda/tensor_attention.h."""

    _fields_ = [
        *((name, c_int32) for name in ("dtype", "batch", "rows", "patches", "width")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("query", "tokens")),
        *((name, c_int64) for name in ("tokens_batch_stride", "tokens_patch_stride")),
        *((name, c_void_p) for name in ("pose_value", "context", "lse")),
        ("given_lse", c_bool),
        *((name, c_void_p) for name in ("patches_out", "importance", "attention")),
        ("attention_stride", c_int64),
        *((name, c_int32) for name in ("attention_rows", "channels")),
        *((name, c_void_p) for name in ("workspace", "stream")),
    ]


class PatchRows(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("patch_stride", c_int64)]


class TensorGradient(ctypes.Structure):
    """As in csrc/cuda/tensor_gradient.h."""

    _fields_ = [
        *((name, c_int32) for name in ("dtype", "batch", "rows", "patches", "width")),
        ("scale", c_float),
        *((name, PatchRows) for name in ("tokens", "grad_patches")),
        *((name, c_void_p) for name in ("grad_context", "pose_value", "grad_importance")),
        ("grad_attention", PatchRows),
        *((name, c_void_p) for name in ("delta", "weights")),
        ("padded_rows", c_int32),
        ("stream", c_void_p),
    ]


ROWS, PATCHES = 136, 3072  # of eight heads and 17 joints, and of the patches of a crop of 256 × 192 pixels
SOMEWHERE = 4096  # an address that launchers pass on


def common(dtype: torch.dtype, width: int) -> dict[str, Any]:
    sizes = {"batch": 1, "rows": ROWS, "patches": PATCHES, "width": width, "scale": width**-0.5}
    return {"dtype": emulated.DTYPES[dtype], **sizes}


def call_tensor_attention(forward: str, library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Updated tokens at width 256; attention beside the channels at the factored widths."""
    if dtype == torch.float32:
        return
    for width in (256, 184, 48):
        strides = {"tokens_batch_stride": PATCHES * width, "tokens_patch_stride": width}
        given = dict.fromkeys(("query", "tokens", "context", "lse", "importance", "workspace"), SOMEWHERE)
        if width == 256:
            wanted = {"pose_value": SOMEWHERE, "patches_out": SOMEWHERE}
        else:
            stride = width + ROWS
            wanted = {"attention": SOMEWHERE, "attention_stride": stride, "attention_rows": ROWS, "channels": width}
        params = TensorAttention(**common(dtype, width), **strides, **given, **wanted)
        launch(library[forward], params)


def call_tensor_gradient(gradient: str, library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Of context and update at width 256, of the context alone at the factored widths."""
    if dtype == torch.float32:
        return
    for width in (256, 184, 48):
        rows = PatchRows(SOMEWHERE, PATCHES * width, width)
        given = dict.fromkeys(("grad_context", "pose_value", "delta", "weights"), SOMEWHERE)
        updates = {"grad_patches": rows} if width == 256 else {}
        params = TensorGradient(**common(dtype, width), tokens=rows, **updates, **given, padded_rows=ROWS)
        launch(library[gradient], params)


def launch(function: Callable[..., int], params: ctypes.Structure) -> None:
    status = function(ctypes.byref(params))
    if status:
        raise RuntimeError(f"the launcher returned error {status}")


# Source → (what the launchers are called for, the calls); the launches of a source that is not here stay unknown.
CALLS: dict[str, tuple[str, Callable[[ctypes.CDLL, torch.dtype], None]]] = {
    "pose_guided_attention.cu": ("width 256 shared", call_attention),
    "prune_patches.cu": ("prune 3072", call_prune),
    "sample_context.cu": ("context channels-last", call_context),
    "mma_attention.cu": ("widths 48, 184, 256", partial(call_tensor_attention, "mma_attention_forward")),
    "mma_gradient.cu": ("widths 48, 184, 256", partial(call_tensor_gradient, "mma_gradient")),
    "tensor_attention.cu": ("widths 48, 184, 256", partial(call_tensor_attention, "tensor_attention_forward")),
    "tensor_gradient.cu": ("widths 48, 184, 256", partial(call_tensor_gradient, "tensor_gradient")),
}


def recorded(source: Path, architecture: str) -> list[Launch]:
    """The launches of one source, for every element type; `architecture` is one that it compiles for."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "recorded.so"
        # PTX alone: nothing runs. Symbolic: the recorder goes before the CUDA that torch may have loaded.
        virtual = architecture.replace("sm_", "compute_")
        command = ["nvcc", "-std=c++17", "-O0", f"-gencode=arch={virtual},code={virtual}", "-shared", "-cudart=none"]
        command += ["-Xcompiler=-fPIC", "-Xlinker=-Bsymbolic", str(source), str(RECORDER), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc does not compile the launchers of {source.name}:\n{done.stderr}")
        library = ctypes.CDLL(str(target))
    _, call = CALLS[source.name]
    for dtype in emulated.DTYPES:
        call(library, dtype)
    library.recorded_symbol.restype = ctypes.c_char_p
    library.recorded_shared.restype = ctypes.c_size_t
    return [
        Launch(library.recorded_symbol(i).decode(), library.recorded_threads(i), library.recorded_shared(i))
        for i in range(library.recorded())
    ]
