"""The training loop: it learns, repeats bit by bit wherever it is interrupted, and leaves frozen parts alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from liftbyimage.checkpoint import load_pipeline
from liftbyimage.data.source import Source
from liftbyimage.data.synthetic import SyntheticPeople
from liftbyimage.training import Trained, TrainingConfig, train
from liftbyimage.training.trainer import Trainer

LIFT_BY_IMAGE = {"encoder": "tiny", "encoder_config": {"channels": 8}, "lifter": {"dim": 16, "heads": 2}}
POSE_ONLY = {"model": "pose-only", "lifter": {"dim": 16, "heads": 2, "layers": 2}}


@pytest.fixture(scope="module")
def people() -> Source:
    return SyntheticPeople(count=21, size=(64, 48))


def quiet() -> Console:
    return Console(file=io.StringIO())


def tiny(**settings: Any) -> TrainingConfig:
    model = POSE_ONLY if settings.get("model") == "pose-only" else LIFT_BY_IMAGE
    return TrainingConfig(**{**model, "epochs": 2, "batch_size": 8, **settings})


def run(config: TrainingConfig, out: Path, source: Source, **options: Any) -> Trained:
    return train(config, out, source=source, console=quiet(), **options)


def stop_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ask the next run to stop in its step `number`, counted from 1."""
    step, calls = Trainer._step, []

    def counting(self: Trainer, *arguments: Any) -> bool:
        calls.append(None)
        self.stop.requested |= len(calls) == number
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", counting)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_pipeline(path).state_dict()


def assert_same_run(first: Path, second: Path) -> None:
    assert json.loads((first / "curves.json").read_text()) == json.loads((second / "curves.json").read_text())
    ours, theirs = weights(first / "model.pt"), weights(second / "model.pt")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.fixture(scope="module")
def whole(people: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 stages × 2 epochs × 3 steps, flips and dropout on, never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert run(tiny(), out, people).finished
    return out


@pytest.mark.parametrize("step", [1, 3, 5, 6, 7, 11, 12])
def test_an_interrupted_run_goes_on_bit_by_bit(
    whole: Path, people: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patched:
        stop_in_step(patched, step)
        assert not run(tiny(), tmp_path, people).finished
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert sum(len(losses) for losses in curves["loss"].values()) == step
    assert run(tiny(), tmp_path, people).finished
    assert_same_run(whole, tmp_path)
