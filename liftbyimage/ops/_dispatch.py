"""Choosing the implementation that serves a call, and saying why the others do not.

A `Backend` states in `why_not` the one reason it cannot serve given arguments, or None. The first backend of an op's
`BACKENDS` without a reason serves, but for those that are known to be slower than the reference. A backend demanded by
`backend=` or by the environment variable `LIFTBYIMAGE_BACKEND` must serve, or its reason is raised: nothing falls back
silently.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from liftbyimage import _extension

ENVIRONMENT_VARIABLE = "LIFTBYIMAGE_BACKEND"
NATIVE_WIDTH_LIMIT = 512


Input = TypeVar("Input", bound="Tensor | None")


def no(*tensors: Tensor) -> bool:
    return False


class Backend(NamedTuple):
    """One implementation of an op.

    `why_not(*tensors)` gives the reason it cannot serve, or None. `forward` and `backward` take and return what the
    op's raw schema says; both are None for the reference, whose gradients are PyTorch's own.
    `batch_independent`: a sample's result does not depend on the rest of its batch (bitwise).
    `slower(*tensors)`: whether a measurement found the reference faster; then it serves only where it is demanded.
    """

    name: str
    why_not: Callable[..., str | None]
    forward: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None
    batch_independent: bool = False
    slower: Callable[..., bool] = no


def demanded_backend() -> str | None:
    """The backend that `LIFTBYIMAGE_BACKEND` demands, None if unset or empty."""
    return os.environ.get(ENVIRONMENT_VARIABLE) or None


def first_choice(backends: Sequence[Backend], *tensors: Tensor) -> Backend | None:
    """The backend that serves `tensors` where none is demanded."""
    for backend in backends:
        if backend.why_not(*tensors) is None and not backend.slower(*tensors):
            return backend
    return None


def select(op: str, backends: Sequence[Backend], requested: str | None, *tensors: Tensor) -> Backend:
    """The backend that serves `tensors`: the requested one, else the first choice.

    Raises:
        ValueError: the requested name is unknown, or that backend cannot serve these arguments.
    """
    demanded = requested if requested is not None else demanded_backend()
    if demanded is None:
        chosen = first_choice(backends, *tensors)
        assert chosen is not None  # the reference serves everything
        return chosen
    origin = f" (demanded by {ENVIRONMENT_VARIABLE})" if requested is None else ""
    names = [backend.name for backend in backends]
    if demanded not in names:
        raise ValueError(f"{op}: backend must be one of {', '.join(names)}, got {demanded!r}{origin}")
    backend = backends[names.index(demanded)]
    reason = backend.why_not(*tensors)
    if reason is not None:
        raise ValueError(f"{op}: backend {demanded!r} cannot serve this call: {reason}{origin}")
    return backend


def has_kernel(backends: Sequence[Backend], *tensors: Tensor) -> bool:
    """Whether another backend than the reference serves `tensors`, under the environment's demand if there is one."""
    demanded = demanded_backend()
    if demanded is None:
        serving = first_choice(backends, *tensors)
    else:
        serving = next((one for one in backends if one.name == demanded and one.why_not(*tensors) is None), None)
    return serving is not None and serving.forward is not None


def needs_graph(inputs: Sequence[Tensor | None]) -> bool:
    """Whether autograd records a call with these inputs; without, its Function need not be entered."""
    if torch.is_grad_enabled():
        for tensor in inputs:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def never(*tensors: Tensor) -> str | None:
    """`why_not` of the reference: it serves everything."""
    return None


def why_not_cpu(*tensors: Tensor) -> str | None:
    if _extension.CPU_MISSING is not None:
        return _extension.CPU_MISSING
    if not tensors[0].is_cpu:
        return f"serves CPU tensors, got {tensors[0].device.type}"
    return None


def why_not_cpu_in_full_precision(*tensors: Tensor) -> str | None:
    reason = why_not_cpu(*tensors)
    if reason is None and tensors[0].dtype not in (torch.float32, torch.float64):
        return f"serves float32 and float64, got {tensors[0].dtype}"
    return reason


def why_not_cpu_but_half(*tensors: Tensor) -> str | None:
    reason = why_not_cpu(*tensors)
    if reason is None and tensors[0].dtype == torch.float16:
        return "serves float32, float64 and bfloat16, got torch.float16"
    return reason


def why_not_triton(*tensors: Tensor) -> str | None:
    return why_not_triton_of_any_width(*tensors) or _too_wide(*tensors)


def why_not_triton_of_any_width(*tensors: Tensor) -> str | None:
    missing = triton_missing()
    if missing is not None:
        return missing
    if tensors[0].device.type != "cuda" and not triton_interprets():
        return f"serves CUDA tensors (or any with TRITON_INTERPRET=1), got {tensors[0].device.type}"
    if triton_interprets() and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return "serves float32 and float16 with TRITON_INTERPRET=1, whose products are wrong in bfloat16"
    return _gpu_dtype(*tensors)


def why_not_cuda(*tensors: Tensor) -> str | None:
    return why_not_cuda_of_any_width(*tensors) or _too_wide(*tensors)


def why_not_cuda_of_any_width(*tensors: Tensor) -> str | None:
    if _extension.CUDA_MISSING is not None:
        return _extension.CUDA_MISSING
    if not tensors[0].is_cuda:
        return f"serves CUDA tensors, got {tensors[0].device.type}"
    return _gpu_dtype(*tensors)


