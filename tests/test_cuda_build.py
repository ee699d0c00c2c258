"""The module of CUDA kernels, built for every GPU the library names, loads without one."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from liftbyimage._extension import CUDA_MISSING

OPS = [
    f"{op}_{direction}"
    for op in ("pose_guided_attention", "prune_patches", "sample_context")
    for direction in ("forward", "backward")
]


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
