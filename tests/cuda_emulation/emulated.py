"""The raw ops of csrc/cuda on CPU tensors: the same .cu files, compiled for the host, run by emulate.h.

Each struct mirrors one of csrc/cuda/*.h and each function follows a raw op's schema. Every buffer lies
between margins of NaN: reading past an end shows in the result, writing past it is detected; outputs start
as NaN.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_bool, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
CUDA_SOURCES = HERE.parents[1] / "csrc" / "cuda"
MARGIN = 64  # elements, a multiple of 16 bytes in every dtype
# Fibers jump between stacks, which a fortified longjmp takes for an error; contraction would undo __fmul_rn.
FLAGS = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
DEFINITIONS = {
    "TORCH_TARGET_VERSION": "0x020a000000000000",
    "LIFTBYIMAGE_CUDA_ARCHITECTURES": "emulated",
    "liftbyimage": "liftbyimage_emulated",
}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class PatchTensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("batch_stride", "group_stride", "patch_stride")),
    ]


class Inputs(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("dtype", "batch", "groups", "rows", "patches")),
        *((name, c_int32) for name in ("key_width", "value_width", "model_width")),
        ("scale", c_float),
        ("query", c_void_p),
        ("key", PatchTensor),
        ("value", PatchTensor),
        ("pose_value", c_void_p),
        ("stream", c_void_p),
    ]


class AttentionForward(Structure):
    _fields_ = [
        ("inputs", Inputs),
        ("tokens", PatchTensor),
        *((name, c_void_p) for name in ("context", "patches_out", "importance", "lse", "residual")),
    ]


class AttentionBackward(Structure):
    _fields_ = [
        ("inputs", Inputs),
        ("lse", c_void_p),
        ("grad_context", c_void_p),
        ("grad_patches", PatchTensor),
        ("grad_importance", c_void_p),
        ("patches_is_key", c_bool),
        *((name, c_void_p) for name in ("residual", "delta")),
        *((name, c_void_p) for name in ("grad_query", "grad_key", "grad_value", "grad_pose_value")),
    ]


class PruneForward(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("importance_dtype", "batch", "patches", "keep")),
        ("row_bytes", c_int64),
        ("rows", c_void_p),
        *((name, c_int64) for name in ("rows_batch_stride", "rows_patch_stride")),
        *((name, c_void_p) for name in ("importance", "kept", "index", "stream")),
    ]


class PruneBackward(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("batch", "patches", "keep")),
        ("row_bytes", c_int64),
        *((name, c_void_p) for name in ("grad_kept", "index", "grad_rows", "stream")),
    ]


MAX_LEVELS = 8


class ContextLevel(Structure):
    _fields_ = [
        ("map", c_void_p),
        *((name, c_int64) for name in ("batch_stride", "channel_stride", "line_stride", "pixel_stride")),
        *((name, c_int32) for name in ("channels", "height", "width")),
    ]


class ContextInputs(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("dtype", "batch", "levels", "joints", "heads", "samples")),
        ("zeros", c_bool),
        *((name, c_void_p) for name in ("reference", "offsets", "weights")),
        ("level", ContextLevel * MAX_LEVELS),
        ("stream", c_void_p),
    ]


class ContextForward(Structure):
    _fields_ = [("inputs", ContextInputs), ("contexts", c_void_p * MAX_LEVELS)]


class ContextBackward(Structure):
    _fields_ = [
        ("inputs", ContextInputs),
        ("grad_contexts", c_void_p * MAX_LEVELS),
        *((name, c_void_p) for name in ("grad_offsets", "grad_weights")),
        ("grad_maps", c_void_p * MAX_LEVELS),
    ]


class Guarded:
    """A copy of a tensor's memory, strides included, between two margins of bytes 0xff (NaN in any dtype)."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        extent = 0
        if tensor.numel() > 0:
            extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.bytes = torch.full(((extent + 2 * MARGIN) * size,), 0xFF, dtype=torch.uint8)
        self.margin = MARGIN * size
        body = self.bytes[self.margin : self.margin + extent * size].view(tensor.dtype)
        body.copy_(tensor.as_strided((extent,), (1,), tensor.storage_offset()))
        self.tensor = body.as_strided(tensor.shape, tensor.stride())
        self.pointer = self.tensor.data_ptr()

    def check(self) -> None:
        assert (self.bytes[: self.margin] == 0xFF).all(), "written before the start of a buffer"
        assert (self.bytes[-self.margin :] == 0xFF).all(), "written past the end of a buffer"


