"""What is shipped: a source archive that builds, and a wheel that holds the package alone and works anywhere.

Without a compiler here, in seconds; `make package` runs the same tests with one, and keeps the files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import liftbyimage

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("cv2", "matplotlib", "scipy", "pandas", "h5py", "onnxruntime", "tensorboard", "typer", "rich", "yaml")
BUILT = (".so", ".pyc", ".o", ".instructions")
WITHOUT_COMPILER = "liftbyimage: no C++ compiler found; installing without the CPU kernels (liftbyimage._C)"


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("packages_into") is not None


@pytest.fixture(scope="module")
def built(
    request: pytest.FixtureRequest, compiled: bool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str]:
    """The source archive, the wheel built from it, and what the build said."""
    folder = Path(request.config.getoption("packages_into") or tmp_path_factory.mktemp("packages")).resolve()
    environment = dict(os.environ) if compiled else {**os.environ, "CXX": "/nowhere/g++"}
    _run(
        [
            sys.executable,
            "-m",
            "build",
            "--sdist",
            "--no-isolation",
            "--skip-dependency-check",
            "--outdir",
            folder,
            ROOT,
        ],
        environment,
    )
    [archive] = folder.glob("liftbyimage-*.tar.gz")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--verbose",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--no-cache-dir",
    ]
    said = _run([*pip, "--wheel-dir", folder, archive], environment, errors=subprocess.STDOUT)
    [wheel] = folder.glob("liftbyimage-*.whl")
    return archive, wheel, said


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and the packages of this environment but no repository."""
    folder = tmp_path_factory.mktemp("installed")
    _run([sys.executable, "-m", "venv", "--without-pip", folder])
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index"]
    _run([*pip, built[1]])
    site.joinpath("others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    return folder / "bin"


def _run(
    command: list[object],
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
    errors: int = subprocess.PIPE,
) -> str:
    """What a command prints; no module of the repository is at hand but what `command` names."""
    variables = {name: value for name, value in (environment or os.environ).items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    run = subprocess.run(words, env=variables, cwd=cwd, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    assert run.returncode == 0, f"{run.stdout}{run.stderr}"
    return run.stdout


def _files(*folders: str) -> set[str]:
    """The files of folders of the repository, without what was built or compiled there."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if path.suffix not in BUILT}


def test_the_source_archive_holds_what_a_build_and_the_tests_need(built: tuple[Path, Path, str]) -> None:
    with tarfile.open(built[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    single = {"LICENSE", "README.md", "CHANGELOG.md", "setup.py", "pyproject.toml", "constraints.txt", "Makefile"}
    folders = _files("liftbyimage", "csrc", "kernels", "tests", "bench", "docs", "examples")
    assert (single | folders) - held == set()
    assert [name for name in held if name.endswith(BUILT)] == []


def test_the_wheel_holds_the_package_alone(built: tuple[Path, Path, str], compiled: bool) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        held = set(wheel.namelist())
        metadata = Parser().parsestr(wheel.read(next(n for n in held if n.endswith(".dist-info/METADATA"))).decode())
    version = liftbyimage.__version__
    package = {name for name in held if not name.startswith(f"liftbyimage-{version}.dist-info/")}
    kernels = {f"liftbyimage/{name}" for name in _files("kernels")}
    native = {name for name in package if name.endswith(BUILT)}
    assert package - native == _files("liftbyimage") | kernels  # and so no `kernels`, no tests, no bench
    assert ("liftbyimage/_C.instructions" in native) == compiled
    assert any(name.endswith(".so") for name in native) == compiled
    assert f"liftbyimage-{version}.dist-info/licenses/LICENSE" in held
    assert metadata["Version"] == version
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Requires-Python"] == ">=3.10"


def test_without_a_compiler_nothing_is_built_and_it_says_so(built: tuple[Path, Path, str], compiled: bool) -> None:
    _, wheel, said = built
    assert (WITHOUT_COMPILER in said) == (not compiled)
    assert wheel.name.endswith("-py3-none-any.whl") == (not compiled)


def test_it_works_where_no_repository_is(installed: Path, compiled: bool, tmp_path: Path) -> None:
    code = (
        "import importlib.util, torch, liftbyimage.kernels, liftbyimage.ops as ops\n"
        "from liftbyimage import _extension, checkpoint, html\n"
        "importance = torch.tensor([[0.1, 0.6, 0.3]])\n"
        "kept = ops.prune_patches(torch.arange(6.0).reshape(1, 3, 2), importance, 2)\n"
        "print(kept.patches.tolist(), _extension.CPU_MISSING is None, importlib.util.find_spec('kernels'))\n"
        "print(checkpoint.load_pipeline(checkpoint.models.__path__[0] + '/../assets/demo.pt').lifter.name)\n"
        "print(bool(html.asset('page.css')), liftbyimage.__file__)\n"
    )
    *lines, last = _run([installed / "python", "-c", code], cwd=tmp_path).splitlines()
    assert lines == [f"[[[2.0, 3.0], [4.0, 5.0]]] {compiled} None", "lift-by-image"]
    assert last == f"True {next(installed.parent.rglob('liftbyimage/__init__.py'))}"
    for program in ([installed / "liftbyimage"], [installed / "python", "-m", "liftbyimage"]):
        assert _run([*program, "--version"], cwd=tmp_path) == f"liftbyimage {liftbyimage.__version__}\n"


def test_the_compiled_wheel_runs_the_demonstration(installed: Path, compiled: bool, tmp_path: Path) -> None:
    if not compiled:
        pytest.skip("the wheel of this run holds no compiled module; make package runs this one")
    shown = _run([installed / "liftbyimage", "demo", "--people", 1], cwd=tmp_path)
    assert "1 pictures are in demo-output/" in shown
    assert (tmp_path / "demo-output" / "person-1.png").is_file()
    findings = json.loads(_run([installed / "liftbyimage", "doctor", "--json"], cwd=tmp_path))
    assert findings["extension"]["march"] == (os.environ.get("LIFTBYIMAGE_MARCH") or "native")
    assert {row["cpu"]["why_not"] for row in findings["ops"] if row["backend"] == "cpu"} == {None}


@pytest.mark.parametrize("module", ["liftbyimage", "liftbyimage.ops", "liftbyimage.nn", "liftbyimage.models"])
def test_what_an_import_does_not_load(module: str) -> None:
    loaded = (
        f"import sys, torch; before = set(sys.modules); import {module}\n"
        f"print(sorted(set({HEAVY!r}) & (set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_the_package_itself_is_light() -> None:
    code = "import sys, liftbyimage; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_processor_that_the_compiler_does_not_know_is_said_in_a_sentence() -> None:
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        pytest.skip("no C++ compiler is on PATH")
    environment = {**os.environ, "CXX": compiler, "LIFTBYIMAGE_MARCH": "abacus"}
    run = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, env=environment, capture_output=True)
    assert run.returncode == 1
    assert run.stderr.decode().splitlines()[-1] == f"LIFTBYIMAGE_MARCH: {compiler} knows no processor 'abacus'"


def test_a_missing_module_is_a_reason_and_a_broken_one_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from liftbyimage import _extension

    assert _extension._load("liftbyimage._nowhere", "not built") == "not built"

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN2at4_ops")

    monkeypatch.setattr(_extension.importlib, "import_module", broken)
    expected = (
        r"liftbyimage._extension is built but does not load \(undefined symbol: _ZN2at4_ops\); rebuild it against"
    )
    with pytest.raises(_extension.BrokenBuild, match=f"^{expected}"):
        _extension._load("liftbyimage._extension", "not built")


def test_what_this_processor_lacks_is_said_before_the_module_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liftbyimage import _extension, _processor

    cpuinfo, record = tmp_path / "cpuinfo", tmp_path / _processor.RECORD
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx fma avx2 bmi2 f16c avx512_vnni\n")
    here = _processor.available(cpuinfo)
    assert here == ["avx", "avx2", "fma", "f16c", "bmi2", "avx512vnni"]
    assert _processor.available(tmp_path / "nowhere") is None
    cpuinfo.write_text("Features\t: neon\n")
    assert _processor.available(cpuinfo) is None

    monkeypatch.setattr(_extension, "available", lambda: here)
    _extension._require_processor(record)  # an older build left no record
    record.write_text("avx avx2 avx512vnni\n")
    _extension._require_processor(record)
    record.write_text("avx avx512f avx512vl\n")
    message = (
        "liftbyimage._C was built for a processor with avx512f, avx512vl, which this one lacks; rebuild it here, or "
        "with LIFTBYIMAGE_MARCH=x86-64-v3 for both"
    )
    with pytest.raises(_extension.BrokenBuild) as refused:
        _extension._require_processor(record)
    assert str(refused.value) == message
    monkeypatch.setattr(_extension, "available", lambda: None)
    _extension._require_processor(record)  # a system that does not say what its processor has
