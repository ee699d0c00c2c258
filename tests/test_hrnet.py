from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from liftbyimage.models.hrnet import HRNet, hrnet_w32, hrnet_w48


def meta_model(build) -> HRNet:
    with torch.device("meta"):
        return build().eval()


def zero_model(num_joints: int = 17) -> HRNet:
    model = meta_model(lambda: hrnet_w32(num_joints)).to_empty(device="cpu")
    for value in model.state_dict().values():
        value.zero_()
    return model


@pytest.fixture(scope="module")
def w32() -> HRNet:
    """Random weights and batch statistics, so that a layer left out or misplaced shows."""
    torch.manual_seed(0)
    model = hrnet_w32().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


class FromNames:
    """HRNet computed from the entries of its state dict alone, by their published names."""

    def __init__(self, entries: dict[str, Tensor]) -> None:
        self.entries = entries

    def conv_bn(self, x: Tensor, conv: str, bn: str, stride: int = 1) -> Tensor:
        weight = self.entries[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.entries[f"{bn}.{name}"] for name in names))

    def pair(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        return self.conv_bn(x, f"{name}.0", f"{name}.1", stride)

    def block(self, x: Tensor, name: str, convs: int) -> Tensor:
        shortcut = self.pair(x, f"{name}.downsample") if f"{name}.downsample.0.weight" in self.entries else x
        for i in range(1, convs + 1):
            x = self.conv_bn(x, f"{name}.conv{i}", f"{name}.bn{i}")
            x = F.relu(x if i < convs else x + shortcut)
        return x

    def branches(self, inputs: list[Tensor], name: str) -> list[Tensor]:
        outputs = []
        for i, x in enumerate(inputs):
            for j in range(4):
                x = self.block(x, f"{name}.branches.{i}.{j}", 2)
            outputs.append(x)
        return outputs

    def carry(self, x: Tensor, name: str, source: int, target: int) -> Tensor:
        if source > target:
            return (
                self.pair(x, name)
                .repeat_interleave(2 ** (source - target), 2)
                .repeat_interleave(2 ** (source - target), 3)
            )
        for k in range(target - source):
            x = self.pair(x, f"{name}.{k}", 2)
            x = F.relu(x) if k < target - source - 1 else x
        return x

    def fuse(self, xs: list[Tensor], name: str, targets: int) -> list[Tensor]:
        return [
            F.relu(sum(self.carry(x, f"{name}.fuse_layers.{i}.{j}", j, i) for j, x in enumerate(xs)))
            for i in range(targets)
        ]

    def __call__(self, images: Tensor) -> dict[str, Tensor | list[Tensor]]:
        x = F.relu(self.conv_bn(images, "conv1", "bn1", 2))
        x = F.relu(self.conv_bn(x, "conv2", "bn2", 2))
        for i in range(4):
            x = self.block(x, f"layer1.{i}", 3)
        xs = [F.relu(self.pair(x, "transition1.0")), F.relu(self.pair(x, "transition1.1.0", 2))]
        xs = self.fuse(self.branches(xs, "stage2.0"), "stage2.0", 2)
        xs.append(F.relu(self.pair(xs[-1], "transition2.2.0", 2)))
        for module in range(4):
            xs = self.fuse(self.branches(xs, f"stage3.{module}"), f"stage3.{module}", 3)
        xs.append(F.relu(self.pair(xs[-1], "transition3.3.0", 2)))
        tapped = self.branches(xs, "stage4.0")
        xs = self.fuse(tapped, "stage4.0", 4)
        xs = self.fuse(self.branches(xs, "stage4.1"), "stage4.1", 4)
        (final,) = self.fuse(self.branches(xs, "stage4.2"), "stage4.2", 1)
        heatmaps = F.conv2d(final, self.entries["final_layer.weight"], self.entries["final_layer.bias"])
        return {"final": final, "heatmaps": heatmaps, "branches": tapped}


@pytest.mark.parametrize(
    ("build", "width", "parameters", "giga_macs"),
    [(hrnet_w32, 32, 28_536_113, 7.645), (hrnet_w48, 48, 63_595_745, 15.69)],
)
def test_published_size(build, width: int, parameters: int, giga_macs: float) -> None:
    model = meta_model(build)
    names = list(model.state_dict())
    assert (model.channels, model.stride) == (width, 4)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(names) == 1754
    assert sum(not name.endswith("num_batches_tracked") for name in names) == 1462
    assert sum(name.startswith("stage4.2.fuse_layers.") for name in names) == 18
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 256, 192, device="meta"), ("heatmaps",))
    digits = len(str(giga_macs).split(".")[1])
    assert round(counter.get_total_flops() / 2e9, digits) == giga_macs


