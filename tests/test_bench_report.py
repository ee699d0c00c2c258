"""The table made of a benchmark's JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from liftbyimage import cli
from liftbyimage.bench_plot import plot_scaling
from liftbyimage.bench_report import summary, table

LAYER, PRUNE = "pose_guided_attention forward B8 P3072 D256 float32 cpu", "prune_patches forward B8"


def _entry(group: str, implementation: str, median: float, **figures: Any) -> dict[str, Any]:
    machine = {
        "device_name": "Some CPU",
        "threads": 2,
        "versions": {"liftbyimage": "0.1.0", "torch": "2.13.0+cpu"},
        "matmul_gflops": 194.6,
        "copy_gbytes": 6.63,
    }
    facts = {"implementation": implementation, **machine, **figures}
    return {"group": group, "extra_info": facts, "stats": {"median": median, "mean": 7.0}}


def _results(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "results.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    figures = {
        "gflops": 103.4,
        "fraction_of_matmul": 0.531,
        "fraction_of_copy": 0.0461,
        "peak_memory_bytes": 78_912_345,
        "operations": 31,
    }
    ours = {"gflops": 170.2, "fraction_of_matmul": 0.8746, "fraction_of_copy": 0.25, "peak_memory_bytes": 25_400_000}
    entries = [
        _entry(LAYER, "reference", 0.1003, **figures),
        _entry(LAYER, "liftbyimage cpu", 0.02006, **ours),
        _entry(PRUNE, "reference", 0.00401, gflops=0.0, fraction_of_matmul=0.0, fraction_of_copy=0.5),
        _entry(PRUNE, "a|b", 0.0000153),
        _entry("alone", "kernel op (cpu)", 1234.5),
    ]
    return _results(tmp_path, {"datetime": "2026-01-02T03:04:05", "benchmarks": entries})


def test_summary_has_one_line_per_work_that_has_both(results: Path) -> None:
    data = json.loads(results.read_text())
    data["benchmarks"] += [_entry(LAYER, "torch.compile", 0.08), _entry(LAYER, "nn.MultiheadAttention", 0.11)]
    data["benchmarks"] += [_entry(LAYER, "liftbyimage bfloat16", 0.01)]
    results.write_text(json.dumps(data))
    assert summary(results).splitlines()[2:] == [
        "| work | plain PyTorch ms | best other way, ms | liftbyimage ms | against plain PyTorch "
        "| against the best other | of matmul rate | peak memory, of plain |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| {LAYER} | 100 | 80.0 (torch.compile) | 20.1 | 5.00× | 3.99× | 87 % | 0.32 |",
        f"| {LAYER}: liftbyimage bfloat16 | 100 | 80.0 (torch.compile) | 10.0 | 10.03× | 8.00× | – | – |",
    ]
    assert CliRunner().invoke(cli.app, ["bench-report", "--summary", str(results)]).stdout == summary(results) + "\n"


def test_table(results: Path) -> None:
    assert table(results) == "\n".join(
        [
            "Measured on 2026-01-02: Some CPU, 2 CPU threads; liftbyimage 0.1.0, torch 2.13.0+cpu; "
            "matrix product 195 GFLOP/s; copy 6.63 GB/s.",
            "",
            "| work | implementation | median ms | speed against reference | GFLOP/s | of matmul rate | of copy rate "
            "| peak memory MB | operations |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            f"| {LAYER} | reference | 100 | 1.00× | 103 | 53 % | 5 % | 78.9 | 31 |",
            "|  | liftbyimage cpu | 20.1 | 5.00× | 170 | 87 % | 25 % | 25.4 | – |",
            f"| {PRUNE} | reference | 4.01 | 1.00× | – | – | 50 % | – | – |",
            "|  | a\\|b | 0.0153 | 262.09× | – | – | – | – | – |",
            "| alone | kernel op (cpu) | 1234500 | – | – | – | – | – | – |",
        ]
    )


def test_command_prints_the_table(results: Path) -> None:
    run = CliRunner().invoke(cli.app, ["bench-report", str(results)])
    assert (run.exit_code, run.stdout, run.stderr) == (0, table(results) + "\n", "")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("{", "not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ([], 'expected what pytest-benchmark writes, an object with a list "benchmarks"'),
        ({"benchmarks": {}}, 'expected what pytest-benchmark writes, an object with a list "benchmarks"'),
        ({"benchmarks": []}, "no row was measured"),
        (
            {"benchmarks": [{"stats": {"median": 1.0}}]},
            'entry 0 has no "implementation" in its "extra_info": not one of these benchmarks',
        ),
        (
            {"benchmarks": ["row"]},
            'entry 0 has no "implementation" in its "extra_info": not one of these benchmarks',
        ),
        (
            {"benchmarks": [_entry("g", "reference", 1.0), _entry("g", "ours", 0.0)]},
            'entry 1 has no positive "median" in its "stats"',
        ),
        (
            {"benchmarks": [_entry("g", "reference", float("nan"))]},
            'entry 0 has no positive "median" in its "stats"',
        ),
    ],
)
def test_refuses_in_one_sentence(tmp_path: Path, data: Any, sentence: str) -> None:
    path = _results(tmp_path, data)
    with pytest.raises(ValueError) as refused:
        table(path)
    assert str(refused.value) == f"benchmark results {path}: {sentence}"
    run = CliRunner().invoke(cli.app, ["bench-report", str(path)])
    assert (run.exit_code, run.stdout) == (2, "")
    assert run.stderr == f"error: benchmark results {path}: {sentence}\n"


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "missing.json"
    run = CliRunner().invoke(cli.app, ["bench-report", str(path)])
    assert (run.exit_code, run.stdout) == (2, "")
    assert run.stderr == f"error: benchmark results {path}: no such file\n"
    run = CliRunner().invoke(cli.app, ["bench-report", str(tmp_path)])
    assert (run.exit_code, run.stderr) == (2, f"error: benchmark results {tmp_path}: is a folder\n")


def _scaling(tmp_path: Path, sizes: list[tuple[int, int, int]]) -> Path:
    """Made-up medians: the reference grows as B·P·D, ours as B·P·√D."""
    entries = []
    for batch, patches, dim in sizes:
        facts = {"op": "lifter", "direction": "forward", "shape": {"B": batch, "P": patches, "D": dim}}
        for name, seconds in (("reference", batch * patches * dim), ("liftbyimage", batch * patches * dim**0.5)):
            entries.append(_entry(f"lifter {batch} {patches} {dim}", name, 1e-6 * seconds, **facts))
    return _results(tmp_path, {"benchmarks": entries})


def test_plot_shows_every_size_that_varies_with_its_exponent(tmp_path: Path) -> None:
    path = _scaling(tmp_path, [(1, 8, 64), (2, 8, 64), (4, 8, 64), (2, 8, 128), (2, 8, 256), (2, 16, 64)])
    visible = [axes for axes in plot_scaling(path).axes if axes.get_visible()]
    labels = {axes.get_xlabel(): [text.get_text() for text in axes.get_legend().get_texts()] for axes in visible}
    assert labels == {
        "batch B": ["reference: B$^{1.00}$", "liftbyimage: B$^{1.00}$"],
        "token width D": ["reference: D$^{1.00}$", "liftbyimage: D$^{0.50}$"],
    }
    assert visible[0].lines[1].get_xdata().tolist() == [1, 2, 4]
    out = tmp_path / "scaling.png"
    run = CliRunner().invoke(cli.app, ["bench-report", str(path), "--plot", str(out)])
    assert (run.exit_code, run.stdout) == (0, f"Wrote {out}.\n")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_plot_needs_a_size_that_varies(tmp_path: Path) -> None:
    path = _scaling(tmp_path, [(1, 8, 64), (2, 8, 64)])
    run = CliRunner().invoke(cli.app, ["bench-report", str(path), "--plot", str(tmp_path / "none.png")])
    assert run.exit_code == 2
    assert run.stderr == f"error: benchmark results {path}: no size takes 3 values: run with --scaling\n"
    assert not (tmp_path / "none.png").exists()
