"""The page docs/kernels/resources.md, from compiled kernels and predictions."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterable, Sequence

import cubin
import kernel_predictions as predicted
import triton
from kernel_resources import CHIPS, Kernel, occupancy, resident_blocks

RESOURCES = (
    "kernel", "GPU", "threads", "registers", "shared memory", "tensor cores", "occupancy", "blocks, limited by",
)  # fmt: skip
TIMES = ("kernel", "MB", "GFLOP", "10⁶ exp", "memory, µs", "products, µs", "exp, µs", "at least, µs")
WORDS = ("kernel", "GPU", "tensor cores", "blocks, limited by")
INTRODUCTION = """# Resources of the GPU kernels

<!-- Written by `python tests/kernel_resources.py --write docs/kernels/resources.md`; edit that, not this. -->

What every CUDA and Triton kernel needs of the chip, read from its machine code, and what time its work takes at least.
No GPU was used: nothing on this page is measured. The tests compile the same kernels and demand that none spills, that
all fit, and that tensor cores are used where they are meant to be (`tests/test_kernel_resources.py`).

Compiled by {versions}. Other compilers give other numbers; the command that made this page gives yours:

    python tests/kernel_resources.py --write docs/kernels/resources.md

Triton kernels are compiled for the sizes that the models run at; `--every` adds others, among them one that does spill:
`token_gradients_kernel` for key and value of width 512 that are different tensors, 8 to 16 bytes of a thread on sm_80.

## How to read it

A GPU runs a kernel as *blocks* of threads. A multiprocessor holds as many blocks at a time as its registers, its shared
memory and its places for warps (32 threads) allow, and hides the waiting of some warps behind the work of others.

- **threads** of one block; **registers** of one thread. A thread that needs more than it gets *spills* to local memory,
  which is slow: no kernel below does, so there is no column for it.
- **shared memory** in bytes of one block. CUDA kernels ask for it when they are launched; here for the sizes named.
- **tensor cores**: the matrix instructions in the machine code. HGMMA is Hopper's own, issued by four warps together,
  with operands in shared memory; HMMA is that of single warps; none means plain arithmetic, as in all kernels that have
  to be exact in float32.
- **occupancy**: the share of a multiprocessor's places for warps that are filled by the **blocks** that it holds,
  **limited by** what runs out first. Low occupancy is no fault by itself: kernels full of matrix products keep their
  operands in registers and shared memory instead.

| one multiprocessor of | registers | shared memory | of it, one block | threads | blocks |
| --- | ---: | ---: | ---: | ---: | ---: |
{chips}

    warps of a block      = threads / 32, rounded up
    by warps              = warps of the multiprocessor / warps of a block
    by registers          = 4 · (registers / 4 / (registers of a thread · 32, rounded up to 256)) / warps of a block
    by shared memory      = shared memory / (that of a block + 1024 that the system keeps, rounded up to 128)
    blocks                = the least of these and of the limit on blocks, all rounded down
    occupancy             = blocks · warps of a block / warps of the multiprocessor

sm_80 is A100, sm_90a is H100 and H200. Where shared memory is decided at launch and nothing is known of it, blocks and
occupancy are what the rest allows, marked ≤.
"""
PREDICTIONS = """## Predicted times

