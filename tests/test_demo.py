"""The demonstration with the packaged checkpoint: errors, backends, pictures."""

import io
import json
import re

import cv2
import pytest
import torch
from rich.console import Console

from liftbyimage import demo
from liftbyimage.checkpoint import read_checkpoint, save_pipeline
from liftbyimage.models import LiftByImage, LiftByImageConfig, Pipeline, TinyEncoder

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "MEASURED_PEOPLE", 64)
        result = demo.run_demo(out, people=2, seed=0, console=Console(file=text, width=100), html=True)
    return result, text.getvalue()


def test_image_guided_beats_the_2d_only_lifter_and_stage_2_refines(run):
    errors = run[0]["mpjpe_mm"]
    assert errors["coarse"] < errors["pose_only"]
    assert errors["refined"] < errors["pose_only"]


def test_prints_what_it_measured(run):
    result, text = run
    for name in ("coarse", "refined", "pose_only"):
        assert f"{result['mpjpe_mm'][name]:.1f}" in text
    for op, backend in result["backends"].items():
        assert op in text and backend in text
    assert "as fast as the plain PyTorch lifter, outputs equal" in text


def test_writes_one_picture_per_person(run):
    pictures = run[0]["pictures"]
    assert [picture.name for picture in pictures] == ["person-1.png", "person-2.png"]
    images = [cv2.imread(str(picture)) for picture in pictures]
    assert all(image.shape[0] > 300 and image.shape[1] > 900 for image in images)
    assert (images[0] != images[1]).any()


def test_writes_a_page_of_the_people_drawn(run):
    result, text = run
    page = result["page"]
    assert page == result["pictures"][0].parent / "viewer.html"
    assert f"Open {page} in a browser" in text
    embedded = re.search('<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    people = json.loads(embedded[1])["people"]
    assert [person["title"] for person in people] == ["Unseen synthetic person 1", "Unseen synthetic person 2"]
    assert all(person["truth"] is not None for person in people)


def test_no_page_unless_asked_for(tmp_path, monkeypatch):
    for name, value in (("evaluate", {}), ("_measure", ({}, {})), ("_draw", []), ("_print", None)):
        monkeypatch.setattr(demo, name, lambda *args, value=value: value)
    monkeypatch.setattr(demo, "MEASURED_PEOPLE", 1)
    result = demo.run_demo(tmp_path, people=1, seed=0, console=Console(file=io.StringIO()))
    assert result["page"] is None
    assert list(tmp_path.iterdir()) == []


def test_packaged_checkpoint_is_small_and_says_how_it_was_trained():
    assert demo.DEMO_CHECKPOINT.stat().st_size <= 8 * MEGABYTE
    training = read_checkpoint(demo.DEMO_CHECKPOINT)["training"]
    assert training["minutes"] <= 20
    assert training["seed"] < demo.FIRST_UNSEEN_SEED


def test_different_outputs_report_no_ratio():
    pose, other = torch.zeros(1, 17, 3), torch.ones(1, 17, 3)
    importance, index = torch.ones(1, 4), torch.zeros(1, 2)
    lifted = demo.LiftedPose(pose, pose, importance, index)
    with pytest.raises(RuntimeError, match="^pose_3d differs from the plain lifter by 1.00e"):
        demo._require_equal(lifted, (other, pose, importance, index))


def test_a_checkpoint_without_the_2d_only_lifter_is_refused(tmp_path):
    config = LiftByImageConfig(dim=16, heads=2)
    save_pipeline(Pipeline(TinyEncoder(32), LiftByImage(config)), tmp_path / "other.pt", encoder="tiny")
    with pytest.raises(ValueError, match="holds no 2D-only lifter; make it with `liftbyimage train-demo`$"):
        demo.load_demo_models(tmp_path / "other.pt")