def test_published_names() -> None:
    pattern = re.compile(
        r"(conv[12]|bn[12]|layer1\.[0-3]\.(conv[123]|bn[123])|layer1\.0\.downsample\.[01]"
        r"|transition1\.0\.[01]|transition1\.1\.0\.[01]|transition2\.2\.0\.[01]|transition3\.3\.0\.[01]"
        r"|(stage2\.0\.branches\.[01]|stage3\.[0-3]\.branches\.[0-2]|stage4\.[0-2]\.branches\.[0-3])"
        r"\.[0-3]\.(conv[12]|bn[12])"
        r"|stage[234]\.\d\.fuse_layers\.\d\.\d(\.\d)?\.[01]|final_layer)"
        r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
    )
    strange = [name for name in meta_model(hrnet_w32).state_dict() if not pattern.fullmatch(name)]
    assert strange == []


def test_shapes_at_256x192() -> None:
    outputs = meta_model(hrnet_w48)(torch.empty(2, 3, 256, 192, device="meta"), ("final", "heatmaps", "branches"))
    assert outputs["final"].shape == (2, 48, 64, 48)
    assert outputs["heatmaps"].shape == (2, 17, 64, 48)
    assert [tuple(branch.shape) for branch in outputs["branches"]] == [
        (2, 48, 64, 48),
        (2, 96, 32, 24),
        (2, 192, 16, 12),
        (2, 384, 8, 6),
    ]


def test_equals_the_network_rebuilt_from_names(w32: HRNet, images: Tensor) -> None:
    entries = {name: value.double() for name, value in w32.state_dict().items()}
    with torch.no_grad():
        expected = FromNames(entries)(images.double())
        got = w32(images, ("final", "heatmaps", "branches"))
    assert set(got) == set(expected)
    pairs = [(got[tap], expected[tap]) for tap in ("final", "heatmaps")]
    pairs += list(zip(got["branches"], expected["branches"], strict=True))
    for output, oracle in pairs:
        assert oracle.std() > 1e-3
        assert (output.double() - oracle).square().mean().sqrt() <= 1e-5 * oracle.square().mean().sqrt()


def test_a_tap_alone_equals_the_tap_among_others(w32: HRNet, images: Tensor) -> None:
    with torch.no_grad():
        together = w32(images, ("heatmaps", "branches", "final"))
        assert torch.equal(w32(images)["final"], together["final"])
        assert torch.equal(w32.features(images), together["final"])
        alone = w32(images, ["heatmaps"])
        branches = w32(images, ("branches",))
    assert list(alone) == ["heatmaps"]
    assert torch.equal(alone["heatmaps"], together["heatmaps"])
    assert list(branches) == ["branches"]
    for branch, expected in zip(branches["branches"], together["branches"], strict=True):
        assert torch.equal(branch, expected)


@pytest.mark.parametrize(
    ("taps", "idle"),
    [
        (("branches",), ("stage4.0.fuse_layers", "stage4.1", "stage4.2", "final_layer")),
        (("final",), ("final_layer",)),
    ],
)
def test_computes_only_what_the_taps_need(taps: tuple[str, ...], idle: tuple[str, ...]) -> None:
    model = meta_model(hrnet_w32)
    ran = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    model(torch.empty(1, 3, 64, 64, device="meta"), taps)
    convs = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert convs - ran == {name for name in convs if name.startswith(idle)}


def test_gradients_reach_every_weight_of_the_final_tap() -> None:
    torch.manual_seed(2)
    model = hrnet_w32().train()
    model.features(torch.randn(2, 3, 64, 64)).square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["final_layer.weight", "final_layer.bias"]


def test_empty_batch(w32: HRNet) -> None:
    assert w32.features(torch.empty(0, 3, 64, 32)).shape == (0, 32, 16, 8)


