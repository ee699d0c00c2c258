"""The experiments of the paper's claims: paired test sets, runs that are kept, tables made of their numbers."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parent.parent / "docs" / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import claims  # noqa: E402
import claims_page  # noqa: E402

TINY = replace(claims.QUICK, seeds=(3,), people=4, batch_size=4, test_people=3, detector_people=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("claims")
    claims.run_all(TINY, out, processes=1)
    return out


def results_of(out):
    return {path.relative_to(out): json.loads(path.read_text()) for path in out.glob("seed-*/**/result.json")}


def without_minutes(result):
    return {key: value for key, value in result.items() if key != "minutes"}


def test_both_test_sets_show_the_same_people_before_other_backgrounds():
    laboratory, unseen = (claims.test_people(TINY, where) for where in (claims.LABORATORY, claims.UNSEEN))
    for one, other in zip((laboratory[i] for i in range(3)), (unseen[i] for i in range(3)), strict=True):
        for name in ("keypoints", "pose_3d", "crop_matrix", "mask"):
            assert np.array_equal(one[name], other[name])
        assert np.array_equal(one["image"][one["mask"]], other["image"][one["mask"]])
        assert not np.array_equal(one["image"][~one["mask"]], other["image"][~one["mask"]])
    trained = claims.training_people(TINY, 3)
    assert not np.array_equal(trained[0]["pose_3d"], laboratory[0]["pose_3d"])


def test_every_model_of_a_seed_starts_from_its_detector_and_shares_its_first_stage(finished):
    detector = torch.load(finished / "seed-3" / "detector.pt", weights_only=True)["encoder"]
    for model in claims.RETENTIONS:
        folder = finished / "seed-3" / model.replace(" ", "-")
        start = claims.load_pipeline(folder / "start.pt").encoder.state_dict()
        assert all(torch.equal(start[name], detector[name]) for name in detector)
        stage1 = claims.load_pipeline(folder / "stage-1" / "model.pt")
        assert not torch.equal(stage1.encoder.stem[0].weight, detector["stem.0.weight"])
        for retention in claims.RETENTIONS[model]:
            whole = claims.load_pipeline(folder / f"retention-{retention}" / "model.pt")
            assert whole.lifter.config.retention == retention
            assert whole.lifter.config.pose_guided_layer == claims.POSE_GUIDED_LAYER[model]
            assert torch.equal(whole.lifter.embed.weight, stage1.lifter.embed.weight)
            assert torch.equal(whole.encoder.stem[0].weight, stage1.encoder.stem[0].weight)
            assert not torch.equal(whole.lifter.refined_head.weight, stage1.lifter.refined_head.weight)


def test_2d_only_is_the_same_before_both_backgrounds_and_others_are_not(finished):
    for path, result in results_of(finished).items():
        same = result["laboratory"]["mpjpe_mm"] == result["unseen"]["mpjpe_mm"]
        assert same == ("2D-only" in str(path))


def test_keeping_all_patches_leaves_the_background_its_share_of_them(finished):
    for result in results_of(finished).values():
        if result["model"] != claims.POSE_ONLY and result["lifter"]["retention"] == 1.0:
            shares = result["unseen"]
            assert shares["background_selected"] == pytest.approx(shares["background_of_uniform"], rel=1e-6)
            assert 0 < shares["background_stage2"] < 1


def test_a_finished_run_is_kept_and_a_missing_one_is_made_again(finished, monkeypatch):
    before = results_of(finished)
    gone = Path("seed-3") / "guided" / "retention-0.5" / "result.json"
    (finished / gone).unlink()
    written = []
    monkeypatch.setattr(claims, "write_json", lambda path, value: written.append((path, value)))
    monkeypatch.setattr(claims, "optimise", lambda *_, **__: pytest.fail("the detector is there"))
    claims.run_all(TINY, finished, processes=1)
    assert [path for path, _ in written] == [finished / gone]
    assert without_minutes(written[0][1]) == without_minutes(before[gone])
    (finished / gone).write_text(json.dumps(before[gone]))


def test_a_run_that_was_stopped_continues_to_the_same_result(finished, tmp_path, monkeypatch):
    job = (claims.run_pose_only, TINY, 3, tmp_path)  # in one thread, as the command runs it

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(claims, "measure_both", stop)
        with pytest.raises(KeyboardInterrupt):
            claims.run_job(job)
    assert not (tmp_path / "seed-3" / "2D-only" / "result.json").exists()
    claims.run_job(job)
    path = Path("seed-3") / "2D-only" / "result.json"
    assert without_minutes(results_of(tmp_path)[path]) == without_minutes(results_of(finished)[path])


def test_results_of_another_recipe_are_refused(finished):
    with pytest.raises(ValueError) as error:
        claims.run_all(replace(TINY, epochs=3), finished, processes=1)
    path = finished / "seed-3" / "2D-only" / "result.json"
    assert str(error.value) == f"{path} is of another recipe, choose another folder with --out"


def other_seed(run, more):
    """A run as another seed might have given it, its errors larger by `more` mm."""
    errors = {
        where: {name: value + more * name.endswith("_mm") for name, value in run[where].items()}
        for where in ("laboratory", "unseen")
    }
    return {**run, **errors, "seed": 4}


def test_the_page_holds_the_numbers_of_the_results(finished, tmp_path):
    results = claims.collect(TINY, finished)
    results["runs"] += [other_seed(run, 0.25 * number) for number, run in enumerate(results["runs"])]
    results["stage1"] += [{**run, "seed": 4} for run in results["stage1"]]
    template = tmp_path / "template.md"
    blocks = "".join(
        f"<!-- results: {name} -->\nstale numbers\n<!-- end of results -->\n" for name in claims_page.BLOCKS
    )
    template.write_text(f"Before.\n{blocks}After.\n")
    claims_page.publish(results, template, tmp_path / "page.md", tmp_path / "images")
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("Before.\n") and page.endswith("After.\n") and "stale" not in page
    first, second = claims_page.values(results, claims_page.GUIDED, "unseen", "mpjpe_mm")
    assert (
        first == results_of(finished)[Path("seed-3/guided/retention-0.3/result.json")]["unseen"]["mpjpe_mm"] != second
    )
    expected = f"{(first + second) / 2:.1f} ± {abs(first - second) / 2**0.5:.1f}"
    line = next(line for line in page.splitlines() if line.startswith("| guided + selection |"))
    assert line.split(" | ")[2] == expected
    assert claims_page.fill(page, results) == page
    for name in ("claims.png", "claims-ablations.png"):
        assert (tmp_path / "images" / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 1.1, 0.9], "**holds**"),
        ([-1.0, -1.1, -0.9], "**does not hold here**"),
        ([1.0, 1.1, -0.1], "cannot be told"),
        ([0.1, 0.1, 9.0], "cannot be told"),
        ([0.0, 0.0, 0.0], "cannot be told"),
    ],
)
def test_a_verdict_needs_every_seed_and_two_standard_errors(differences, expected):
    assert claims_page.verdict(differences) == expected


def test_the_shipped_page_is_made_of_the_shipped_results():
    page = (EXPERIMENTS / "claims.md").read_text()
    results = json.loads((EXPERIMENTS / "claims.json").read_text())
    assert claims_page.fill(page, results) == page
    assert results["recipe"] == json.loads(json.dumps(claims.asdict(claims.Recipe())))
