"""What an installation holds: no top-level `kernels`, and a working package where no compiler is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DESCRIBE = """
import json
from distutils.core import run_setup
from setuptools import setup
distribution = run_setup("setup.py", stop_after="init")
modules = [extension.name for extension in distribution.ext_modules or []]
print(json.dumps({"packages": distribution.packages, "dirs": distribution.package_dir, "modules": modules}))
"""


def describe(**environment):
    result = subprocess.run(
        [sys.executable, "-c", DESCRIBE], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    *printed, facts = result.stdout.strip().splitlines()
    return printed, json.loads(facts)


def test_only_liftbyimage_is_installed():
    _, facts = describe()
    assert all(name.split(".")[0] == "liftbyimage" for name in facts["packages"])
    assert facts["dirs"]["liftbyimage.kernels"] == "kernels"
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "liftbyimage").rglob("__init__.py")}
    assert set(facts["packages"]) == found | {"liftbyimage.kernels"}


def test_no_top_level_kernels_can_be_imported(tmp_path):
    code = "import importlib.util, liftbyimage.kernels; print(importlib.util.find_spec('kernels'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == "None", result.stderr


def test_without_a_compiler_nothing_is_built_and_it_says_so():
    printed, facts = describe(CXX="/nowhere/g++")
    assert facts["modules"] == []
    assert "liftbyimage: no C++ compiler found; installing without the CPU kernels (liftbyimage._C)" in printed


def test_a_missing_module_is_a_reason_and_a_broken_one_an_error(monkeypatch):
    from liftbyimage import _extension

    assert _extension._load("liftbyimage._nowhere", "not built") == "not built"

    def broken(name):
        raise ImportError("undefined symbol: _ZN2at4_ops")

    monkeypatch.setattr(_extension.importlib, "import_module", broken)
    expected = (
        r"liftbyimage._extension is built but does not load \(undefined symbol: _ZN2at4_ops\); rebuild it against"
    )
    with pytest.raises(ImportError, match=f"^{expected}"):
        _extension._load("liftbyimage._extension", "not built")
