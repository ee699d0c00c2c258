"""`make gpu` without a GPU: which parts run, what becomes of them, what is kept, and how rows on a GPU are timed."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_json import entry

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
sys.path.append(str(ROOT / "bench"))  # behind tests/, which has files of the same names

import gpu  # noqa: E402
import gpu_machine  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_tests  # noqa: E402
import measurement  # noqa: E402
import sanitize  # noqa: E402
from event_clock import EventClock  # noqa: E402
from gpu_process import Budget, run  # noqa: E402
from gpu_results import merge, publish, slug, why_not_publish  # noqa: E402
from gpu_summary import Outcome, summary  # noqa: E402
from row_states import RowStates, State, not_run, read_states  # noqa: E402

H200 = {
    "name": "NVIDIA H200",
    "capability": "9.0",
    "driver": "570.1",
    "torch": "2.13.0+cu130",
    "memory_bytes": 150 << 30,
}
GPU = {"device": "cuda", "dtype": "bfloat16", "device_name": "NVIDIA H200"}


class Hand:
    """A clock that somebody moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class FakeEvent:
    """Stands in for a CUDA event; the clock tells milliseconds."""

    def __init__(self, clock: Hand) -> None:
        self.clock, self.at = clock, 0.0

    def record(self) -> None:
        self.at = self.clock()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of all that the parts write."""
    for name, place in {"WORK": "gpu", "MERGED": "gpu/merged.json", "STAMP": "stamp", "RESULTS": "results"}.items():
        monkeypatch.setattr(gpu_parts, name, tmp_path / place)
    return tmp_path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with everything."""
    monkeypatch.setattr(gpu, "find_gpu", lambda variables: H200)
    monkeypatch.setattr(gpu_machine, "nvcc", lambda variables: "/somewhere/nvcc")
    monkeypatch.setattr(gpu.signal, "signal", lambda number, handler: None)


def options(rows: str | None = None, compiled: bool = False, **variables: str) -> gpu.Options:
    return gpu.Options(H200, {**os.environ, **variables}, rows, compiled)


def fake_parts(monkeypatch: pytest.MonkeyPatch, ran: list[str], **results: str) -> None:
    """Every part passes at once but for `results`."""

    def part(name: str) -> Callable[..., gpu_parts.Result]:
        def run_part(options: gpu.Options, budget: Budget) -> gpu_parts.Result:
            ran.append(name)
            return results.get(name, "passed"), [f"said by {name}"]

        return run_part

    for name, real in list(gpu.PARTS.items()):
        monkeypatch.setitem(gpu.PARTS, name, gpu_parts.Part(real.what, real.weight, part(name)))


# Parts


