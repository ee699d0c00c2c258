"""What this installation can do: versions, which backend serves each op, what is missing and its cure."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

import liftbyimage

# What some commands need and an installation without extras lacks: the package, and what for.
OPTIONAL = {
    "onnxruntime": "2D pose models in ONNX files",
    "h5py": "source mpi-inf-3dhp-test",
    "tensorboard": "curves of training in TensorBoard",
}
_ISAS = ("DEFAULT", "AVX2", "AVX512")  # as the module's build and torch spell them, from narrow to wide
REBUILD = "`pip install --no-build-isolation -e .`"


def report() -> dict[str, Any]:
    """Everything `liftbyimage doctor` shows, as plain values.

    Returns:
        A dict of

        - ``versions``: name to version, None where absent;
        - ``extension``: the compiled module's build information, None where it is not built;
        - ``demanded_backend``: LIFTBYIMAGE_BACKEND or None;
        - ``devices``: those whose tensors the ops were asked about;
        - ``ops``: one row per op and backend in the order of choice, with ``op``, ``backend``,
          ``batch_independent`` and per device ``why_not`` (None: it can) and ``chosen`` (it does serve);
        - ``missing``: rows of ``what`` and ``cure``.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    result: dict[str, Any] = {
        "versions": _versions(),
        "extension": None,
        "demanded_backend": os.environ.get("LIFTBYIMAGE_BACKEND") or None,
        "devices": devices,
        "ops": [],
        "missing": [],
    }
    try:
        from liftbyimage import _extension
    except ImportError as error:  # built against another torch: exactly what a doctor is called for
        result["missing"].append({"what": str(error), "cure": REBUILD})
        return result
    if _extension.CPU_MISSING is None:
        from liftbyimage import _C

        result["extension"] = dict(_C.build_info())
    result["ops"] = [row for op in _sample_calls("cpu") for row in _rows(op, devices)]
    result["missing"] = [*_missing(_extension.CPU_MISSING, _extension.CUDA_MISSING), *_narrow(result["extension"])]
    return result


def render(findings: dict[str, Any]) -> RenderableType:
    """The report as rich tables."""
    versions = Table(title="versions", title_justify="left", show_header=False, box=None)
    for name, version in findings["versions"].items():
        versions.add_row(name, version or "[dim]none[/]")
    build = findings["extension"]
    stated = ", ".join(f"{key} {value}" for key, value in build.items()) if build else "[dim]not built[/]"
    versions.add_row("C++ extension", stated)
    parts: list[RenderableType] = [versions]
    if findings["ops"]:
        parts += [Text(), _ops_table(findings)]
    if findings["demanded_backend"]:
        parts.append(Text(f"LIFTBYIMAGE_BACKEND demands {findings['demanded_backend']!r} for every op."))
    parts.append(Text())
    parts += [
        Text.assemble(("missing: ", "bold"), f"{row['what']}\n", ("   cure: ", "bold"), row["cure"])
        for row in findings["missing"]
    ] or [Text("Nothing is missing.")]
    return Group(*parts)


def print_report(console: Console, findings: dict[str, Any]) -> None:
    console.print(render(findings))


def _ops_table(findings: dict[str, Any]) -> Table:
    table = Table(title="ops and their backends, in the order of choice", title_justify="left")
    for column in ("op", "backend", *(f"{device} tensors" for device in findings["devices"])):
        table.add_column(column, overflow="fold")
    table.add_column("batch independent", justify="center")
    previous = None
    for row in findings["ops"]:
        if previous not in (None, row["op"]):
            table.add_section()
        cells = [_cell(row[device]) for device in findings["devices"]]
        table.add_row(
            "" if previous == row["op"] else row["op"],
            row["backend"],
            *cells,
            "yes" if row["batch_independent"] else "no",
        )
        previous = row["op"]
    return table


