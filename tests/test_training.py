"""The training loop: it learns, repeats bit by bit wherever it is interrupted, and leaves frozen parts alone."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from small_branches import SmallBranches
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import default_collate
from typer.testing import CliRunner

from liftbyimage import cli, models
from liftbyimage.batches import Batch, make_batch
from liftbyimage.checkpoint import load_pipeline, save_pipeline
from liftbyimage.data.source import CorruptRecord, Source
from liftbyimage.data.synthetic import SyntheticPeople
from liftbyimage.evaluate import evaluate
from liftbyimage.metrics import mpjpe
from liftbyimage.training import Trained, TrainingConfig, train
from liftbyimage.training.build import build_pipeline
from liftbyimage.training.feed import mirrored_records
from liftbyimage.training.loss import StageLoss
from liftbyimage.training.stages import stages_of
from liftbyimage.training.trainer import Place, Trainer, learning_rate

SIZE = (64, 48)
TINY: dict[str, dict[str, Any]] = {
    "lift-by-image": {"encoder": "tiny", "encoder_config": {"channels": 8}, "lifter": {"dim": 16, "heads": 2}},
    "pose-only": {"lifter": {"dim": 16, "heads": 2, "layers": 2}},
    "context-aware-poseformer": {
        "encoder": "small branches",
        "lifter": {"dim": 16, "heads": 2, "context_heads": 2, "depth": 2},
        "batch_size": 8,
    },
}


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.ENCODERS, "small branches", SmallBranches)


class People(Source):
    """Records of another source, kept in memory, some of them corrupt or changed."""

    def __init__(
        self, source: Source, corrupt: tuple[int, ...] = (), without: str = "", count: int | None = None
    ) -> None:
        self.groups, self.size, self.description = source.groups, source.size, source.description
        self.records = [source[index] for index in range(len(source))][:count]
        self.corrupt, self.without = corrupt, without

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.corrupt:
            raise CorruptRecord(f"record {index} is broken")
        return {key: value for key, value in self.records[index].items() if key != self.without}


@pytest.fixture(scope="module")
def people() -> Source:
    return SyntheticPeople(count=21, size=SIZE)


@pytest.fixture(scope="module")
def others() -> Source:
    return SyntheticPeople(count=6, seed=1, size=SIZE)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def tiny(model: str = "lift-by-image", **settings: Any) -> TrainingConfig:
    return TrainingConfig(model=model, **{**TINY[model], "epochs": 2, "batch_size": 8, "pictures": 0, **settings})


def run(config: TrainingConfig, out: Path, source: Source, **options: Any) -> Trained:
    return train(config, out, source=source, **{"console": quiet(), **options})


def in_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[Trainer], None]) -> None:
    """Let `act` happen just before step `number`, counted from 1 over the whole call."""
    step, calls = Trainer._step, []

    def counting(self: Trainer, *arguments: Any) -> bool:
        calls.append(None)
        if len(calls) == number:
            act(self)
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", counting)


def stop_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    in_step(monkeypatch, number, lambda trainer: setattr(trainer.stop, "requested", True))


def weights(path: Path) -> dict[str, Tensor]:
    return load_pipeline(path).state_dict()


def curves(out: Path) -> dict[str, Any]:
    return json.loads((out / "curves.json").read_text())


def losses(found: Mapping[str, Any]) -> list[float]:
    return [loss for stage in found["loss"].values() for loss in stage]


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """The names under which both hold the same bits."""
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if torch.equal(value, second[name])]


def assert_same_run(first: Path, second: Path) -> None:
    assert curves(first) == curves(second)
    ours, theirs = weights(first / "model.pt"), weights(second / "model.pt")
    assert same(ours, theirs) == list(ours)


# --- it learns -----------------------------------------------------------------------------------------------------


def test_it_learns(tmp_path: Path) -> None:
    config = tiny(epochs=12, stage2_epochs=4, learning_rate=3e-3)
    source, held_out = SyntheticPeople(count=64, size=SIZE), SyntheticPeople(count=32, seed=1, size=SIZE)
    trained = run(config, tmp_path, source, validation=held_out)
    stage1 = trained.curves["loss"]["stage 1"]
    assert sum(stage1[-8:]) < 0.3 * sum(stage1[:8])
    errors = [point["mpjpe_mm"] for point in trained.curves["validation"]]
    assert errors[11] < 0.75 * errors[0]  # the coarse pose, over stage 1
    assert errors[15] < 0.9 * errors[12]  # the refined pose, over stage 2
    assert trained.best_mpjpe_mm == min(errors[12:])
    best = evaluate(load_pipeline(tmp_path / "best.pt"), held_out)
    assert best["mpjpe_mm"] == pytest.approx(trained.best_mpjpe_mm, rel=1e-9)
    last = evaluate(load_pipeline(tmp_path / "model.pt"), held_out)
    assert last["mpjpe_mm"] == pytest.approx(errors[15], rel=1e-9)


def test_each_stage_changes_its_own_parameters_only(people: Source, tmp_path: Path) -> None:
    start = build_pipeline(tiny(), SIZE).pipeline.state_dict()
    run(tiny(stage2_epochs=0), tmp_path / "stage 1", people)
    run(tiny(stage2_epochs=1), tmp_path / "both", people)
    stage1, both = weights(tmp_path / "stage 1" / "model.pt"), weights(tmp_path / "both" / "model.pt")
    of_stage2 = [name for name in start if name.startswith(("lifter.stage2.", "lifter.refined_head."))]
    assert same(start, stage1) == of_stage2
    assert same(stage1, both) == [name for name in start if name not in of_stage2]


def test_the_second_stage_can_start_from_the_first_of_another_run(people: Source, tmp_path: Path) -> None:
    run(tiny(stage2_epochs=0), tmp_path / "first", people)
    first = str(tmp_path / "first" / "model.pt")
    config = TrainingConfig(init=first, epochs=0, stage2_epochs=2, batch_size=8, lifter={"retention": 0.5})
    assert run(config, tmp_path / "second", people).finished
    second = load_pipeline(tmp_path / "second" / "model.pt")
    assert (second.lifter.config.retention, second.lifter.config.dim) == (0.5, 16)
    kept = same(weights(tmp_path / "first" / "model.pt"), second.state_dict())
    assert all(name in kept for name in second.state_dict() if name.startswith(("encoder.", "lifter.stage1.")))


@pytest.mark.parametrize(
    ("model", "settings", "size", "expected"),
    [
        ("lift-by-image", {}, SIZE, [False, False]),
        ("lift-by-image", {"pose_guided_layer": None}, SIZE, [False, False]),
        ("lift-by-image", {"pose_guided_layer": 2, "dim": 64}, SIZE, [True, False]),  # patches stay factored
        ("context-aware-poseformer", {}, SIZE, [False]),
        ("context-aware-poseformer", {"context": False}, SIZE, [False]),
        ("pose-only", {}, SIZE, [False]),
    ],
)
def test_idle_parameters_are_those_that_get_no_gradient(
    model: str, settings: dict[str, Any], size: tuple[int, int], expected: list[bool]
) -> None:
    pipeline = build_pipeline(tiny(model, lifter={**TINY[model]["lifter"], **settings}), size).pipeline
    pose_2d = torch.rand(2, 17, 2)
    poses = (pose_2d, pose_2d) if model == "context-aware-poseformer" else (pose_2d,)
    batch = Batch(torch.randn(2, 3, *size), poses, torch.randn(2, 17, 3))
    stages = stages_of(pipeline.lifter)
    assert [stage.has_idle_parameters(pipeline) for stage in stages] == expected
    for stage, idle in zip(stages, expected, strict=True):
        stage.train(pipeline)
        pipeline.zero_grad()
        stage.pose(pipeline, batch).square().sum().backward()
        assert any(parameter.grad is None for parameter in stage.parameters(pipeline)) == idle


# --- it can be interrupted -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(people: Source, others: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 stages × 2 epochs × 3 steps, with flips, dropout and validation, never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert run(tiny(), out, people, validation=others).finished
    return out


@pytest.mark.parametrize("step", [1, 3, 5, 6, 7, 12])
def test_an_interrupted_run_goes_on_bit_by_bit(
    whole: Path, people: Source, others: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Within stage 1, at its epoch's end, at its own end, and the same in stage 2."""
    with monkeypatch.context() as patched:
        stop_in_step(patched, step)
        assert not run(tiny(), tmp_path, people, validation=others).finished
    assert len(losses(curves(tmp_path))) == step
    assert not (tmp_path / "model.pt").exists()
    assert run(tiny(), tmp_path, people, validation=others).finished
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("lift-by-image", {"ema": 0.9, "clip_norm": 0.5, "schedule": "cosine", "warm_up": 2, "accumulate": 2}),
        ("context-aware-poseformer", {}),
        ("pose-only", {"precision": "bfloat16", "weight_decay": 0.1, "optimiser": "adamw", "loss": "mpjpe"}),
    ],
)
def test_every_lifter_goes_on_after_a_crash(
    model: str, settings: dict[str, Any], people: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(model, **settings, save_every_minutes=1e-9)  # saved after every step
    run(config, tmp_path / "whole", people)

    def crash(trainer: Trainer) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="crash"):
        in_step(patched, 5, crash)
        run(config, tmp_path / "crashed", people)
    assert len(losses(curves(tmp_path / "crashed"))) == 4
    assert run(config, tmp_path / "crashed", people).finished
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")


