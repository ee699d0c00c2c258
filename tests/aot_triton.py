"""Every Triton kernel ahead of time, without a GPU: what is launched, and what it compiles to.

The launch functions themselves run on meta tensors while a recorder stands in for the launch, so the kernels,
argument types and options compiled here are those that a GPU would get.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
QUICK = (
    "bf16 width 256 shared", "bf16 width 48 shared", "bf16 width 184 shared", "fp32 width 48 shared",
    "bf16 prune 3072", "bf16 context channels-last", "fp32 context channels-last", "bf16 tokens 5 × 16",
    "bf16 tokens 17 × 80", "fp32 tokens 17 × 80", "bf16 branch 1 × 256", "bf16 branch 256 × 256",
    "fp32 branch 256 × 256", "bf16 joints 1 × 256", "bf16 joints 256 × 256", "fp32 joints 256 × 256",
)  # fmt: skip


def load_kernels() -> Any:
    """The kernels' folder as a package of its own: without `liftbyimage`, compiled extensions or an installation."""
    spec = importlib.util.spec_from_file_location(
        "aot_kernels", KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["aot_kernels"] = package
    spec.loader.exec_module(package)
    return package


def record_launches(call: Any) -> list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]]:
    """The (kernel, arguments, keywords) of every launch that `call` makes; nothing is launched."""
    launches = []

    def record(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append((self, arguments, keywords))

    run, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = run
    return launches


def attention_calls(dtype: torch.dtype, width: int, groups: int, shared: bool) -> dict[str, Any]:
    """Forward and backward of both attention ops at B 2, H 8, J 17, P 3072; shared: one token tensor for all roles."""
    from aot_kernels import attend_patches, pose_guided_attention

    batch, heads, joints, num_patches, scale = 2, 8, 17, 3072, width**-0.5

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, rows = new(batch, heads, joints, width), new(batch, heads, joints, width)
    key = new(batch, groups, num_patches, width)
    value = None if shared else new(batch, groups, num_patches, width)
    patches = None if shared else new(batch, num_patches, width)
    importance = new(batch, num_patches, dtype=torch.float32)
    lse = new(batch, heads, joints, dtype=torch.float32)
    attention = new(batch, num_patches, heads * joints).transpose(1, 2).unflatten(1, (heads, joints))
    return {
        "attend_patches.forward": lambda: attend_patches.forward(query, key, value, scale, True, True),
        "attend_patches.backward": lambda: attend_patches.backward(
            rows, importance, attention, query, key, value, rows, lse, scale, True
        ),
        "pose_guided_attention.forward": lambda: pose_guided_attention.forward(
            query, key, value, rows, patches, scale
        ),
        "pose_guided_attention.backward": lambda: pose_guided_attention.backward(
            rows, importance.new_empty(batch, num_patches, width, dtype=dtype), importance,
            query, key, value, rows, rows, lse, scale, True, shared,
        ),
    }  # fmt: skip


def prune_calls(dtype: torch.dtype, width: int, num_patches: int) -> dict[str, Any]:
    from aot_kernels import prune_patches

    keep = max(1, num_patches * 3 // 10)
    patches = torch.empty(2, num_patches, width, dtype=dtype, device="meta")
    importance = torch.empty(2, num_patches, dtype=torch.float32, device="meta")
    index = torch.empty(2, keep, dtype=torch.int64, device="meta")
    return {
        "prune_patches.forward": lambda: prune_patches.forward(patches, importance, keep),
        "prune_patches.backward": lambda: prune_patches.backward(patches[:, :keep], index, num_patches),
    }


def context_calls(dtype: torch.dtype, channels: tuple[int, ...], channels_last: bool) -> dict[str, Any]:
    """Forward and backward at B 2, J 17, H 4, S 4 over the maps of an HRNet that sees 256 × 192 pixels."""
    from aot_kernels import sample_context

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    memory = torch.channels_last if channels_last else torch.contiguous_format
    maps = [new(2, width, 64 >> i, 48 >> i).to(memory_format=memory) for i, width in enumerate(channels)]
    levels = len(channels)
    places = (new(2, 17, 2), new(2, levels, 17, 4, 4, 2), new(2, levels, 17, 4, 4))
    grads = [new(2, 17, 4, width) for width in channels]
    wanted = [True] * levels
    return {
        "sample_context.forward": lambda: sample_context.forward(maps, *places, False),
        "sample_context.backward": lambda: sample_context.backward(
            grads, maps, *places, False, True, True, wanted
        ),
        "sample_context.backward (zeros)": lambda: sample_context.backward(
            grads, maps, *places, True, True, False, wanted[:-1] + [False]
        ),
    }  # fmt: skip


def token_calls(dtype: torch.dtype, tokens: int, heads: int, width: int) -> dict[str, Any]:
    from aot_kernels import attend_tokens

    packed = torch.empty(2, tokens, 3 * heads * width, dtype=dtype, device="meta")
    grad = torch.empty(2, tokens, heads * width, dtype=dtype, device="meta")
    return {
        "attend_tokens.forward": lambda: attend_tokens.forward(packed, heads, 0.25),
        "attend_tokens.backward": lambda: attend_tokens.backward(grad, packed, heads, 0.25),
    }


def branch_calls(dtype: torch.dtype, batch: int, width: int, hidden: int) -> dict[str, Any]:
    """Forward and backward of both residual branches over 17 tokens; only the second has stochastic depth."""
    from aot_kernels import residual_attention, residual_feed_forward

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def layer(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        return new(outputs, inputs), new(outputs)

    tokens, norm, statistics = new(batch, 17, width), layer(width, 1)[1:] * 2, new(batch, 17, 2, dtype=torch.float32)
    attention = (*norm, *layer(3 * width, width), *layer(width, width), None)
    feed_forward = (*norm, *layer(hidden, width), *layer(width, hidden), new(batch))
    wanted = [True] * 7 + [False]
    return {
        "residual_attention.forward": lambda: residual_attention.forward(tokens, *attention, 8, 1e-5, False),
        "residual_attention.backward": lambda: residual_attention.backward(
            tokens, tokens, *attention, new(batch, 17, 3 * width), statistics, 8, wanted
        ),
        "residual_feed_forward.forward": lambda: residual_feed_forward.forward(tokens, *feed_forward, 1e-5, True),
        "residual_feed_forward.backward": lambda: residual_feed_forward.backward(
            tokens, tokens, *feed_forward, new(batch, 17, hidden), statistics, wanted
        ),
    }  # fmt: skip


def joint_calls(dtype: torch.dtype, batch: int, width: int, folded: int | None) -> dict[str, Any]:
    """Both sides of the attention to patches for 17 joints; `folded` is the width of the keys, None the heads' own."""
    from aot_kernels import joint_queries, update_joints

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def layer(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        return new(outputs, inputs), new(outputs)

    joints, norm, head = new(batch, 17, width), (new(width), new(width)), width // 8
    fold = None if folded is None else new(8, head, folded)
    unfold = None if folded is None else new(8, head, folded).transpose(1, 2)
    context = new(batch, 8, 17, folded or head)
    projections = (*layer(3 * width, width), *layer(width, width))
    feed_forward = (*layer(4 * width, width), *layer(width, 4 * width))
    return {
        "joint_queries.forward": lambda: joint_queries.forward(
            joints, *projections, *norm, *layer(width, width), fold, 8, 1e-5
        ),
        "update_joints.forward": lambda: update_joints.forward(
            joints, context, unfold, new(width), *projections[2:], *norm, *feed_forward, *norm, 1e-5
        ),
    }  # fmt: skip


def configurations() -> list[tuple[str, dict[str, Any]]]:
    """What is compiled: the default absorbed and factored widths, separate tensors, the widest, and both dtypes."""
    half, single = torch.bfloat16, torch.float32
    return [
        ("bf16 width 256 shared", attention_calls(half, 256, 1, True)),
        ("bf16 width 48 shared", attention_calls(half, 48, 1, True)),
        ("bf16 width 184 shared", attention_calls(half, 184, 1, True)),
        ("bf16 width 256 separate", attention_calls(half, 256, 1, False)),
        ("bf16 width 32 per head", attention_calls(half, 32, 8, False)),
        ("bf16 width 512 separate", attention_calls(half, 512, 1, False)),
        ("fp32 width 256 shared", attention_calls(single, 256, 1, True)),
        ("fp32 width 512 separate", attention_calls(single, 512, 1, False)),
        ("fp32 width 48 shared", attention_calls(single, 48, 1, True)),
        ("bf16 prune 3072", prune_calls(half, 256, 3072)),
        ("fp32 prune 20000", prune_calls(single, 48, 20000)),
        ("bf16 context channels-last", context_calls(half, (32, 64, 128, 256), True)),
        ("fp32 context channels-last", context_calls(single, (32, 64, 128, 256), True)),
        ("fp32 context contiguous", context_calls(single, (48, 96, 192, 384), False)),
        ("bf16 tokens 5 × 16", token_calls(half, 5, 8, 16)),
        ("bf16 tokens 17 × 80", token_calls(half, 17, 8, 80)),
        ("bf16 tokens 64 × 128", token_calls(half, 64, 8, 128)),
        ("fp32 tokens 5 × 16", token_calls(single, 5, 8, 16)),
        ("fp32 tokens 17 × 80", token_calls(single, 17, 8, 80)),
        ("fp32 tokens 64 × 128", token_calls(single, 64, 8, 128)),
        ("bf16 branch 1 × 256", branch_calls(half, 1, 256, 1024)),
        ("bf16 branch 256 × 256", branch_calls(half, 256, 256, 1024)),
        ("bf16 branch 8 × 512", branch_calls(half, 8, 512, 2048)),
        ("bf16 branch 64 × 640", branch_calls(half, 64, 640, 1280)),
        ("bf16 branch 256 × 72", branch_calls(half, 256, 72, 144)),
        ("fp32 branch 1 × 256", branch_calls(single, 1, 256, 1024)),
        ("fp32 branch 256 × 256", branch_calls(single, 256, 256, 1024)),
        ("fp32 branch 64 × 640", branch_calls(single, 64, 640, 1280)),
        ("bf16 joints 1 × 256", joint_calls(half, 1, 256, 48)),
        ("bf16 joints 256 × 256", joint_calls(half, 256, 256, 48)),
        ("bf16 joints 256 × 256, absorbed", joint_calls(half, 256, 256, 256)),
        ("bf16 joints 8 × 512", joint_calls(half, 8, 512, None)),
        ("fp32 joints 1 × 256", joint_calls(single, 1, 256, 48)),
        ("fp32 joints 256 × 256", joint_calls(single, 256, 256, 48)),
    ]


def specialise(
    kernel: JITFunction, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and attributes as Triton derives them at launch (tensors aligned to 16 bytes)."""
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values.update({name: value for name, value in keywords.items() if name in kernel.arg_names})
    signature, constants, attributes = {}, {}, {}

    def type_of(value: Any, place: tuple[int, ...], specialised: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of(part, (*place, i), specialised) for i, part in enumerate(value))
        if value is None or (specialised and isinstance(value, int) and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (specialised and value % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return "*" + TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
        else:
            signature[parameter.name] = type_of(value, (position,), not parameter.do_not_specialize)
    return signature, constants, attributes


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    call: str  # the launch function, such as "prune_patches.forward"
    configuration: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def source(self) -> Path:
        return Path(self.kernel.fn.__code__.co_filename)

    def identity(self) -> tuple[str, ...]:
        return (self.kernel.__name__, str(self.signature), str(self.constants), str(self.options))


@functools.cache
def launches(every: bool) -> tuple[Launch, ...]:
    """One launch per distinct (kernel, types, constants, options), named after the first call that needs it; those of
    the sizes that the models run at, or every one."""
    load_kernels()
    found: dict[tuple[str, ...], Launch] = {}
    for configuration, calls in configurations():
        if not every and configuration not in QUICK:
            continue
        for call, function in calls.items():
            for kernel, arguments, keywords in record_launches(function):
                options = {key: value for key, value in keywords.items() if key in OPTIONS}
                launch = Launch(kernel, call, configuration, *specialise(kernel, arguments, keywords), options)
                found.setdefault(launch.identity(), launch)
    return tuple(found.values())


def compiled(launch: Launch, arch: int) -> Any:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    source = triton.compiler.ASTSource(
        fn=launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=launch.attributes
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
