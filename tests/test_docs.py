"""The documentation: every public name and every option is there, every page is in the contents, code compiles."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import typer

from liftbyimage import cli, models, nn, ops

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "examples" / "README.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("module", "page"), [(ops, "ops"), (nn, "nn"), (models, "models")])
def test_every_public_name_is_in_the_reference(module: object, page: str) -> None:
    named = {line.rpartition(".")[2] for line in (DOCS / "reference" / f"{page}.md").read_text().split("\n")}
    results = {name for name in module.__all__ if issubclass(type(getattr(module, name)), type) and page == "ops"}
    assert set(module.__all__) - results <= named  # what ops return is described where they are


def test_every_page_is_in_the_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text()
    missing = [page for path in DOCS.rglob("*.md") if (page := str(path.relative_to(DOCS))) not in contents]
    assert missing == []


def test_every_option_is_in_the_generated_page(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(DOCS))
    page = importlib.import_module("site_hooks").options()
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        assert f"## {name}\n" in page
        assert all(word in page for parameter in command.params for word in parameter.opts if word.startswith("--"))
    overview = (DOCS / "cli.md").read_text()
    assert all(f"| `{name}` |" in overview for name in commands)


def test_links_become_links_between_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(DOCS))
    hooks = importlib.import_module("site_hooks")

    class Page:
        class file:
            src_uri = "kernels/factored.md"

    class Known:
        def get_file_from_path(self, path: str) -> object:
            return path if path in ("index.md", "kernels/factored.md", "images/a.png") else None

    given = (
        "[a](../../README.md#measured) ![b](../images/a.png) [c](../../setup.py) [d](nowhere.md) [e](https://x.org/y)"
    )
    expected = "[a](../index.md#measured) ![b](../images/a.png) c [d](nowhere.md) [e](https://x.org/y)"
    assert hooks.on_page_markdown(given, Page, None, Known()) == expected


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
