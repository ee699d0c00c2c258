"""The tables made of a benchmark's JSON, side by side or joined, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_json import entry, write
from typer.testing import CliRunner

from liftbyimage import cli
from liftbyimage.bench_report.results import read_machines
from liftbyimage.bench_report.tables import summary, table

LAYER, PRUNE = "pose_guided_attention forward B8 P3072 D256", "prune_patches forward B8"
WHERE = (
    "Measured on 2026-01-02: Some CPU, 2 CPU threads, float32; liftbyimage 0.1.0, torch 2.13.0+cpu; "
    "matrix product 195 GFLOP/s; copy 6.63 GB/s."
)
GPU = {"device": "cuda", "dtype": "bfloat16", "device_name": "Some GPU", "matmul_gflops": 6e5, "copy_gbytes": 2500.0}


def _run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["bench-report", *map(str, arguments)])


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
        entry(LAYER, "reference", 0.1003, **figures),
        entry(LAYER, "torch.compile", 0.08),
        entry(LAYER, "nn.MultiheadAttention", 0.11),
        entry(LAYER, "liftbyimage cpu", 0.02006, **ours),
        entry(LAYER, "liftbyimage bfloat16", 0.01),
        entry(PRUNE, "reference", 0.00401, gflops=0.0, fraction_of_matmul=0.0, fraction_of_copy=0.5),
        entry(PRUNE, "a|b", 0.0000153),
        entry("alone", "kernel op (cpu)", 1234.5),
    ]
    return write(tmp_path / "results.json", entries)


@pytest.fixture
def gpu(tmp_path: Path) -> Path:
    entries = [
        entry(LAYER, "reference", 0.0004, **GPU),
        entry(LAYER, "liftbyimage cuda", 0.0001, **GPU),
        entry("only there", "reference", 0.002, **GPU),
        entry("only there", "liftbyimage cuda", 0.001, **GPU),
    ]
    return write(tmp_path / "gpu.json", entries)


SUMMARY = [
    "| work | plain PyTorch ms | best other way, ms | liftbyimage ms | against plain PyTorch "
    "| against the best other | of matmul rate | peak memory, of plain |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    f"| {LAYER} | 100 | 80.0 (torch.compile) | 20.1 | 5.00× | 3.99× | 87 % | 0.32 |",
    f"| {LAYER}: liftbyimage bfloat16 | 100 | 80.0 (torch.compile) | 10.0 | 10.03× | 8.00× | – | – |",
]
TABLE = [
    "| work | implementation | median ms | speed against reference | GFLOP/s | of matmul rate | of copy rate "
    "| peak memory MB | operations |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    f"| {LAYER} | reference | 100 | 1.00× | 103 | 53 % | 5 % | 78.9 | 31 |",
    "|  | torch.compile | 80.0 | 1.25× | – | – | – | – | – |",
    "|  | nn.MultiheadAttention | 110 | 0.91× | – | – | – | – | – |",
    "|  | liftbyimage cpu | 20.1 | 5.00× | 170 | 87 % | 25 % | 25.4 | – |",
    "|  | liftbyimage bfloat16 | 10.0 | 10.03× | – | – | – | – | – |",
    f"| {PRUNE} | reference | 4.01 | 1.00× | – | – | 50 % | – | – |",
    "|  | a\\|b | 0.0153 | 262.09× | – | – | – | – | – |",
    "| alone | kernel op (cpu) | 1234500 | – | – | – | – | – | – |",
]


def test_summary_has_one_line_per_work_that_has_both(results: Path) -> None:
    text = "\n".join([WHERE, "", *SUMMARY])
    assert summary(read_machines([results])).markdown() == text
    assert _run("--summary", results).stdout == text + "\n"


def test_command_prints_the_table(results: Path) -> None:
    text = "\n".join([WHERE, "", *TABLE])
    assert table(read_machines([results])).markdown() == text
    run = _run(results)
    assert (run.exit_code, run.stdout, run.stderr) == (0, text + "\n", "")


def test_only_keeps_works_that_start_so(results: Path) -> None:
    run = _run(results, "--only", "alone", "--only", "prune")
    assert run.stdout == "\n".join([WHERE, "", *TABLE[:2], *TABLE[-3:]]) + "\n"
    run = _run(results, "--only", "alone", "--only", "patches")
    assert (run.exit_code, run.stderr) == (2, f'error: benchmark results {results}: no work starts with "patches"\n')


def test_machines_stand_side_by_side(results: Path, gpu: Path) -> None:
    run = _run("--summary", results, gpu)
    assert run.stdout.splitlines() == [
        f"Some CPU: {WHERE}",
        "",
        "Some GPU: Measured on 2026-01-02: Some GPU, 2 CPU threads, bfloat16; liftbyimage 0.1.0, torch 2.13.0+cpu; "
        "matrix product 600000 GFLOP/s; copy 2500 GB/s.",
        "",
        "| work | Some CPU: median ms | Some CPU: against plain PyTorch "
        "| Some GPU: median ms | Some GPU: against plain PyTorch |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| {LAYER} | 20.1 | 5.00× | 0.100 | 4.00× |",
        f"| {LAYER}: liftbyimage bfloat16 | 10.0 | 10.03× | – | – |",
        "| only there | – | – | 1.00 | 2.00× |",
    ]
    rows = _run(gpu, results).stdout.splitlines()[6:]
    assert rows[:4] == [
        f"| {LAYER} | reference | 0.400 | 1.00× | 100 | 1.00× |",
        "|  | liftbyimage cuda | 0.100 | 4.00× | – | – |",
        "|  | torch.compile | – | – | 80.0 | 1.25× |",
        "|  | nn.MultiheadAttention | – | – | 110 | 0.91× |",
    ]
    assert len(rows) == 11


def test_namesakes_are_told_apart_by_what_differs(tmp_path: Path, results: Path) -> None:
    versions = {"liftbyimage": "0.1.0", "torch": "2.12.0"}
    other = write(tmp_path / "other.json", [entry(LAYER, "reference", 0.2, versions=versions, threads=4)])
    columns = _run(results, other).stdout.splitlines()[4]
    assert "| Some CPU, 2 threads, torch 2.13.0+cpu: median ms |" in columns
    assert "| Some CPU, 4 threads, torch 2.12.0: median ms |" in columns


def test_parts_of_one_machine_are_joined(tmp_path: Path, results: Path) -> None:
    other = write(tmp_path / "other.json", [entry("new work", "reference", 0.2, matmul_gflops=200.0)])
    lines = _run(results, other).stdout.splitlines()
    assert lines[0] == (
        "Measured on 2026-01-02: Some CPU, 2 CPU threads, float32; liftbyimage 0.1.0, torch 2.13.0+cpu. Joined from "
        "2 files: results.json (3 works, matrix product 195 GFLOP/s, copy 6.63 GB/s), "
        "other.json (1 works, matrix product 200 GFLOP/s, copy 6.63 GB/s)."
    )
    assert lines[2:] == [*TABLE, "| new work | reference | 200 | 1.00× | – | – | – | – | – |"]


def test_a_work_measured_twice_on_one_machine_is_not_joined(tmp_path: Path, results: Path) -> None:
    again = write(tmp_path / "again.json", [entry("new", "reference", 0.2), entry(PRUNE, "liftbyimage", 0.2)])
    run = _run(results, again)
    assert (run.exit_code, run.stdout) == (2, "")
    assert run.stderr == (
        f'error: benchmark results {results} and {again}: both measured "{PRUNE}" on the same machine with the same '
        "versions; files of one machine are joined only if they share no work, two runs are compared by --compare\n"
    )


def test_json_holds_the_same_rows(results: Path, gpu: Path) -> None:
    data = json.loads(_run(results, gpu, "--json").stdout)
    assert [machine["name"] for machine in data["machines"]] == ["Some CPU", "Some GPU"]
    assert data["machines"][1]["files"] == [
        {"path": str(gpu), "date": "2026-01-02", "works": 2, "matmul_gflops": 6e5, "copy_gbytes": 2500.0}
    ]
    assert [row["machine"] for row in data["rows"]] == [0] * 8 + [1] * 4
    row = data["rows"][3]
    assert (row["work"], row["implementation"], row["seconds"]) == (LAYER, "liftbyimage cpu", 0.02006)
    assert row["against_reference"] == pytest.approx(5)
    assert data["rows"][7]["against_reference"] is None
    summarised = json.loads(_run(results, "--json", "--summary").stdout)["rows"]
    assert [row["implementation"] for row in summarised] == ["liftbyimage cpu", "liftbyimage bfloat16"]
    assert summarised[0]["best_other"] == {"implementation": "torch.compile", "seconds": 0.08}
    assert summarised[1]["memory_of_reference"] is None


OTHER_MACHINE = [entry("g", "reference", 1.0), entry("g", "ours", 1.0, threads=4)]
NO_IMPLEMENTATION = 'has no "implementation" in its "extra_info": not one of these benchmarks'
NO_LIST = 'expected what pytest-benchmark writes, an object with a list "benchmarks"'


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("{", "not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("[]", NO_LIST),
        ({"benchmarks": {}}, NO_LIST),
        ({"benchmarks": []}, "no row was measured"),
        ({"benchmarks": [{"stats": {"median": 1.0}}]}, f"entry 0 {NO_IMPLEMENTATION}"),
        ({"benchmarks": ["row"]}, f"entry 0 {NO_IMPLEMENTATION}"),
        ([entry("g", "reference", 1.0), {**entry("g", "ours", 1), "extra_info": {}}], f"entry 1 {NO_IMPLEMENTATION}"),
        ([entry("g", "reference", 1.0), entry("g", "ours", 0.0)], 'entry 1 has no positive "median" in its "stats"'),
        ([entry("g", "reference", float("nan"))], 'entry 0 has no positive "median" in its "stats"'),
        (
            OTHER_MACHINE,
            "entry 1 was measured on Some CPU, 4 CPU threads, float32, entry 0 on Some CPU, 2 CPU threads, float32: "
            "expected one machine",
        ),
        (
            [entry("g", "reference", 1.0), entry("g", "reference", 1.0)],
            'entry 1 measures "reference" of "g" again, after entry 0',
        ),
    ],
)
def test_refuses_in_one_sentence(tmp_path: Path, data: Any, sentence: str) -> None:
    path = write(tmp_path / "results.json", data)
    run = _run(path)
    assert (run.exit_code, run.stdout) == (2, "")
    assert run.stderr == f"error: benchmark results {path}: {sentence}\n"


def test_refuses_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "missing.json"
    run = _run(path)
    assert (run.exit_code, run.stdout) == (2, "")
    assert run.stderr == f"error: benchmark results {path}: no such file\n"
    run = _run(tmp_path)
    assert (run.exit_code, run.stderr) == (2, f"error: benchmark results {tmp_path}: is a folder\n")
    binary = tmp_path / "picture.json"
    binary.write_bytes(b"\x89PNG")
    run = _run(binary)
    assert run.exit_code == 2
    assert run.stderr.startswith(f"error: benchmark results {binary}: not valid JSON ('utf-8' codec")


def test_a_summary_needs_plain_pytorch_and_liftbyimage(tmp_path: Path) -> None:
    path = write(tmp_path / "results.json", [entry("g", "reference", 1.0), entry("h", "liftbyimage", 1.0)])
    run = _run(path, "--summary")
    assert (run.exit_code, run.stdout) == (2, "")
    assert run.stderr == (
        f"error: benchmark results {path}: no work has both a row of plain PyTorch (reference) and one of liftbyimage\n"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "bench-report: expected RESULTS.json, what `pytest bench --benchmark-json=FILE` wrote"),
        (
            ["r.json", "--update", "a.md"],
            "--update goes alone: every block of the file names its own results and options",
        ),
        (["r.json", "--figure", "ratios"], "--figure needs --plot, the file to draw into"),
        (["r.json", "--plot", "a.jpg"], "--plot a.jpg: expected a file that ends in .png or .svg"),
        (["r.json", "--plot", "a.png", "--figure", "pie"], "--figure: expected ratios, roofline, scaling, got pie"),
    ],
)
def test_refuses_options_that_do_not_go_together(arguments: list[str], sentence: str) -> None:
    run = _run(*arguments)
    assert (run.exit_code, run.stdout, run.stderr) == (2, "", f"error: {sentence}\n")
