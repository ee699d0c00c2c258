"""`bench-report --compare`: noise marks nothing, a regression is marked, and a slower machine is not one."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from bench_json import entry, write
from typer.testing import CliRunner

from liftbyimage import cli
from liftbyimage.bench_report.compare import FASTER, NOISE, RULER, SLOWER, Comparison, compare
from liftbyimage.bench_report.results import read_machines

WORKS = 12
CEILINGS = {"matmul_gflops": 200.0, "copy_gbytes": 40.0}
Times = dict[tuple[str, str], float]


def _times() -> Times:
    """Twelve works of a millisecond and more: plain PyTorch, a peer, and the library, twice as fast."""
    times = {}
    for i in range(WORKS):
        for name, seconds in (("reference", 2.0), ("torch.compile", 1.5), ("liftbyimage cpu", 1.0)):
            times[f"work {i}", name] = 1e-3 * (i + 1) * seconds
    return times


def _noisy(times: Times, noise: float, seed: int) -> Times:
    chance = random.Random(seed)
    return {key: seconds * math.exp(chance.gauss(0, noise)) for key, seconds in times.items()}


def _file(path: Path, times: Times, scatter: float = 0.01, **facts: Any) -> Path:
    facts = {**CEILINGS, **facts}
    return write(path, [entry(*key, seconds, scatter, **facts) for key, seconds in times.items()])


@pytest.fixture
def judged(tmp_path: Path) -> Any:
    """A function from old and new times to their comparison."""

    def judge(old: Times, new: Times, scatter: float = 0.01, **facts: Any) -> Comparison:
        then = _file(tmp_path / "old.json", old, scatter)
        now = _file(tmp_path / "new.json", new, scatter, **facts)
        return compare(read_machines([then]), read_machines([now]))

    return judge


def _marked(comparison: Comparison, verdict: str) -> list[tuple[str, str]]:
    return [(change.new.work, change.new.implementation) for change in comparison.marked(verdict)]


def test_a_run_equals_itself(judged: Any) -> None:
    comparison = judged(_times(), _times())
    assert (comparison.rulers, comparison.drift, comparison.spread) == (2 * WORKS + 2, 0, 0)
    assert len(_marked(comparison, NOISE)) == WORKS
    assert len(_marked(comparison, RULER)) == 2 * WORKS


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.15])
def test_noise_marks_nothing(judged: Any, noise: float) -> None:
    for seed in range(5):
        comparison = judged(_noisy(_times(), noise, seed), _noisy(_times(), noise, seed + 100))
        assert _marked(comparison, SLOWER) + _marked(comparison, FASTER) == []


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05])
def test_a_regression_and_an_improvement_are_marked(judged: Any, noise: float) -> None:
    new = _noisy(_times(), noise, 1)
    new["work 3", "liftbyimage cpu"] *= 1.6
    new["work 7", "liftbyimage cpu"] /= 1.6
    comparison = judged(_noisy(_times(), noise, 2), new)
    assert _marked(comparison, SLOWER) == [("work 3", "liftbyimage cpu")]
    assert _marked(comparison, FASTER) == [("work 7", "liftbyimage cpu")]


def test_the_same_change_is_noise_where_the_runs_scatter_more(judged: Any) -> None:
    new = _times()
    new["work 3", "liftbyimage cpu"] *= 1.2
    assert _marked(judged(_times(), new, scatter=0.02), SLOWER) == [("work 3", "liftbyimage cpu")]
    assert _marked(judged(_times(), new, scatter=0.1), SLOWER) == []


def test_less_than_the_smallest_is_noise(judged: Any) -> None:
    for factor, marked in ((1.02, 0), (1.05, 1)):
        new = _times()
        new["work 3", "liftbyimage cpu"] *= factor
        assert len(_marked(judged(_times(), new, scatter=0.0), SLOWER)) == marked


@pytest.mark.parametrize("ceilings_too", [True, False])
def test_a_machine_slower_as_a_whole_marks_nothing_but_what_is_slower_still(judged: Any, ceilings_too: bool) -> None:
    new = {key: 1.4 * seconds for key, seconds in _times().items()}
    facts = {name: rate / 1.4 for name, rate in CEILINGS.items()} if ceilings_too else {}
    comparison = judged(_times(), new, **facts)
    assert comparison.drift == pytest.approx(math.log(1.4))
    assert _marked(comparison, SLOWER) + _marked(comparison, FASTER) == []
    new["work 0", "liftbyimage cpu"] *= 1.5
    assert _marked(judged(_times(), new, **facts), SLOWER) == [("work 0", "liftbyimage cpu")]


def test_a_work_measured_while_the_machine_was_busy_is_not_marked(judged: Any) -> None:
    new = {key: 1.5 * seconds if key[0] == "work 5" else seconds for key, seconds in _times().items()}
    assert _marked(judged(_times(), new), SLOWER) == []


def test_a_faster_reference_makes_no_regression(judged: Any) -> None:
    new = _times()
    new["work 5", "reference"] /= 1.5
    assert _marked(judged(_times(), new), SLOWER) == []


def test_peers_are_rulers_only_beside_a_row_of_the_library(judged: Any) -> None:
    old = {**_times(), ("choice", "projected"): 1.0, ("choice", "absorbed"): 1.0}
    new = {**old, ("choice", "projected"): 1.5, ("work 0", "torch.compile"): 1.0}
    assert _marked(judged(old, new), SLOWER) == [("choice", "projected")]


def test_without_rulers_of_its_own_the_ceilings_tell_the_drift(judged: Any) -> None:
    old = {("training", name): 1.0 for name in ("cache", "no cache")}
    slower = {name: rate / 2 for name, rate in CEILINGS.items()}
    comparison = judged(old, {key: 2 * seconds for key, seconds in old.items()}, **slower)
    assert (comparison.rulers, len(_marked(comparison, NOISE))) == (2, 2)


def _run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["bench-report", *map(str, arguments)])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two works; the first became twice as slow, the second is gone, a third is new."""
    old = {key: seconds for key, seconds in _times().items() if key[0] in ("work 0", "work 1")}
    new = {key: seconds for key, seconds in _times().items() if key[0] in ("work 0", "work 2")}
    new["work 0", "liftbyimage cpu"] *= 2
    return _file(tmp_path / "old.json", old), _file(tmp_path / "new.json", new)


