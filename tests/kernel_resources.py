"""What every GPU kernel needs of the chip, found by compiling it without a GPU, and whether that fits.

    python tests/kernel_resources.py                                        as JSON
    python tests/kernel_resources.py --every                                the Triton sizes that no model runs at, too
    python tests/kernel_resources.py --write docs/kernels/resources.md      as a page, with predicted times

CUDA sources are compiled by nvcc and launched as `cuda_launches` records; Triton kernels are compiled as `aot_triton`
records their launches.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import aot_triton
import cubin
import cuda_launches
import proxy_fences
import torch

from liftbyimage._files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CUDA_ARCHITECTURES = ("sm_80", "sm_90a")
HOPPER_SOURCES = ("tensor_attention.cu", "tensor_gradient.cu")  # as in setup.py: for sm_90a alone
OTHERS_SOURCES = ("mma_attention.cu", "mma_gradient.cu")  # as in setup.py: for all but sm_90a
TRITON_ARCHITECTURES = (80, 90)
SHORT_TYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32"}  # as Triton calls them
NVCC_MISSING = None if shutil.which("nvcc") else "nvcc is not on PATH"


@dataclass(frozen=True, order=True)
class Kernel:
    """One kernel for one architecture; shared memory in bytes per block, `stack` and `local` in bytes per thread."""

    source: str
    name: str
    use: str  # the sizes it was compiled for (Triton, with the launch function) or launched for (CUDA)
    architecture: str
    threads: int  # of a block
    registers: int  # of a thread
    static_shared: int
    dynamic_shared: int | None  # None: decided at launch, and no launch was recorded
    stack: int
    local: int
    local_accesses: int
    tensor_cores: str
    products: int | None = None  # Triton: matrix products in the kernel's text
    unfenced: int = 0  # Triton: products on tensor cores that may read a copy before it is there for them

    def __str__(self) -> str:
        return ", ".join(part for part in (f"{self.source} {self.name}", self.use, self.architecture) if part)


@dataclass(frozen=True)
class Chip:
    """One multiprocessor."""

    shared: int  # bytes
    shared_of_block: int
    registers: int = 65_536
    warps: int = 64
    blocks: int = 32
    reserved_of_block: int = 1024  # bytes of shared memory that the system keeps for itself in every block


CHIPS = {
    "sm_80": Chip(shared=164 * 1024, shared_of_block=163 * 1024),
    "sm_90a": Chip(shared=228 * 1024, shared_of_block=227 * 1024),
}
NONE = {"sm_80": "none", "sm_90a": "none"}
WARPS = {"sm_80": "HMMA", "sm_90a": "HMMA"}
WARP_GROUPS = {"sm_80": "HMMA", "sm_90a": "HGMMA"}
MIXED = {"sm_80": "HMMA", "sm_90a": "HGMMA|HGMMA+HMMA"}
# Which tensor-core instructions the kernels of a source use. The first pattern found in a kernel's name or use decides.
EXPECTED = {
    "csrc/cuda/tensor_attention.cu": {"combine_kernel": NONE, "": {"sm_90a": "HGMMA"}},
    "csrc/cuda/tensor_gradient.cu": {"": {"sm_90a": "HGMMA"}},
    "csrc/cuda/mma_attention.cu": {"combine_kernel": NONE, "": {"sm_80": "HMMA"}},
    "csrc/cuda/mma_gradient.cu": {"": {"sm_80": "HMMA"}},
    "csrc/cuda/pose_guided_attention.cu": {"": NONE},
    "csrc/cuda/prune_patches.cu": {"": NONE},
    "csrc/cuda/sample_context.cu": {"": NONE},
    "kernels/_attention.py": {"fp32": NONE, "per head": MIXED, "bf16": WARP_GROUPS},
    # Hopper's own instruction needs 64 rows; the tokens of a sample are fewer.
    "kernels/attend_tokens.py": {"fp32": NONE, "tokens 64": WARP_GROUPS, "bf16": WARPS},
    "kernels/_layer_norm.py": {"": NONE},
    # Few rows (a batch of 1) fill no 64.
    "kernels/_linear.py": {"fp32": NONE, " 1 ×": WARPS, "bf16": WARP_GROUPS},
    "kernels/_heads.py": {"fp32": NONE, " 1 ×": WARPS, "bf16": MIXED},
    "kernels/prune_patches.py": {"": NONE},
    "kernels/sample_context.py": {"": NONE},
}


def problems(kernel: Kernel) -> list[str]:
    """What does not fit, or is not as intended."""
    chip = CHIPS[kernel.architecture]
    shared = kernel.static_shared + (kernel.dynamic_shared or 0)
    registers = kernel.threads * kernel.registers
    expected = expected_tensor_cores(kernel)
    checks = {
        f"stack frame of {kernel.stack} bytes": kernel.stack > 0,
        f"{kernel.local} bytes of local memory": kernel.local > 0,
        f"{kernel.local_accesses} loads and stores of local memory": kernel.local_accesses > 0,
        f"{shared} bytes of shared memory, {chip.shared_of_block} are there": shared > chip.shared_of_block,
        f"{registers} registers of a block, {chip.registers} are there": registers > chip.registers,
        f"{kernel.unfenced} products behind a copy without a proxy fence": kernel.unfenced > 0,
        f"tensor cores: expected {expected}, got {kernel.tensor_cores}": kernel.tensor_cores not in expected.split("|"),
    }
    return [f"{kernel}: {text}" for text, found in checks.items() if found]


def expected_tensor_cores(kernel: Kernel) -> str:
    for pattern, instructions in EXPECTED.get(kernel.source, {}).items():
        if pattern in f"{kernel.name} {kernel.use}":
            return instructions[kernel.architecture]
    return "an entry in EXPECTED"


def resident_blocks(kernel: Kernel) -> tuple[int, str]:
    """Blocks that one multiprocessor holds at a time, and what allows no more."""
    chip = CHIPS[kernel.architecture]
    warps = -(-kernel.threads // 32)
    registers_of_warp = round_up(32 * kernel.registers, 256)
    # Each of the four schedulers has a quarter of the registers, and whole warps.
    warps_by_registers = 4 * (chip.registers // 4 // registers_of_warp)
    shared = round_up(kernel.static_shared + (kernel.dynamic_shared or 0) + chip.reserved_of_block, 128)
    limits = {
        "warps": chip.warps // warps,
        "registers": warps_by_registers // warps,
        "shared memory": chip.shared // shared,
        "blocks": chip.blocks,
    }
    fewest = min(limits, key=lambda name: limits[name])
    return limits[fewest], fewest


def occupancy(kernel: Kernel) -> float:
    blocks, _ = resident_blocks(kernel)
    return blocks * -(-kernel.threads // 32) / CHIPS[kernel.architecture].warps


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def nvcc_cubin(source: Path, architecture: str, *flags: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.cubin"
        command = ["nvcc", "-std=c++17", "-O3", "-Werror=all-warnings", f"-arch={architecture}", *flags]
        done = subprocess.run([*command, "-cubin", str(source), "-o", str(target)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc does not compile {source.name} for {architecture}:\n{done.stderr}")
        return target.read_bytes()


def architectures_of(source: Path) -> tuple[str, ...]:
    if source.name in OTHERS_SOURCES:
        return ("sm_80",)
    return ("sm_90a",) if source.name in HOPPER_SOURCES else CUDA_ARCHITECTURES


def cuda_kernels(source: Path) -> list[Kernel]:
    found = [usage for name in architectures_of(source) for usage in cubin.read(nvcc_cubin(source, name))]
    names = short_names([usage.symbol for usage in found])
    path = str(source.relative_to(ROOT))
    kernels = [kernel_of(usage, path, name, "", None) for usage, name in zip(found, names, strict=True)]
    if source.name not in cuda_launches.CALLS:
        return kernels
    use, _ = cuda_launches.CALLS[source.name]
    launches = largest_launches(source)
    return [
        as_launched(kernel, use, launches[kernel.name]) if kernel.name in launches else kernel for kernel in kernels
    ]


def largest_launches(source: Path) -> dict[str, cuda_launches.Launch]:
    """Of each kernel's recorded launches, the one with most shared memory."""
    launches = cuda_launches.recorded(source, architectures_of(source)[0])
    names = short_names([launch.symbol for launch in launches])
    ascending = sorted(zip(names, launches, strict=True), key=lambda found: found[1].shared)
    return dict(ascending)


