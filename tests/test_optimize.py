"""Folding, packing and the choice of the fastest way: every network here has random weights and batch statistics."""

from __future__ import annotations

import copy
import operator
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from liftbyimage.models import HRNet, LiftByImage, LiftByImageConfig, Pipeline, TinyEncoder, fold_batch_norm, optimize
from liftbyimage.models.optimize import BOUNDS, OptimizedEncoder, optimize_encoder, relative_error
from liftbyimage.models.packed_conv import PackedConv2d, pack_convolutions, why_not_pack

CPU = torch.device("cpu")
packs = pytest.mark.skipif(why_not_pack(torch.float32, CPU) is not None, reason=str(why_not_pack(torch.float32, CPU)))
packs_bfloat16 = pytest.mark.skipif(
    why_not_pack(torch.bfloat16, CPU) is not None, reason=str(why_not_pack(torch.bfloat16, CPU))
)


def randomised(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
            nn.init.normal_(part.running_mean, std=0.5)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            if part.affine:
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, std=0.5)
    return module.eval()


def batch_norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=[TinyEncoder, HRNet], ids=["tiny", "hrnet"])
def encoder(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return randomised(request.param())


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 96)


@pytest.fixture
def pipeline() -> Pipeline:
    config = LiftByImageConfig(image_channels=8, grid=(8, 4), dim=16, heads=2)
    return Pipeline(randomised(TinyEncoder(8)), LiftByImage(config)).eval()


@pytest.fixture
def crops() -> Tensor:
    return torch.randn(2, 3, 32, 16)


class Block(nn.Module):
    """Two convolutions and two batch norms, registered in an order that is not the order of use."""

    def __init__(self) -> None:
        super().__init__()
        self.second_norm, self.first_norm = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, bias=False)


class InOrderOfUse(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))


class ReadTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.first_norm(y) + self.second_norm(self.second(y)) + y


class CalledTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.second_norm(self.first(self.first_norm(self.first(x))))


class WeightReadElsewhere(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.first_norm(self.first(x)) + F.conv2d(x, self.first.weight, padding=1)


class WeightShared(Block):
    def __init__(self) -> None:
        super().__init__()
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.first_norm(self.first(x)) + self.second(x)


class NoConvolutionBefore(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.first_norm(F.relu(self.first(self.second_norm(x))))


class HookedConvolution(Block):
    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(lambda module, args, result: 2 * result)

    def forward(self, x: Tensor) -> Tensor:
        return self.first_norm(self.first(x))


class OfBatchStatistics(Block):
    def __init__(self) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first_norm(self.first(x))


class NotAffine(Block):
    def __init__(self) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first_norm(self.first(x))


class Residual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + x)


class TwoConvolutionsAdded(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.first(x), self.second(x)).relu()


class Doubled(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y + y


class SmallResidual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.first(x) + x.mean(dim=(2, 3), keepdim=True))


class LargeResidual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.first(x.mean(dim=(2, 3), keepdim=True)))


class FlatResidual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + x.mean(dim=(0, 2, 3))[:, None, None]


class ResidualChangedInBetween(Block):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = 2 * x
        y = self.first(x)
        shortcut.neg_()
        return y + shortcut


class InputChangedInBetween(Block):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x
        y = self.first(x)
        return y + self.relu(x)


