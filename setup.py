"""Builds the native modules; everything else about the package is in pyproject.toml.

Environment: MAX_JOBS (parallel compilers), CXX (the C++ compiler), LIFTBYIMAGE_MARCH (default `native`;
`x86-64-v3` makes a build for other machines), CUDA_HOME (the CUDA toolkit; default: nvcc on PATH), TORCH_CUDA_ARCH_LIST
(as for torch, numbers only; default: sm_80, sm_90a and PTX for later GPUs).
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
HOPPER_SOURCES = ("tensor_attention.cu", "tensor_gradient.cu")  # in csrc/cuda
OTHERS_SOURCES = ("mma_attention.cu", "mma_gradient.cu")  # the same for every other GPU
PROCESSOR = runpy.run_path(str(ROOT / "liftbyimage" / "_processor.py"))


def cxx_compiler() -> str | None:
    """The C++ compiler that torch would use, or None where there is none."""
    from torch.utils.cpp_extension import get_cxx_compiler

    return shutil.which(get_cxx_compiler())


def target_march() -> str:
    return os.environ.get("LIFTBYIMAGE_MARCH") or "native"


def predefined_macros(compiler: str, march: str) -> set[str]:
    """What the compiler defines when it compiles for `march`: one macro for every instruction set."""
    command = [compiler, f"-march={march}", "-dM", "-E", "-x", "c++", os.devnull]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"LIFTBYIMAGE_MARCH: {compiler} knows no processor {march!r}")
    return set(run.stdout.split())


def vector_isa(macros: set[str]) -> str:
    """The widest instruction set of `at::vec` that the code may use."""
    if {"__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__", "__FMA__"} <= macros:
        return "AVX512"
    return "AVX2" if {"__AVX2__", "__FMA__", "__F16C__"} <= macros else "DEFAULT"


def needed_instructions(compiler: str, march: str) -> list[str]:
    """What a processor must have to run the code; what an old Linux does not list here is not asked for here."""
    macros = predefined_macros(compiler, march)
    needed = [name for name in PROCESSOR["INSTRUCTIONS"] if f"__{name.upper()}__" in macros]
    here = PROCESSOR["available"]() if march == "native" else None
    return needed if here is None else [name for name in needed if name in here]


def cpu_extensions() -> list:
    """`liftbyimage._C`: the operator schemas and their CPU kernels."""
    compiler = cxx_compiler()
    if compiler is None:
        print("liftbyimage: no C++ compiler found; installing without the CPU kernels (liftbyimage._C)")
        return []
    from torch.utils.cpp_extension import CppExtension

    march = target_march()
    isa = vector_isa(predefined_macros(compiler, march))
    sources = [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    return [
        CppExtension(
            "liftbyimage._C",
            [str(source.relative_to(ROOT)) for source in sources],
            # No -ffast-math: NaN and infinity must come through. -g0: Python's own flags may ask for debug information,
            # twenty times the code's size; function names stay, for profilers.
            extra_compile_args=[
                "-O3",
                "-g0",
                f"-march={march}",
                "-fopenmp",
                "-fvisibility=hidden",
                "-Wall",
                "-Wno-unknown-pragmas",
                f"-DCPU_CAPABILITY={isa}",
                f"-DCPU_CAPABILITY_{isa}",
                f'-DLIFTBYIMAGE_MARCH="{march}"',
            ],
            extra_link_args=["-fopenmp", *(["-Wl,--strip-debug"] if sys.platform == "linux" else [])],
        )
    ]


def nvcc() -> str | None:
    """The CUDA compiler, or None. It may be a wrapper script: asked by name, it finds its own toolkit."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def cuda_targets() -> list[str]:
    """What to generate code for: `sm_*` is machine code, `compute_*` is PTX that later GPUs translate."""
    targets = []
    for entry in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match:
            targets.append(f"sm_{match[1]}{match[2]}")
            targets += [f"compute_{match[1]}{match[2]}"] if match[3] else []
        elif entry:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries such as 9.0a or 8.0+PTX, got {entry!r}")
    return targets or ["sm_80", "sm_90a", "compute_90"]


