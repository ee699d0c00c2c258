from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from marked_person import MarkerModel, picture, write_video
from rich.console import Console
from typer.testing import CliRunner, Result

import liftbyimage
from liftbyimage import _extension, checkpoint, cli, doctor, lift_command, models
from liftbyimage.data.synthetic import generate
from liftbyimage.ops._explain import OPS, backends_of

DEMONSTRATION = "This is a demonstration model, trained on synthetic scenes only"


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def _refused(message: str, *arguments: object) -> None:
    result = _run(*arguments)
    assert result.stderr == f"error: {message}\n"
    assert result.stdout == ""
    assert result.exit_code == 2


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    lifter = models.LiftByImage(models.LiftByImageConfig(dim=32, heads=4))
    path = tmp_path_factory.mktemp("checkpoint") / "small.pt"
    checkpoint.save_pipeline(models.Pipeline(models.TinyEncoder(), lifter), path, encoder="tiny")
    return path


@pytest.fixture
def photo(tmp_path: Path) -> tuple[Path, Path]:
    """A picture with a synthetic person, and its pose file."""
    scene = generate(1, seed=21).scene(0)
    image, pose = tmp_path / "person.png", tmp_path / "pose.json"
    assert cv2.imwrite(str(image), scene["image"].numpy()[..., ::-1])
    pose.write_text(json.dumps({"keypoints": scene["pose_2d"].tolist()}), encoding="utf-8")
    return image, pose


def test_version() -> None:
    result = _run("--version")
    assert (result.exit_code, result.stdout) == (0, f"liftbyimage {liftbyimage.__version__}\n")


def test_help_names_every_command() -> None:
    result = _run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("demo", "lift", "train-demo", "doctor", "bench-report"))


def test_runs_as_a_module_without_loading_torch() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['liftbyimage', '--version']\n"
        "try:\n    runpy.run_module('liftbyimage', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print([name for name in ('torch', 'cv2', 'matplotlib') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr == ""
    assert run.stdout == f"liftbyimage {liftbyimage.__version__}\n[]\n"


def test_lift(small: Path, photo: tuple[Path, Path], tmp_path: Path) -> None:
    image, pose = photo
    out = tmp_path / "out"
    result = _run("lift", image, "--pose", pose, "--checkpoint", small, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Lifted 1 person: {out / 'poses.json'} and a picture of each beside it.\n"
    assert sorted(path.name for path in out.iterdir()) == ["person.png", "poses.json"]
    [entry] = json.loads((out / "poses.json").read_text(encoding="utf-8"))["images"]
    assert entry["image"] == str(image)
    assert torch.tensor(entry["pose_3d"]).shape == (17, 3)


def test_lift_says_that_the_default_model_is_a_demonstration(
    small: Path, photo: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "DEMO_CHECKPOINT", small)
    image, pose = photo
    result = _run("lift", image, "--pose", pose, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(DEMONSTRATION)


def test_lift_with_official_encoder_weights(photo: tuple[Path, Path], tmp_path: Path) -> None:
    image, pose = photo
    torch.manual_seed(6)
    pipeline = models.Pipeline(models.hrnet_w32(), models.LiftByImage(models.LiftByImageConfig(dim=32, heads=4)))
    weights, lifter = tmp_path / "w32.pth", tmp_path / "lifter.pt"
    torch.save(pipeline.encoder.state_dict(), weights)
    checkpoint.save_pipeline(pipeline, lifter, encoder="hrnet-w32", with_encoder=False)
    out = tmp_path / "out"
    common = ("lift", image, "--pose", pose, "--out", out)
    _refused(
        f"checkpoint {lifter}: holds no encoder weights, give a file of official hrnet-w32 weights",
        *common,
        "--checkpoint",
        lifter,
    )
    _refused(
        "--encoder-weights needs --checkpoint too: a lifter trained on that encoder's features "
        "(the demonstration model has an encoder of its own)",
        *common,
        "--encoder-weights",
        weights,
    )
    assert not out.exists()
    result = _run(*common, "--checkpoint", lifter, "--encoder-weights", weights)
    assert result.exit_code == 0, result.output
    assert (out / "poses.json").is_file()


def test_lift_refuses_bad_input_before_it_writes(small: Path, photo: tuple[Path, Path], tmp_path: Path) -> None:
    image, pose = photo
    out, nowhere = tmp_path / "out", tmp_path / "nowhere"
    options = ("--checkpoint", small, "--out", out)
    _refused(f"image {nowhere}: no such file", "lift", image, nowhere, "--pose", pose, *options)
    _refused(f"image {pose}: not an image that OpenCV can read", "lift", image, pose, "--pose", pose, *options)
    _refused(f"pose file {nowhere}: no such file", "lift", image, "--pose", nowhere, *options)
    _refused(
        f"checkpoint {nowhere}: no such file",
        *("lift", image, "--pose", pose, "--checkpoint", nowhere, "--out", out),
    )
    _refused(f"image {nowhere}: no such file", "lift", nowhere, "--pose", pose, *options)
    _refused(f"image {tmp_path}: is a folder", "lift", tmp_path, "--pose", pose, *options)
    short = tmp_path / "short.json"
    short.write_text(json.dumps({"keypoints": [[1, 2]] * 16}), encoding="utf-8")
    _refused(f"pose file {short}: the pose has 16 keypoints, expected 17", "lift", image, "--pose", short, *options)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"x.png": json.loads(pose.read_text())}), encoding="utf-8")
    _refused(f"pose file {other}: no entry for image 'person.png'", "lift", image, "--pose", other, *options)
    assert not out.exists()