class RectifiedAndReadElsewhere(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return F.relu(y) - y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_folding_is_exact(encoder: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    encoder, images = copy.deepcopy(encoder).to(dtype), images.to(dtype)
    folded = fold_batch_norm(encoder, "features")
    assert batch_norms(encoder) > 0
    assert batch_norms(folded) == 0
    with torch.no_grad():
        for given in (images, torch.randn(1, 3, 32, 32, dtype=dtype)):
            assert relative_error(folded(given), encoder.features(given)) <= BOUNDS[dtype]


@pytest.mark.parametrize(
    ("build", "left"),
    [
        (InOrderOfUse, 0),
        (ReadTwice, 1),
        (CalledTwice, 0),
        (WeightReadElsewhere, 0),
        (WeightShared, 0),
        (NoConvolutionBefore, 2),
        (HookedConvolution, 1),
        (OfBatchStatistics, 1),
        (NotAffine, 0),
    ],
)
def test_only_what_the_data_flow_pairs_is_folded(build: type[Block], left: int) -> None:
    block = randomised(build()).double()
    folded = fold_batch_norm(block)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(folded(x), block(x)) <= 1e-12
    assert batch_norms(folded) == left


def test_folding_leaves_the_original_as_it_was(encoder: nn.Module, images: Tensor) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    folded = fold_batch_norm(encoder, "features")
    after = encoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    own = {parameter.data_ptr() for parameter in encoder.parameters()}
    assert not own & {parameter.data_ptr() for parameter in folded.parameters()}


class DependsOnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_fold_bad_input() -> None:
    with pytest.raises(TypeError, match=r"^fold_batch_norm: module must be an nn\.Module, got int$"):
        fold_batch_norm(3)
    half_trained = TinyEncoder().eval()
    half_trained.coarse[0].train()
    expected = "fold_batch_norm: module must be in evaluation mode, got coarse.0 in training mode"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        fold_batch_norm(half_trained)
    expected = (
        "fold_batch_norm: DependsOnValues.forward must be traceable by torch.fx, "
        "got: symbolically traced variables cannot be used as inputs to control flow"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        fold_batch_norm(DependsOnValues().eval())


@packs
@pytest.mark.parametrize(
    "build",
    [
        InOrderOfUse,
        CalledTwice,
        ReadTwice,
        HookedConvolution,
        Residual,
        TwoConvolutionsAdded,
        Doubled,
        SmallResidual,
        LargeResidual,
        FlatResidual,
        ResidualChangedInBetween,
        InputChangedInBetween,
        RectifiedAndReadElsewhere,
    ],
)
def test_packed_convolutions_equal_plain_ones(build: type[Block]) -> None:
    block = randomised(build())
    packed = pack_convolutions(fold_batch_norm(block), torch.randn(2, 3, 6, 5))
    assert any(isinstance(part, PackedConv2d) for part in packed.modules()) == (build is not HookedConvolution)
    with torch.no_grad():
        for shape in ((2, 3, 6, 5), (1, 3, 1, 1), (5, 3, 9, 16)):
            x = torch.randn(shape)
            assert relative_error(packed(x), block(x)) <= 1e-5


@packs
@pytest.mark.parametrize(
    ("changes", "is_packed"),
    [
        ({"stride": 2, "padding": (1, 0), "dilation": (1, 2)}, True),
        ({"groups": 4, "bias": False}, True),
        ({"padding": "same"}, False),
        ({"padding": 1, "padding_mode": "circular"}, False),
    ],
)
def test_geometries_of_packed_convolutions(changes: dict, is_packed: bool) -> None:
    plain = nn.Sequential(nn.Conv2d(4, 8, 3, **changes)).eval()
    packed = pack_convolutions(fold_batch_norm(plain), torch.randn(1, 4, 9, 8))
    x = torch.randn(3, 4, 12, 11)
    with torch.no_grad():
        assert relative_error(packed(x), plain(x)) <= 1e-5
        assert relative_error(copy.deepcopy(packed)(x), plain(x)) <= 1e-5
    assert any(isinstance(part, PackedConv2d) for part in packed.modules()) == is_packed


@packs
def test_residual_and_rectifier_are_fused(images: Tensor) -> None:
    """HRNet keeps only the additions and rectifiers that no single convolution can do."""
    plain = fold_batch_norm(HRNet().eval(), "features")
    packed = pack_convolutions(copy.deepcopy(plain), images)
    modules = [type(packed.get_submodule(n.target)) for n in packed.graph.nodes if n.op == "call_module"]
    assert modules.count(PackedConv2d) == 292
    assert nn.Conv2d not in modules
    additions = [sum(node.target is operator.add for node in network.graph.nodes) for network in (plain, packed)]
    assert additions == [161, 36]  # what is left adds maps of different branches
    fused = [n for n in packed.graph.nodes if n.target in dict(packed.named_modules()) and len(n.args) == 2]
    assert len(fused) >= 4 * (1 + 2 + 4 * 3 + 3 * 4)  # one per residual block


@packs
def test_pipeline_gives_the_same_poses(pipeline: Pipeline, crops: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "folded, packed")
    before = {name: value.clone() for name, value in pipeline.state_dict().items()}
    optimised = pipeline.optimize(crops)
    pose_2d = torch.rand(2, 17, 2) * 2 - 1
    with torch.no_grad():
        for given in (crops, torch.randn(1, 3, 32, 16)):
            expected, got = pipeline(given, pose_2d[: len(given)]), optimised(given, pose_2d[: len(given)])
            assert torch.equal(got.index, expected.index)
            assert relative_error(got.pose_3d, expected.pose_3d) <= 1e-4
            assert relative_error(got.importance, expected.importance) <= 1e-4
    assert all(torch.equal(value, before[name]) for name, value in pipeline.state_dict().items())
    assert all(parameter.requires_grad for parameter in pipeline.parameters())
    assert not any(parameter.requires_grad for parameter in optimised.parameters())
    assert not optimised(crops, pose_2d).pose_3d.requires_grad
    assert pipeline.train().training and not optimised.training


@packs
def test_a_residual_of_another_dtype_is_promoted() -> None:
    class Promoting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + x.double()

    module, x = Promoting().eval(), torch.randn(1, 3, 8, 8)
    packed = pack_convolutions(fold_batch_norm(module), x)
    with torch.no_grad():
        expected, got = module(x), packed(x)
    assert got.dtype == expected.dtype == torch.float64
    assert relative_error(got, expected) <= 1e-5


def test_every_way_is_verified_and_timed(encoder: nn.Module, images: Tensor) -> None:
    optimised, report = optimize_encoder(encoder, images)
    names = [candidate.name for candidate in report.candidates]
    assert names == ["plain", "folded", "folded, channels-last", "folded, packed"]
    for candidate in report.candidates:
        if candidate.why_not is None:
            assert candidate.error <= 1e-4 and candidate.milliseconds > 0
    assert report.chosen == min(report.candidates, key=lambda c: c.milliseconds or float("inf")).name
    with torch.no_grad():
        for given in (images, torch.randn(3, 3, 32, 64)):
            assert relative_error(optimised.features(given), encoder.features(given)) <= 1e-4
    copied = copy.deepcopy(optimised)
    assert torch.equal(copied.features(images), optimised.features(images))
    lines = str(report).splitlines()
    assert lines[0] == f"encoder: {report.chosen}, {report.speedup:.2f} times as fast as plain"
    assert len(lines) == 1 + len(names)


def choose(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def times(encoders: dict[str, OptimizedEncoder], images: Tensor) -> dict[str, float]:
        return {way: 1.0 if way == name else 2.0 for way in encoders}

    monkeypatch.setattr(optimize, "_milliseconds", times)


@pytest.mark.parametrize("name", ["plain", "folded", "folded, channels-last", "folded, packed"])
def test_the_fastest_is_chosen(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, crops: Tensor, name: str) -> None:
    choose(monkeypatch, name)
    if name == "folded, packed" and why_not_pack(torch.float32, CPU) is not None:
        pytest.skip(str(why_not_pack(torch.float32, CPU)))
    optimised = pipeline.optimize(crops)
    assert optimised.report.chosen == name
    assert optimised.report.speedup == (1 if name == "plain" else 2)
    assert batch_norms(optimised.encoder) == (batch_norms(pipeline.encoder) if name == "plain" else 0)
    with torch.no_grad():
        features = optimised.encoder.features(crops)
        assert relative_error(features, pipeline.encoder.features(crops)) <= 1e-4
        assert optimised.encoder.features(crops[:0]).shape == (0, 8, 8, 4)
        broken = crops.clone()
        broken[1, 0, 3, 5] = float("nan")
        assert optimised.encoder.features(broken)[1].isnan().all()
        assert relative_error(optimised.encoder.features(broken)[0], features[0]) <= 1e-6


@packs
@pytest.mark.parametrize("off", [2e-4, float("nan")])
def test_a_wrong_way_is_refused(
    monkeypatch: pytest.MonkeyPatch, encoder: nn.Module, images: Tensor, off: float
) -> None:
    def wrong(network: nn.Module, given: Tensor) -> nn.Module:
        class Wrong(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                features = network(x)
                features[-1, 0, 0, 0] += off * features.square().mean().sqrt()
                return features

        return Wrong()

    monkeypatch.setattr(optimize, "pack_convolutions", wrong)
    choose(monkeypatch, "folded, packed")
    _, report = optimize_encoder(encoder, images)
    (packed,) = (candidate for candidate in report.candidates if candidate.name == "folded, packed")
    text = "2.0e-04" if off == 2e-4 else "nan"
    assert packed.why_not == f"wrong: its largest error is {text} of the RMS, 1e-04 is allowed"
    assert report.chosen != packed.name
    assert f"{packed.name}  " in str(report) and packed.why_not in str(report)


@packs_bfloat16
def test_bfloat16_only_on_demand_and_within_its_bound(
    monkeypatch: pytest.MonkeyPatch, encoder: nn.Module, images: Tensor
) -> None:
    choose(monkeypatch, "folded, packed, bfloat16")
    optimised, report = optimize_encoder(encoder, images, dtype=torch.bfloat16)
    assert report.chosen == "folded, packed, bfloat16"
    with torch.no_grad():
        features, expected = optimised.features(images), encoder.features(images)
    assert features.dtype == torch.bfloat16
    assert 1e-4 < relative_error(features, expected) <= BOUNDS[torch.bfloat16]
    assert F.cosine_similarity(features.double().flatten(), expected.double().flatten(), dim=0) >= 0.999
    _, report = optimize_encoder(encoder, images)
    assert not any("bfloat16" in candidate.name for candidate in report.candidates)


@packs_bfloat16
def test_bfloat16_features_reach_the_lifter_in_its_dtype(
    monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, crops: Tensor
) -> None:
    choose(monkeypatch, "folded, packed, bfloat16")
    optimised = pipeline.optimize(crops, dtype=torch.bfloat16)
    pose_2d = torch.rand(2, 17, 2) * 2 - 1
    with torch.no_grad():
        got, expected = optimised(crops, pose_2d).coarse_pose_3d, pipeline(crops, pose_2d).coarse_pose_3d
    assert got.dtype == torch.float32
    assert relative_error(got, expected) <= 0.1


class Untraceable(nn.Module):
    channels = 3

    def features(self, images: Tensor) -> Tensor:
        return images if images.sum() > 0 else -images


def test_an_encoder_that_cannot_be_traced_runs_as_it_is() -> None:
    images = torch.rand(1, 3, 4, 4)
    optimised, report = optimize_encoder(Untraceable().eval(), images)
    assert report.chosen == "plain"
    assert report.candidates[1].why_not == (
        "fold_batch_norm: Untraceable.features must be traceable by torch.fx, "
        "got: symbolically traced variables cannot be used as inputs to control flow"
    )
    assert torch.equal(optimised.features(images), images)
    assert torch.equal(optimised.features(-images), images)


def test_compiled_on_demand(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, crops: Tensor) -> None:
    name = "folded, channels-last, compiled"
    choose(monkeypatch, name)
    optimised = pipeline.optimize(crops, compile=True)
    assert optimised.report.chosen == name
    with torch.no_grad():
        for given in (crops, torch.randn(1, 3, 64, 32)):
            assert relative_error(optimised.encoder.features(given), pipeline.encoder.features(given)) <= 1e-4


def test_optimise_bad_input(pipeline: Pipeline, crops: Tensor) -> None:
    def refused(error: type[Exception], text: str, *args: object, **kwargs: object) -> None:
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            pipeline.optimize(*args, **kwargs)

    refused(TypeError, "Pipeline.optimize: images must be a torch.Tensor, got list", [crops])
    shape = "Pipeline.optimize: images must have shape [B, 3, H, W] with B of at least 1, got "
    refused(ValueError, f"{shape}[3, 32, 16]", crops[0])
    refused(ValueError, f"{shape}[0, 3, 32, 16]", crops[:0])
    dtype = "Pipeline.optimize: dtype must be None, torch.bfloat16 or the images' torch.float32, got "
    refused(ValueError, f"{dtype}torch.float16", crops, dtype=torch.float16)
    refused(
        TypeError, "TinyEncoder: images must have the weights' dtype torch.float32, got torch.float64", crops.double()
    )
    not_finite = "Pipeline.optimize: images must give finite features, got some that are not"
    refused(ValueError, not_finite, crops * float("nan"))
    pipeline.lifter.train()
    training = "Pipeline.optimize: pipeline must be in evaluation mode, got training mode; call eval()"
    refused(ValueError, training, crops)


def test_an_optimised_pipeline_is_for_inference_only(pipeline: Pipeline, crops: Tensor) -> None:
    optimised = pipeline.optimize(crops)
    expected = "OptimizedEncoder: is for inference only; train the encoder it was made from"
    with pytest.raises(RuntimeError, match=f"^{expected}$"):
        optimised.train()
    assert not optimised.to("cpu").eval().encoder.features(crops.requires_grad_()).requires_grad
    again = "Pipeline.optimize: pipeline must not be optimised yet, got one that optimize() made"
    with pytest.raises(ValueError, match=f"^{re.escape(again)}$"):
        optimised.eval().optimize(crops)
    wrong = "TinyEncoder: images must have the weights' dtype torch.float32, got torch.float64"
    with pytest.raises(TypeError, match=f"^{wrong}$"):
        optimised.encoder.features(crops.double())