class Buffers:
    """Every buffer of one launch."""

    def __init__(self) -> None:
        self.all: list[Guarded] = []

    def input(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.all.append(Guarded(tensor.contiguous()))
        return self.all[-1].pointer

    def input_as_it_lies(self, tensor: Tensor) -> int:
        self.all.append(Guarded(tensor))
        return self.all[-1].pointer

    def patch_tensor(self, tensor: Tensor | None) -> PatchTensor:
        """[B, G, P, width], in place where the width is contiguous."""
        if tensor is None:
            return PatchTensor(None, 0, 0, 0)
        self.all.append(Guarded(tensor if tensor.stride(3) == 1 else tensor.contiguous()))
        return PatchTensor(self.all[-1].pointer, *tensor_strides(self.all[-1].tensor))

    def output(self, *shape: int, dtype: torch.dtype) -> Tensor:
        poison = torch.empty(shape, dtype=dtype)
        poison.view(torch.uint8).fill_(0xFF)
        self.all.append(Guarded(poison))
        return self.all[-1].tensor

    def check(self) -> None:
        for buffer in self.all:
            buffer.check()


def tensor_strides(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def compile_library(folder: Path) -> ctypes.CDLL:
    """Compile csrc/cuda for the host; loading it registers its ops as `liftbyimage_emulated`, key CUDA."""
    library = folder / "emulated.so"
    headers = [HERE, sysconfig.get_paths()["include"], *include_paths()]
    sources = [*sorted(CUDA_SOURCES.glob("*.c*")), HERE / "cpu_torch.cpp"]
    command = ["g++", *FLAGS, *(f"-D{name}={value}" for name, value in DEFINITIONS.items())]
    command += [*(f"-I{path}" for path in headers), "-x", "c++", *map(str, sources)]
    # Symbolic: the answers of cpu_torch.cpp go before those of libtorch.
    command += ["-Wl,-Bsymbolic", *(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu"]
    compiled = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    return ctypes.CDLL(str(library))


class Binding:
    """`<op>_forward` and `<op>_backward` through csrc/cuda/bindings.cpp and the emulated kernels."""

    def __init__(self, op: str) -> None:
        library = torch.library.Library("liftbyimage_emulated", "FRAGMENT")
        self.library = library
        self.forward = self.define(library, f"{op}_forward")
        self.backward = self.define(library, f"{op}_backward")

    @staticmethod
    def define(library: torch.library.Library, name: str) -> Callable[..., Any]:
        schema = str(getattr(torch.ops.liftbyimage, name).default._schema)
        library.define(schema.removeprefix("liftbyimage::"))
        overload = getattr(torch.ops.liftbyimage_emulated, name).default
        return functools.partial(overload.redispatch, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA))


def launch(function: Callable[..., int], params: Structure, buffers: Buffers) -> None:
    function.argtypes, function.restype = [POINTER(type(params))], c_int  # type: ignore[attr-defined]
    status = function(byref(params))
    assert status == 0, f"launcher returned error {status}"
    buffers.check()


class PoseGuidedAttention:
    """pose_guided_attention_forward and _backward, by their raw schemas."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    @staticmethod
    def inputs(
        buffers: Buffers, query: Tensor, key: Tensor, value: Tensor | None, pose_value: Tensor, scale: float
    ) -> Inputs:
        batch, heads, joints, key_width = query.shape
        groups, patches = key.shape[1:3]
        sizes = (batch, groups, heads * joints // groups, patches, key_width)
        key_tensor = buffers.patch_tensor(key)
        return Inputs(
            DTYPES[query.dtype],
            *sizes,
            (key if value is None else value).shape[3],
            pose_value.shape[3],
            scale,
            buffers.input(query),
            key_tensor,
            key_tensor if value is None else buffers.patch_tensor(value),
            buffers.input(pose_value),
            None,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        pose_value: Tensor,
        patches: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        buffers = Buffers()
        inputs = self.inputs(buffers, query, key, value, pose_value, scale)
        tokens = inputs.key if patches is None else buffers.patch_tensor(patches[:, None])
        batch, heads, joints, _ = query.shape
        outputs = (
            buffers.output(batch, heads, joints, inputs.value_width, dtype=query.dtype),
            buffers.output(batch, inputs.patches, inputs.model_width, dtype=query.dtype),
            buffers.output(batch, inputs.patches, dtype=torch.float32),
            buffers.output(batch, heads, joints, dtype=torch.float32),
        )
        residual = buffers.output(batch, heads, joints, dtype=torch.float32)
        params = AttentionForward(inputs, tokens, *(output.data_ptr() for output in (*outputs, residual)))
        launch(self.library.pose_guided_attention_forward, params, buffers)
        return outputs

    def backward(
        self,
        grad_context: Tensor | None,
        grad_patches: Tensor | None,
        grad_importance: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        pose_value: Tensor,
        context: Tensor,
        lse: Tensor,
        scale: float,
        need_token_grads: bool,
        patches_is_key: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        buffers = Buffers()
        inputs = self.inputs(buffers, query, key, value, pose_value, scale)
        residual = buffers.output(*lse.shape, dtype=torch.float32)
        delta = buffers.output(*lse.shape, dtype=torch.float32)
        grad_query = buffers.output(*query.shape, dtype=query.dtype)
        grad_pose_value = buffers.output(*pose_value.shape, dtype=query.dtype)
        key_shape = key.shape if need_token_grads else (0,)
        value_shape = value.shape if need_token_grads and value is not None else (0,)
        grad_key = buffers.output(*key_shape, dtype=query.dtype)
        grad_value = buffers.output(*value_shape, dtype=query.dtype)
        params = AttentionBackward(
            inputs,
            buffers.input(lse),
            buffers.input(grad_context),
            buffers.patch_tensor(None if grad_patches is None else grad_patches[:, None]),
            buffers.input(grad_importance),
            patches_is_key,
            residual.data_ptr(),
            delta.data_ptr(),
            grad_query.data_ptr(),
            grad_key.data_ptr() if need_token_grads else None,
            grad_value.data_ptr() if need_token_grads and value is not None else None,
            grad_pose_value.data_ptr(),
        )
        launch(self.library.pose_guided_attention_backward, params, buffers)
        return grad_query, grad_key, grad_value, grad_pose_value


class PrunePatches:
    """prune_patches_forward and _backward, by their raw schemas."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def forward(self, patches: Tensor, importance: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        buffers = Buffers()
        batch, num_patches, width = patches.shape
        size = patches.element_size()
        rows = buffers.patch_tensor(patches[:, None])
        kept = buffers.output(batch, keep, width, dtype=patches.dtype)
        index = buffers.output(batch, keep, dtype=torch.int64)
        params = PruneForward(
            DTYPES[importance.dtype],
            *(batch, num_patches, keep, width * size),
            *(rows.data, rows.batch_stride * size, rows.patch_stride * size),
            *(buffers.input(importance), kept.data_ptr(), index.data_ptr(), None),
        )
        launch(self.library.prune_patches_forward, params, buffers)
        return kept, index

    def backward(self, grad_kept: Tensor, index: Tensor, num_patches: int) -> Tensor:
        buffers = Buffers()
        batch, keep, width = grad_kept.shape
        grad_rows = buffers.output(batch, num_patches, width, dtype=grad_kept.dtype)
        params = PruneBackward(
            *(batch, num_patches, keep, width * grad_kept.element_size()),
            *(buffers.input(grad_kept), buffers.input(index), grad_rows.data_ptr(), None),
        )
        launch(self.library.prune_patches_backward, params, buffers)
        return grad_rows


class SampleContext:
    """sample_context_forward and _backward, by their raw schemas."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    @staticmethod
    def inputs(
        buffers: Buffers,
        feature_maps: Sequence[Tensor],
        reference: Tensor,
        offsets: Tensor,
        weights: Tensor,
        zeros: bool,
    ) -> ContextInputs:
        levels = [
            ContextLevel(buffers.input_as_it_lies(values), *values.stride(), *values.shape[1:])
            for values in feature_maps
        ]
        return ContextInputs(
            *(DTYPES[offsets.dtype], *offsets.shape[:5], zeros),
            *(buffers.input(reference), buffers.input(offsets), buffers.input(weights)),
            *((ContextLevel * MAX_LEVELS)(*levels), None),
        )

    def forward(
        self, feature_maps: Sequence[Tensor], reference: Tensor, offsets: Tensor, weights: Tensor, zeros: bool
    ) -> list[Tensor]:
        buffers = Buffers()
        inputs = self.inputs(buffers, feature_maps, reference, offsets, weights, zeros)
        batch, _, joints, heads = offsets.shape[:4]
        contexts = [
            buffers.output(batch, joints, heads, values.shape[1], dtype=values.dtype) for values in feature_maps
        ]
        params = ContextForward(inputs, (c_void_p * MAX_LEVELS)(*(context.data_ptr() for context in contexts)))
        launch(self.library.sample_context_forward, params, buffers)
        return contexts

    def backward(
        self,
        grad_contexts: Sequence[Tensor],
        feature_maps: Sequence[Tensor],
        reference: Tensor,
        offsets: Tensor,
        weights: Tensor,
        zeros: bool,
        need_places: bool,
        need_weights: bool,
        need_maps: Sequence[bool],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        buffers = Buffers()
        inputs = self.inputs(buffers, feature_maps, reference, offsets, weights, zeros)
        grad_offsets = buffers.output(*(offsets.shape if need_places else (0,)), dtype=offsets.dtype)
        grad_weights = buffers.output(*(weights.shape if need_weights else (0,)), dtype=offsets.dtype)
        grad_maps = [
            buffers.output(*(values.permute(0, 2, 3, 1).shape if need else (0,)), dtype=values.dtype)
            for values, need in zip(feature_maps, need_maps, strict=True)
        ]
        maps = [grad.data_ptr() if need else None for grad, need in zip(grad_maps, need_maps, strict=True)]
        params = ContextBackward(
            inputs,
            (c_void_p * MAX_LEVELS)(*(buffers.input(grad) for grad in grad_contexts)),
            grad_offsets.data_ptr() if need_places else None,
            grad_weights.data_ptr() if need_weights else None,
            (c_void_p * MAX_LEVELS)(*maps),
        )
        launch(self.library.sample_context_backward, params, buffers)
        channels_first = [
            grad.permute(0, 3, 1, 2) if need else grad for grad, need in zip(grad_maps, need_maps, strict=True)
        ]
        return grad_offsets, grad_weights, channels_first