def test_lift_keeps_the_users_own_files(small: Path, photo: tuple[Path, Path]) -> None:
    image, pose = photo
    own = pose.rename(pose.with_name("poses.json"))
    folder = image.parent
    before = own.read_bytes()
    _refused(
        f"--out {folder} would overwrite the pose file {own}: choose another folder",
        *("lift", image, "--pose", own, "--checkpoint", small, "--out", folder),
    )
    assert own.read_bytes() == before
    _refused(f"--out {image}: expected a folder, got a file", "lift", image, "--pose", own, "--out", image)


@pytest.mark.parametrize("arguments", [("lift",), ("lift", "--pose", "p.json"), ("demo", "--people", 0)])
def test_usage_errors(arguments: tuple[object, ...]) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.stderr.startswith("Usage: ")


def _module(monkeypatch: pytest.MonkeyPatch, name: str, function: str, body: Any) -> None:
    module = types.ModuleType(f"liftbyimage.{name}")
    setattr(module, function, body)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(liftbyimage, name, module, raising=False)


def test_demo_and_train_demo_pass_their_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    _module(monkeypatch, "demo", "run_demo", lambda *a: calls.append(a) or {"pictures": [out]})
    errors = {"coarse": 2.0, "refined": 1.0, "pose_only": 3.0}
    _module(monkeypatch, "train_demo", "train_demo", lambda *a: calls.append(a) or {**errors, "minutes": 4.0})
    out, file = tmp_path / "pictures", tmp_path / "new.pt"
    assert _run("demo", "--out", out, "--people", 3, "--seed", 7).exit_code == 0
    assert _run("train-demo", "--out", file, "--seed", 8).exit_code == 0
    assert json.loads(_run("demo", "--out", out, "--json", "--html").stdout) == {"pictures": [str(out)]}
    expected = {"checkpoint": str(file), "seed": 0, "mpjpe_mm": errors, "minutes": 4.0}
    assert json.loads(_run("train-demo", "--out", file, "--json").stdout) == expected
    shown = [tuple("console" if isinstance(one, Console) else one for one in call) for call in calls]
    trained = [(file, 8, "console"), (file, 0, "console")]
    assert shown == [(out, 3, 7, "console", False), trained[0], (out, 6, 0, "console", True), trained[1]]
    (tmp_path / "taken").write_text("")
    _refused(f"--out {tmp_path / 'taken'}: expected a folder, got a file", "demo", "--out", tmp_path / "taken")
    _refused(f"--out {tmp_path}: expected a file, got a folder", "train-demo", "--out", tmp_path)