def test_validation_may_take_some_records_all_over_the_source(people: Source, others: Source, tmp_path: Path) -> None:
    config = tiny("pose-only", epochs=1, limit_validation=3)
    [errors] = run(config, tmp_path, people, validation=others).curves["validation"]
    expected = evaluate(load_pipeline(tmp_path / "model.pt"), others, indices=[0, 2, 4])
    assert errors["mpjpe_mm"] == pytest.approx(expected["mpjpe_mm"], rel=1e-9)


@pytest.mark.parametrize("number", [1, 4])
def test_validation_is_broken_off_and_done_again(
    whole: Path, people: Source, others: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Asking(People):
        """Asks to stop in a validation."""

        def __getitem__(self, index: int) -> dict[str, Any]:
            asked.append(index)
            if len(asked) == 1 + len(self) * number:  # the first reading only looks whether there are poses
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    asked: list[int] = []
    stopped = run(tiny(), tmp_path, people, validation=Asking(others))
    assert not stopped.finished
    assert (len(losses(stopped.curves)), len(stopped.curves["validation"])) == (3 * number, number - 1)
    assert run(tiny(), tmp_path, people, validation=others).finished
    assert_same_run(whole, tmp_path)


def test_what_others_draw_at_random_changes_nothing(
    whole: Path, people: Source, others: Source, tmp_path: Path
) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    run(tiny(), tmp_path, people, validation=others)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_run(whole, tmp_path)


def test_reading_in_workers_changes_nothing(people: Source, tmp_path: Path) -> None:
    run(tiny("pose-only"), tmp_path / "0", people)
    run(tiny("pose-only", workers=1), tmp_path / "1", people)
    assert_same_run(tmp_path / "0", tmp_path / "1")


def test_a_finished_run_stays_as_it_is(people: Source, tmp_path: Path) -> None:
    first = run(tiny("pose-only"), tmp_path, people)
    before = weights(tmp_path / "model.pt")
    again = run(tiny("pose-only"), tmp_path, people)
    assert again == first
    assert same(before, weights(tmp_path / "model.pt")) == list(before)


def test_a_run_may_start_anew(people: Source, tmp_path: Path) -> None:
    run(tiny("pose-only", seed=1), tmp_path / "first", people)
    run(tiny("pose-only", seed=1), tmp_path / "other", people)
    anew = run(tiny("pose-only", seed=2), tmp_path / "other", people, resume=False)
    assert losses(anew.curves) != losses(curves(tmp_path / "first"))
    assert len(losses(anew.curves)) == 6


def command(config: TrainingConfig, out: Path) -> list[str]:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    return [sys.executable, "-m", "liftbyimage", "train", "--config", str(path), "--out", str(out)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_command_goes_on_bit_by_bit(number: signal.Signals, tmp_path: Path) -> None:
    """At whatever moment the signal comes: it is drawn anew in every run of this test."""
    data = "synthetic,count=21,size=64x48"
    validate = "synthetic,count=3,seed=1,size=64x48"
    config = tiny("pose-only", data=data, validate=validate, batch_size=2, epochs=12)  # 132 steps
    out = tmp_path / "killed"
    often = replace(config, workers=1, save_every_minutes=1e-9)  # after every step
    process = subprocess.Popen(
        command(often, out),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # which rounding depends on
    )
    moment = random.Random()
    wanted = moment.randint(1, 60)
    while not (out / "curves.json").exists() or len(losses(curves(out))) < wanted:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    time.sleep(moment.uniform(0, 0.02))
    os.killpg(process.pid, number)  # its readers too
    said, complaint = process.communicate(timeout=30)
    steps = len(losses(curves(out)))
    assert wanted <= steps < 132
    if number == signal.SIGTERM:
        assert process.returncode == 0, complaint
        assert said == f"Stopped; the same command goes on from {out / 'last.pt'}.\n"
    else:
        assert process.returncode == -signal.SIGKILL
    assert train(config, out, console=quiet()).finished
    assert train(config, tmp_path / "whole", console=quiet()).finished
    assert_same_run(tmp_path / "whole", out)


# --- a step --------------------------------------------------------------------------------------------------------


def test_parts_of_a_batch_give_the_whole_batch(people: Source, tmp_path: Path) -> None:
    config = {"lifter": {**TINY["pose-only"]["lifter"], "dropout": 0.0}}
    whole = run(tiny("pose-only", **config), tmp_path / "1", people)
    parts = run(tiny("pose-only", **config, accumulate=3), tmp_path / "3", people)
    torch.testing.assert_close(losses(parts.curves), losses(whole.curves), rtol=1e-5, atol=0)
    assert losses(parts.curves) != losses(whole.curves)  # it did add up in another order


def test_the_gradient_is_that_of_the_mean_over_a_batch_of_any_size(
    people: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("pose-only", epochs=1, flip=False, lifter={**TINY["pose-only"]["lifter"], "dropout": 0.0})
    trainers: list[Trainer] = []
    in_step(monkeypatch, 1, trainers.append)
    few = People(people, count=5)  # of a batch of 8
    run(replace(config, accumulate=2), tmp_path, few)
    pipeline = build_pipeline(config, SIZE).pipeline
    batch = make_batch(pipeline.lifter, default_collate(few.records))
    (pipeline(batch.images, *batch.poses) - batch.pose_3d).square().mean().backward()
    for ours, expected in zip(trainers[0].pipeline.parameters(), pipeline.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_loss_is_the_mean_over_the_batch(people: Source) -> None:
    config = tiny("pose-only")
    pipeline = build_pipeline(config, SIZE).pipeline.eval()
    pose_2d, truth = torch.rand(5, 17, 2), torch.randn(5, 17, 3)
    batch = Batch(torch.empty(5, 3, *SIZE), (pose_2d,), truth)
    pose = pipeline(batch.images, pose_2d)
    from liftbyimage.training.feed import Part

    [stage] = stages_of(pipeline.lifter)
    of = {kind: StageLoss(pipeline, stage, kind, "float32")(Part(batch, truth, [])) / 5 for kind in ("mse", "mpjpe")}
    torch.testing.assert_close(of["mse"], (pose - truth).square().mean())
    torch.testing.assert_close(of["mpjpe"], (pose - truth).norm(dim=-1).mean())


def test_the_average_of_the_weights_is_what_is_kept(
    people: Source, others: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after: list[dict[str, Tensor]] = []
    step = Trainer._step

    def noting(self: Trainer, *arguments: Any) -> bool:
        stopping = step(self, *arguments)
        after.append({name: value.clone() for name, value in self.pipeline.state_dict().items()})
        return stopping

    monkeypatch.setattr(Trainer, "_step", noting)
    trained = run(tiny("pose-only", ema=0.75, epochs=1), tmp_path, people, validation=others)
    average = after[0]
    for state in after[1:]:
        average = {name: 0.75 * average[name] + 0.25 * value for name, value in state.items()}
    for name in ("model.pt", "best.pt"):
        kept = weights(tmp_path / name)
        for key, value in average.items():
            torch.testing.assert_close(kept[key], value, rtol=1e-5, atol=1e-7)
    measured = evaluate(load_pipeline(tmp_path / "best.pt"), others)["mpjpe_mm"]
    assert trained.best_mpjpe_mm == pytest.approx(measured, rel=1e-9)


def test_bfloat16_trains_nearly_the_same(people: Source, tmp_path: Path) -> None:
    settings = {"lifter": {**TINY["lift-by-image"]["lifter"], "dropout": 0.0}, "learning_rate": 1e-4}
    exact = losses(run(tiny(**settings), tmp_path / "32", people).curves)
    half = losses(run(tiny(**settings, precision="bfloat16"), tmp_path / "16", people).curves)
    assert half != exact
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0)


def test_the_cache_changes_nothing_but_rounding(people: Source, tmp_path: Path) -> None:
    plain = run(tiny(), tmp_path / "plain", people).curves["loss"]
    cached = run(tiny(cache=str(tmp_path / "cache")), tmp_path / "cached", people).curves["loss"]
    assert cached["stage 1"] == plain["stage 1"]
    torch.testing.assert_close(cached["stage 2"], plain["stage 2"], rtol=1e-5, atol=0)


def test_a_cache_that_is_a_file_is_refused_before_stage_1(people: Source, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    text = f"TrainingConfig: cache must be a folder, got the file {tmp_path / 'cache'}"
    refused(text, lambda: run(tiny(cache=str(tmp_path / "cache")), tmp_path / "out", people))
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_a_cache_elsewhere_but_not_without(people: Source, tmp_path: Path) -> None:
    run(tiny(cache=str(tmp_path / "cache")), tmp_path / "out", people)
    assert run(tiny(cache=str(tmp_path / "other")), tmp_path / "out", people).finished
    refused(
        f"{tmp_path / 'out' / 'last.pt'} is of another run, choose another folder for this one "
        "(cache: true there, false here)",
        lambda: run(tiny(), tmp_path / "out", people),
    )


def test_a_cached_run_goes_on_bit_by_bit(people: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(cache=str(tmp_path / "cache"))
    run(config, tmp_path / "whole", people)
    with monkeypatch.context() as patched:
        stop_in_step(patched, 8)
        run(config, tmp_path / "stopped", people)
    run(config, tmp_path / "stopped", people)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_learning_rates() -> None:
    step = TrainingConfig()
    rates = [learning_rate(step, Place(epoch=epoch), 10, 20) for epoch in (0, 3, 4, 8)]
    assert rates == pytest.approx([1e-3, 1e-3, 0.9e-3, 0.81e-3])
    poseformer = TrainingConfig(model="context-aware-poseformer")
    assert learning_rate(poseformer, Place(epoch=2, step=5), 10, 20) == pytest.approx(6.4e-4 * 0.99**2)
    cosine = TrainingConfig(schedule="cosine", warm_up=4)
    rates = [learning_rate(cosine, Place(step=number), 12, 1) for number in (0, 1, 3, 4, 8)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 1e-3, 1e-3, 0.5e-3])


def test_mirrored_records_are_drawn_anew_every_epoch() -> None:
    first, second = (mirrored_records(TrainingConfig(), 1000, 0, epoch) for epoch in (0, 1))
    assert torch.equal(first, mirrored_records(TrainingConfig(), 1000, 0, 0))
    assert 400 < first.sum() < 600
    assert 400 < (first != second).sum() < 600
    assert not mirrored_records(TrainingConfig(flip=False), 1000, 0, 0).any()


# --- what can go wrong ---------------------------------------------------------------------------------------------


def test_corrupt_records_are_told_and_counted(people: Source, others: Source, tmp_path: Path) -> None:
    console = quiet()
    source = People(people, corrupt=(3, 4, 5, 20))
    run(tiny("pose-only", epochs=1), tmp_path, source, validation=People(others, corrupt=(0,)), console=console)
    said = console.file.getvalue()
    assert said.count(" is broken") == 3
    assert "warning: 4 records could not be read in lifter, epoch 1 of 1; the next ones stood in for them.\n" in said


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_stops_at_a_corrupt_record(workers: int, people: Source, tmp_path: Path) -> None:
    with pytest.raises(CorruptRecord, match=r"^record 3 is broken$"):
        run(tiny("pose-only", strict=True, workers=workers), tmp_path, People(people, corrupt=(3,)))


def test_a_loss_that_is_not_finite_stops_the_run(
    people: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.pipeline.lifter.head.bias.fill_(float("nan"))

    in_step(monkeypatch, 5, spoil)
    message = f"lifter, epoch 2, step 2: the loss is nan; {tmp_path / 'last.pt'} stays as it was before"
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.") + "$"):
        run(tiny("pose-only"), tmp_path, people)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["place"] == {"stage": 0, "epoch": 0, "step": 3}


def test_weights_that_are_not_finite_are_not_saved(
    people: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss may have a gradient that is not."""

    def spoil(trainer: Trainer) -> None:
        head = trainer.pipeline.lifter.head.bias
        head.register_hook(lambda gradient: gradient * float("nan"))

    in_step(monkeypatch, 6, spoil)  # the last one of its epoch, which is saved
    message = f"lifter, epoch 2, step 3: the weights are not finite; {tmp_path / 'last.pt'} stays as it was before"
    refused(message, lambda: run(tiny("pose-only"), tmp_path, people))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["place"] == {"stage": 0, "epoch": 0, "step": 3}


def refused(text: str, act: Callable[[], object], error: type[Exception] = ValueError) -> None:
    with pytest.raises(error) as caught:
        act()
    assert str(caught.value) == text


def test_another_run_in_the_folder_is_refused(people: Source, others: Source, tmp_path: Path) -> None:
    run(tiny("pose-only"), tmp_path, people, validation=others)
    last = tmp_path / "last.pt"
    lifter = {**TINY["pose-only"]["lifter"], "dim": 32}
    refused(
        f"{last} is of another run, choose another folder for this one (lifter.dim: 16 there, 32 here; "
        "seed: 0 there, 1 here)",
        lambda: run(tiny("pose-only", seed=1, lifter=lifter), tmp_path, people, validation=others),
    )
    refused(
        f"{last} is of another run, choose another folder for this one (data.count: 21 there, 6 here; "
        "data.seed: 0 there, 1 here; data.records: 21 there, 6 here)",
        lambda: run(tiny("pose-only"), tmp_path, others, validation=others),
    )
    assert run(tiny("pose-only", workers=1, save_every_minutes=1.0), tmp_path, people, validation=others).finished
    last.write_bytes(b"nothing")
    refused(f"{last}: not a readable PyTorch file of plain values", lambda: run(tiny("pose-only"), tmp_path, people))
    torch.save({"format": "x"}, last)
    refused(
        f"{last}: expected what training writes ('liftbyimage-training-1'), got another file",
        lambda: run(tiny("pose-only"), tmp_path, people),
    )


def test_a_finished_run_without_last_pt_is_not_trained_over(people: Source, tmp_path: Path) -> None:
    run(tiny("pose-only"), tmp_path, people)
    (tmp_path / "last.pt").unlink()
    before = (tmp_path / "model.pt").read_bytes()
    refused(
        f"{tmp_path} holds model.pt but no last.pt to go on from; choose another folder or delete it",
        lambda: run(tiny("pose-only"), tmp_path, people),
    )
    assert (tmp_path / "model.pt").read_bytes() == before
    assert run(tiny("pose-only"), tmp_path, people, resume=False).finished


def test_sources_that_do_not_serve_are_refused(people: Source, others: Source, tmp_path: Path) -> None:
    refused("TrainingConfig: data must name a source, got None", lambda: train(tiny("pose-only"), tmp_path))
    refused(
        "TrainingConfig: data must have records, got none",
        lambda: run(tiny("pose-only", data="synthetic"), tmp_path, People(people, count=0)),
    )
    refused(
        "TrainingConfig: validate must have true poses (pose_3d), got records without",
        lambda: run(tiny("pose-only"), tmp_path, people, validation=People(others, without="pose_3d")),
    )
    refused(
        "TrainingConfig: validate must have crops of 64x48 px as data has, got 128x96",
        lambda: run(tiny("pose-only"), tmp_path, people, validation=SyntheticPeople(count=1, size=(128, 96))),
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        (
            {"model": "lifter"},
            ValueError,
            "TrainingConfig: model must be one of lift-by-image, context-aware-poseformer, pose-only, got 'lifter'",
        ),
        ({"epochs": "many"}, TypeError, "TrainingConfig: epochs must be an int or None, got 'many'"),
        ({"epochs": True}, TypeError, "TrainingConfig: epochs must be an int or None, got True"),
        ({"epochs": -1}, ValueError, "TrainingConfig: epochs must be >= 0, got -1"),
        ({"seed": 2**63}, ValueError, "TrainingConfig: seed must be < 2**63, got 9223372036854775808"),
        ({"learning_rate": 0}, ValueError, "TrainingConfig: learning_rate must be > 0, got 0"),
        ({"clip_norm": float("inf")}, ValueError, "TrainingConfig: clip_norm must be > 0, got inf"),
        ({"ema": 1.5}, ValueError, "TrainingConfig: ema must be between 0 and 1, got 1.5"),
        ({"loss": "l1"}, TypeError, "TrainingConfig: loss must be 'mse' or 'mpjpe' or None, got 'l1'"),
        ({"lifter": [1]}, TypeError, "TrainingConfig: lifter must be a mapping, got [1]"),
        (
            {"encoder": "resnet"},
            ValueError,
            "TrainingConfig: encoder must be one of hrnet-w32, hrnet-w48, tiny, small branches, got 'resnet'",
        ),
        (
            {"model": "pose-only", "cache": "c"},
            ValueError,
            "TrainingConfig: cache must be None for a pose-only, which has no second stage",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    refused(text, lambda: TrainingConfig(**settings), error)


@pytest.mark.parametrize(
    ("model", "settings", "error", "text"),
    [
        (
            "lift-by-image",
            {"lifter": {"dim": "wide"}},
            TypeError,
            "TrainingConfig: lifter: dim must be an int, got 'wide'",
        ),
        (
            "pose-only",
            {"lifter": {"depth": 3}},
            ValueError,
            "TrainingConfig: lifter: no setting is called 'depth', "
            "only dim, heads, mlp_ratio, dropout, layers, num_joints",
        ),
        (
            "lift-by-image",
            {"lifter": {"grid": [64, 48]}},
            ValueError,
            "TrainingConfig: lifter.grid must be [16, 12] for this encoder and crops of 64x48 px, got [64, 48]",
        ),
        (
            "context-aware-poseformer",
            {"encoder": "tiny"},
            ValueError,
            "TrainingConfig: encoder must be an HRNet for a context-aware-poseformer, which reads its branches",
        ),
        (
            "pose-only",
            {"encoder_weights": "hrnet.pth"},
            ValueError,
            "TrainingConfig: encoder_weights must not be given, for a pose-only reads no image",
        ),
        (
            "pose-only",
            {"encoder_config": {"channels": 8}},
            ValueError,
            "TrainingConfig: encoder_config must not be given, for a pose-only reads no image",
        ),
        ("pose-only", {"lifter": {"heads": 0}}, ValueError, "PoseOnlyConfig: heads must be >= 1, got 0"),
        ("pose-only", {"lifter": {"layers": 0}}, ValueError, "PoseOnlyConfig: layers must be >= 1, got 0"),
        ("pose-only", {"lifter": {"dropout": 2}}, ValueError, "PoseOnlyConfig: dropout must be in [0, 1), got 2"),
        ("pose-only", {"lifter": {"mlp_ratio": 0}}, ValueError, "PoseOnlyConfig: mlp_ratio must be more than 0, got 0"),
        (
            "pose-only",
            {"lifter": {"dim": 16, "heads": 3}},
            ValueError,
            "PoseOnlyConfig: dim must be a multiple of heads, got 16 and 3",
        ),
        ("lift-by-image", {"init": "no.pt"}, ValueError, "checkpoint no.pt: no such file"),
    ],
)
def test_pipelines_that_cannot_be_built_are_refused(
    model: str, settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    refused(text, lambda: build_pipeline(tiny(model, **settings), SIZE), error)


def test_official_weights_start_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(3)
    official = models.HRNet(32, num_joints=2).state_dict()
    path = tmp_path / "hrnet.pth"
    torch.save(official, path)
    config = TrainingConfig(model="context-aware-poseformer", encoder_weights=str(path), lifter={"dim": 16})
    start = build_pipeline(config, SIZE)
    assert (start.encoder, start.encoder_config) == ("hrnet-w32", {"num_joints": 2})
    assert same(official, start.pipeline.encoder.state_dict()) == list(official)
    assert start.pipeline.lifter.config.channels == (32, 64, 128, 256)
    refused(
        f"encoder weights {path} are of hrnet-w32, but TrainingConfig: encoder is 'tiny'",
        lambda: build_pipeline(tiny(encoder_weights=str(path)), SIZE),
    )


def test_an_encoder_that_nobody_trains_or_gives_is_told(people: Source, tmp_path: Path) -> None:
    console = quiet()
    run(tiny("context-aware-poseformer", epochs=1), tmp_path / "new", people, console=console)
    warning = (
        "warning: a context-aware-poseformer never trains its encoder, and this one has random weights; "
        "encoder_weights gives it others\n"
    )
    assert console.file.getvalue().startswith(warning)
    init = str(tmp_path / "new" / "model.pt")
    console = quiet()
    settings = {"init": init, "encoder": None, "epochs": 1}
    run(tiny("context-aware-poseformer", **settings), tmp_path / "next", people, console=console)
    assert "warning" not in console.file.getvalue()


def test_init_without_an_encoder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lifter.pt"
    start = build_pipeline(tiny(), SIZE)
    save_pipeline(start.pipeline, path, encoder="tiny", encoder_config={"channels": 8}, with_encoder=False)
    refused(
        f"TrainingConfig: init {path} holds no encoder weights, encoder_weights must give them",
        lambda: build_pipeline(TrainingConfig(init=str(path)), SIZE),
    )


def test_init_of_another_lifter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pose.pt"
    save_pipeline(build_pipeline(tiny("pose-only"), SIZE).pipeline, path, encoder=None)
    refused(
        f"TrainingConfig: init {path} must hold a lift-by-image, got 'pose-only'",
        lambda: build_pipeline(TrainingConfig(init=str(path)), SIZE),
    )


# --- what a person gives and gets ----------------------------------------------------------------------------------


def test_recipes_are_the_papers() -> None:
    ours = TrainingConfig()
    assert (ours.optimiser, ours.learning_rate, ours.decay, ours.decay_every) == ("adam", 1e-3, 0.9, 4)
    assert (ours.batch_size, ours.epochs, ours.stage2_epochs, ours.loss, ours.flip) == (128, 20, 20, "mse", True)
    assert (ours.encoder, ours.flip_test) == ("hrnet-w32", False)
    theirs = TrainingConfig(model="context-aware-poseformer")
    assert (theirs.optimiser, theirs.learning_rate, theirs.weight_decay) == ("adamw", 6.4e-4, 0.1)
    assert (theirs.decay, theirs.decay_every, theirs.batch_size) == (0.99, 1, 512)
    assert (theirs.loss, theirs.flip_test) == ("mpjpe", True)
    assert TrainingConfig(**theirs.to_dict()) == theirs
    assert TrainingConfig(model="pose-only").encoder is None


def test_yaml_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: pose-only\nlearning_rate: 1e-4\nepochs: 3\nlifter: {dim: 32, heads: 4}\n", encoding="utf-8")
    config = TrainingConfig.read(path, {"epochs": 5, "lifter.dim": 64})
    assert (config.learning_rate, config.epochs, config.lifter) == (1e-4, 5, {"dim": 64, "heads": 4})
    refused(f"--config {tmp_path}: is a folder", lambda: TrainingConfig.read(tmp_path))
    refused(
        "TrainingConfig: epochs must be a mapping to take epochs.x, got 3",
        lambda: TrainingConfig.read(path, {"epochs.x": 1}),
    )
    path.write_text("[1, 2]", encoding="utf-8")
    refused(f"--config {path}: expected a mapping of settings, got [1, 2]", lambda: TrainingConfig.read(path))
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no readable YAML: .+") as caught:
        TrainingConfig.read(path)
    assert "\n" not in str(caught.value)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["train", *(str(argument) for argument in arguments)])


def test_the_command_trains_by_flags(tmp_path: Path) -> None:
    flags = ["--model", "pose-only", "--data", "synthetic,count=9,size=64x48", "--epochs", 1, "--batch-size", 4]
    flags += ["--set", "lifter.dim=16", "--set", "lifter.heads=2", "--set", "learning_rate=1e-4"]
    result = invoke("--out", tmp_path / "out", *flags)
    assert (result.exit_code, result.stdout) == (0, "")
    first, epoch, last = result.stderr.splitlines()
    assert first == "pose-only, 0.0 million weights, on 9 records: 3 steps an epoch, cpu, one process."
    assert epoch.startswith("lifter, epoch 1 of 1: loss ")
    assert last == f"Finished: {tmp_path / 'out' / 'model.pt'}."
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert TrainingConfig(**written) == TrainingConfig(
        model="pose-only",
        data="synthetic,count=9,size=64x48",
        epochs=1,
        batch_size=4,
        learning_rate=1e-4,
        lifter={"dim": 16, "heads": 2},
    )
    assert len(losses(curves(tmp_path / "out"))) == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--set", "dim"], "--set must be KEY=VALUE, got 'dim'"),
        (
            ["--set", "lifter=*a"],
            "--set lifter=*a: no readable YAML: "
            "found undefined alias 'a' in \"<unicode string>\", line 1, column 1: *a ^",
        ),
        (["--config", "no.yaml"], "--config no.yaml: no such file"),
        (["--model", "pose-only"], "TrainingConfig: data must name a source, got None"),
        (
            ["--data", "synthetic,count=1,size=64x48", "--precision", "float16"],
            "train: precision float16 needs a GPU, got device 'cpu'; bfloat16 serves there",
        ),
    ],
)
def test_the_command_refuses_in_one_sentence(arguments: list[str], text: str, tmp_path: Path) -> None:
    result = invoke("--out", tmp_path / "out", "--device", "cpu", *arguments)
    assert (result.exit_code, result.stderr) == (2, f"error: {text}\n")


def test_tensorboard_draws_every_point_once(
    people: Source, others: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(pictures=1)
    with monkeypatch.context() as patched:
        stop_in_step(patched, 3)  # at the end of the first epoch: validation is still to come
        run(config, tmp_path, people, validation=others)

    def crash(trainer: Trainer) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="crash"):
        in_step(patched, 3, crash)  # after step 5 was drawn, but not saved
        run(config, tmp_path, people, validation=others)
    run(config, tmp_path, people, validation=others)
    drawn = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = drawn.Scalars("loss")
    assert [point.step for point in points] == list(range(12))
    assert [point.value for point in points] == pytest.approx(losses(curves(tmp_path)))
    assert {"learning rate", "seconds per step"} <= set(drawn.Tags()["scalars"])
    errors = drawn.Scalars("validation/mpjpe_mm")
    assert [point.step for point in errors] == [3, 6, 9, 12]
    assert [point.value for point in errors] == pytest.approx(
        [point["mpjpe_mm"] for point in curves(tmp_path)["validation"]]
    )
    assert [picture.step for picture in drawn.Images("validation/0")] == [3, 6, 9, 12]
    run(config, tmp_path, people, validation=others)  # finished already
    again = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert again.Scalars("validation/mpjpe_mm") == errors


def test_pictures_of_stage_1_show_the_pose_that_is_trained(
    people: Source, others: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[bool, float]] = []

    def draw(*arrays: Any, coarse_pose_3d: Tensor | None, truth_3d: Any) -> Any:
        drawn.append((coarse_pose_3d is not None, float(mpjpe(arrays[-1], torch.as_tensor(truth_3d)))))
        return draw_nothing()

    draw_nothing = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr("liftbyimage.draw.picture_of_person", draw)
    trained = run(tiny(pictures=6, epochs=1), tmp_path, people, validation=others)
    assert [coarse for coarse, _ in drawn] == [False] * 6 + [True] * 6
    for number, point in enumerate(trained.curves["validation"]):
        errors = [error for _, error in drawn[6 * number :][:6]]
        assert 1000 * sum(errors) / 6 == pytest.approx(point["mpjpe_mm"], rel=1e-5)


def test_without_tensorboard_it_says_so_and_trains(
    people: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    console = quiet()
    assert run(tiny("pose-only"), tmp_path, people, console=console).finished
    said = console.file.getvalue()
    assert said.count("TensorBoard is not installed (pip install tensorboard)") == 1
    assert not (tmp_path / "tensorboard").exists()


def test_on_a_terminal_there_is_a_bar(people: Source, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    run(tiny("pose-only"), tmp_path, people, console=console)
    assert "lifter, epoch 1 of 2 \x1b" in console.file.getvalue()
    assert "0/3" in console.file.getvalue()


@pytest.mark.parametrize(
    ("rank", "said"), [("0", "Stopped; the same command goes on from {out}/last.pt.\n"), ("1", "")]
)
def test_one_process_says_that_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, said: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    stop_in_step(monkeypatch, 1)
    flags = ["--model", "pose-only", "--data", "synthetic,count=9,size=64x48", "--batch-size", 4]
    result = invoke("--out", tmp_path, *flags, "--set", "lifter.dim=16", "--set", "lifter.heads=2")
    assert (result.exit_code, result.stdout) == (0, said.format(out=tmp_path))


def test_nothing_is_left_half_written(people: Source, tmp_path: Path) -> None:
    (tmp_path / ".last.pt.k9x2").write_bytes(b"half of it")  # of a run that was killed while it wrote
    run(tiny("pose-only"), tmp_path, people)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "curves.json",
        "last.pt",
        "model.pt",
        "tensorboard",
    ]
    assert os.access(tmp_path / "model.pt", os.R_OK)
