"""Evaluation against the metrics called on all poses at once, and its command."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from converted_dataset import write_mpi_inf_3dhp_test
from few_people import FewPeople, small_pipeline
from torch.utils.data import default_collate
from typer.testing import CliRunner, Result

from liftbyimage import checkpoint, cli, metrics, models
from liftbyimage.batches import joint_order, make_batch
from liftbyimage.data.crop import apply_affine
from liftbyimage.data.skeleton import FLIP_PERMUTATION, H36M_TO_MPI_INF_3DHP, JOINT_NAMES
from liftbyimage.data.source import SOURCES, CorruptRecord, open_source
from liftbyimage.evaluate import SCHEMA, Measurements, evaluate, measure, summarise
from liftbyimage.evaluate_command import spread

GRID = (16, 12)


def _everything(source: FewPeople) -> dict[str, Any]:
    return default_collate([source[index] for index in range(len(source)) if index not in source.corrupt])


def _assert_equal(ours: Measurements, theirs: Measurements, **tolerance: float) -> None:
    for field in fields(Measurements):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, **tolerance)
        else:
            assert a == b, field.name


@pytest.mark.parametrize("name", models.LIFTERS)
def test_every_lifter_is_measured_as_the_metrics_say(name: str) -> None:
    source, pipeline = FewPeople(), small_pipeline(name)
    measured = measure(pipeline, source, batch_size=5)
    assert pipeline.training, "the training flag must be as before"
    records = _everything(source)
    batch = make_batch(pipeline.lifter, records)
    with torch.no_grad():
        out = pipeline.eval()(batch.images, *batch.poses)
    pose = metrics.root_relative((out if isinstance(out, torch.Tensor) else out.pose_3d).double())
    truth = records["pose_3d"].double()
    for metric in ("mpjpe", "p_mpjpe", "n_mpjpe", "pck", "auc"):
        expected = getattr(metrics, metric)(pose, truth, reduction="none")
        torch.testing.assert_close(getattr(measured, metric), expected, rtol=1e-5, atol=1e-6)
        assert expected.std() > 0
    torch.testing.assert_close(measured.joint_errors, (pose - truth).norm(dim=-1), rtol=1e-5, atol=1e-6)
    assert measured.index.tolist() == list(range(12)) and measured.group.tolist() == [0, 1, 2] * 4
    assert measured.pck_all_joints is None and measured.skipped == ()
    if name == "lift-by-image":
        coarse = out.coarse_pose_3d.double()
        torch.testing.assert_close(measured.coarse_mpjpe, metrics.mpjpe(coarse, truth, "none"), rtol=1e-5, atol=1e-6)
        expected = metrics.p_mpjpe(coarse, truth, "none")
        torch.testing.assert_close(measured.coarse_p_mpjpe, expected, rtol=1e-5, atol=1e-6)
        assert (measured.coarse_mpjpe - measured.mpjpe).abs().max() > 1e-3
    else:
        assert measured.coarse_mpjpe is None and measured.background is None


def test_poses_in_another_order_and_off_the_root_are_measured_in_human36m_order() -> None:
    source, pipeline = FewPeople(), small_pipeline("context-aware-poseformer", "mpi-inf-3dhp")
    measured = measure(pipeline, source)
    records = _everything(source)
    batch = make_batch(pipeline.lifter, records)
    with torch.no_grad():
        out = pipeline.eval()(batch.images, *batch.poses).double()
    assert joint_order(pipeline.lifter) == list(H36M_TO_MPI_INF_3DHP)
    ordered = torch.empty_like(out)
    ordered[:, list(H36M_TO_MPI_INF_3DHP)] = out
    errors = (ordered - ordered[:, :1] - records["pose_3d"].double()).norm(dim=-1)
    torch.testing.assert_close(measured.joint_errors, errors, rtol=1e-5, atol=1e-6)


def test_background_with_a_mask_and_with_the_hull_of_the_joints() -> None:
    pipeline = small_pipeline("lift-by-image")
    for mask in (True, False):
        source = FewPeople(mask=mask)
        measured = measure(pipeline, source, batch_size=4)
        records = _everything(source)
        batch = make_batch(pipeline.lifter, records)
        with torch.no_grad():
            importance = pipeline.eval()(batch.images, *batch.poses).importance.double()
        if mask:
            masks = records["mask"]
        else:
            crop_px = apply_affine(records["crop_matrix"].numpy(), records["keypoints"].numpy())
            masks = torch.stack([metrics.hull_mask(joints, (64, 48)) for joints in crop_px])
        expected = metrics.background_attention(importance, masks, GRID, "none")
        torch.testing.assert_close(measured.background, expected, rtol=1e-5, atol=1e-6)
        uniform = 1 - masks.double().mean(dim=(1, 2))
        torch.testing.assert_close(measured.background_of_uniform, uniform)
        assert 0.1 < uniform.mean() < 0.9 and (measured.background - uniform).abs().max() > 1e-4


def test_averages_of_groups_by_hand() -> None:
    index, group = torch.arange(5), torch.tensor([0, 0, 0, 2, 2])
    each = torch.tensor([0.01, 0.02, 0.03, 0.1, 0.2], dtype=torch.float64)
    joints = each[:, None] * torch.ones(17, dtype=torch.float64)
    half = each * 0 + torch.tensor([0.5, 0.5, 0.5, 1, 1], dtype=torch.float64)
    measurements = Measurements(index, group, joints, each, each / 2, each / 4, half, half / 2)
    summary = summarise(measurements, ("a", "b", "c"), per_joint=True)
    assert list(summary["groups"]) == ["a", "c"], "a group without a record has no mean"
    assert (summary["groups"]["a"]["records"], summary["groups"]["c"]["records"], summary["records"]) == (3, 2, 5)
    assert summary["groups"]["a"]["mpjpe_mm"] == pytest.approx(20)
    assert summary["groups"]["c"]["mpjpe_mm"] == pytest.approx(150)
    assert summary["average"]["mpjpe_mm"] == pytest.approx(85)
    assert summary["mpjpe_mm"] == pytest.approx(72)
    assert (summary["average"]["p_mpjpe_mm"], summary["n_mpjpe_mm"]) == pytest.approx((42.5, 18))
    assert (summary["pck"], summary["average"]["pck"], summary["average"]["auc"]) == pytest.approx((0.7, 0.75, 0.375))
    assert summary["per_joint_mm"] == pytest.approx(dict.fromkeys(JOINT_NAMES, 72))
    assert summary["average"]["per_joint_mm"] == pytest.approx(dict.fromkeys(JOINT_NAMES, 85))
    assert "coarse_mpjpe_mm" not in summary and "background" not in summary
    assert summary["schema"] == SCHEMA and summary["skipped"] == 0
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.parametrize("name", models.LIFTERS)
def test_flip_test(name: str) -> None:
    source, pipeline = FewPeople(6), small_pipeline(name)
    straight, flipped = measure(pipeline, source), measure(pipeline, source, flip_test=True)
    records = _everything(source)
    batch = make_batch(pipeline.lifter, records)
    with torch.no_grad():
        pose = metrics.root_relative(pipeline.eval().flip_test(batch.images, *batch.poses).double())
    expected = metrics.mpjpe(pose, records["pose_3d"].double(), "none")
    torch.testing.assert_close(flipped.mpjpe, expected, rtol=1e-5, atol=1e-6)
    assert (straight.mpjpe - flipped.mpjpe).abs().max() > 1e-3
    if name == "lift-by-image":
        assert (straight.coarse_mpjpe - flipped.coarse_mpjpe).abs().max() > 1e-3
        torch.testing.assert_close(straight.background, flipped.background)


@pytest.mark.parametrize("name", models.LIFTERS)
def test_with_the_flip_test_a_mirrored_source_measures_the_same(name: str) -> None:
    source, mirrored, pipeline = FewPeople(6), FewPeople(6), small_pipeline(name)
    swap, columns = list(FLIP_PERMUTATION), mirrored.columns
    columns["image"], columns["mask"] = columns["image"][:, :, ::-1].copy(), columns["mask"][:, :, ::-1].copy()
    columns["pose_3d"] = columns["pose_3d"][:, swap] * np.float32([-1, 1, 1])
    keypoints = columns["keypoints"][:, swap].copy()
    keypoints[..., 0] = 2 * 220 - keypoints[..., 0]  # about the box's centre, which is the crop's
    columns["keypoints"] = keypoints
    if name == "context-aware-poseformer":  # its pose_2d is mirrored about the picture's centre: 320 − 220 px beside
        columns["image_size"] = np.tile(np.float32([440, 580]), (6, 1))
        source.columns["image_size"] = columns["image_size"]
    ours, theirs = (measure(pipeline, each, flip_test=True) for each in (source, mirrored))
    swapped = theirs.joint_errors[:, swap]
    torch.testing.assert_close(ours.joint_errors, swapped, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.mpjpe, theirs.mpjpe, rtol=1e-4, atol=1e-5)
    straight, other = (measure(pipeline, each) for each in (source, mirrored))
    assert (straight.mpjpe - other.mpjpe).abs().max() > 1e-3


def test_evaluated_joints_are_for_pck_and_auc_alone() -> None:
    source, pipeline = FewPeople(), small_pipeline("pose-only")
    some = (1, 2, 3, 10, 16)
    plain = measure(pipeline, source)
    source.evaluated_joints = some
    measured = measure(pipeline, source)
    errors = measured.joint_errors
    torch.testing.assert_close(measured.pck, (errors[:, list(some)] < 0.15).double().mean(dim=1))
    assert torch.equal(measured.pck_all_joints, plain.pck) and torch.equal(measured.auc_all_joints, plain.auc)
    assert not torch.equal(measured.auc, plain.auc)
    assert torch.equal(measured.mpjpe, plain.mpjpe)
    summary = summarise(measured, source.groups)
    assert summary["auc_all_joints"] == pytest.approx(plain.auc.mean().item())


def test_neither_batch_size_nor_workers_change_what_is_measured() -> None:
    source, pipeline = FewPeople(corrupt=(4,)), small_pipeline("lift-by-image")
    state = torch.random.get_rng_state()
    whole = measure(pipeline, source, batch_size=12)
    _assert_equal(measure(pipeline, source, batch_size=12), whole, rtol=0, atol=0)
    _assert_equal(measure(pipeline, source, batch_size=5, workers=2), whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.random.get_rng_state(), state), "measuring draws no random numbers"


def test_two_halves_joined_are_the_whole() -> None:
    source, pipeline = FewPeople(corrupt=(3, 8)), small_pipeline("lift-by-image")
    whole = measure(pipeline, source)
    halves = [measure(pipeline, source, indices=range(rank, 12, 2)) for rank in (1, 0)]
    _assert_equal(Measurements.join(halves), whole, rtol=1e-5, atol=1e-6)
    overlapping = [measure(pipeline, source, indices=part) for part in ([7, 3, 1, 7], [], range(12), [8])]
    _assert_equal(Measurements.join(overlapping), whole, rtol=1e-5, atol=1e-6)
    assert len(overlapping[0]) == 2 and len(overlapping[1]) == 0 and len(overlapping[3]) == 0
    assert [problem.index for problem in overlapping[3].skipped] == [8]


def test_corrupt_records_are_left_out_and_counted() -> None:
    source, pipeline = FewPeople(corrupt=(0, 1, 7)), small_pipeline("pose-only")
    counts: list[int] = []
    measured = measure(pipeline, source, batch_size=2, on_batch=counts.append)
    assert measured.index.tolist() == [2, 3, 4, 5, 6, 8, 9, 10, 11] and counts == [2] * 6
    assert [problem.index for problem in measured.skipped] == [0, 1, 7]
    whole = measure(pipeline, FewPeople())
    torch.testing.assert_close(measured.mpjpe, whole.mpjpe[measured.index], rtol=1e-5, atol=1e-6)
    summary = evaluate(pipeline, source)
    assert summary["records"] == 9 and summary["skipped"] == 3
    assert summary["problems"] == [f"image {i}.jpg: not an image that OpenCV can read" for i in (0, 1, 7)]


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_stops_at_the_first(workers: int) -> None:
    with pytest.raises(CorruptRecord) as error:
        measure(small_pipeline("pose-only"), FewPeople(corrupt=(5, 9)), batch_size=4, strict=True, workers=workers)
    assert str(error.value) == "image 5.jpg: not an image that OpenCV can read"


def test_bfloat16_is_near_float32() -> None:
    source = FewPeople(6)
    for name in models.LIFTERS:
        pipeline = small_pipeline(name)
        exact, rounded = measure(pipeline, source), measure(pipeline, source, precision="bfloat16")
        assert not torch.equal(exact.mpjpe, rounded.mpjpe), name
        torch.testing.assert_close(exact.mpjpe, rounded.mpjpe, rtol=0.05, atol=0)


def test_refusals() -> None:
    pipeline, source = small_pipeline("pose-only"), FewPeople(3)
    few = models.Pipeline(None, models.build("pose-only", dim=16, heads=2, layers=1, num_joints=16))
    nothing = measure(pipeline, FewPeople(3, corrupt=(1,)), indices=[1])
    broken = measure(pipeline, source)
    broken.mpjpe[1] = np.nan
    gpus = torch.cuda.device_count()
    cases = {
        "measure: batch_size must be at least 1, got 0": lambda: measure(pipeline, source, batch_size=0),
        "measure: precision must be one of float32, bfloat16, float16, got 'half'": lambda: measure(
            pipeline, source, precision="half"
        ),
        "measure: precision float16 needs a GPU, got device 'cpu'; bfloat16 serves there": lambda: measure(
            pipeline, source, precision="float16", device="cpu"
        ),
        "measure: device must be auto, cpu or cuda, got 'gpu'": lambda: measure(pipeline, source, device="gpu"),
        f"measure: device 'cuda:99' does not exist: PyTorch finds {gpus} GPUs here": lambda: measure(
            pipeline, source, device="cuda:99"
        ),
        "measure: indices must lie in 0 … 2, got 3": lambda: measure(pipeline, source, indices=[0, 3]),
        "measure: source must know the true poses, got records without pose_3d": lambda: measure(
            pipeline, FewPeople(3, truth=False)
        ),
        "lifter must lift 17 joints, got one for 16": lambda: measure(few, source),
        "summarise: no record was measured; image 1.jpg: not an image that OpenCV can read": lambda: summarise(
            nothing, source.groups
        ),
        "summarise: no record was measured": lambda: summarise(Measurements.join([]), source.groups),
        "summarise: the pose of record 1 is not finite: the weights are broken": lambda: summarise(
            broken, source.groups
        ),
        "summarise: groups must name every record's group, got 2 names and group 2": lambda: summarise(
            measure(pipeline, source), ("a", "b")
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message
    with pytest.raises(TypeError) as type_error:
        measure(pipeline, source, batch_size=2.5)  # type: ignore[arg-type]
    assert str(type_error.value) == "measure: batch_size must be a whole number, got 2.5"


def test_a_limit_is_spread_over_the_source() -> None:
    assert spread(10, None) == range(10) and spread(10, 20) == range(10)
    assert spread(10, 3) == [0, 3, 6] and spread(10, 1) == [0]


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in ("evaluate", *arguments)])


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """`few,count=…` as a source of the command line."""
    monkeypatch.setitem(SOURCES, "few", "few_people:FewPeople")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "small.pt"
    checkpoint.save_pipeline(small_pipeline("lift-by-image"), path, encoder="tiny", encoder_config={"channels": 8})
    return path


def test_command_prints_a_table_and_writes_json(few: None, saved: Path, tmp_path: Path) -> None:
    written = tmp_path / "results" / "out.json"
    result = _run(saved, "--data", "few,count=7", "--json", written, "--batch-size", 2, "--per-joint", "--flip-test")
    assert result.exit_code == 0, result.output
    document = json.loads(written.read_text(encoding="utf-8"))
    assert list(written.parent.iterdir()) == [written]
    summary = evaluate(checkpoint.load_pipeline(saved), FewPeople(7), flip_test=True, per_joint=True)
    for name in ("mpjpe_mm", "p_mpjpe_mm", "coarse_mpjpe_mm", "background", "auc"):
        assert document[name] == pytest.approx(summary[name], rel=1e-5)
    assert document["lifter"] == "lift-by-image" and document["data"] == "few,count=7" and document["flip_test"]
    assert document["source"] == {"source": "few", "count": 7, "seed": 0, "size": [64, 48]}
    lines = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
    assert lines["walking"][0] == "3" and lines["sitting"][0] == "2" and lines["all"][0] == "7"
    assert lines["all"][1] == f"{summary['mpjpe_mm']:.1f}"
    assert lines["average"][1] == f"{summary['average']['p_mpjpe_mm']:.1f}" or lines["average"][0] == (
        f"{summary['average']['mpjpe_mm']:.1f}"
    )
    assert lines["left_wrist"] == [f"{summary['per_joint_mm']['left_wrist']:.1f}"]
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_command_on_the_test_set_of_mpi_inf_3dhp(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="h5py is not installed")
    root, written = write_mpi_inf_3dhp_test(tmp_path / "3dhp"), tmp_path / "a.json"
    (root / "TS2" / "imageSequence" / "img_000003.jpg").write_bytes(b"torn")
    line = f"mpi-inf-3dhp-test:{root},sequences=TS1+TS2,size=64x48"
    result = _run(saved, "--data", line, "--json", written, "--per-joint")
    assert result.exit_code == 0, result.output
    document = json.loads(written.read_text(encoding="utf-8"))
    assert {name: means["records"] for name, means in document["groups"].items()} == {"TS1": 3, "TS2": 2}
    assert document["skipped"] == 1 and "img_000003.jpg" in document["problems"][0]
    source = open_source(line)
    measured = measure(checkpoint.load_pipeline(saved), source)
    evaluated = [joint for joint, name in enumerate(JOINT_NAMES) if name not in ("pelvis", "spine", "nose")]
    near = (measured.joint_errors < 0.15).double()
    assert document["pck"] == pytest.approx(near[:, evaluated].mean().item())
    assert document["pck_all_joints"] == pytest.approx(near.mean().item()) and document["pck"] < near.mean()
    assert document["mpjpe_mm"] == pytest.approx(1000 * measured.joint_errors.mean().item(), rel=1e-5)


def test_command_counts_what_cannot_be_read_or_stops(few: None, saved: Path) -> None:
    arguments = (saved, "--data", "few,count=4,corrupt=[2]")
    result = _run(*arguments)
    assert result.exit_code == 0, result.output
    assert "Left out 1 records that could not be read, the first: image 2.jpg: not an image" in result.stdout
    strict = _run(*arguments, "--strict")
    assert (strict.exit_code, strict.stderr) == (2, "error: image 2.jpg: not an image that OpenCV can read\n")


def test_command_knows_the_demonstration_model_and_a_limit(tmp_path: Path) -> None:
    result = _run("demo", "--data", "synthetic,count=8", "--limit", 2, "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert document["records"] == 2 and document["mpjpe_mm"] < 400


def test_command_refuses(saved: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none.pt"
    for message, arguments in {
        f"checkpoint {missing}: no such file": (missing, "--data", "synthetic,count=2"),
        "measure: device must be auto, cpu or cuda, got 'tpu'": (saved, "--data", "synthetic", "--device", "tpu"),
        f"--json {tmp_path}: expected a file, got a folder": (saved, "--data", "synthetic", "--json", tmp_path),
    }.items():
        result = _run(*arguments)
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {message}\n")