def as_launched(kernel: Kernel, use: str, launch: cuda_launches.Launch) -> Kernel:
    if launch.threads > kernel.threads:
        raise ValueError(f"{kernel}: compiled for at most {kernel.threads} threads, launched with {launch.threads}")
    return dataclasses.replace(kernel, use=use, threads=launch.threads, dynamic_shared=launch.shared)


def triton_kernels(every: bool, number: int, architecture: int) -> list[Kernel]:
    launch = aot_triton.launches(every)[number]
    compiled = aot_triton.compiled(launch, architecture)
    [usage] = cubin.read(compiled.asm["cubin"])
    assert usage.threads == 32 * compiled.metadata.num_warps
    kernel = kernel_of(
        usage,
        str(launch.source.relative_to(ROOT)),
        launch.kernel.__name__,
        f"{launch.call}, {launch.configuration}",
        compiled.metadata.shared,
    )
    products = compiled.asm["ttir"].count("tt.dot ")
    unfenced = len(proxy_fences.unfenced_products(compiled.asm["ptx"]))
    return [dataclasses.replace(kernel, products=products, unfenced=unfenced)]


def kernel_of(usage: cubin.Usage, source: str, name: str, use: str, dynamic_shared: int | None) -> Kernel:
    return Kernel(
        source,
        name,
        use,
        usage.architecture,
        usage.threads,
        usage.registers,
        usage.static_shared,
        dynamic_shared,
        usage.stack,
        usage.local,
        usage.local_accesses,
        usage.tensor_cores,
    )


