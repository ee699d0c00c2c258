"""The CUDA sources compile for every GPU the library names, within limits; the module loads without one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from liftbyimage._extension import CUDA_MISSING

CUDA_SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
ARCHITECTURES = ["sm_80", "sm_90a"]
KERNELS = {
    "pose_guided_attention": 5 * 3,  # five kernels, three element types
    "prune_patches": 3 + 1,  # selection for three types of importance; the scatter moves bytes
    "sample_context": 3 * 3,  # three kernels, three element types
}
MAX_REGISTERS = 168  # three blocks of 128 threads per multiprocessor
OPS = [f"{op}_{direction}" for op in KERNELS for direction in ("forward", "backward")]


@pytest.fixture(scope="module", params=KERNELS)
def assembled(request, tmp_path_factory):
    """A source and what ptxas says of each kernel: (architecture, stack, stores, loads, registers, rest)."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    target = tmp_path_factory.mktemp("cuda_build") / f"{request.param}.o"
    command = [nvcc, "-std=c++17", "-O3", "-Xptxas=-v", "-Werror=all-warnings", "--threads=2"]
    command += [f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}" for name in ARCHITECTURES]
    command += ["-c", str(CUDA_SOURCES / f"{request.param}.cu"), "-o", str(target)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    reports = re.findall(
        r"Compiling entry function '\S+' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        compiled.stderr,
        flags=re.DOTALL,
    )
    return request.param, reports


def test_every_kernel_fits_without_spilling(assembled):
    source, reports = assembled
    for architecture in ARCHITECTURES:
        assert sum(report[0] == architecture for report in reports) == KERNELS[source]
    for architecture, *local_bytes, registers, rest in reports:
        assert local_bytes == ["0", "0", "0"], f"{source} on {architecture}: stack frame or spills {local_bytes}"
        assert int(registers) <= MAX_REGISTERS, f"{source} on {architecture}: {registers} registers"
        # All shared memory is dynamic; the emulation runs the widest shapes against the limit of sm_80.
        assert "smem" not in rest, f"{source} on {architecture}: static shared memory ({rest})"


@pytest.mark.skipif(CUDA_MISSING is not None, reason=str(CUDA_MISSING))
class TestModule:
    @pytest.mark.parametrize("op", OPS)
    def test_registers_its_ops(self, op):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"liftbyimage::{op}", "CUDA")

    def test_says_how_it_was_built(self):
        from liftbyimage import _cuda

        info = _cuda.build_info()
        assert re.fullmatch(r"\d+\.\d+", info["cuda"])
        assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", name) for name in info["architectures"].split("+"))

    def test_links_against_the_library_that_knows_cuda_streams(self):
        """libtorch pulls in libtorch_cuda; without it the weak symbol of the CUDA stream would stay null."""
        from liftbyimage import _cuda

        readelf = shutil.which("readelf")
        if readelf is None:
            pytest.skip("readelf is not on PATH")
        dynamic = subprocess.run([readelf, "-d", _cuda.__file__], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"NEEDED.*\[(\S+)\]", dynamic))
        assert {"libtorch.so", "libtorch_cpu.so"} <= needed
        assert not any(name.startswith("libcudart") for name in needed), "cudart must be linked statically"

    def test_refuses_cpu_tensors_in_a_sentence(self):
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        forward = torch.ops.liftbyimage.prune_patches_forward.default
        with pytest.raises(RuntimeError, match="importance must be on the CUDA device of the first argument"):
            forward.redispatch(cuda, torch.zeros(1, 4, 2), torch.zeros(1, 4), 2)
