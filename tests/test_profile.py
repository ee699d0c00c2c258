"""Profiles: hand counts, parts that make the whole, what is written, the page, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import opened
from rich.console import Console
from typer.testing import CliRunner

from liftbyimage import cli
from liftbyimage.html import write_page
from liftbyimage.models import (
    ContextAwarePoseFormer,
    HRNet,
    LiftByImage,
    LiftByImageConfig,
    Pipeline,
    PoseOnlyConfig,
    PoseOnlyLifter,
    TinyEncoder,
)
from liftbyimage.profile import Part, Profile, profile
from liftbyimage.profile.counting import OperationCounter, count_flops
from liftbyimage.profile.page import document
from liftbyimage.profile.parts import REST, PlainPipeline, example_inputs, scopes_of
from liftbyimage.profile.report import COLUMNS, as_csv, as_json, cells, print_profile
from liftbyimage.profile.scopes import count

CROP = (80, 48)
B, J, D, H, P, K = 3, 17, 24, 3, 20 * 12, 72  # 72 = floor(0.3 · 240)
HIDDEN = 4 * D


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    torch.manual_seed(0)
    encoder = TinyEncoder()
    config = LiftByImageConfig(image_channels=encoder.channels, grid=(20, 12), dim=D, heads=H)
    return Pipeline(encoder, LiftByImage(config, formulation="projected")).eval()


@pytest.fixture(scope="module")
def measured(pipeline: Pipeline) -> Profile:
    against = ("reference",)
    return profile(
        pipeline, model="small", batches=(1, B), against=against, crop=CROP, seconds=0.01, small_ceilings=True
    )


def _counts(model: Any, pipeline: Pipeline, crop: tuple[int, int] = CROP) -> dict[str, Any]:
    inputs = example_inputs(pipeline, B, crop)
    with torch.no_grad():
        return count(model, scopes_of(model), lambda: model(*inputs), REST)


def test_hand_counts_of_the_projected_lifter_and_of_its_twin(pipeline: Pipeline) -> None:
    width = pipeline.encoder.channels + 16
    among = 2 * B * (J * D * 3 * D + 2 * J * J * D + J * D * D)  # projections, two products of J × J, output
    patches = 2 * B * (2 * P * D * D + 2 * J * P * D)  # keys and values of all patches; scores and context
    few = 2 * B * (2 * K * D * D + 2 * J * K * D)
    feed = 2 * B * 2 * J * D * HIDDEN
    projection = 2 * B * J * D * D  # of the query, or of the output
    guide = 2 * B * (J * D * D + J * P * D + P * D * D)  # pose values, patches receive, image-side output
    plain = {part: counts.flops for part, counts in _counts(PlainPipeline(pipeline), pipeline).items()}
    assert plain["embed pose"] == 2 * B * J * 2 * D
    assert plain["embed patches"] == 2 * B * P * width * D
    for layer in range(3):
        assert plain[f"stage 1 layer {layer}: among joints"] == among
        assert plain[f"stage 1 layer {layer}: feed-forward"] == feed
        guided = guide if layer == 1 else 0
        assert plain[f"stage 1 layer {layer}: attention to patches"] == patches + 2 * projection + guided
        assert plain[f"stage 2 layer {layer}: attention to patches"] == few + 2 * projection
    assert plain["coarse head"] == plain["refined head"] == 2 * B * J * D * 3
    ours = {part: counts.flops for part, counts in _counts(pipeline, pipeline).items()}
    assert ours["stage 1 layer 0: among joints"] == among + projection  # which asks, too
    assert ours["stage 1 layer 0: attention to patches"] == patches
    assert ours["stage 1 layer 0: feed-forward"] == feed + projection
    # Each head's rows are as wide as a token: what joints send, and what patches receive of all rows.
    sent = 2 * B * (J * D * D + J * D * D)
    assert ours["stage 1 layer 1: attention to patches"] == patches + sent + 2 * B * H * J * P * D
    assert ours["select patches"] == 0


@pytest.mark.parametrize("kind", ["lift-by-image", "context-aware-poseformer", "pose-only"])
def test_parts_make_the_whole(kind: str, pipeline: Pipeline) -> None:
    if kind == "context-aware-poseformer":
        torch.manual_seed(1)
        pipeline = Pipeline(HRNet(32), ContextAwarePoseFormer()).eval()
    elif kind == "pose-only":
        pipeline = Pipeline(None, PoseOnlyLifter(PoseOnlyConfig(dim=16, heads=2, layers=2))).eval()
    crop = (64, 64) if kind == "context-aware-poseformer" else CROP
    inputs = example_inputs(pipeline, B, crop)
    counts = _counts(pipeline, pipeline, crop)
    with torch.no_grad():
        flops = count_flops(lambda: pipeline(*inputs))
        with OperationCounter() as counter:
            pipeline(*inputs)
    assert flops > 0
    assert sum(part.flops for part in counts.values()) == flops
    assert sum(part.operations for part in counts.values()) == counter.count
    rest = sum(counts[part].flops for part in (REST, "encoder, rest") if part in counts)
    assert rest <= 0.01 * flops


def test_profiling_leaves_the_model_as_it_was(pipeline: Pipeline, measured: Profile) -> None:
    assert all("forward" not in vars(module) for module in pipeline.modules())
    assert "ask" not in vars(pipeline.lifter.stage1[0])


def test_what_is_measured(measured: Profile) -> None:
    assert [run.batch for run in measured.runs] == [1, B]
    run = measured.runs[1]
    assert run.whole.flops == sum(part.flops for part in run.parts)
    assert run.whole.operations == sum(part.operations for part in run.parts)
    assert run.unattributed_ms == pytest.approx(run.whole.milliseconds - sum(part.milliseconds for part in run.parts))
    assert run.whole.reference_flops and run.whole.reference_milliseconds
    [peer] = run.peers
    assert peer.why_not is None and peer.ratio == pytest.approx(peer.milliseconds / run.whole.milliseconds)
    for part in run.parts:
        assert part.milliseconds_low <= part.milliseconds <= part.milliseconds_high
        assert part.gflops == pytest.approx(part.flops / part.milliseconds / 1e6)
        assert part.of_matmul == pytest.approx(part.gflops / measured.ceilings.matmul_gflops)


def test_a_peer_that_differs_gets_no_ratio(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from liftbyimage.profile import parts

    class Wrong(PlainPipeline):
        def forward(self, *inputs: torch.Tensor) -> Any:
            pose, *rest = super().forward(*inputs)
            return pose + 0.1, *rest

    monkeypatch.setattr("liftbyimage.profile.measure.PlainPipeline", Wrong)
    options = dict(batches=(1,), against=("reference",), crop=CROP, seconds=0.01, small_ceilings=True)
    [peer] = profile(pipeline, **options).runs[0].peers
    assert peer.ratio is None and peer.why_not is not None
    assert peer.why_not.startswith("pose_3d differs by ") and peer.why_not.endswith("; no ratio is reported")
    assert parts.why_no_twin(PoseOnlyLifter()) == "a PoseOnlyLifter is plain PyTorch itself"


def test_files(measured: Profile) -> None:
    data = json.loads(as_json(measured))
    assert data["schema"] == 1
    assert data["runs"][1]["whole"]["flops"] == measured.runs[1].whole.flops
    rows = list(csv.DictReader(as_csv(measured).splitlines()))
    assert list(rows[0]) == ["batch", *Part.__dataclass_fields__]
    assert [row["name"] for row in rows] == [p.name for run in measured.runs for p in (run.whole, *run.parts)]
    assert len(cells(measured.runs[0].whole)) == len(COLUMNS)


@pytest.mark.parametrize("width", [80, 200])
def test_terminal(measured: Profile, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    print_profile(console, measured)
    text = console.export_text()
    assert "stage 2 layer 2: feed-forward" in text and "unattributed" in text and "…" not in text
    assert ("operations" in text) == (width == 200)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_page(measured: Profile, tmp_path: Path, width: int, dark: bool) -> None:
    write_page(tmp_path / "profile.html", document(measured, "liftbyimage profile <small>"))
    with opened(tmp_path / "profile.html", width=width, dark=dark) as shown:
        page = shown.page
        assert page.locator("svg").count() == 8
        assert page.is_hidden("#tip")
        dot = page.locator('circle[data-part="1:3"]')
        dot.hover(force=True)
        assert page.text_content("#tip").startswith(f"{measured.runs[1].parts[3].name}: ")
        assert page.locator('tr.chosen[data-part="1:3"]').count() == 1
        page.hover("h1")
        assert page.is_hidden("#tip")
        assert "<small>" in page.text_content("code")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown.assert_alone()


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(cli.app, ["profile", "pose-only", "--trace", "--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((out / "profile.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["profile.csv", "profile.html", "profile.json", "trace.json"]
    assert json.loads((out / "trace.json").read_text())["traceEvents"]
    assert "a trace" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nothing.pt"],
            "profile: expected lift-by-image, context-aware-poseformer, pose-only, demo or a checkpoint, "
            "got nothing.pt",
        ),
        (["demo", "--against", "numpy"], "--against: expected reference or compile, or both with a comma, got numpy"),
        (
            ["demo", "--dtype", "float16"],
            "profile: precision float16 needs a GPU, got device 'cpu'; bfloat16 serves there",
        ),
        (["demo", "--encoder", "tiny"], "--encoder goes before a model with random weights; a checkpoint has its own"),
        (["pose-only", "--encoder", "tiny"], "--encoder: a pose-only lifter reads no image"),
        (
            ["context-aware-poseformer", "--encoder", "tiny"],
            "--encoder: a context-aware-poseformer lifter needs an encoder with branches, got tiny",
        ),
        (["lift-by-image", "--encoder", "resnet"], "encoder must be one of hrnet-w32, hrnet-w48, tiny, got 'resnet'"),
        (
            ["pose-only", "--encoder-weights", "x.pth"],
            "--encoder-weights needs a checkpoint: this model's weights are random",
        ),
    ],
)
def test_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["profile", *arguments, "--device", "cpu", "--out", str(tmp_path / "out")])
    assert (result.stderr, result.stdout, result.exit_code) == (f"error: {message}\n", "", 2)


def test_refused_in_python(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="^profile: batch must be at least 1, got 0$"):
        profile(pipeline, batches=(0,))
    with pytest.raises(ValueError, match="^profile: against must be of reference, compile, got 'jax'$"):
        profile(pipeline, against=("jax",))
    with pytest.raises(ValueError, match="^profile: pipeline must be in evaluation mode, got training mode; call eval"):
        profile(Pipeline(None, PoseOnlyLifter()))
