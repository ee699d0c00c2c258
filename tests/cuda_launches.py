"""What the CUDA launchers ask for: they run on the CPU, and a recorder stands in for CUDA's runtime."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


# Source → (what the launchers are called for, the calls); the launches of a source that is not here stay unknown.
CALLS: dict[str, tuple[str, Callable[[ctypes.CDLL, torch.dtype], None]]] = {
    "pose_guided_attention.cu": ("width 256 shared", call_attention),
    "prune_patches.cu": ("prune 3072", call_prune),
    "sample_context.cu": ("context channels-last", call_context),
}


def recorded(source: Path) -> list[Launch]:
    """The launches of one source, for every element type."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "recorded.so"
        # PTX alone: nothing runs. Symbolic: the recorder goes before the CUDA that torch may have loaded.
        command = ["nvcc", "-std=c++17", "-O0", "-gencode=arch=compute_80,code=compute_80", "-shared", "-cudart=none"]
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
