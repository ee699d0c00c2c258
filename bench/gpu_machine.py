"""The GPU of this machine, its toolkit, and why `make gpu` cannot run here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

USUAL_TOOLKIT = Path("/usr/local/cuda")
DRIVER = Path("/proc/driver/nvidia/version")
# In a process of its own, so that this one holds no memory of the GPU that is measured.
PROBE = """
import json, platform, torch
from importlib import metadata
if torch.cuda.is_available():
    print(json.dumps({
        "name": torch.cuda.get_device_name(),
        "capability": "%d.%d" % torch.cuda.get_device_capability(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": metadata.version("triton"),
    }))
"""


def environment() -> dict[str, str]:
    """That of the parts: prints at once, and finds the toolkit in its usual place too."""
    home = os.environ.get("CUDA_HOME")
    folders = [os.environ.get("PATH", os.defpath), str((Path(home) if home else USUAL_TOOLKIT) / "bin")]
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PATH": os.pathsep.join(folders)}


def find_gpu(variables: Mapping[str, str]) -> dict[str, Any] | None:
    """Name, compute capability, driver and versions; None where torch sees no GPU."""
    probe = subprocess.run([sys.executable, "-c", PROBE], env=variables, stdout=subprocess.PIPE, text=True, check=False)
    lines = probe.stdout.splitlines()
    return {**json.loads(lines[-1]), "driver": driver_version(variables)} if lines else None


def driver_version(variables: Mapping[str, str]) -> str:
    command = shutil.which("nvidia-smi", path=variables["PATH"])
    if command is not None:
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.split()[0]
    return DRIVER.read_text().splitlines()[0].partition(":")[2].strip() if DRIVER.is_file() else "unknown"


def why_not_here(gpu: Mapping[str, Any] | None, parts: Sequence[str], variables: Mapping[str, str]) -> str | None:
    if gpu is None:
        return f"needs an NVIDIA GPU, and the torch of {sys.executable} sees none"
    if "build" in parts and nvcc(variables) is None:
        return "needs nvcc to build the CUDA kernels; set CUDA_HOME to the CUDA toolkit, or put nvcc on PATH"
    return None


def nvcc(variables: Mapping[str, str]) -> str | None:
    """Where setup.py will find it."""
    home = variables.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else variables["PATH"])


def architecture(capability: str) -> str:
    """What to compile for, as TORCH_CUDA_ARCH_LIST names it: Hopper's tensor cores are used in sm_90a only."""
    return {"9.0": "9.0a"}.get(capability, capability)