@pytest.mark.parametrize(
    ("tracked", "prefix", "from_file"),
    [(True, "", True), (False, "", False), (True, "module.", False), (False, "module.", True)],
)
def test_load_official(w32: HRNet, images: Tensor, tmp_path, tracked: bool, prefix: str, from_file: bool) -> None:
    weights = {
        prefix + name: value
        for name, value in w32.state_dict().items()
        if tracked or not name.endswith("num_batches_tracked")
    }
    model = zero_model()
    if from_file:
        torch.save(weights, tmp_path / "w.pth")
        assert model.load_official(tmp_path / "w.pth") is model
    else:
        assert model.load_official(weights) is model
    loaded = model.state_dict()
    for name, value in w32.state_dict().items():
        assert torch.equal(value, loaded[name]), name


def test_load_official_lists_the_first_missing_and_unexpected_names() -> None:
    model = meta_model(hrnet_w32)
    weights = dict(list(model.state_dict().items())[7:])
    weights["head.bias"] = torch.zeros(1)
    message = (
        "HRNet.load_official: weights must have the names of HRNet-w32, got 6 missing "
        "(conv1.weight, bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var, …) "
        "and 1 unexpected (head.bias)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.load_official(weights)


def test_load_official_refuses_another_width_and_changes_nothing() -> None:
    model = meta_model(hrnet_w32)
    with pytest.raises(
        ValueError,
        match=r"^HRNet\.load_official: weights must have the shapes of HRNet-w32 with 17 joints, "
        r"got 1386 other \(transition1\.0\.0\.weight \[48, 256, 3, 3\] instead of \[32, 256, 3, 3\], ",
    ):
        model.load_official(meta_model(hrnet_w48).state_dict())

    small = zero_model(num_joints=2)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with pytest.raises(ValueError, match="with 2 joints, got 2 other"):
        small.load_official({name: torch.ones(value.shape) for name, value in model.state_dict().items()})
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_load_official_refuses_what_is_no_state_dict(tmp_path) -> None:
    model = meta_model(hrnet_w32)
    with pytest.raises(TypeError, match=r"weights must be a state dict or a path, got list$"):
        model.load_official([])
    with pytest.raises(TypeError, match=r"weights must map names to tensors, got dict at 'state_dict'$"):
        model.load_official({"state_dict": {}})
    for content in (b"", b"not a checkpoint", b"\xff\xd8\xff\xe0 JFIF", b"PK\x03\x04 truncated"):
        path = tmp_path / "broken.pth"
        path.write_bytes(content)
        message = f"weights must be a file of tensors saved by torch.save, got the unreadable {path}"
        with pytest.raises(ValueError, match=re.escape(message)):
            model.load_official(str(path))
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        model.load_official(tmp_path / "absent.pth")


def test_load_official_never_unpickles_code(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="got the unreadable"):
        meta_model(hrnet_w32).load_official(tmp_path / "evil.pth")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([1.0], TypeError, "HRNet: images must be a torch.Tensor, got list"),
        (
            torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device="meta"),
            TypeError,
            "HRNet: images must be a floating-point tensor, got torch.uint8",
        ),
        (
            torch.zeros(3, 64, 64, device="meta"),
            ValueError,
            "HRNet: images must have shape [B, 3, H, W], got [3, 64, 64]",
        ),
        (
            torch.zeros(1, 3, 64, 48, device="meta"),
            ValueError,
            "HRNet: images must have height and width that are multiples of 32, got 64x48",
        ),
        (torch.zeros(1, 3, 64, 64), ValueError, "HRNet: images must be on the weights' device meta, got cpu"),
        (
            torch.zeros(1, 3, 64, 64, dtype=torch.float64, device="meta"),
            TypeError,
            "HRNet: images must have the weights' dtype torch.float32, got torch.float64",
        ),
    ],
)
def test_bad_images(images, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        meta_model(hrnet_w32)(images)


@pytest.mark.parametrize(
    ("taps", "error", "message"),
    [
        ("final", TypeError, "HRNet: taps must be a sequence of names, got 'final'"),
        ((), ValueError, "HRNet: taps must be one or more of final, heatmaps, branches, got []"),
        (
            ("final", "stem"),
            ValueError,
            "HRNet: taps must be one or more of final, heatmaps, branches, got ['final', 'stem']",
        ),
    ],
)
def test_bad_taps(taps, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        meta_model(hrnet_w32)(torch.zeros(1, 3, 64, 64, device="meta"), taps)


def test_bad_configuration() -> None:
    with pytest.raises(ValueError, match="^HRNet: width must be 32 or 48, got 18$"):
        HRNet(18)
    with pytest.raises(ValueError, match="^HRNet: num_joints must be an integer of at least 1 or None, got 0$"):
        HRNet(32, num_joints=0)