def _cell(status: dict[str, Any]) -> Text:
    if status["why_not"] is not None:
        return Text(status["why_not"], style="dim")
    return Text("serves (chosen)", style="bold green") if status["chosen"] else Text("serves")


def _versions() -> dict[str, str | None]:
    return {
        "liftbyimage": liftbyimage.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
        "triton": _package_version("triton"),
        "CUDA toolkit (nvcc)": _nvcc_version(),
        "C++ compiler": _compiler(),
        "processor's vectors": torch.backends.cpu.get_cpu_capability(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "CPU threads": str(torch.get_num_threads()),
    }


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def _nvcc_version() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))
    if nvcc is None:
        return None
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release ([\d.]+)", run.stdout)
    return found.group(1) if found else None


def _sample_calls(device: str) -> dict[str, tuple[Tensor, ...]]:
    """Small tensor arguments of every op, in its own order."""
    batch, heads, joints, patches, dim = 1, 2, 3, 8, 16
    query = torch.zeros(batch, heads, joints, dim, device=device)
    key = torch.zeros(batch, 1, patches, dim, device=device)  # [B, 1, P, D], the head that all share
    rows = torch.zeros(batch, patches, dim, device=device)  # [B, P, D]
    importance = torch.zeros(batch, patches, device=device)
    return {
        "attend_patches": (query, key, key),
        "pose_guided_attention": (query, key, key, torch.zeros_like(query), rows),
        "guide_patches": (query, rows),
        "prune_patches": (rows, importance),
        "joint_queries": (rows,),
        "update_joints": (rows, query),
        "sample_context": (torch.zeros(batch, 1, joints, heads, 4, 2, device=device),),
        "residual_context": (rows,),
        "attend_tokens": (rows.repeat(1, 1, 3),),
        "residual_attention": (rows,),
        "residual_feed_forward": (rows,),
    }


def _rows(op: str, devices: list[str]) -> list[dict[str, Any]]:
    from liftbyimage.ops._dispatch import demanded_backend, first_choice
    from liftbyimage.ops._explain import backends_of

    backends = backends_of(op)
    rows: list[dict[str, Any]] = [
        {"op": op, "backend": backend.name, "batch_independent": backend.batch_independent} for backend in backends
    ]
    for device in devices:
        tensors = _sample_calls(device)[op]
        reasons = [backend.why_not(*tensors) for backend in backends]
        # Not `select`, which raises where the demanded backend cannot serve: that is to be shown.
        first = first_choice(backends, *tensors)
        assert first is not None
        chosen = demanded_backend() or first.name
        for row, reason in zip(rows, reasons, strict=True):
            row[device] = {"why_not": reason, "chosen": reason is None and row["backend"] == chosen}
    return rows


def _missing(cpu: str | None, cuda: str | None) -> list[dict[str, str]]:
    missing = []
    if cpu is not None:
        install = "" if _compiler() else "install g++ (Debian, Ubuntu: `apt-get install g++`), then "
        missing.append({"what": cpu, "cure": f"{install}{REBUILD}"})
    if cuda is not None:
        install = "" if _nvcc_version() else "install the CUDA toolkit (it brings nvcc), then "
        missing.append({"what": cuda, "cure": f"{install}{REBUILD}"})
    if _package_version("triton") is None:
        missing.append({"what": "the package triton is not installed", "cure": "`pip install triton`"})
    for package, purpose in OPTIONAL.items():
        if _package_version(package) is None:
            what = f"the package {package} is not installed; without it: no {purpose}"
            missing.append({"what": what, "cure": f"`pip install {package}`"})
    return missing


def _narrow(build: dict[str, Any] | None) -> list[dict[str, str]]:
    """Whether the module was built for narrower vectors than this processor has."""
    here = torch.backends.cpu.get_cpu_capability()
    if build is None or here not in _ISAS or _ISAS.index(build["isa"]) >= _ISAS.index(here):
        return []
    return [{"what": f"the C++ extension is built for {build['isa']}, this processor has {here}", "cure": REBUILD}]