TENSOR_CORE_ROWS, TENSOR_CORE_WIDTH = 144, 256


def why_not_tensor_cores(query: Tensor, *tokens: Tensor, held: int = 1) -> str | None:
    """Why csrc/cuda/tensor_attention.cu (Hopper) and mma_attention.cu (from Ampere on) cannot serve query [B, H, J, E]
    over one head of tokens, key and value.

    `held`: tensors of the query's shape whose rows a kernel holds in shared memory at a time.
    """
    reason = why_not_cuda_of_any_width(query) or _no_tensor_cores(query.device)
    if reason is not None:
        return reason
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"serves float16 and bfloat16, got {str(query.dtype).removeprefix('torch.')}"
    rows, width = query.shape[1] * query.shape[2], query.shape[3]
    if rows > TENSOR_CORE_ROWS:
        return f"serves up to {TENSOR_CORE_ROWS} query rows H·J, got {rows}"
    if width > TENSOR_CORE_WIDTH or width % 8:
        return f"serves widths that are multiples of 8 up to {TENSOR_CORE_WIDTH}, got {width}"
    needed, limit = rows_held_bytes(width, held), _shared_memory(query.device)
    if needed > limit:
        return f"needs {needed} bytes of shared memory for width {width}, the GPU lets a block use {limit}"
    return None


def rows_held_bytes(width: int, held: int) -> int:
    """Shared memory of mma_attention.cu's scatter and of mma_gradient.cu: columns of 128 bytes of all rows, and two
    float32 per row."""
    columns = -(-2 * width // 128)
    return TENSOR_CORE_ROWS * (held * columns * 128 + 2 * 4)


@functools.cache
def _no_tensor_cores(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"needs compute capability 8.0 or later for its tensor cores, got {major}.{minor}"


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may use."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs know the property of CPU builds alone
    return int(properties.shared_memory_per_block_optin)


def _gpu_dtype(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return "serves float32, float16 and bfloat16, got float64"
    return None


def _too_wide(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.dim() > 2 and tensor.shape[-1] > NATIVE_WIDTH_LIMIT:
            return f"serves widths up to {NATIVE_WIDTH_LIMIT}, got {tensor.shape[-1]}"
    return None


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be used at all on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


_PYTHON_LIBRARY = torch.library.Library("liftbyimage", "FRAGMENT")


def python_op(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `liftbyimage::{name}`, written in Python for every device, with its fake implementation."""
    _PYTHON_LIBRARY.define(name + schema)
    _PYTHON_LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"liftbyimage::{name}", fake, lib=_PYTHON_LIBRARY)
    return getattr(torch.ops.liftbyimage, name).default  # type: ignore[no-any-return]


def triton_op(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `liftbyimage::{name}_triton`, launched by `forward` or `backward` of the op's kernel module.

    `name` is "<op>_forward" or "<op>_backward". That module is imported at the first launch.
    """
    op, direction = name.rsplit("_", 1)

    def launch(*args: Any, **kwargs: Any) -> Any:
        module = importlib.import_module(f"liftbyimage.kernels.{op}")
        return getattr(module, direction)(*args, **kwargs)

    return python_op(f"{name}_triton", schema, launch, fake)


def native_op(name: str, fake: Callable[..., Any]) -> Callable[..., Any] | None:
    """The compiled op `liftbyimage::{name}` with its fake implementation, None where the extension is not built."""
    if _extension.CPU_MISSING is not None:
        return None
    torch.library.register_fake(f"liftbyimage::{name}", fake)
    return getattr(torch.ops.liftbyimage, name).default  # type: ignore[no-any-return]


def count_flops(ops: Sequence[Callable[..., Any] | None], formula: Callable[..., int]) -> None:
    """Register `formula(*shapes, …, out_shape)` with torch.utils.flop_counter for every op that exists here."""
    from torch.utils.flop_counter import register_flop_formula

    for op in ops:
        if op is not None:
            register_flop_formula(op.overloadpacket)(formula)  # type: ignore[attr-defined]


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which a reference computes in the dtype of its inputs, whatever autocast says of single layers."""
    return torch.autocast(tensor.device.type, enabled=False)


# Asked once: torch 2.10 and 2.11 cannot trace the question in a compiled function.
_AUTOCAST_DEVICES = frozenset(
    name
    for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla")
    if torch.amp.is_autocast_available(name)
)


def autocast_is_on(device: str) -> bool:
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def autocast(*tensors: Input) -> tuple[Input, ...]:
    """Cast floating tensors to the autocast dtype where autocast is on; float64 stays, and one object stays one."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    return _cast(tensors, torch.get_autocast_dtype(device)) if autocast_is_on(device) else tensors


def autocast_to_float32(*tensors: Input) -> tuple[Input, ...]:
    """The same to float32, for ops whose inputs a 16-bit type would spoil: places in a feature map."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    return _cast(tensors, torch.float32) if autocast_is_on(device) else tensors


def _cast(tensors: tuple[Input, ...], dtype: torch.dtype) -> tuple[Input, ...]:
    cast: dict[int, Any] = {}
    for tensor in tensors:
        cast[id(tensor)] = tensor
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
            cast[id(tensor)] = tensor.to(dtype)
    return tuple(cast[id(tensor)] for tensor in tensors)