def test_command_lists_every_row_and_exits_with_3(files: tuple[Path, Path]) -> None:
    old, new = files
    run = _run(new, "--compare", old)
    where = (
        "Measured on 2026-01-02: Some CPU, 2 CPU threads, float32; liftbyimage 0.1.0, torch 2.13.0+cpu; "
        "matrix product 200 GFLOP/s; copy 40.0 GB/s."
    )
    assert (run.exit_code, run.stderr) == (3, "")
    assert run.stdout.splitlines() == [
        f"Old: {where}",
        "",
        f"New: {where}",
        "",
        "4 figures that the library does not change (plain PyTorch's rows and the ceilings) took +0.0 % time in the "
        "median, and nine of ten lie within ±0 % of that.",
        "",
        "Beyond noise, 1 row is slower and 0 faster; 0 within it.",
        "",
        "| work | implementation | verdict | old ms | new ms | time | against plain PyTorch | noise |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| work 0 | reference | ruler | 2.00 | 2.00 | +0.0 % | – | – |",
        "|  | torch.compile | ruler | 1.50 | 1.50 | +0.0 % | – | – |",
        "|  | liftbyimage cpu | **slower** | 1.00 | 2.00 | +100.0 % | 2.00× → 1.00× | ±3 % |",
        "",
        "Only in the old run:",
        "",
        "- work 1: reference, torch.compile, liftbyimage cpu",
        "",
        "Only in the new run:",
        "",
        "- work 2: reference, torch.compile, liftbyimage cpu",
    ]
    run = _run(old, "--compare", new, "--summary")
    assert run.exit_code == 0
    rows = [line for line in run.stdout.splitlines() if line.startswith("| ")][2:]
    assert rows == ["| work 0 | liftbyimage cpu | **faster** | 2.00 | 1.00 | −50.0 % | 1.00× → 2.00× | ±3 % |"]


def test_command_prints_json_and_the_same_exit_code(files: tuple[Path, Path]) -> None:
    old, new = files
    run = _run(new, "--compare", old, "--summary", "--json")
    data = json.loads(run.stdout)
    assert (run.exit_code, data["slower"], data["faster"], data["rulers"]) == (3, 1, 0, 4)
    assert [(row["work"], row["verdict"], row["time_change"]) for row in data["rows"]] == [("work 0", "slower", 1.0)]
    assert {row["work"] for row in data["only_in_old"]} == {"work 1"}
    assert {row["work"] for row in data["only_in_new"]} == {"work 2"}


def test_other_versions_are_said(tmp_path: Path) -> None:
    old = _file(tmp_path / "old.json", _times(), versions={"liftbyimage": "0.1.0", "torch": "2.12.0"})
    new = _file(tmp_path / "new.json", _times(), versions={"liftbyimage": "0.2.0", "torch": "2.13.0"})
    said = "Versions differ, torch 2.12.0 then and 2.13.0 now: what is measured against plain PyTorch may have changed "
    assert said + "with them." in _run(new, "--compare", old).stdout


def test_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    one = _file(tmp_path / "one.json", _times())
    other = _file(tmp_path / "other.json", _times(), device_name="Another CPU")
    elsewhere = _file(tmp_path / "elsewhere.json", {("other work", "reference"): 1.0})
    refused = {
        (one, "--compare", other): f"benchmark results {other} was measured on Another CPU, 2 CPU threads, float32, "
        f"benchmark results {one} on Some CPU, 2 CPU threads, float32; name both as RESULTS to see them side by side",
        (one, other, "--compare", one): f"benchmark results {one} and {other} are of 2 machines or sets of versions; "
        "expected one",
        (one, "--compare", elsewhere): f"benchmark results {elsewhere} and {one} share no row",
    }
    for arguments, sentence in refused.items():
        run = _run(*arguments)
        assert (run.exit_code, run.stdout, run.stderr) == (2, "", f"error: --compare: {sentence}\n")
