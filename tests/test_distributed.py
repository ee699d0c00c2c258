"""Two processes on the CPU train as one does."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
import yaml
from rich.console import Console
from small_branches import SmallBranches
from torch import Tensor, nn

from liftbyimage import models
from liftbyimage.data.synthetic import SyntheticPeople
from liftbyimage.training import TrainingConfig, train
from liftbyimage.training.distributed import SynchronisedBatchNorm2d, processes
from liftbyimage.training.feed import Batches
from liftbyimage.training.trainer import Trainer

WORLD = 2
SPLITS = {"uneven": (0, 4, 6), "one empty": (0, 6, 6)}  # where each process's samples of a batch of 6 begin and end
SETTINGS = {
    "encoder": "tiny",
    "encoder_config": {"channels": 8},
    "lifter": {"dim": 16, "heads": 2, "dropout": 0.0},
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 2e-4,  # Adam makes rounding errors of tiny gradients as large as this
    "weight_decay": 0.1,  # added to the gradient, whose size Adam alone would not tell
}
LIFTERS: dict[str, dict[str, Any]] = {
    # What guides patches in the last layer gets no gradient, for they are not read again.
    "pose-guided last": {"lifter": {**SETTINGS["lifter"], "pose_guided_layer": 2, "dim": 64}},
    "pose-only": {
        "model": "pose-only",
        "encoder": None,
        "encoder_config": {},
        "lifter": {"dim": 16, "heads": 2, "layers": 2, "dropout": 0.0},
    },
    # Without batch norms, which see a part at a time, parts of a step give the whole step.
    "pose-only in parts": {
        "model": "pose-only",
        "encoder": None,
        "encoder_config": {},
        "lifter": {"dim": 16, "heads": 2, "layers": 2, "dropout": 0.0},
        "accumulate": 2,
    },
    "context-aware-poseformer": {
        "model": "context-aware-poseformer",
        "encoder": "small branches",
        "encoder_config": {},
        "lifter": {"dim": 16, "heads": 2, "context_heads": 2, "depth": 2, "drop_path": 0.0},
    },
}


def people(count: int) -> SyntheticPeople:
    return SyntheticPeople(count=count, size=(64, 48))


def quiet() -> Console:
    return Console(file=io.StringIO())


def batch_norm_case() -> tuple[nn.BatchNorm2d, Tensor, Tensor]:
    """A batch norm, its input [6, 3, 4, 5] and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(6, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    norm = nn.BatchNorm2d(3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    return norm, 3 * x + 100, gradient


def run_batch_norm(norm: nn.BatchNorm2d, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(gradient)
    return {
        "output": y.detach(),
        "input gradient": x.grad,
        "weight gradient": norm.weight.grad,
        "bias gradient": norm.bias.grad,
        **{name: value.clone() for name, value in norm.named_buffers()},
    }


def in_one_of_two(rank: int, folder: Path, port: int) -> None:
    """What each of the two processes does; the parent compares what it leaves in `folder`."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    found: dict[str, Any] = {}
    with processes("cpu") as group:
        for name, bounds in SPLITS.items():
            norm, x, gradient = batch_norm_case()
            group.synchronise_batch_norm(norm)
            own = slice(bounds[rank], bounds[rank + 1])
            found[name] = run_batch_norm(norm, x[own], gradient[own])
        found["kind"] = type(norm).__name__
        found["sums"] = group.add_up([1.0, 10.0 * rank])
        found["gathered"] = group.gather(f"from {rank}")
        found["shared"] = group.share(f"from {rank}")
    models.ENCODERS["small branches"] = SmallBranches
    for name, settings in LIFTERS.items():
        config = TrainingConfig(**{**SETTINGS, **settings})
        found[name] = train(config, folder / name, source=people(9), console=quiet()).curves
    step = Trainer._step

    def asked_in_the_third(self: Trainer, *arguments: Any) -> bool:
        self.stop.requested |= rank == 1 and self._global_step() == 2
        return step(self, *arguments)

    Trainer._step = asked_in_the_third
    stopped = train(TrainingConfig(**SETTINGS), folder / "stopped", source=people(9), console=quiet())
    found["stopped"] = (stopped.finished, stopped.curves)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(in_one_of_two, (folder, port), nprocs=WORLD)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("split", SPLITS)
def test_synchronised_batch_norm_is_that_of_the_joined_batch(found: list[dict[str, Any]], split: str) -> None:
    expected = run_batch_norm(*batch_norm_case())
    joined = {name: torch.cat([one[split][name] for one in found]) for name in ("output", "input gradient")}
    summed = {name: sum(one[split][name] for one in found) for name in ("weight gradient", "bias gradient")}
    for name, value in {**joined, **summed}.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10)
    for one in found:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(one[split][name], expected[name], rtol=1e-12, atol=0)
        assert one["kind"] == "SynchronisedBatchNorm2d"


def test_synchronised_batch_norm_in_evaluation_is_the_plain_one() -> None:
    norm, x, _ = batch_norm_case()
    expected = norm.eval()(x)
    norm.__class__ = SynchronisedBatchNorm2d
    assert torch.equal(norm(x), expected)
    assert list(norm.state_dict()) == list(nn.BatchNorm2d(3).state_dict())


def test_numbers_and_values_travel_between_processes(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["sums"] == [2.0, 10.0]
        assert one["gathered"] == ["from 0", "from 1"]
        assert one["shared"] == "from 0"


def assert_same_losses(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["loss"].keys() == second["loss"].keys()
    for stage, losses in first["loss"].items():
        assert len(losses) > 0
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(second["loss"][stage]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LIFTERS)
def test_two_processes_train_every_lifter_as_one_does(
    found: list[dict[str, Any]], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.ENCODERS, "small branches", SmallBranches)
    config = TrainingConfig(**{**SETTINGS, **LIFTERS[name], "accumulate": 1})
    alone = train(config, tmp_path, source=people(9), console=quiet()).curves
    for one in found:
        assert_same_losses(one[name], alone)


def test_all_processes_stop_after_the_step_in_which_one_was_asked(found: list[dict[str, Any]], folder: Path) -> None:
    for finished, curves in (one["stopped"] for one in found):
        assert not finished
        assert [len(losses) for losses in curves["loss"].values()] == [3, 0]
    assert torch.load(folder / "stopped" / "last.pt", weights_only=True)["place"] == {"stage": 0, "epoch": 1, "step": 1}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("count", [17, 16, 3])
def test_processes_share_every_record_of_an_epoch(count: int, accumulate: int) -> None:
    config = TrainingConfig(model="pose-only", batch_size=8, accumulate=accumulate)
    alone = list(Batches(TrainingConfig(model="pose-only", batch_size=8), count, 0, 0, 1))
    shares = [Batches(config, count, 0, rank, 2) for rank in range(2)]
    for step, batch in enumerate(alone):
        first = [sum(share.parts(before) for before in range(step)) for share in shares]
        parts = [list(share)[start : start + share.parts(step)] for share, start in zip(shares, first, strict=True)]
        assert len(parts[0]) == len(parts[1])
        assert [record for share in parts for part in share for record in part] == batch
        assert shares[0].samples(step) == len(batch)
        assert all(len(ours) + len(theirs) for ours, theirs in zip(*parts, strict=True))
    assert sorted(record for batch in alone for record in batch) == list(range(count))


def test_torchrun_gives_the_curve_of_one_process(tmp_path: Path) -> None:
    settings = {
        **SETTINGS,
        "data": "synthetic,count=21,size=64x48",
        "validate": "synthetic,count=5,seed=1,size=64x48",
        "pictures": 0,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "liftbyimage", "train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=100)
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("stage 1, epoch 1 of 2: loss") == 1  # one process talks
    one = train(TrainingConfig.read(tmp_path / "run.yaml"), tmp_path / "one", console=quiet()).curves
    curves = json.loads((tmp_path / "two" / "curves.json").read_text())
    assert_same_losses(curves, one)
    for ours, theirs in zip(curves["validation"], one["validation"], strict=True):
        assert ours["mpjpe_mm"] == pytest.approx(theirs["mpjpe_mm"], abs=0.5)
    assert len(one["validation"]) == 4
