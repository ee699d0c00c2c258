"""The parts of `make gpu`: what each runs, and what it says of it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_machine import architecture
from gpu_process import OUT_OF_TIME as LATE
from gpu_process import ROOT, Budget, run
from gpu_results import merge, publish, why_not_publish, write_json
from gpu_summary import FAILED, NOT_RUN, OUT_OF_TIME, PASSED
from row_states import DUE, LEFT_OUT, State, not_run, read_states

Result = tuple[str, list[str]]  # and what the summary says of it

WORK = ROOT / "build" / "gpu"
MERGED = WORK / "merged.json"
STAMP = ROOT / "build" / "gpu-install"
RESULTS = ROOT / "bench" / "results"

# Every test that puts something on a GPU, and what it needs beside the library; tests/test_gpu_runner.py keeps the list
# whole. Of these files the tests with "cpu" in their names are left out; gpu_tests.py orders the others.
GPU_TESTS: dict[str, Sequence[str]] = {
    "tests/test_capture.py": (),
    "tests/test_lift_by_image.py": (),
    "tests/test_examples.py::test_example[cuda_graph.py]": (),
    "tests/test_cli.py::test_doctor_json_states_every_backend": ("typer", "rich", "cv2"),
    "tests/test_ops.py": (),
    "tests/test_triton_interpreter.py": (),
}
MAX_TEST_PROCESSES = 16
TEST_PROCESS_BYTES = 3 * 2**30  # of the GPU's memory: a context, the largest case and its reference in float64

SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")

# The most telling rows first: what does not fit into the time is at the end.
BENCHES: dict[str, Sequence[str]] = {
    "test_lift_by_image.py": (),
    "test_pose_guided_attention.py": (),
    "test_prune_patches.py": (),
    "test_factored.py": (),
    "test_attend_patches.py": (),
    "test_context_aware_poseformer.py": (),
    "test_sample_context.py": (),
    "test_attend_tokens.py": (),
    "test_joint_side.py": (),
    "test_token_blocks.py": (),
    "test_formulations.py": (),
    "test_dispatch_overhead.py": (),
    "test_encoder.py": (),
    "test_training.py": ("yaml", "cv2"),
}
COLLECTING_SECONDS = 60.0
SHORTEST_BENCH = 30.0  # seconds: less is not enough to start a process and measure a row
FILE_SHARE = 0.4  # of the part's time, at most, for one file
ROWS_FAILED = 1  # exit status of pytest


@dataclass(frozen=True)
class Options:
    gpu: Mapping[str, Any]
    variables: Mapping[str, str]
    rows: str | None
    compiled: bool


def missing(packages: Iterable[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def not_installed(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence for each that lacks a package."""
    lacking = {name: missing(packages) for name, packages in needs.items()}
    return [f"{name} not run: without {', '.join(packages)}" for name, packages in lacking.items() if packages]


def result_of(status: int | None, what: str) -> Result:
    if status is LATE:
        return OUT_OF_TIME, []
    return (PASSED, []) if status == 0 else (FAILED, [f"{what} ended with exit status {status}"])


def build(options: Options, budget: Budget) -> Result:
    chosen = options.variables.get("TORCH_CUDA_ARCH_LIST") or architecture(options.gpu["capability"])
    variables = {**options.variables, "TORCH_CUDA_ARCH_LIST": chosen}
    if STAMP.is_file() and STAMP.read_text() == fingerprint(variables, options.gpu) and not why_not_built(variables):
        return PASSED, [f"up to date, compiled for {chosen}"]
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", "."]
    status = run(command, budget.left(), variables)
    if status != 0:
        return result_of(status, "pip")
    reason = why_not_built(variables)
    if reason:
        return FAILED, [reason]
    STAMP.parent.mkdir(exist_ok=True)
    STAMP.write_text(fingerprint(variables, options.gpu))
    return PASSED, [f"compiled for {chosen}"]


def fingerprint(variables: Mapping[str, str], gpu: Mapping[str, Any]) -> str:
    """Of all that the compiled modules depend on, and of themselves."""
    names = ("TORCH_CUDA_ARCH_LIST", "LIFTBYIMAGE_MARCH", "CXX", "CUDA_HOME")
    facts: list[object] = [sys.executable, gpu["torch"], *(variables.get(name) for name in names)]
    facts += [[path.name, path.stat().st_mtime_ns] for path in sorted((ROOT / "liftbyimage").glob("*.so"))]
    sources = [ROOT / "setup.py", ROOT / "pyproject.toml", *sorted((ROOT / "csrc").rglob("*.*"))]
    facts += [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in sources]
    return json.dumps(facts)


