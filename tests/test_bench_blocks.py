"""Tables in Markdown files: made of stored results, and the repository's own are what those results give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_json import entry, write
from typer.testing import CliRunner

from liftbyimage import cli
from liftbyimage.bench_report.blocks import renew

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/context-aware-poseformer.md",
    "docs/kernels/factored.md",
    "docs/kernels/pose_guided_attention.md",
)


def _run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["bench-report", *map(str, arguments)])


@pytest.mark.parametrize("page", PAGES)
def test_the_numbers_of_a_page_are_those_of_its_results(page: str) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    renewed, _ = renew(text, path)
    assert renewed == text, f"run `liftbyimage bench-report --update {page}`"


def test_no_page_with_a_block_is_left_unchecked() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    with_block = {p.relative_to(ROOT).as_posix() for p in pages if "\n<!-- measured:begin " in p.read_text("utf-8")}
    assert with_block == set(PAGES)


def test_a_number_typed_by_hand_is_replaced() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    assert text.count("| 6.44 |") == 1
    assert renew(text.replace("| 6.44 |", "| 6.43 |"), path) == (text, 1)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page in a folder of its own, two results beside that folder, the new one slower."""
    for name, factor in (("old", 1.0), ("new", 2.0)):
        works = [(work, name) for work in ("a work", "b") for name in ("reference", "liftbyimage")]
        write(tmp_path / f"{name}.json", [entry(*key, factor if key[1] == "liftbyimage" else 4.0) for key in works])
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir()
    path.write_text(
        "# Title\n\n"
        '<!-- measured:begin ../new.json summary only="a work" -->\nstale\n<!-- measured:end -->\n\nbetween\n\n'
        "<!-- measured:begin ../new.json compare=../old.json summary -->\n<!-- measured:end -->\n\n"
        "<!-- measured:begin ../new.json -->\n<!-- measured:end -->\n\n"
        "    <!-- measured:begin indented, so it is an example -->\n"
    )
    return path


def test_update_makes_every_block_anew_and_nothing_else(page: Path, tmp_path: Path) -> None:
    run = _run("--update", page)
    assert (run.exit_code, run.stdout) == (0, f"{page}: 3 blocks changed.\n")
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    expected = [
        _run(new, "--summary", "--only", "a work").stdout,
        _run(new, "--summary", "--compare", old).stdout,
        _run(new).stdout,
    ]
    assert "| a work | 4000 | – | 2000 | 2.00× |" in expected[0] and "**slower**" in expected[1]
    assert page.read_text() == (
        f'# Title\n\n<!-- measured:begin ../new.json summary only="a work" -->\n{expected[0]}<!-- measured:end -->\n\n'
        f"between\n\n<!-- measured:begin ../new.json compare=../old.json summary -->\n{expected[1]}"
        f"<!-- measured:end -->\n\n<!-- measured:begin ../new.json -->\n{expected[2]}<!-- measured:end -->\n\n"
        "    <!-- measured:begin indented, so it is an example -->\n"
    )
    assert _run("--update", page).stdout == f"{page}: no blocks changed.\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# Title\n", ": has no block that starts with <!-- measured:begin RESULTS.json -->"),
        ("x\n<!-- measured:begin ../new.json -->\n", ", line 2: the block has no line <!-- measured:end -->"),
        (
            "<!-- measured:begin ../new.json -->\n<!-- measured:begin ../new.json -->\n<!-- measured:end -->\n",
            ", line 1: the block has no line <!-- measured:end -->",
        ),
        ("<!-- measured:begin summary -->\n<!-- measured:end -->\n", ", line 1: names no RESULTS.json"),
        (
            "<!-- measured:begin ../new.json --summary -->\n<!-- measured:end -->\n",
            ", line 1: expected RESULTS.json, summary, only=START or compare=OLD.json, got --summary",
        ),
        ("<!-- measured:begin only='a -->\n<!-- measured:end -->\n", ", line 1: No closing quotation"),
        (
            "<!-- measured:begin gone.json -->\n<!-- measured:end -->\n",
            ", line 1: benchmark results {folder}/gone.json: no such file",
        ),
    ],
)
def test_refuses_in_one_sentence_and_leaves_the_file(page: Path, text: str, sentence: str) -> None:
    page.write_text(text)
    run = _run("--update", page)
    assert (run.exit_code, run.stdout) == (2, "")
    assert run.stderr == f"error: {page}{sentence.format(folder=page.parent)}\n"
    assert page.read_text() == text


def test_refuses_a_missing_page(tmp_path: Path) -> None:
    run = _run("--update", tmp_path / "none.md")
    assert (run.exit_code, run.stderr) == (2, f"error: --update {tmp_path / 'none.md'}: no such file\n")
