"""The training recipe: it learns, repeats exactly, and leaves frozen parts alone."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from liftbyimage import demo, train_demo
from liftbyimage.train_demo import DemoRecipe, coarse_loss, optimise, refined_loss, render_scenes

TINY = DemoRecipe(
    scenes=12, held_out=8, detector_steps=2, stage1_steps=3, stage2_steps=2, batch_size=4, dim=16, heads=2
)


def quiet():
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def scenes():
    return render_scenes(12, seed=0)


def test_optimise_finds_a_minimum_and_repeats_bitwise():
    def fit():
        torch.manual_seed(0)
        inputs = torch.randn(64, 5)
        targets = inputs @ torch.arange(1.0, 6.0)
        weights = torch.zeros(5, requires_grad=True)
        losses = optimise(
            [weights],
            lambda batch: (inputs[batch] @ weights - targets[batch]).square().mean(),
            count=64,
            steps=400,
            batch_size=24,
            learning_rate=0.1,
            seed=1,
        )
        return weights.detach(), losses

    weights, losses = fit()
    torch.testing.assert_close(weights, torch.arange(1.0, 6.0), atol=0.05, rtol=0)
    again, losses_again = fit()
    assert torch.equal(weights, again) and losses == losses_again


def test_every_sample_is_seen_once_an_epoch():
    seen = []
    weight = torch.zeros(1, requires_grad=True)

    def loss_of(batch):
        seen.append(batch)
        return weight.square().sum()

    optimise([weight], loss_of, count=10, steps=10, batch_size=4, learning_rate=0.1, seed=0)
    counts = torch.bincount(torch.cat(seen), minlength=10)
    assert (counts == 4).all()


def test_stage_losses_reach_their_own_parameters_only(scenes):
    pipeline, _ = train_demo.build_demo_models(TINY)
    coarse_loss(pipeline, scenes, torch.arange(4)).backward()
    stage1 = [*pipeline.encoder.parameters(), *pipeline.lifter.stage1_parameters()]
    # A key bias shifts every score of a row, which the softmax drops, and patches updated last are not read again.
    assert sum(p.grad is not None and bool(p.grad.any()) for p in stage1) > 0.9 * len(stage1)
    assert all(p.grad is None for p in pipeline.lifter.stage2_parameters())
    pipeline.zero_grad(set_to_none=True)
    refined_loss(pipeline, scenes, torch.arange(4)).backward()
    assert all(p.grad is None for p in stage1)
    assert any(p.grad is not None and bool(p.grad.any()) for p in pipeline.lifter.stage2_parameters())


def test_render_scenes_does_not_depend_on_chunks(scenes, monkeypatch):
    monkeypatch.setattr(train_demo, "CHUNK", 5)
    again = render_scenes(12, seed=0)
    for name in ("image", "pose_2d", "pose_3d"):
        assert torch.equal(getattr(scenes, name), getattr(again, name))


def test_train_demo_writes_a_checkpoint_that_the_demo_reads(tmp_path):
    errors = train_demo.train_demo(tmp_path / "demo.pt", seed=3, console=quiet(), recipe=TINY)
    pipeline, pose_only = demo.load_demo_models(tmp_path / "demo.pt")
    held_out = render_scenes(TINY.held_out, seed=4)
    again = train_demo.evaluate(pipeline, pose_only, held_out)
    for name in ("coarse", "refined", "pose_only"):
        assert again[name] == pytest.approx(errors[name], rel=2e-2)  # weights are stored in float16


def test_train_demo_is_reproducible(tmp_path):
    recipe = replace(TINY, stage2_steps=1)
    first, second = (
        train_demo.train_demo(tmp_path / f"{i}.pt", seed=3, console=quiet(), recipe=recipe) for i in range(2)
    )
    assert {k: v for k, v in first.items() if k != "minutes"} == {k: v for k, v in second.items() if k != "minutes"}