def test_a_demanded_backend_that_cannot_serve_is_the_users_mistake(
    small: Path, photo: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIFTBYIMAGE_BACKEND", "quantum")
    image, pose = photo
    names = ", ".join(backend.name for backend in backends_of("attend_patches"))
    _refused(
        f"attend_patches: backend must be one of {names}, got 'quantum' (demanded by LIFTBYIMAGE_BACKEND)",
        *("lift", image, "--pose", pose, "--checkpoint", small, "--out", tmp_path / "out"),
    )
    assert not (tmp_path / "out").exists()


def test_a_defect_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*arguments: Any) -> None:
        int("no number")

    _module(monkeypatch, "demo", "run_demo", defect)
    result = _run("demo", "--out", tmp_path)
    assert isinstance(result.exception, ValueError)
    assert result.exit_code == 1


def test_unwritable_output_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    _module(monkeypatch, "demo", "run_demo", denied)
    _refused("[Errno 13] Permission denied: 'somewhere'", "demo", "--out", tmp_path)


def test_doctor_json_states_every_backend() -> None:
    result = _run("doctor", "--json")
    assert result.exit_code == 0
    findings = json.loads(result.stdout)
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["versions"]["liftbyimage"] == liftbyimage.__version__
    assert findings["devices"] == (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    assert (findings["extension"] is None) == (_extension.CPU_MISSING is not None)
    rows = [(row["op"], row["backend"], row["batch_independent"]) for row in findings["ops"]]
    assert rows == [(op, b.name, b.batch_independent) for op in OPS for b in backends_of(op)]
    for op in OPS:
        mine = [row["cpu"] for row in findings["ops"] if row["op"] == op]
        assert mine[-1]["why_not"] is None  # the reference serves everything
        assert sum(status["chosen"] for status in mine) == 1
    [cuda] = [r["cpu"] for r in findings["ops"] if (r["op"], r["backend"]) == ("prune_patches", "cuda")]
    assert cuda["why_not"] == (_extension.CUDA_MISSING or "serves CUDA tensors, got cpu")


def test_doctor_without_compiler_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "the C++ extension is not built (no C++ compiler when liftbyimage was installed)"
    monkeypatch.setattr(_extension, "CPU_MISSING", missing)
    monkeypatch.setattr(_extension, "CUDA_MISSING", "the CUDA module needs the C++ extension, which is not built")
    monkeypatch.setattr(doctor, "_compiler", lambda: None)
    monkeypatch.setattr(doctor, "_nvcc_version", lambda: None)
    findings = doctor.report()
    assert findings["extension"] is None
    rebuild = "`pip install --no-build-isolation -e .`"
    assert findings["missing"][:2] == [
        {
            "what": missing,
            "cure": f"install g++ (Debian, Ubuntu: `apt-get install g++`), then {rebuild}",
        },
        {
            "what": "the CUDA module needs the C++ extension, which is not built",
            "cure": f"install the CUDA toolkit (it brings nvcc), then {rebuild}",
        },
    ]
    cpu_rows = [row["cpu"] for row in findings["ops"] if row["backend"] == "cpu"]
    assert cpu_rows == [{"why_not": missing, "chosen": False}] * len(OPS)
    shown = " ".join(_run("doctor").stdout.split())
    assert f"missing: {missing} cure: install g++" in shown


def test_doctor_shows_a_demanded_backend_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFTBYIMAGE_BACKEND", "quantum")
    findings = doctor.report()
    assert findings["demanded_backend"] == "quantum"
    assert not any(row["cpu"]["chosen"] for row in findings["ops"])
    assert "LIFTBYIMAGE_BACKEND demands 'quantum' for every op." in _run("doctor").stdout


def test_doctor_survives_a_broken_build(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def broken(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if name == "liftbyimage" and fromlist and "_extension" in fromlist:
            raise ImportError("liftbyimage._C is built but does not load (undefined symbol)")
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", broken)
    findings = doctor.report()
    assert findings["ops"] == []
    assert findings["missing"] == [
        {
            "what": "liftbyimage._C is built but does not load (undefined symbol)",
            "cure": "`pip install --no-build-isolation -e .`",
        }
    ]


PLACES = [(30 + 8 * step, 40) for step in range(5)] + [None]


@pytest.fixture
def pose_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that loads as the model that finds marked people."""
    path = tmp_path / "pose.onnx"
    path.write_bytes(b"")
    monkeypatch.setattr(lift_command, "load_pose_model", lambda given: {path: MarkerModel()}[given])
    return path


def test_lift_with_a_pose_model(small: Path, pose_model: Path, tmp_path: Path) -> None:
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    for image, at in zip(images, PLACES, strict=False):
        assert cv2.imwrite(str(image), picture(at)[..., ::-1])
    out = tmp_path / "out"
    common = ("lift", *images, "--pose-model", pose_model, "--checkpoint", small, "--out", out)
    result = _run(*common)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Lifted 2 people: {out / 'poses.json'} and a picture of each beside it.\n"
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "poses.json"]
    result = _run(*common, "--no-pictures", "--format", "npz", "--box", "-5,0,140.5,190")
    assert result.stdout == f"Lifted 2 people: {out / 'poses.npz'}.\n"
    _refused(f"image {images[0]}: the pose model saw nobody in it", *common, "--box", "0,0,20,20")


def test_lift_with_a_detector_of_the_users(
    small: Path, pose_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "people_finder.py").write_text(
        "def nobody(image):\n    return []\ndef all(image):\n    return [[0, 0, 240, 190]]\n"
    )
    image, out = tmp_path / "a.png", tmp_path / "out"
    assert cv2.imwrite(str(image), picture(PLACES[0])[..., ::-1])
    common = ("lift", image, "--pose-model", pose_model, "--checkpoint", small, "--out", out, "--detector")
    _refused(f"image {image}: the detector found nobody in it", *common, "people_finder:nobody")
    _refused("detector people_finder: expected package.module:function", *common, "people_finder")
    assert not out.exists()
    assert _run(*common, "people_finder:all").exit_code == 0
    assert (out / "poses.json").is_file()


def test_lift_a_video(small: Path, pose_model: Path, tmp_path: Path) -> None:
    clip, out = write_video(tmp_path / "clip.avi", PLACES), tmp_path / "out"
    common = ("lift", clip, "--pose-model", pose_model, "--checkpoint", small, "--out", out)
    result = _run(*common)
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"Lifted the person in 5 of 6 frames: {out / 'poses.json'} and {out / 'clip.mp4'}. "
        "Nobody was seen in the others.\n"
    )
    frames = json.loads((out / "poses.json").read_text(encoding="utf-8"))["frames"]
    assert [frame["pose_3d"] is not None for frame in frames] == [True] * 5 + [False]
    result = _run(*common, "--frames", "2:4", "--no-pictures", "--format", "npz")
    assert result.stdout == f"Lifted the person in 2 of 2 frames: {out / 'poses.npz'}.\n"
    assert _run(*common, "--frames", "4:").stdout.startswith("Lifted the person in 1 of 2 frames: ")


def test_a_torn_video_says_how_much_could_be_read(small: Path, pose_model: Path, tmp_path: Path) -> None:
    torn = write_video(tmp_path / "torn.avi", PLACES[:1] * 12)
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    result = _run("lift", torn, "--pose-model", pose_model, "--checkpoint", small, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f" {torn} states 12 frames, but no more could be read.\n")


def test_lift_refuses_options_that_do_not_go_together(
    small: Path, photo: tuple[Path, Path], pose_model: Path, tmp_path: Path
) -> None:
    image, pose = photo
    clip = write_video(tmp_path / "clip.avi", PLACES[:2])
    common = ("--checkpoint", small, "--out", tmp_path / "out")
    of_image, of_clip = ("lift", image, *common), ("lift", clip, *common)
    found, given = ("--pose-model", pose_model), ("--pose", pose)
    _refused("no 2D poses: give --pose FILE, or --pose-model FILE to find them", *of_image)
    _refused("--pose and --pose-model both give the 2D poses: choose one", *of_image, *found, *given)
    needs = "a video needs --pose-model FILE, which finds the 2D pose in every frame"
    _refused(needs, *of_clip)
    _refused(needs, *of_clip, *given)
    _refused(f"expected pictures or one video, got the video {clip} among 2 files", *of_clip, image, *found)
    looks = "says where a pose model looks: it needs --pose-model"
    _refused(f"--box {looks}", *of_image, *given, "--box", "0,0,9,9")
    _refused(f"--detector {looks}", *of_image, *given, "--detector", "a:b")
    both = "--box and --detector both say where to look: choose one"
    _refused(both, *of_image, *found, "--box", "0,0,9,9", "--detector", "a:b")
    for text in ("1,2,3", "a,b,c,d", "5,5,1,9", "0,0,inf,1"):
        message = f"--box: expected x0,y0,x1,y1 in px with x0 < x1 and y0 < y1, got {text}"
        _refused(message, *of_image, *found, "--box", text)
    _refused("--frames chooses frames of a video, got pictures", *of_image, *found, "--frames", "1:2")
    message = "--frames: expected A:B, frame numbers from 0 of which either may be left out, got "
    for text in ("3", "a:b", "-1:2"):
        _refused(message + text, *of_clip, *found, "--frames", text)
    _refused("--frames: expected A:B with A < B, got 3:3", *of_clip, *found, "--frames", "3:3")
    message = f"video {clip}: has 2 frames, expected more than 7, the first one asked for"
    _refused(message, *of_clip, *found, "--frames", "7:")
    _refused("--format: expected json or npz, got csv", *of_image, *found, "--format", "csv")
    missing, broken = tmp_path / "no.mp4", tmp_path / "broken.mp4"
    broken.write_bytes(b"text")
    _refused(f"video {missing}: no such file", "lift", missing, *common, *found)
    _refused(f"video {broken}: not a video that OpenCV can read", "lift", broken, *common, *found)
    notes = tmp_path / "notes.txt"
    notes.write_bytes(b"\x1b[31mred\x1b[0m\n" * 100)  # FFmpeg plays it
    _refused(f"image {notes}: not an image that OpenCV can read", "lift", notes, *common, *found)
    _refused(
        "--model context-aware-poseformer needs --checkpoint: the demonstration model is lift-by-image",
        *("lift", image, *given, "--model", "context-aware-poseformer"),
    )
    assert not (tmp_path / "out" / "poses.json").exists()


def test_lift_with_a_published_context_aware_poseformer(
    photo: tuple[Path, Path], pose_model: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    lifter = models.build("context-aware-poseformer")
    parts = {"backbone": models.HRNet(32, num_joints=None), "volume_net": lifter}
    weights = {f"module.{part}.{name}": value for part in parts for name, value in parts[part].state_dict().items()}
    published, out = tmp_path / "published.bin", tmp_path / "out"
    torch.save({"model": weights}, published)
    clip, (image, pose) = write_video(tmp_path / "clip.avi", PLACES), photo
    options = ("--checkpoint", published, "--model", "context-aware-poseformer", "--out", out)
    result = _run("lift", image, "--pose", pose, *options)
    assert result.exit_code == 0, result.output
    [entry] = json.loads((out / "poses.json").read_text(encoding="utf-8"))["images"]
    assert [entry[name] for name in ("coarse_pose_3d", "kept_patches", "patches")] == [None] * 3
    assert entry["pose_3d"][0] == [0, 0, 0]
    assert (out / entry["picture"]).is_file()
    result = _run("lift", clip, "--pose-model", pose_model, *options)
    assert result.exit_code == 0, result.output
    frames = json.loads((out / "poses.json").read_text(encoding="utf-8"))["frames"]
    assert [frame["pose_3d"] is not None for frame in frames] == [True] * 5 + [False]
    _refused(
        f"checkpoint {published}: lifter must be 'lift-by-image', got 'context-aware-poseformer'",
        *("lift", image, "--pose", pose, "--checkpoint", published, "--model", "lift-by-image", "--out", out),
    )