**Predicted, not measured.** Batch {batch}, {patches} patches, {rows} rows ({heads} heads × {joints} joints), bfloat16,
on one {machine}: the bytes, FLOPs and exponentials that the shapes force on a kernel, divided by the rates of the
machine: {copy} TB/s (a copy), {flops} TFLOP/s (products in bfloat16), {exps} · 10¹² exponentials (exp) per second
({multiprocessors} multiprocessors, {exps_per_clock} per clock, {clock} GHz). A kernel takes at least the longest
of the three, and reaches that only if it hides the other two behind it entirely and reads every tensor from memory
once. Kernels are those of [pose_guided_attention](pose_guided_attention.md): every one recomputes the attention. Their
products are counted in the compiled Triton kernels too, and the tests compare.
"""
LAYERS = {
    "pose_guided_attention": "absorbed: tokens of the model's width are key, value and the patches that are updated",
    "guide_patches": "factored: the encoder's channels; attention is written beside them, for the next layer",
    "attend_patches": "factored, the layer after it: channels and attention of the one before; importance is written",
    "prune_patches": "the {kept} most important patches are kept",
}


def page(kernels: Sequence[Kernel]) -> str:
    parts = [
        INTRODUCTION.format(versions=versions(), chips="\n".join(chip_row(name) for name in CHIPS)),
        *(resources_of(source, found) for source, found in by(kernels, "source")),
        *(prediction_parts()),
    ]
    return "\n".join(parts)


def by(items: Iterable, attribute: str) -> list[tuple[str, list]]:
    """Neighbours of one value together, in the order given."""
    groups = itertools.groupby(items, key=lambda item: getattr(item, attribute))
    return [(value, list(found)) for value, found in groups]


def versions() -> str:
    nvcc = re.search(r"release \S+ V(\S+)", printed("nvcc", "--version"))
    ptxas = re.search(r"V(\d+\.\d+\.\d+)", printed(str(cubin.CUOBJDUMP.with_name("ptxas")), "--version"))
    assert nvcc and ptxas
    return f"nvcc {nvcc[1]} and Triton {triton.__version__} (with ptxas {ptxas[1]})"


def printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def chip_row(name: str) -> str:
    chip = CHIPS[name]
    sizes = (chip.registers, chip.shared, chip.shared_of_block, 32 * chip.warps, chip.blocks)
    return row(name, *sizes)


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(titles: Sequence[str], words: Sequence[str], rows: Iterable[str]) -> str:
    """Columns whose titles are in `words` are flush left, the others flush right."""
    return "\n".join([row(*titles), row(*("---" if title in words else "---:" for title in titles)), *rows])


def resources_of(source: str, kernels: Sequence[Kernel]) -> str:
    return f"## {source}\n\n{table(RESOURCES, WORDS, map(resources_row, kernels))}\n"


def resources_row(kernel: Kernel) -> str:
    blocks, limit = resident_blocks(kernel)
    known = kernel.dynamic_shared is not None
    shared = kernel.static_shared + (kernel.dynamic_shared or 0)
    most = "" if known else "≤ "
    return row(
        f"`{kernel.name}`<br>{kernel.use}".removesuffix("<br>"),
        kernel.architecture,
        kernel.threads,
        kernel.registers,
        shared if known else "at launch",
        kernel.tensor_cores,
        f"{most}{100 * occupancy(kernel):.0f} %",
        f"{most}{blocks}, {limit}",
    )


def prediction_parts() -> list[str]:
    machine = predicted.H200
    parts = [
        PREDICTIONS.format(
            batch=predicted.BATCH,
            patches=predicted.PATCHES,
            rows=predicted.ROWS,
            heads=predicted.HEADS,
            joints=predicted.JOINTS,
            machine=machine.name,
            copy=f"{machine.bytes_per_second / 1e12:.1f}",
            flops=f"{machine.flops_per_second / 1e12:.0f}",
            exps=f"{machine.exps_per_second / 1e12:.2f}",
            multiprocessors=machine.multiprocessors,
            exps_per_clock=machine.exps_per_clock,
            clock=f"{machine.clock / 1e9:.3f}",
        )
    ]
    for op, kernels in by(predicted.predictions(), "op"):
        about = LAYERS[op].format(kept=predicted.KEPT)
        rows = [prediction_row(kernel) for kernel in kernels]
        rows += [total_row(direction, found) for direction, found in by(kernels, "direction")]
        parts.append(f"### {op}, width {kernels[0].width}\n\n{about.capitalize()}.\n\n{table(TIMES, WORDS, rows)}\n")
    return parts


def prediction_row(kernel: predicted.Prediction) -> str:
    seconds = kernel.seconds(predicted.H200)
    least, _ = kernel.bound(predicted.H200)
    return row(
        f"{kernel.direction}: {kernel.kernel}",
        f"{kernel.bytes / 1e6:.1f}",
        f"{kernel.flops / 1e9:.1f}",
        f"{kernel.exps / 1e6:.1f}",
        *(f"{1e6 * seconds[stream]:.1f}" for stream in ("memory", "products", "exponentials")),
        f"{1e6 * least:.1f}",
    )


def total_row(direction: str, kernels: Sequence[predicted.Prediction]) -> str:
    least = sum(kernel.bound(predicted.H200)[0] for kernel in kernels)
    return row(f"**{direction}**", *[""] * 6, f"**{1e6 * least:.1f}**")
