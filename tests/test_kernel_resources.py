"""Every CUDA and Triton kernel, compiled without a GPU: it fits, spills nothing, uses tensor cores as intended."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import aot_triton
import cubin
import cuda_launches
import kernel_predictions as predicted
import kernel_resources
import proxy_fences
import triton
import triton.language as tl
from kernel_resources import (
    CHIPS,
    CUDA_ARCHITECTURES,
    CUDA_SOURCES,
    EXPECTED,
    NVCC_MISSING,
    ROOT,
    Kernel,
    architectures_of,
    problems,
    resident_blocks,
)
from liftbyimage.kernels import _resources
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from liftbyimage.ops._dispatch import rows_held_bytes

PAGE = ROOT / "docs" / "kernels" / "resources.md"
HERE = Path(__file__).resolve().parent
needs_nvcc = pytest.mark.skipif(NVCC_MISSING is not None, reason=str(NVCC_MISSING))
FITTING = Kernel("csrc/cuda/prune_patches.cu", "some_kernel", "", "sm_90a", 256, 128, 0, 0, 0, 0, 0, "none")


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Compiled in a process of its own: in this one Triton may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "kernel_resources.py"), "--jobs", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return [Kernel(**kernel) for kernel in json.loads(done.stdout)]


def of_triton(kernels: list[Kernel]) -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.source.startswith("kernels/")]


def of_cuda(kernels: list[Kernel]) -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.source.startswith("csrc/")]


def test_triton_kernels_fit(kernels: list[Kernel]) -> None:
    found = of_triton(kernels)
    assert {kernel.use.split(".")[0] for kernel in found} == {
        "attend_patches",
        "attend_tokens",
        "joint_queries",
        "pose_guided_attention",
        "prune_patches",
        "residual_attention",
        "residual_feed_forward",
        "sample_context",
        "update_joints",
    }
    assert {kernel.source for kernel in found} == {source for source in EXPECTED if source.startswith("kernels/")}
    assert [text for kernel in found for text in problems(kernel)] == []


@needs_nvcc
def test_cuda_kernels_fit(kernels: list[Kernel]) -> None:
    found = of_cuda(kernels)
    sources = {str(source.relative_to(ROOT)) for source in CUDA_SOURCES}
    assert sources == {source for source in EXPECTED if source.startswith("csrc/")}
    pairs = {(str(one.relative_to(ROOT)), name) for one in CUDA_SOURCES for name in architectures_of(one)}
    assert {(kernel.source, kernel.architecture) for kernel in found} == pairs
    assert [text for kernel in found for text in problems(kernel)] == []
    recorded = {kernel.source for kernel in found if kernel.dynamic_shared is not None}
    assert recorded == {f"csrc/cuda/{name}" for name in cuda_launches.CALLS}


@needs_nvcc
def test_launches_are_recorded_as_they_are() -> None:
    launches = cuda_launches.recorded(ROOT / "csrc" / "cuda" / "prune_patches.cu", "sm_80")
    names = kernel_resources.short_names([launch.symbol for launch in launches])
    found = {name: (launch.threads, launch.shared) for name, launch in zip(names, launches, strict=True)}
    keys_histogram_sums_found = 4 * 3072 + 4 * 256 + 8 * (512 // 32) + 4 * 3
    selects = {f"select_kernel<{dtype}>": (512, keys_histogram_sums_found) for dtype in ("fp32", "fp16", "bf16")}
    assert {name: size for name, size in found.items() if name != "scatter_kernel"} == selects
    assert found["scatter_kernel"] == (256, 4 * 64)


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "updating"), [("mma_attention.cu", "scatter_kernel"), ("mma_gradient.cu", "gradient_kernel")]
)
def test_shared_memory_of_held_rows_is_what_the_choice_of_a_backend_counts_with(
    kernels: list[Kernel], source: str, updating: str
) -> None:
    of_source = [kernel for kernel in kernels if kernel.source.endswith(source) and updating in kernel.name]
    found = {kernel.name: kernel.dynamic_shared for kernel in of_source if kernel.dynamic_shared is not None}
    for columns, width in ((1, 48), (3, 184), (4, 256)):
        held = 2 if width == 256 else 1
        of_width = [shared for name, shared in found.items() if f"<bf16, {columns}, " in name]
        assert of_width == [rows_held_bytes(width, held)]


def test_a_launch_beyond_the_bounds_of_its_kernel_is_refused() -> None:
    launch = cuda_launches.Launch("some_kernel", 128, 48)
    launched = kernel_resources.as_launched(FITTING, "some size", launch)
    assert (launched.threads, launched.dynamic_shared, launched.use) == (128, 48, "some size")
    with pytest.raises(ValueError, match="compiled for at most 256 threads, launched with 512"):
        kernel_resources.as_launched(FITTING, "some size", dataclasses.replace(launch, threads=512))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 8}, "stack frame of 8 bytes"),
        ({"local": 16}, "16 bytes of local memory"),
        ({"local_accesses": 2}, "2 loads and stores of local memory"),
        ({"static_shared": 1, "dynamic_shared": 232_448}, "232449 bytes of shared memory, 232448 are there"),
        ({"architecture": "sm_80", "dynamic_shared": 166_913}, "166913 bytes of shared memory, 166912 are there"),
        ({"threads": 512, "registers": 136}, "69632 registers of a block, 65536 are there"),
        ({"unfenced": 4}, "4 products behind a copy without a proxy fence"),
        ({"tensor_cores": "HGMMA"}, "tensor cores: expected none, got HGMMA"),
        ({"source": "csrc/cuda/new.cu"}, "tensor cores: expected an entry in EXPECTED, got none"),
    ],
)
def test_every_number_that_is_looked_at_can_fail(change: dict, message: str) -> None:
    assert problems(FITTING) == []
    kernel = dataclasses.replace(FITTING, **change)
    assert problems(kernel) == [f"{kernel}: {message}"]


def cuda_usage(folder: Path, text: str, architecture: str, *flags: str) -> list[cubin.Usage]:
    source = folder / "kernels.cu"
    source.write_text(text)
    return cubin.read(kernel_resources.nvcc_cubin(source, architecture, *flags))


@needs_nvcc
@pytest.mark.parametrize("architecture", CUDA_ARCHITECTURES)
class TestReadings:
    """What is read from machine code that was made to have it."""

    def test_spills(self, tmp_path: Path, architecture: str) -> None:
        text = """__global__ void __launch_bounds__(96) spilling(float* x) {
            float v[64];
            #pragma unroll
            for (int i = 0; i < 64; ++i) v[i] = x[threadIdx.x + 96 * i];
            #pragma unroll
            for (int round = 0; round < 8; ++round)
            #pragma unroll
              for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i * 7 + round) % 64] + v[(i + 1) % 64];
            #pragma unroll
            for (int i = 0; i < 64; ++i) x[threadIdx.x + 96 * i] = v[i];
        }"""
        [roomy] = cuda_usage(tmp_path, text, architecture)
        assert (roomy.stack, roomy.local, roomy.local_accesses, roomy.threads) == (0, 0, 0, 96)
        [tight] = cuda_usage(tmp_path, text.replace("__launch_bounds__(96) ", ""), architecture, "-maxrregcount=32")
        assert tight.registers == 32 < roomy.registers
        assert tight.stack > 0 and tight.local_accesses > 0
        assert tight.threads == 1024  # it does not say
        texts = problems(kernel_resources.kernel_of(tight, FITTING.source, "spilling", "", None))
        assert [re.sub(r"^.*?: |\d+", "", text) for text in texts] == [
            "stack frame of  bytes",
            " loads and stores of local memory",
        ]

    def test_shared_memory_and_empty_sources(self, tmp_path: Path, architecture: str) -> None:
        text = """__global__ void __launch_bounds__(64, 2) turning(float* x) {
            __shared__ float turned[3000];
            turned[threadIdx.x] = x[threadIdx.x];
            __syncthreads();
            x[threadIdx.x] = turned[63 - threadIdx.x];
        }
        __global__ void adding(float* x) { x[threadIdx.x] += 1; }"""
        found = {usage.symbol: usage.static_shared for usage in cuda_usage(tmp_path, text, architecture)}
        assert found == {"_Z7turningPf": 12_000, "_Z6addingPf": 0}
        assert cuda_usage(tmp_path, "// nothing for this architecture", architecture) == []


def large_product(pointer):
    rows, columns = tl.arange(0, 128), tl.arange(0, 512)
    x = tl.load(pointer + rows[:, None] * 512 + columns[None, :])
    y = tl.load(pointer + columns[:, None] * 128 + rows[None, :])
    tl.store(pointer + rows[:, None] * 128 + rows[None, :], tl.dot(x, y).to(tl.float16))


@pytest.mark.parametrize("architecture", kernel_resources.TRITON_ARCHITECTURES)
def test_a_triton_kernel_with_too_large_tiles_does_not_fit(architecture: int) -> None:
    options = {"num_warps": 16, "enable_fp_fusion": True}
    source = triton.compiler.ASTSource(fn=JITFunction(large_product), signature={"pointer": "*fp16"}, constexprs={})
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    [usage] = cubin.read(compiled.asm["cubin"])
    kernel = kernel_resources.kernel_of(usage, "kernels/_attention.py", "bf16", "", compiled.metadata.shared)
    assert kernel.dynamic_shared > CHIPS[kernel.architecture].shared_of_block
    assert f"{kernel.dynamic_shared} bytes of shared memory" in " ".join(problems(kernel))


def pipelined_product(pointer, stop):
    rows, total = tl.arange(0, 64), tl.full([64, 64], 0, tl.float32)
    at = pointer + rows[:, None] * 64 + rows[None, :]
    for _ in range(0, stop):
        x = tl.load(at)
        total = tl.dot(x, x, total)
        at += 64 * 64
    tl.store(at, total.to(tl.float16))


def test_products_without_a_fence_are_found_in_compiled_code() -> None:
    source = triton.compiler.ASTSource(
        fn=JITFunction(pipelined_product), signature={"pointer": "*fp16", "stop": "i32"}, constexprs={},
        attrs={(0,): [["tt.divisibility", 16]]},
    )  # fmt: skip
    options = {"num_stages": 3 if _resources.fences_prefetched(9) else 1, "enable_fp_fusion": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    lines = ptx.splitlines()
    products = {number for number, line in enumerate(lines) if "wgmma.mma_async" in line}
    assert products and proxy_fences.unfenced_products(ptx) == set()
    if "cp.async.wait" in ptx:
        assert proxy_fences.unfenced_products(ptx.replace("fence.proxy.async", "")) == products


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        (["wait", "product"], {2}),
        (["wait", "fence", "product"], set()),
        (["product", "wait"], {1}),  # in the next turn
        (["product", "wait", "fence"], set()),
        (["wait", "@%p1 bra $end;", "fence", "$end:", "product"], {5}),  # past the fence
        (["wait", "bra.uni $end;", "product", "$end:", "fence"], set()),  # never reached
    ],
)
def test_every_way_to_a_product_is_looked_at(loop: list[str], expected: set[int]) -> None:
    instructions = {
        "wait": "cp.async.wait_group 0;",
        "fence": "fence.proxy.async.shared::cta;",
        "product": "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 …;",
    }
    lines = ["$loop:", *(instructions.get(line, line) for line in loop), "@!%p2 bra $loop;", "ret;"]
    assert proxy_fences.unfenced_products("\n".join(lines)) == expected


@pytest.mark.parametrize(
    ("change", "blocks", "limit"),
    [
        ({}, 2, "registers"),  # 8 warps of 4096 registers: 16 of 64 warps
        ({"registers": 32}, 8, "warps"),
        ({"registers": 129}, 1, "registers"),  # rounded up to 136: 3 warps of each scheduler
        ({"registers": 32, "static_shared": 30_000, "dynamic_shared": 36_000}, 3, "shared memory"),
        ({"registers": 32, "dynamic_shared": 76_800}, 3, "shared memory"),  # three times 76800 + 1024 = 228 KiB
        ({"registers": 32, "dynamic_shared": 76_801}, 2, "shared memory"),
        ({"architecture": "sm_80", "registers": 32, "dynamic_shared": 76_800}, 2, "shared memory"),
        ({"threads": 32, "registers": 16}, 32, "blocks"),
    ],
)
def test_resident_blocks(change: dict, blocks: int, limit: str) -> None:
    kernel = dataclasses.replace(FITTING, **change)
    assert resident_blocks(kernel) == (blocks, limit)
    assert kernel_resources.occupancy(kernel) == blocks * kernel.threads / 2048


def test_short_names() -> None:
    names = {
        "void liftbyimage::cuda::(anonymous namespace)::f<float>(liftbyimage::cuda::Params)": "f<fp32>",
        "void liftbyimage::cuda::f<__nv_bfloat16, __half>(__half*)": "f<bf16, fp16>",
        "void f<(liftbyimage::cuda::Kind)1, 48>(int, float*)": "f<(Kind)1, 48>",
        "liftbyimage::cuda::(anonymous namespace)::scatter(liftbyimage::cuda::Params)": "scatter",
        "plain": "plain",
    }
    assert {name: kernel_resources.short_name(name) for name in names} == names


def rows_of_the_page() -> list[tuple[str, str, str, str]]:
    """(source, kernel, for what, GPU) of every row."""
    found = []
    for source, section in re.findall(r"^## (\S+\.(?:cu|py))\n(.*?)(?=^## )", PAGE.read_text("utf-8"), re.M | re.S):
        for name, use, gpu in re.findall(r"^\| `(.*?)`(?:<br>)?(.*?) \| (sm_\w+) \|", section, re.M):
            found.append((source, name, use, gpu))
    return found


def test_the_page_names_the_kernels_that_are_compiled(kernels: list[Kernel]) -> None:
    compiled = [(kernel.source, kernel.name, kernel.use, kernel.architecture) for kernel in kernels]
    page = rows_of_the_page()
    if NVCC_MISSING:
        page = [row for row in page if row[0].startswith("kernels/")]
    assert page == sorted(compiled)


def test_the_page_states_the_predictions() -> None:
    from kernel_resources_page import prediction_parts

    assert "\n".join(prediction_parts()) in PAGE.read_text("utf-8")


def test_predicted_products_are_those_of_the_compiled_kernels(kernels: list[Kernel]) -> None:
    """Factored layers run the launches of `attend_patches`, with or without attention to be stored."""
    compiled = {(kernel.use, kernel.name): kernel.products for kernel in of_triton(kernels)}
    checked = [found for found in predicted.predictions() if found.op != "prune_patches"]
    assert len(checked) == 15
    for found in checked:
        op = "attend_patches" if found.op == "guide_patches" else found.op
        use = f"{op}.{found.direction}, bf16 width {found.width} shared"
        assert compiled[use, f"{found.kernel}_kernel"] == found.products, found


def test_predictions_by_hand() -> None:
    gather, scatter = predicted.predictions()[:2]
    assert gather.flops == 4 * 256 * 136 * 3072 * 256
    assert gather.exps == 256 * 136 * 3072
    assert scatter.bytes == 256 * (2 * 3072 * 256 * 2 + 2 * 136 * 256 * 2 + 136 * 4 + 3072 * 4)
    assert gather.bound(predicted.H200) == (pytest.approx(138.6e-6, rel=1e-3), "products")
    assert scatter.bound(predicted.H200) == (pytest.approx(196.3e-6, rel=1e-3), "memory")


def test_interpreted_kernels_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        aot_triton.compiled(None, 90)


@pytest.mark.parametrize("name", ["HOPPER_SOURCES", "OTHERS_SOURCES"])
def test_sources_for_some_gpus_alone_are_those_of_the_build(name):
    [line] = re.findall(rf"^{name} = (\(.*?\))", (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert line == str(getattr(kernel_resources, name)).replace("'", '"')


@needs_nvcc
@pytest.mark.parametrize("name", kernel_resources.HOPPER_SOURCES)
def test_a_build_without_hopper_has_no_kernels_for_it(name):
    source = ROOT / "csrc" / "cuda" / name
    assert cubin.read(kernel_resources.nvcc_cubin(source, "sm_80", "-DLIFTBYIMAGE_WITHOUT_SM90A")) == []