def short_names(symbols: Sequence[str]) -> list[str]:
    """`context_kernel<bf16>`: demangled, without namespaces, return type and parameters."""
    done = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True) if symbols else None
    return [short_name(line) for line in done.stdout.splitlines()] if done else []


def short_name(demangled: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|liftbyimage::cuda::", "", demangled.removeprefix("void "))
    for type_name, short in SHORT_TYPES.items():
        name = re.sub(rf"\b{type_name}\b", short, name)
    depth = 0
    for position, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:position]
    return name


def compile_task(task: tuple) -> list[Kernel]:
    torch.set_num_threads(1)
    function, *arguments = task
    return function(*arguments)


def all_kernels(every: bool, jobs: int) -> list[Kernel]:
    """Sorted; without nvcc, those of Triton alone."""
    tasks: list[tuple] = [
        (triton_kernels, every, number, architecture)
        for number in range(len(aot_triton.launches(every)))
        for architecture in TRITON_ARCHITECTURES
    ]
    if NVCC_MISSING is None:
        tasks = [(cuda_kernels, source) for source in CUDA_SOURCES] + tasks  # the longest first
    with ProcessPoolExecutor(jobs) as pool:
        return sorted(kernel for found in pool.map(compile_task, tasks) for kernel in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--every", action="store_true", help="also the Triton sizes that no model runs at")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page instead of JSON")
    arguments = parser.parse_args()
    if arguments.write and NVCC_MISSING:
        raise SystemExit(f"kernel_resources: {NVCC_MISSING}")
    kernels = all_kernels(arguments.every, arguments.jobs)
    if arguments.write:
        from kernel_resources_page import page

        text = page(kernels)
        write_atomically(arguments.write, lambda file: file.write(text.encode()))
    else:
        json.dump([dataclasses.asdict(kernel) for kernel in kernels], sys.stdout, indent=1)
    sys.exit("\n".join(text for kernel in kernels for text in problems(kernel)) or 0)


if __name__ == "__main__":
    main()