def why_not_built(variables: Mapping[str, str]) -> str:
    """In one line why the installed library is not this one with its CUDA kernels, or ""."""
    program = (
        "import liftbyimage.kernels; from liftbyimage import _extension as e; print(liftbyimage.__file__);"
        "print(e.CUDA_MISSING or '')"
    )
    command = [sys.executable, "-c", program]
    probe = subprocess.run(command, cwd="/", env=variables, capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        return f"the library cannot be imported: {probe.stderr.strip().splitlines()[-1]}"
    file, reason = probe.stdout.split("\n")[:2]
    return reason if ROOT in Path(file).parents else f"{sys.executable} imports another liftbyimage: {file}"


def test(options: Options, budget: Budget) -> Result:
    chosen = [test for test, needed in GPU_TESTS.items() if not missing(needed)]
    notes = not_installed(GPU_TESTS)
    outcomes = WORK / "tests.jsonl"
    WORK.mkdir(parents=True, exist_ok=True)
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "gpu_tests", f"--test-states={outcomes}"]
    command += ["--require-gpu", "-k", "not cpu", *chosen]
    variables = {**options.variables, "PYTHONPATH": search_path(ROOT / "bench", options.variables)}
    if not missing(["xdist"]):
        processes = test_processes(options.gpu, os.cpu_count() or 1)
        command += ["-n", str(processes)]
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    status = run(command, budget.left(), variables)
    states = read_states([outcomes])
    failed = [f"failed: {test}" for test, state in states.items() if state.state == "failed"]
    result, why = result_of(status, "pytest")
    return FAILED if failed else result, [*why, *failed, *not_run_notes(not_run(states), "tests"), *notes]


def search_path(folder: Path, variables: Mapping[str, str]) -> str:
    return os.pathsep.join([str(folder), *filter(None, [variables.get("PYTHONPATH")])])