def test_parts_run_in_their_order_and_only_the_chosen(here: None, monkeypatch: Any, capsys: Any) -> None:
    ran: list[str] = []
    fake_parts(monkeypatch, ran)
    assert gpu.main([]) == 0
    assert ran == ["build", "test", "sanitize", "bench", "report"]
    ran.clear()
    assert gpu.main(["--only", "report,build"]) == 0
    assert ran == ["build", "report"]
    table = capsys.readouterr().out.rpartition("part ")[2]
    assert re.findall(r"^(\w+) +passed", table, re.MULTILINE) == ["build", "report"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--only", "build,tset"], "argument --only: expected some of build,test,sanitize,bench,report, got 'tset'"),
        (["--only", ""], "argument --only: expected some of build,test,sanitize,bench,report, got ''"),
        (["--minutes", "0"], "argument --minutes: expected a number of minutes above 0, got '0'"),
        (["--minutes", "nan"], "argument --minutes: expected a number of minutes above 0, got 'nan'"),
        (["--minutes", "ten"], "argument --minutes: expected a number of minutes above 0, got 'ten'"),
    ],
)
def test_bad_options_get_one_sentence(arguments: list[str], sentence: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"make gpu: {sentence}\n"


def test_the_list_needs_no_gpu(capsys: Any) -> None:
    assert gpu.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(gpu.PARTS)


def test_without_a_gpu_nothing_starts(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(gpu, "find_gpu", lambda variables: None)
    fake_parts(monkeypatch, ran := [])
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.err == f"make gpu: needs an NVIDIA GPU, and the torch of {sys.executable} sees none\n"
    assert (said.out, ran) == ("", [])


def test_without_nvcc_only_the_build_is_refused(monkeypatch: Any, tmp_path: Path) -> None:
    variables = {"PATH": str(tmp_path), "CUDA_HOME": ""}
    assert gpu_machine.why_not_here(H200, ["build", "test"], variables) == (
        "needs nvcc to build the CUDA kernels; set CUDA_HOME to the CUDA toolkit, or put nvcc on PATH"
    )
    assert gpu_machine.why_not_here(H200, ["test", "bench"], variables) is None
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.touch(mode=0o755)
    assert gpu_machine.why_not_here(H200, ["build"], {**variables, "CUDA_HOME": str(tmp_path)}) is None


def test_a_gpu_is_found_where_torch_has_one() -> None:
    assert (gpu_machine.find_gpu(gpu_machine.environment()) is not None) == torch.cuda.is_available()


@pytest.mark.parametrize("result, status", [("failed", 1), ("out of time", 1), ("NOT RUN", 0)])
def test_the_exit_status_is_of_the_worst_part(
    result: str, status: int, here: None, monkeypatch: Any, capsys: Any
) -> None:
    fake_parts(monkeypatch, ran := [], sanitize=result)
    assert gpu.main([]) == status
    assert ran == list(gpu.PARTS), "a part that fails ends no other"
    assert re.search(rf"^sanitize  {result} +0\n +said by sanitize$", capsys.readouterr().out, re.MULTILINE)


def test_an_interruption_leaves_the_table(here: None, monkeypatch: Any, capsys: Any) -> None:
    def interrupted(options: gpu.Options, budget: Budget) -> gpu_parts.Result:
        raise KeyboardInterrupt

    fake_parts(monkeypatch, [])
    monkeypatch.setitem(gpu.PARTS, "test", gpu_parts.Part("", 1.0, interrupted))
    assert gpu.main([]) == 130
    assert re.search(r"\npart .*\nbuild +passed .*\n +said by build\n$", capsys.readouterr().out)


# Time


def test_a_part_takes_its_share_of_what_is_left() -> None:
    clock = Hand()
    budget = Budget(100.0, clock)
    budget.start(0.5)
    assert budget.left() == 50
    clock.seconds = 20
    assert (budget.left(), budget.seconds()) == (30, 20)
    budget.start(0.25)
    assert budget.left() == 20
    budget.start(1.0)
    assert budget.left() == 80


def test_the_only_part_has_all_the_time_and_each_of_five_leaves_some_to_the_next(monkeypatch: Any) -> None:
    clock = Hand()
    limits: list[float] = []

    def takes_all(options: gpu.Options, budget: Budget) -> gpu_parts.Result:
        limits.append(budget.left())
        clock.seconds += budget.left()
        return "out of time", []

    for name, real in list(gpu.PARTS.items()):
        monkeypatch.setitem(gpu.PARTS, name, gpu_parts.Part(real.what, real.weight, takes_all))
    gpu.run_parts(["test"], options(), Budget(540.0, clock), [])
    assert limits == [540]
    limits.clear()
    gpu.run_parts(list(gpu.PARTS), options(), Budget(540.0, clock), [])
    assert sum(limits) == pytest.approx(540) and min(limits) > 10


def test_a_part_without_time_is_not_started(monkeypatch: Any) -> None:
    fake_parts(monkeypatch, ran := [])
    clock, outcomes = Hand(), []
    budget = Budget(100.0, clock)
    clock.seconds = 100
    gpu.run_parts(["bench", "report"], options(), budget, outcomes)
    assert ran == []
    assert [(one.part, one.result, one.notes) for one in outcomes] == [
        ("bench", "out of time", ["not started"]),
        ("report", "out of time", ["not started"]),
    ]


def test_a_process_ends_by_itself() -> None:
    assert run([sys.executable, "-c", "raise SystemExit(7)"], 60, os.environ) == 7


def test_a_process_beyond_its_limit_is_interrupted_and_leaves_nothing_running(tmp_path: Path) -> None:
    program = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(2, signal.SIG_IGN);"
        "time.sleep(600)'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "try: time.sleep(600)\n"
        "except KeyboardInterrupt: pathlib.Path('saved').touch()\n"
    )
    script = tmp_path / "script.py"
    script.write_text(f"import os; os.chdir({str(tmp_path)!r})\n{program}")
    assert run([sys.executable, script], 6.0, os.environ) is None
    assert (tmp_path / "saved").exists()
    child = int((tmp_path / "child").read_text())
    attempts = 0
    while is_running(child) and attempts < 100:  # a killed process takes a moment to end
        attempts += 1
        time.sleep(0.1)
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# Build


@pytest.fixture
def pip(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What would be compiled for, of every run of pip; the library it leaves is right."""
    targets: list[str] = []

    def install(command: list[str], limit: float, variables: dict[str, str]) -> int:
        assert command[2:4] == ["pip", "install"] and command[-2:] == ["--editable", "."]
        targets.append(variables["TORCH_CUDA_ARCH_LIST"])
        return 0

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(gpu_parts, "run", install)
    monkeypatch.setattr(gpu_parts, "why_not_built", lambda variables: "")
    yield targets


def test_the_build_is_for_this_gpu_unless_the_user_says_otherwise(pip: list[str]) -> None:
    assert gpu_parts.build(options(), Budget(60)) == ("passed", ["compiled for 9.0a"])
    assert gpu_parts.build(options(), Budget(60)) == ("passed", ["up to date, compiled for 9.0a"])
    chosen = options(TORCH_CUDA_ARCH_LIST="8.0+PTX")
    assert gpu_parts.build(chosen, Budget(60)) == ("passed", ["compiled for 8.0+PTX"])
    assert pip == ["9.0a", "8.0+PTX"]
    assert [gpu_machine.architecture(capability) for capability in ("8.0", "8.9", "12.0")] == ["8.0", "8.9", "12.0"]


def test_a_build_without_cuda_kernels_is_no_success(pip: list[str], monkeypatch: Any) -> None:
    reason = "the CUDA module is not built (no nvcc when liftbyimage was installed)"
    monkeypatch.setattr(gpu_parts, "why_not_built", lambda variables: reason)
    for _ in range(2):  # nor is it up to date afterwards
        assert gpu_parts.build(options(), Budget(60)) == ("failed", [reason])
    assert len(pip) == 2


def test_an_installed_library_is_tried() -> None:
    nowhere = {**os.environ, "PYTHONPATH": str(TESTS / "nowhere"), "PYTHONNOUSERSITE": "1"}
    broken = subprocess.run([sys.executable, "-c", "import liftbyimage"], cwd="/", env=nowhere, capture_output=True)
    reason = gpu_parts.why_not_built(nowhere)
    assert ("cannot be imported: ModuleNotFoundError" in reason) == (broken.returncode != 0)


# Test


def test_every_test_that_touches_a_gpu_is_listed() -> None:
    asks = re.compile(r"cuda\.is_available\(|\.cuda\(\)|\.to\(\"cuda\"|device=\"cuda\"")
    others = {"conftest.py", Path(__file__).name}
    asking = {path.name for path in TESTS.glob("*.py") if asks.search(path.read_text(encoding="utf-8"))} - others
    assert asking == {Path(name.partition("::")[0]).name for name in gpu_parts.GPU_TESTS}


def test_listed_tests_exist() -> None:
    for name in gpu_parts.GPU_TESTS:
        path, _, test = name.partition("::")
        source = (ROOT / path).read_text(encoding="utf-8")
        assert not test or f"def {test.partition('[')[0]}(" in source
        assert "[" not in test or f'"{test.partition("[")[2][:-1]}"' in source


def test_tests_whose_needs_are_missing_are_named(work: Path, monkeypatch: Any) -> None:
    commands: list[list[str]] = []

    def pytest_run(command: list[str], limit: float, variables: dict[str, str]) -> int:
        commands.append(command)
        return 1

    monkeypatch.setattr(gpu_parts, "GPU_TESTS", {"tests/a.py": (), "tests/b.py": ("nothing_of_this_name", "json")})
    monkeypatch.setattr(gpu_parts, "run", pytest_run)
    result, notes = gpu_parts.test(options(), Budget(60))
    assert (result, notes) == (
        "failed",
        ["pytest ended with exit status 1", "tests/b.py not run: without nothing_of_this_name"],
    )
    assert "tests/a.py" in commands[0] and "tests/b.py" not in commands[0] and "--require-gpu" in commands[0]


@pytest.mark.parametrize("status, result", [(None, "out of time"), (0, "passed"), (-9, "failed")])
@pytest.mark.parametrize("outcome", ["passed", "skipped", "failed"])
def test_tests_that_failed_or_were_not_reached_are_named(
    status: int | None, result: str, outcome: str, work: Path, monkeypatch: Any
) -> None:
    def pytest_run(command: list[str], limit: float, variables: dict[str, str]) -> int | None:
        states = RowStates(Path(next(word for word in command if word.startswith("--test-states=")).partition("=")[2]))
        for test in ("tests/test_a.py::one", "tests/test_a.py::two", "tests/test_b.py::three"):
            states.add(test, "due")
        states.add("tests/test_a.py::one", outcome)
        return status

    monkeypatch.setattr(gpu_parts, "run", pytest_run)
    monkeypatch.setattr(gpu_parts, "not_installed", lambda needs: [])
    for _ in range(2):  # what an earlier run left is no part of this one
        ended, notes = gpu_parts.test(options(), Budget(60))
        assert ended == ("failed" if outcome == "failed" else result)
        assert ("failed: tests/test_a.py::one" in notes) == (outcome == "failed")
        assert notes[-2:] == ["test_a.py: 1 tests not run: two", "test_b.py: 1 tests not run: three"]


def test_every_test_has_a_processor_and_memory_of_the_gpu() -> None:
    assert gpu_parts.test_processes(H200, 14) == 14
    assert gpu_parts.test_processes(H200, 64) == gpu_parts.MAX_TEST_PROCESSES
    assert gpu_parts.test_processes({"memory_bytes": 8 << 30}, 14) == 2
    assert gpu_parts.test_processes({"memory_bytes": 2 << 30}, 14) == 1


def run_with_plugin(states: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": gpu_parts.search_path(ROOT / "bench", os.environ)}
    command = [sys.executable, "-m", "pytest", "-p", "gpu_tests", "-p", "no:cacheprovider", f"--test-states={states}"]
    return subprocess.run([*command, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True)


def test_the_most_telling_tests_come_first(tmp_path: Path) -> None:
    states = tmp_path / "states.jsonl"
    finished = run_with_plugin(states, "-k", "not cpu", "--collect-only", "-qq", *gpu_parts.GPU_TESTS)
    assert finished.returncode == 0, finished.stdout
    tests = list(read_states([states]))
    ranks = [gpu_tests.rank(test) for test in tests]
    assert ranks == sorted(ranks) and not any("cpu" in test.partition("::")[2] for test in tests)
    of_cases = [test for test in tests if "test_forward_and_gradients" in test]
    order = ["-cuda-", "-triton-bfloat16", "-triton-float32", "-triton-float16", "-reference-"]
    places = [next(place for place, part in enumerate(order) if part in test) for test in of_cases]
    assert places == sorted(places) and "-triton-float16" in "".join(of_cases)
    assert "test_ops.py" not in tests[0] and set(of_cases) < set(tests)


def test_states_of_tests_outlive_an_interruption(tmp_path: Path) -> None:
    test = tmp_path / "test_three.py"
    test.write_text(
        "import pytest\n"
        "def test_one(): pass\n"
        "def test_two(): pytest.skip('for a reason')\n"
        "def test_three(): raise KeyboardInterrupt\n"
    )
    states = tmp_path / "states.jsonl"
    finished = run_with_plugin(states, "--rootdir", tmp_path, "-o", "addopts=", test)
    assert finished.returncode == 2, finished.stdout
    known = {test.partition("::")[2]: state for test, state in read_states([states]).items()}
    assert known == {
        "test_one": State("passed", ""),
        "test_two": State("skipped", "Skipped: for a reason"),
        "test_three": State("due", ""),
    }


@pytest.mark.parametrize("part, notes", [("test", []), ("sanitize", ["in memcheck"])])
def test_a_part_that_reaches_its_limit_has_not_passed(
    part: str, notes: list[str], work: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "compute-sanitizer").touch(mode=0o755)
    monkeypatch.setattr(gpu_parts, "run", lambda command, limit, variables: None)
    monkeypatch.setattr(gpu_parts, "not_installed", lambda needs: [])
    assert gpu_parts.PARTS[part].run(options(PATH=str(tmp_path)), Budget(60)) == ("out of time", notes)


# Sanitize


def test_a_missing_sanitizer_is_not_a_success(tmp_path: Path, capsys: Any) -> None:
    result = gpu_parts.sanitize(options(PATH=str(tmp_path)), Budget(60))
    assert result == ("NOT RUN", ["compute-sanitizer is not on PATH"])
    assert capsys.readouterr().out == "compute-sanitizer is not on PATH: not run\n"
    table = summary([Outcome("sanitize", result[0], 0.0, result[1])])
    assert "NOT RUN" in table and "passed" not in table


@pytest.mark.parametrize("found, result", [("nothing", "passed"), ("racecheck", "failed"), ("memcheck", "failed")])
def test_what_a_sanitizer_finds_fails(found: str, result: str, tmp_path: Path) -> None:
    program = tmp_path / "compute-sanitizer"
    # --tool TOOL --error-exitcode 1 PYTHON SCRIPT
    program.write_text(f'#!/bin/sh\nif [ "$2" = {found} ]; then exit "$4"; fi\n[ -f "$6" ]\n')
    program.chmod(0o755)
    assert gpu_parts.sanitize(options(PATH=f"{tmp_path}:{os.environ['PATH']}"), Budget(60))[0] == result


def test_every_op_with_a_cuda_kernel_is_sanitized() -> None:
    launchers = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    on_tensor_cores = {
        "tensor_attention",
        "tensor_gradient",
        "mma_attention",
        "mma_gradient",
    }  # forward and backward of three ops
    assert {*sanitize.ops_to_check()} == launchers - on_tensor_cores | {*sanitize.TENSOR_CORES_ALONE}
    assert {op for op, _, _ in sanitize.calls()} == {*sanitize.ops_to_check()}
    assert {dtype for _, _, dtype in sanitize.calls()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("op, case, dtype", list(sanitize.calls()))
def test_the_sanitized_calls_are_valid(op: str, case: Any, dtype: torch.dtype, monkeypatch: Any) -> None:
    sanitize.check(op, case, dtype, device="cpu", backend="reference")
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(sanitize, "run", lambda *arguments: ({"context": nan}, {}))
    with pytest.raises(RuntimeError, match=f"^{op}, {case}, {dtype}: context is not finite$"):
        sanitize.check(op, case, dtype, device="cpu", backend="reference")


# Bench

PLAIN, COMPILED, LATER = "bench/test_a.py::row[plain]", "bench/test_a.py::row[compiled]", "bench/test_b.py::row[later]"


class FakeBench:
    """Plays pytest: writes the states and results of rows, each of which takes a while, unless told otherwise."""

    def __init__(self, clock: Hand, seconds: float = 10.0, statuses: dict[str, int | None] | None = None) -> None:
        self.clock, self.seconds, self.statuses = clock, seconds, statuses or {}
        self.files: list[str] = []

    def __call__(self, command: list[str], limit: float, variables: dict[str, str]) -> int | None:
        states = RowStates(Path(next(word for word in command if word.startswith("--row-states=")).partition("=")[2]))
        kind = next(word for word in command if word.startswith("--compiled-rows=")).partition("=")[2]
        if "--collect-only" in command:
            for row in (PLAIN, COMPILED, LATER):
                states.add(row, "left out" if row == COMPILED and kind == "none" else "due")
            return 0
        file = Path(command[3]).name
        self.files.append(f"{file} {kind}")
        rows = {
            "test_a.py": {"none": [PLAIN], "only": [COMPILED], "all": [PLAIN, COMPILED]}[kind],
            "test_b.py": [LATER],
        }
        self.clock.seconds += self.seconds
        status = self.statuses.get(file, 0)
        for row in rows[file]:
            states.add(row, {None: "due", 1: "failed"}.get(status, "passed"))
        results = Path(command[-3 if "-k" in command else -1].partition("=")[2])
        if status in (0, 1):
            measured = [{**entry(row, "liftbyimage", 0.001, **GPU), "fullname": row} for row in rows[file]]
            document = {"datetime": "2026-01-02T03:04:05", "machine_info": {"cpu": 1}, "benchmarks": measured}
            results.write_text(json.dumps(document))
        return status


@pytest.fixture
def two_files(work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the part with two files of rows; the result, its notes, the processes and the rows that were kept."""
    monkeypatch.setattr(
        gpu_parts, "BENCHES", {"test_a.py": (), "test_b.py": (), "test_c.py": ("nothing_of_this_name",)}
    )

    def bench(total: float = 1000.0, compiled: bool = False, **played: Any) -> Any:
        clock = Hand()
        fake = FakeBench(clock, **played)
        monkeypatch.setattr(gpu_parts, "run", fake)
        result, notes = gpu_parts.bench(options(compiled=compiled), Budget(total, clock))
        kept = json.loads(gpu_parts.MERGED.read_text()) if gpu_parts.MERGED.exists() else {"benchmarks": []}
        return result, notes, fake.files, [row["fullname"] for row in kept["benchmarks"]]

    return bench


MISSING = "test_c.py not run: without nothing_of_this_name"


def test_compiled_rows_come_last(two_files: Any) -> None:
    result, notes, files, kept = two_files()
    assert (result, notes) == ("passed", [MISSING])
    assert files == ["test_a.py none", "test_b.py none", "test_a.py only"]
    assert kept == [PLAIN, LATER, COMPILED]
    assert two_files(compiled=True)[2] == ["test_a.py all", "test_b.py all"]


def test_compiled_rows_without_time_are_named_and_no_failure(two_files: Any) -> None:
    result, notes, _, kept = two_files(total=45.0)
    assert (result, kept) == ("passed", [PLAIN, LATER])
    assert notes == [MISSING, "test_a.py: 1 rows not run: row[compiled]"]
    assert json.loads(gpu_parts.MERGED.read_text())["machine_info"]["rows_not_run"] == [COMPILED]


def test_finished_files_outlive_the_time(two_files: Any) -> None:
    result, notes, files, kept = two_files(total=39.0)
    assert (result, files, kept) == ("out of time", ["test_a.py none"], [PLAIN])
    assert notes == [MISSING, "test_a.py: 1 rows not run: row[compiled]", "test_b.py: 1 rows not run: row[later]"]


def test_a_file_that_is_stopped_costs_only_its_own_rows(two_files: Any) -> None:
    result, notes, _, kept = two_files(statuses={"test_a.py": None})
    assert (result, kept) == ("out of time", [LATER])
    assert "test_a.py: 2 rows not run: row[plain]; row[compiled]" in notes


def test_a_failed_row_and_a_broken_process_are_named(two_files: Any) -> None:
    result, notes, _, kept = two_files(statuses={"test_b.py": 1})
    assert (result, kept) == ("failed", [PLAIN, COMPILED])
    assert f"failed: {LATER}" in notes
    result, notes, _, kept = two_files(statuses={"test_b.py": -11})
    assert (result, kept) == ("failed", [PLAIN, COMPILED])
    assert "test_b.py ended with exit status -11" in notes
    assert "test_b.py: 1 rows not run: row[later]" in notes, "its results were never written"


def test_every_benchmark_has_its_turn() -> None:
    assert {*gpu_parts.BENCHES} == {path.name for path in (ROOT / "bench").glob("test_*.py")}


def test_states_of_rows_are_written_as_they_are_known(tmp_path: Path) -> None:
    states = tmp_path / "states.jsonl"
    command = gpu_parts.pytest_bench("bench/test_attend_tokens.py", states, "none", "not backward")
    command += ["--smoke", "--collect-only", "-qq", "-p", "no:cacheprovider"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
    known = read_states([states, tmp_path / "never written"])
    assert known and all("backward" not in row for row in known)
    assert {state.state for row, state in known.items() if "torch.compile" in row} == {"left out"}
    assert {state.state for row, state in known.items() if "torch.compile" not in row} == {"due"}
    RowStates(states).add("one", "skipped", "why")
    with states.open("a") as file:
        file.write('{"row": "half of a li')
    assert read_states([states])["one"] == State("skipped", "why")
    assert not_run(read_states([states])) == list(known)


# Results


@pytest.mark.parametrize(
    "name, folder",
    [("NVIDIA H200", "nvidia-h200"), ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"), ("A/B (C)", "a-b-c")],
)
def test_slug(name: str, folder: str) -> None:
    assert slug(name) == folder


def test_merging_keeps_rows_in_order_and_says_where_they_are_from(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.json" for name in ("first", "killed", "second")]
    for path in (paths[0], paths[2]):
        document = {"datetime": path.stem, "machine_info": {"cpu": 1}, "benchmarks": [{"name": path.stem}]}
        path.write_text(json.dumps(document))
    merged = merge(paths, H200, ["a row"])
    assert merged == {
        "datetime": "first",
        "machine_info": {"cpu": 1, "gpu": H200, "rows_not_run": ["a row"]},
        "benchmarks": [{"name": "first"}, {"name": "second"}],
    }
    assert merge(paths[1:2], H200, []) is None


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"datetime": "2026-01-02T03:04:05", "machine_info": {"gpu": H200}, "benchmarks": list(rows)}


def test_a_run_is_published_under_its_gpu_and_day_and_replaces_none(tmp_path: Path) -> None:
    document = results(entry("work", "liftbyimage", 0.001, **GPU))
    for name in ("2026-01-02", "2026-01-02-2", "2026-01-02-3"):
        path = publish(document, tmp_path)
        assert path == tmp_path / "nvidia-h200" / f"{name}.json"
        assert json.loads(path.read_text()) == document
    assert len([*path.parent.iterdir()]) == 3  # nothing half-written is left


def test_only_what_a_gpu_measured_is_published(work: Path) -> None:
    assert gpu_parts.report(options(), Budget(60)) == ("NOT RUN", ["there are no results of the part bench"])
    assert why_not_publish(results()) == "no row was measured"
    gpu_parts.MERGED.parent.mkdir()
    gpu_parts.MERGED.write_text(json.dumps(results(entry("work", "liftbyimage", 0.001))))
    assert gpu_parts.report(options(), Budget(60)) == ("failed", ["rows were measured on cpu, not on a GPU"])
    assert not gpu_parts.RESULTS.exists()


def test_the_report_publishes_and_sums_up(work: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr(gpu_parts, "ROOT", work)
    gpu_parts.MERGED.parent.mkdir()
    rows = [entry("a work", name, seconds, **GPU) for name, seconds in (("reference", 0.003), ("liftbyimage", 0.001))]
    gpu_parts.MERGED.write_text(json.dumps(results(*rows)))
    place = "results/nvidia-h200/2026-01-02.json"
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert gpu_parts.report(options(PYTHONPATH=search), Budget(60)) == ("passed", [f"wrote {place}"])
    assert (work / place).is_file()
    assert re.search(r"\| a work \|.*3\.00×", capfd.readouterr().out)


# Timing

TIMED = Hand()
CLOCK = EventClock(lambda: FakeEvent(TIMED))


def move(milliseconds: float) -> str:
    TIMED.seconds += milliseconds
    return "result"


@pytest.mark.benchmark(timer=CLOCK)
def test_the_statistics_of_a_row_are_seconds_of_its_events(benchmark: Any) -> None:
    if benchmark.disabled:
        pytest.skip("pytest-benchmark measures nothing here")
    durations = itertools.cycle([5.0, 7.0, 6.0])

    def between_the_rounds() -> tuple[tuple[float], dict[str, Any]]:
        move(1000.0)  # a flush of the cache, say
        return (next(durations),), {}

    assert benchmark.pedantic(lambda ms: CLOCK.time(move, ms), setup=between_the_rounds, rounds=3) == "result"
    assert benchmark.stats.stats.data == pytest.approx([0.005, 0.007, 0.006])
    assert str(CLOCK) == "CUDA events"  # what the JSON names as timer


def test_a_round_flushes_the_cache_and_waits_before_its_events(monkeypatch: Any) -> None:
    happened: list[str] = []

    class Clock:
        def time(self, function: Callable[..., Any], *args: Any) -> None:
            happened.append("start")
            function(*args)
            happened.append("end")

    def flusher(cache_bytes: int, device: str) -> Callable[[], object]:
        assert cache_bytes > 0
        return lambda: happened.append("flush")

    def pedantic(target: Callable[..., Any], setup: Callable[[], Any], rounds: int) -> None:
        for _ in range(rounds):
            args, kwargs = setup()
            target(*args, **kwargs)

    monkeypatch.setattr(measurement, "EVENT_CLOCK", Clock())
    monkeypatch.setattr(measurement, "cache_flusher", flusher)
    monkeypatch.setattr(measurement.machine, "synchronise", lambda: happened.append("wait"))
    step: Any = SimpleNamespace(launch=lambda call: happened.append(call))
    turns: Any = itertools.cycle(["first inputs", "second inputs"])
    measurement.take_event_time(SimpleNamespace(pedantic=pedantic), step, turns, rounds=2)
    one, two = (["flush", "wait", "start", inputs, "end"] for inputs in ("first inputs", "second inputs"))
    assert happened == one + two
