"""The documentation: every public name and every option is there, every page is in the contents, code compiles."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from browser import opened, until

from liftbyimage import cli, models, nn, ops
from liftbyimage.ops._explain import OPS, backends_of

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "examples" / "README.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("module", "page"), [(ops, "ops"), (nn, "nn"), (models, "models")])
def test_every_public_name_is_in_the_reference(module: ModuleType, page: str) -> None:
    text = (DOCS / "reference" / f"{page}.md").read_text(encoding="utf-8")
    named = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith("::: ")}
    assert set(module.__all__) - named == set()


def test_the_contents_name_every_page_once_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(DOCS))
    generated = [*importlib.import_module("site_hooks").BROUGHT, "reference/options.md"]
    contents = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    written = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(pages_in(contents)) == sorted([*written, *generated])


def pages_in(contents: list[Any] | dict[str, Any] | str) -> list[str]:
    if isinstance(contents, str):
        return [contents]
    parts = contents.values() if isinstance(contents, dict) else contents
    return [page for part in parts for page in pages_in(part)]


def test_the_table_of_backends_says_what_the_ops_have() -> None:
    table = re.findall(r"^\| (`.*) \|$", (DOCS / "backends.md").read_text(encoding="utf-8"), re.MULTILINE)
    stated = {}
    for row in table:
        names, *cells = row.split(" | ")
        for name in re.findall("`(.*?)`", names):
            assert name not in stated
            stated[name] = {
                backend
                for backend, cell in zip(("reference", "cpu", "triton", "cuda"), cells, strict=True)
                if cell != "–"
            }
    assert stated == {op: {backend.name for backend in backends_of(op)} for op in OPS}


def test_troubleshooting_quotes_the_librarys_own_messages() -> None:
    pieces, whole = strings_of([ROOT / "setup.py", *(ROOT / "liftbyimage").rglob("*.py")])
    first_cells = re.findall(
        r"^\| (?!message)(`.*?) \|", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE
    )
    messages = [code[1].strip() for cell in first_cells for code in re.finditer(r"(?<!`)`{1,2}(?!`)(.+?)`{1,2}$", cell)]
    assert len(messages) > 10
    foreign = [message for message in messages if message.startswith("ModuleNotFoundError")]
    for message in set(messages) - set(foreign):
        fragments = [fragment.strip() for fragment in message.split("…")]
        known = any(template.fullmatch(message) for template in whole) or all(part in pieces for part in fragments)
        assert known, message


def strings_of(sources: list[Path]) -> tuple[str, list[re.Pattern[str]]]:
    """Every string of the sources, and those with values in them as patterns."""
    pieces, whole = [], []
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                pieces.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                constants = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                if sum(len(str(part)) for part in constants if part) > 20:
                    whole.append(
                        re.compile("".join(".*" if part is None else re.escape(str(part)) for part in constants))
                    )
    return "\n".join(pieces), whole


def test_every_option_is_in_the_generated_page(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(DOCS))
    page = importlib.import_module("site_hooks").options()
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        assert f"## {name}\n" in page
        assert all(word in page for parameter in command.params for word in parameter.opts if word.startswith("--"))
    assert re.search(r"^\| `--workers` \| .* \| `0` \|$", page, re.MULTILINE)
    assert re.search(r"^\| `--pictures`, `--no-pictures` \| .* \| `--pictures` \|$", page, re.MULTILINE)
    assert re.search(r"^\| `--data LINE` \| .* \| needed \|$", page, re.MULTILINE)
    overview = (DOCS / "cli.md").read_text()
    assert all(f"| `{name}` |" in overview for name in commands)


def test_links_become_links_between_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    structure = pytest.importorskip("mkdocs.structure.files")
    File, InclusionLevel = structure.File, structure.InclusionLevel
    monkeypatch.syspath_prepend(str(DOCS))
    hooks = importlib.import_module("site_hooks")

    class Page:
        class file:
            src_uri = "kernels/factored.md"

    class Known:
        def get_file_from_path(self, path: str) -> Any:
            inclusion = {"live_picture.py": InclusionLevel.EXCLUDED}.get(path, InclusionLevel.INCLUDED)
            known = path in ("index.md", "kernels/factored.md", "images/a.png", "live_picture.py")
            return File(path, "docs", "site", False, inclusion=inclusion) if known else None

    given = (
        "[f](../live_picture.py) [a](../../README.md#measured) ![b](../images/a.png) "
        "[c](../../setup.py) [d](nowhere.md) [e](https://x.org/y)"
    )
    expected = "f [a](../index.md#measured) ![b](../images/a.png) c [d](nowhere.md) [e](https://x.org/y)"
    assert hooks.on_page_markdown(given, Page, None, Known()) == expected


def test_a_broken_link_fails_the_build_as_make_runs_it(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    [options] = re.findall(
        r"\$\(BIN\)/mkdocs (build .*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text("site_name: small\n")

    def build(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "docs" / "index.md").write_text(text)
        command = [sys.executable, "-m", "mkdocs", *options.split()]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert build("# Home\n").returncode == 0
    broken = build("[x](nowhere.md)\n")
    assert broken.returncode == 1
    assert "nowhere.md" in broken.stderr


def test_pages_opened_as_files_start_the_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(DOCS))
    worker = 'onmessage = (event) => postMessage("found " + event.data);'
    (tmp_path / "search.js").write_text(importlib.import_module("site_hooks").offline_search(worker))
    (tmp_path / "page.html").write_text(
        """<!doctype html><title></title><script src="search.js"></script><script>
        const search = new Worker("file:///nowhere/worker.js");
        search.onmessage = (event) => { document.title = event.data; };
        search.postMessage("joints");
        </script>"""
    )
    with opened(tmp_path / "page.html") as shown:
        until(lambda: shown.page.title() == "found joints")
        shown.assert_alone()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_blocks_compile_and_import_what_exists(path: Path) -> None:
    for block in BLOCK.findall(path.read_text(encoding="utf-8")):
        if block.lstrip().startswith(">>>"):
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("liftbyimage"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("liftbyimage"):
                        importlib.import_module(alias.name)


def test_the_quick_start_runs() -> None:
    for block in BLOCK.findall((DOCS / "quick-start.md").read_text(encoding="utf-8")):
        exec(compile(block, "quick-start.md", "exec"), {})
