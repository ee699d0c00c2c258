"""How the command line behaves: JSON alone on standard output, completion, Ctrl-C, pipes, a sentence per mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from liftbyimage import cli, doctor
from liftbyimage._files import DEMO_CHECKPOINT, require_utf8, write_atomically
from liftbyimage.checkpoint import save_atomically
from liftbyimage.data.source import SOURCES
from liftbyimage.lift import FORMATS
from liftbyimage.lift_video import is_video, open_video
from liftbyimage.models import ENCODERS, LIFTERS
from liftbyimage.predict import PRECISIONS

PROGRAM = (sys.executable, "-m", "liftbyimage")
LESS_MEMORY = "smaller batches, fewer workers or a smaller model need less"
TINY = ("--encoder", "tiny", "--set", "lifter.dim=32", "--set", "lifter.heads=4", "--batch-size", "4")


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def _document(*arguments: object) -> dict[str, Any]:
    """What a command prints with --json, which must be one document and nothing else."""
    result = _run(*arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def photo(tmp_path: Path) -> tuple[Path, Path]:
    """A picture and a pose file for it."""
    image, pose = tmp_path / "person.png", tmp_path / "pose.json"
    assert cv2.imwrite(str(image), np.full((256, 192, 3), 128, np.uint8))
    corners = [[60 + 4 * (joint % 5), 40 + 10 * joint] for joint in range(17)]
    pose.write_text(json.dumps({"keypoints": corners}), encoding="utf-8")
    return image, pose


class TestJson:
    def test_lift(self, photo: tuple[Path, Path], tmp_path: Path) -> None:
        image, pose = photo
        out = tmp_path / "out"
        assert _document("lift", image, "--pose", pose, "--out", out, "--json") == {
            "people": 1,
            "poses": str(out / "poses.json"),
            "pictures": [str(out / "person.png")],
            "checkpoint": str(DEMO_CHECKPOINT),
        }
        assert sorted(path.name for path in out.iterdir()) == ["person.png", "poses.json"]

    def test_notes_go_to_standard_error(self, photo: tuple[Path, Path], tmp_path: Path) -> None:
        image, pose = photo
        result = _run("lift", image, "--pose", pose, "--out", tmp_path / "out", "--no-pictures", "--json")
        assert json.loads(result.stdout)["pictures"] == []
        assert result.stderr.startswith("This is a demonstration model")
        assert result.stderr.endswith(f"Lifted 1 person: {tmp_path / 'out' / 'poses.json'}.\n")

    def test_train(self, tmp_path: Path) -> None:
        out, data = tmp_path / "run", "synthetic,count=4,size=128x96"
        command = ("train", "--out", out, "--data", data, *TINY, "--epochs", 1, "--stage2-epochs", 0, "--json")
        report = _document(*command)
        assert report["finished"] is True
        assert report["files"] == {
            name.partition(".")[0]: str(out / name) for name in ("model.pt", "last.pt", "config.yaml", "curves.json")
        }
        curves = json.loads((out / "curves.json").read_text())["loss"]
        assert report["steps"] == {"stage 1": 1}
        assert report["loss"] == {"stage 1": curves["stage 1"][-1]}
        assert (report["validation"], report["best_mpjpe_mm"]) == (None, None)

    def test_of_the_processes_that_torchrun_starts_the_first_prints(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from liftbyimage import training

        trained = training.trainer.Trained(True, {"loss": {}, "validation": []}, None)
        monkeypatch.setattr(training, "train", lambda config, out: trained)
        command = ("train", "--out", tmp_path / "run", "--data", "synthetic", "--json")
        monkeypatch.setenv("RANK", "1")
        assert _run(*command).stdout == ""
        monkeypatch.setenv("RANK", "0")
        assert json.loads(_run(*command).stdout)["finished"] is True

    def test_evaluate_prints_what_it_writes(self, tmp_path: Path) -> None:
        file = tmp_path / "results.json"
        command = ("evaluate", "demo", "--data", "synthetic,count=2")
        written = _run(*command, "--json", file)
        assert "MPJPE" in written.stdout
        document = json.loads(file.read_text(encoding="utf-8"))
        assert document["checkpoint"] == str(DEMO_CHECKPOINT)
        assert _document(*command, "--json") == document
        assert _document(*command, "--json", "-") == document
        assert _document("evaluate", "demo", "--json", *command[2:]) == document
        assert "MPJPE" in _run(*command, "--json").stderr

    def test_lift_all(self, tmp_path: Path) -> None:
        out = tmp_path / "shards"
        command = ("lift-all", "synthetic,count=3", "--out", out, "--shard-size", 2, "--device", "cpu", "--json")
        expected = {
            "out": str(out),
            "records": 3,
            "shards": {"lifted": 2, "present": 0, "others": 0},
            "problems": 0,
            "device": "cpu",
            "checkpoint": str(DEMO_CHECKPOINT),
            "precision": "float32",
            "flip_test": False,
        }
        assert _document(*command) == expected
        assert _document(*command) == {**expected, "shards": {"lifted": 0, "present": 2, "others": 0}}

    def test_a_mistake_leaves_standard_output_empty(self, tmp_path: Path) -> None:
        result = _run("lift", tmp_path / "no.png", "--json")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == f"error: image {tmp_path / 'no.png'}: no such file\n"


class TestCompletion:
    @pytest.mark.parametrize(
        ("shell", "start"),
        [("bash", "_liftbyimage_completion() {"), ("zsh", "#compdef liftbyimage"), ("fish", "complete --command lift")],
    )
    def test_the_script_of_a_shell(self, shell: str, start: str) -> None:
        result = _run("--show-completion", shell)
        assert result.exit_code == 0
        assert result.stdout.startswith(start)
        assert cli.COMPLETION_REQUEST in result.stdout

    def test_it_is_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        script = tmp_path / ".bash_completions" / "liftbyimage.sh"
        result = _run("--install-completion", "bash")
        assert result.stdout == f"Wrote {script}; new shells complete liftbyimage.\n"
        assert script.read_text().strip() == _run("--show-completion", "bash").stdout.strip()
        assert str(script) in (tmp_path / ".bashrc").read_text()

    def test_an_unknown_shell(self) -> None:
        result = _run("--show-completion", "tcsh")
        assert result.exit_code == 2
        assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in " ".join(result.stderr.replace("│", " ").split())

    @pytest.mark.parametrize(
        ("line", "completions"),
        [
            ("train --model ", list(LIFTERS)),
            ("train --encoder ", list(ENCODERS)),
            ("train --precision b", ["bfloat16"]),
            ("evaluate demo --device ", ["auto", "cpu", "cuda"]),
            ("evaluate demo --precision ", list(PRECISIONS)),
            ("evaluate demo --data ", list(SOURCES)),
            ("lift-all h", ["human3.6m"]),
            ("lift --format ", list(FORMATS)),
            ("lift --pose", ["--pose", "--pose-model"]),
            ("--show-completion z", ["zsh"]),
        ],
    )
    def test_words_that_a_shell_completes(self, line: str, completions: list[str]) -> None:
        words = f"liftbyimage {line}"
        result = CliRunner().invoke(
            _completing(),
            env={
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - (not words.endswith(" "))),
                cli.COMPLETION_REQUEST: "complete_bash",
            },
            prog_name=cli.PROGRAM,
        )
        assert result.stdout.split() == completions

    def test_a_request_names_every_command_and_loads_no_torch(self) -> None:
        code = (
            "import runpy, sys\n"
            "try:\n    runpy.run_module('liftbyimage', run_name='__main__')\n"
            "except SystemExit as end:\n    assert not end.code, end.code\n"
            "print([name for name in ('torch', 'numpy', 'cv2') if name in sys.modules])"
        )
        request = {"COMP_WORDS": "liftbyimage ", "COMP_CWORD": "1", cli.COMPLETION_REQUEST: "complete_bash"}
        run = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **request}, capture_output=True, text=True, check=True
        )
        *commands, loaded = run.stdout.splitlines()
        assert {"demo", "lift", "train-demo", "doctor", "bench-report", "train", "evaluate", "lift-all"} <= {*commands}
        assert loaded == "[]"


def _completing() -> Any:
    from typer.completion import completion_init

    completion_init()
    return cli.app


class TestEnds:
    def test_ctrl_c_is_one_line(self, tmp_path: Path) -> None:
        command = (*PROGRAM, "train-demo", "--out", str(tmp_path / "demo.pt"))
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("Rendering ")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert errors == "Interrupted.\n"
        assert process.returncode == 130

    @pytest.mark.parametrize("arguments", [("doctor", "--json"), ("--help",)])
    def test_a_reader_that_goes_away_is_no_traceback(self, arguments: tuple[str, ...]) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        run = subprocess.run((*PROGRAM, *arguments), stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writing)
        assert run.stderr.strip() == ""
        assert run.returncode == 1

    def test_what_standard_output_cannot_show_is_escaped(self, photo: tuple[Path, Path], tmp_path: Path) -> None:
        image, pose = photo
        command = (*PROGRAM, "lift", str(image), "--pose", str(pose), "--no-pictures", "--out", "größe")
        environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert run.stderr == ""
        assert run.stdout.endswith("Lifted 1 person: gr\\xf6\\xdfe/poses.json.\n")


def _raising(error: BaseException) -> Any:
    def run_demo(*arguments: Any) -> None:
        raise error

    return run_demo


class TestMistakes:
    @pytest.mark.parametrize(
        ("error", "sentence"),
        [
            (
                RuntimeError(
                    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."
                ),
                "out of memory (64 bytes more were asked for): " + LESS_MEMORY,
            ),
            (
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total"),
                "out of memory (2.50 GiB more were asked for): " + LESS_MEMORY,
            ),
            (MemoryError(), "out of memory: " + LESS_MEMORY),
            (
                RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
                "DataLoader worker (pid 7) is killed by signal: Killed: fewer --workers need less memory",
            ),
            (OSError(28, "No space left on device", "demo-output/person-1.png"), None),
        ],
    )
    def test_what_this_machine_has_not_enough_of(
        self, error: Exception, sentence: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("liftbyimage.demo.run_demo", _raising(error))
        result = _run("demo", "--out", tmp_path)
        assert result.stderr == f"error: {sentence or error}\n"
        assert result.exit_code == 2

    def test_another_runtime_error_is_a_defect(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("liftbyimage.demo.run_demo", _raising(RuntimeError("shapes do not fit")))
        result = _run("demo", "--out", tmp_path)
        assert result.exit_code == 1
        assert isinstance(result.exception, RuntimeError)

    def test_a_build_that_does_not_load(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from liftbyimage._extension import BrokenBuild

        monkeypatch.setattr("liftbyimage.demo.run_demo", _raising(BrokenBuild("liftbyimage._C is broken")))
        result = _run("demo", "--out", tmp_path)
        assert result.stderr == "error: liftbyimage._C is broken; `liftbyimage doctor` says more\n"
        assert result.exit_code == 2

    def test_places_that_cannot_be_written_into_are_told_before_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "file"
        file.write_text("")
        for command, option in (
            (("demo",), "--out"),
            (("lift", "a.png"), "--out"),
            (("train-demo",), "--out"),
            (("train",), "--out"),
            (("lift-all", "synthetic"), "--out"),
            (("evaluate", "demo", "--data", "synthetic"), "--json"),
        ):
            result = _run(*command, option, file / "inside" / "x")
            where = file / "inside" if command == ("train-demo",) else file / "inside" / "x"
            assert result.stderr == f"error: {option} {where}: {file} is a file, expected a folder\n"
            assert (result.exit_code, result.stdout) == (2, "")
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        result = _run("demo", "--out", tmp_path / "new")
        message = f"error: --out {tmp_path / 'new'}: {tmp_path} is a folder that you may not write into\n"
        assert (result.exit_code, result.stderr) == (2, message)

    def test_names_that_opencv_cannot_take(self, photo: tuple[Path, Path], tmp_path: Path) -> None:
        image, pose = photo
        other = image.rename(tmp_path / os.fsdecode(b"n\xff.png"))
        result = _run("lift", other, "--pose", pose, "--out", tmp_path / "out")
        shown = str(other).encode("ascii", "backslashreplace").decode()
        assert result.stderr.encode("ascii", "backslashreplace").decode() == (
            f"error: file {shown}: the name is not UTF-8; rename the file or folder\n"
        )
        assert result.exit_code == 2
        clip = other.rename(other.with_suffix(".mp4"))
        for refuses in (is_video, open_video):
            with pytest.raises(ValueError, match="the name is not UTF-8"):
                refuses(clip)
        require_utf8("file", tmp_path / "größe")

    def test_a_full_disk_says_which_file_had_no_room(self, tmp_path: Path) -> None:
        def write(file: Any) -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError) as refused:
            write_atomically(tmp_path / "x", write)
        assert str(refused.value) == f"[Errno 28] No space left on device: '{tmp_path / 'x'}'"
        code = (
            "import resource, torch; from liftbyimage.checkpoint import save_atomically\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
            f"try:\n    save_atomically(torch.zeros(100000), {str(tmp_path / 'big.pt')!r})\n"
            "except OSError as error:\n    print(error)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout == f"[Errno 27] File too large: '{tmp_path / 'big.pt'}'\n"
        assert list(tmp_path.iterdir()) == []
        save_atomically(torch.zeros(2), tmp_path / "small.pt")

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (
                ("evaluate", "{image}", "--data", "synthetic"),
                "checkpoint {image}: not a readable PyTorch file of plain",
            ),
            (("evaluate", "{torn}", "--data", "synthetic"), "checkpoint {torn}: not a readable PyTorch file of plain"),
            (
                ("evaluate", "{empty}", "--data", "synthetic"),
                "checkpoint {empty}: not a readable PyTorch file of plain",
            ),
            (("evaluate", "{folder}", "--data", "synthetic"), "checkpoint {folder}: is a folder\n"),
            (("evaluate", "demo", "--data", "synthetic,count=0"), "count: expected at least 1, got 0\n"),
            (
                ("evaluate", "demo", "--data", "pictures"),
                "source 'pictures': pictures needs its folder, as in pictures:",
            ),
            (("train", "--out", "{folder}/r", "--config", "{image}"), "--config {image}: no readable YAML: "),
            (("train", "--out", "{folder}/r", "--config", "{folder}"), "--config {folder}: is a folder\n"),
            (
                ("train", "--out", "{folder}/r", "--config", "{empty}"),
                "--config {empty}: expected a mapping of settings",
            ),
            (
                ("train", "--out", "{folder}/r", "--data", "synthetic", "--init", "{torn}"),
                "checkpoint {torn}: not a re",
            ),
            (("lift", "{empty}", "--pose", "{pose}", "--out", "{folder}/o"), "image {empty}: not an image that OpenCV"),
            (("lift", "{image}", "--pose", "{image}", "--out", "{folder}/o"), "pose file {image}: not valid JSON"),
            (("lift", "{image}", "--pose", "{folder}", "--out", "{folder}/o"), "pose file {folder}: is a folder\n"),
            (("lift", "{image}", "--pose-model", "{empty}"), "pose model {empty}: not a readable PyTorch file"),
            (("bench-report", "{folder}"), "benchmark results {folder}: is a folder\n"),
            (
                ("lift-all", "synthetic,count=2", "--out", "{folder}/s", "--part", "2/2"),
                "--part: expected K/N with 0 ≤",
            ),
        ],
    )
    def test_a_sentence_for_each(
        self, arguments: tuple[str, ...], sentence: str, photo: tuple[Path, Path], tmp_path: Path
    ) -> None:
        image, pose = photo
        empty, torn = tmp_path / "empty", tmp_path / "torn.pt"
        empty.write_bytes(b"")
        torn.write_bytes(DEMO_CHECKPOINT.read_bytes()[:10_000])
        names = {"image": image, "pose": pose, "empty": empty, "torn": torn, "folder": tmp_path}
        result = _run(*(argument.format(**names) for argument in arguments))
        assert result.stderr.startswith(f"error: {sentence.format(**names)}")
        assert result.stderr.count("\n") == 1
        assert result.exit_code == 2


class TestDoctor:
    def test_names_packages_that_some_commands_need(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = doctor._package_version
        monkeypatch.setattr(doctor, "_package_version", lambda name: None if name == "h5py" else real(name))
        assert {
            "what": "the package h5py is not installed; without it: no source mpi-inf-3dhp-test",
            "cure": "`pip install h5py`",
        } in doctor.report()["missing"]

    def test_says_that_a_build_is_for_narrower_vectors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        assert doctor._narrow({"isa": "AVX2"}) == [
            {"what": "the C++ extension is built for AVX2, this processor has AVX512", "cure": doctor.REBUILD}
        ]
        assert doctor._narrow({"isa": "AVX512"}) == doctor._narrow(None) == []
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "VSX")
        assert doctor._narrow({"isa": "AVX2"}) == []