def test_processes(gpu: Mapping[str, Any], processors: int) -> int:
    """Compiling takes a processor each, and every process its memory of the GPU."""
    return max(1, min(processors, MAX_TEST_PROCESSES, gpu["memory_bytes"] // TEST_PROCESS_BYTES))


def sanitize(options: Options, budget: Budget) -> Result:
    program = shutil.which(SANITIZER, path=options.variables["PATH"])
    if program is None:
        print(f"{SANITIZER} is not on PATH: not run", flush=True)
        return NOT_RUN, [f"{SANITIZER} is not on PATH"]
    variables = {**options.variables, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for number, tool in enumerate(TOOLS):
        command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, "bench/sanitize.py"]
        limit = budget.left() / (len(TOOLS) - number)
        result, notes = result_of(run(command, limit, variables), f"{SANITIZER} --tool {tool}")
        if result != PASSED:
            return result, notes or [f"in {tool}"]
    return PASSED, [f"{' and '.join(TOOLS)} found nothing"]


@dataclass(frozen=True)
class Pass:
    """One pytest process: a file's rows, or those of it that are compiled."""

    file: str
    compiled_rows: str  # as bench/conftest.py has it

    @property
    def states(self) -> Path:
        return WORK / f"{Path(self.file).stem}-{self.compiled_rows}.jsonl"

    @property
    def results(self) -> Path:
        return self.states.with_suffix(".json")

    def command(self, rows: str | None) -> list[str]:
        chosen = pytest_bench(f"bench/{self.file}", self.states, self.compiled_rows, rows)
        return [*chosen, f"--benchmark-json={self.results}"]


def pytest_bench(target: str, states: Path, compiled_rows: str, rows: str | None) -> list[str]:
    command = [sys.executable, "-m", "pytest", target, "--benchmark-only", f"--row-states={states}"]
    return [*command, f"--compiled-rows={compiled_rows}", *(["-k", rows] if rows else [])]


def bench(options: Options, budget: Budget) -> Result:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    files = [file for file, needed in BENCHES.items() if not missing(needed)]
    notes = not_installed(BENCHES)
    kind = "all" if options.compiled else "none"
    collected = WORK / "collected.jsonl"
    collect(collected, kind, files, options, budget)
    states = read_states([collected])
    if not states:
        return FAILED, ["pytest found no rows to measure", *notes]
    done: list[Pass] = []
    broken: list[str] = []
    for one in passes(states, kind, files):
        if budget.left() < SHORTEST_BENCH:
            break
        status = run(one.command(options.rows), min(budget.left(), FILE_SHARE * budget.granted), options.variables)
        done.append(one)
        if status not in (0, ROWS_FAILED, LATE):
            broken.append(f"{one.file} ended with exit status {status}")
        keep(collected, done, options.gpu)
    states = read_states([collected, *(one.states for one in done)])
    failed = [row for row, state in states.items() if state.state == "failed"]
    unmeasured = not_run(states) + lost_rows(states)
    notes += [*broken, *(f"failed: {row}" for row in failed), *not_run_notes(unmeasured, "rows")]
    if failed or broken:
        return FAILED, notes
    due = {row for row, state in read_states([collected]).items() if state.state == DUE}
    return (OUT_OF_TIME if due & {*unmeasured} else PASSED), notes


def collect(states: Path, kind: str, files: Sequence[str], options: Options, budget: Budget) -> None:
    """Write which rows there are, so that none that is not reached goes unmentioned."""
    first, *others = (f"bench/{file}" for file in files)
    command = [*pytest_bench(first, states, kind, options.rows), *others, "--collect-only", "-qq"]
    run(command, min(budget.left(), COLLECTING_SECONDS), options.variables)


def passes(states: Mapping[str, State], kind: str, files: Sequence[str]) -> list[Pass]:
    """Every file that has rows; then, for the time that remains, the compiled rows that were left out."""

    def having(state: str) -> list[str]:
        there = {file_of(row) for row, one in states.items() if one.state == state}
        return [file for file in files if file in there]

    return [*(Pass(file, kind) for file in having(DUE)), *(Pass(file, "only") for file in having(LEFT_OUT))]


def file_of(row: str) -> str:
    return Path(row.partition("::")[0]).name


def keep(collected: Path, done: Sequence[Pass], gpu: Mapping[str, Any]) -> None:
    """Write what there is so far as one file."""
    states = read_states([collected, *(one.states for one in done)])
    document = merge([one.results for one in done], gpu, not_run(states))
    if document is not None:
        finished = {row for row, state in states.items() if state.state == "passed"}
        document["benchmarks"] = [row for row in document["benchmarks"] if row["fullname"] in finished]
        write_json(MERGED, document)


def lost_rows(states: Mapping[str, State]) -> list[str]:
    """Rows that were measured by a process that was killed before it wrote them."""
    written = {row["fullname"] for row in json.loads(MERGED.read_text())["benchmarks"]} if MERGED.is_file() else set()
    return [row for row, state in states.items() if state.state == "passed" and row not in written]


def not_run_notes(ids: Sequence[str], what: str) -> list[str]:
    by_file: dict[str, list[str]] = {}
    for one in ids:
        by_file.setdefault(file_of(one), []).append(one.partition("::")[2])
    return [f"{file}: {len(names)} {what} not run: {'; '.join(names)}" for file, names in by_file.items()]


def report(options: Options, budget: Budget) -> Result:
    if not MERGED.is_file():
        return NOT_RUN, ["there are no results of the part bench"]
    document = json.loads(MERGED.read_text())
    reason = why_not_publish(document)
    if reason is not None:
        return FAILED, [reason]
    path = publish(document, RESULTS)
    # As `liftbyimage bench-report --summary` prints it, without what the command line needs installed.
    program = (
        "import pathlib, sys; from liftbyimage.bench_report.blocks import make_report;"
        "print(make_report([pathlib.Path(sys.argv[1])], True, [], []).markdown())"
    )
    status = run([sys.executable, "-c", program, path], budget.left(), options.variables)
    result, notes = result_of(status, "bench-report")
    return result, [f"wrote {path.relative_to(ROOT)}", *notes]


@dataclass(frozen=True)
class Part:
    what: str
    weight: float  # its share of the time that is left, beside the weights of the parts to come
    run: Callable[[Options, Budget], Result]


PARTS = {
    "build": Part("compile for this GPU and install", 30, build),
    "test": Part("every test that touches a GPU, none of which may skip", 33, test),
    "sanitize": Part(f"the CUDA kernels under {SANITIZER}", 12, sanitize),
    "bench": Part("benchmarks, as many as the time allows", 21, bench),
    "report": Part("publish the results and sum them up", 2, report),
}