def targets_of(source: Path) -> list[str]:
    """The targets that a source is compiled for: some are for Hopper alone, and some for all others where there are
    others."""
    targets = cuda_targets()
    others = [target for target in targets if target != "sm_90a"]
    if source.name in HOPPER_SOURCES and "sm_90a" in targets:
        return ["sm_90a"]
    return others if source.name in OTHERS_SOURCES and others else targets


def cuda_extensions() -> list:
    """`liftbyimage._cuda`: the CUDA kernels, built wherever nvcc is, GPU or not."""
    if cxx_compiler() is None or nvcc() is None:
        print("liftbyimage: no nvcc or C++ compiler found; installing without the CUDA kernels")
        return []
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cuda").iterdir())]
    # The .cu files are no `sources`: torch's BuildExtension would refuse them beside a CPU-only torch.
    return [Extension("liftbyimage._cuda", ["csrc/cuda/bindings.cpp"], depends=files)]


def compile_cuda_object(source: Path, folder: Path) -> Path:
    """The object file of one CUDA or C++ source; compiled only if the sources or the command have changed."""
    from torch.utils.cpp_extension import include_paths

    target = folder / f"{source.stem}.o"
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
    if source.suffix == ".cu":
        flags += [f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}" for name in targets_of(source)]
        flags += [] if "sm_90a" in cuda_targets() else ["-DLIFTBYIMAGE_WITHOUT_SM90A"]
    else:
        # The stable ABI of torch 2.10: the binding loads with that and every later version.
        flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
        flags += [f"-DLIFTBYIMAGE_CUDA_ARCHITECTURES={'+'.join(cuda_targets())}"]
        flags += [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    command = [str(nvcc()), *flags, "-c", str(source), "-o", str(target)]
    record = target.with_suffix(".command")
    newest = max(path.stat().st_mtime for path in source.parent.iterdir())
    if record.exists() and record.read_text() == " ".join(command) and record.stat().st_mtime > newest:
        return target
    record.unlink(missing_ok=True)
    subprocess.run(command, check=True)
    record.write_text(" ".join(command))
    return target


def link_cuda_module(objects: list[Path], target: Path) -> None:
    from torch.utils.cpp_extension import library_paths

    target.parent.mkdir(parents=True, exist_ok=True)
    # Without --no-as-needed the linker drops libtorch, and the weak symbol of the CUDA stream stays null.
    linker = ["--exclude-libs=ALL", "--no-as-needed", "-ltorch", "-ltorch_cpu", "--as-needed"]
    command = [str(nvcc()), "-shared", "-cudart=static", *map(str, objects), "-o", str(target)]
    command += [f"-L{path}" for path in library_paths()]
    subprocess.run([*command, f"-Xlinker={','.join(linker)}"], check=True)


def with_cuda_and_record(build_extension: type) -> type:
    """`build_extension` that compiles and links `liftbyimage._cuda` with nvcc alone, and writes beside `liftbyimage._C`
    which instructions it needs."""

    class Build(build_extension):
        def run(self) -> None:
            super().run()
            package = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
            needed = needed_instructions(str(cxx_compiler()), target_march())
            (package / "liftbyimage" / PROCESSOR["RECORD"]).write_text(" ".join(needed) + "\n", encoding="utf-8")

        def build_extension(self, extension: Extension) -> None:
            if extension.name != "liftbyimage._cuda":
                super().build_extension(extension)
                return
            folder = (Path(self.build_temp) / "cuda").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            sources = [path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".cpp")]
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                objects = list(pool.map(lambda source: compile_cuda_object(source, folder), sources))
            link_cuda_module(objects, Path(self.get_ext_fullpath(extension.name)))

    return Build


def build_commands(ext_modules: list) -> dict:
    if not ext_modules:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": with_cuda_and_record(BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None))}


extensions = cpu_extensions() + cuda_extensions()

setup(
    packages=[*find_packages(include=["liftbyimage", "liftbyimage.*"]), "liftbyimage.kernels"],
    package_dir={"liftbyimage.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass=build_commands(extensions),
)
