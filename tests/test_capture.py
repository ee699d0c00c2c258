"""A module replayed from a CUDA graph; without a GPU, what it says of inputs it cannot take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from liftbyimage.models import CapturedModule, capture

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


class Mix(nn.Module):
    """Takes what a lifter takes: a list of maps and a pose."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, maps: list[Tensor], pose: Tensor) -> dict[str, Tensor]:
        mean = sum(feature_map.mean(dim=(2, 3)) for feature_map in maps)
        return {"pose": self.linear(mean)[:, None] + pose, "mean": mean}


class Recorder:
    """Stands in for the graph: counts its replays."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


def draw(device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, 8, size, size, generator=generator) for size in (4, 2)]
    maps[0] = maps[0].to(memory_format=torch.channels_last)
    return [values.to(device) for values in maps], torch.randn(2, 17, 3, generator=generator).to(device)


@pytest.mark.parametrize(
    "module, inputs, error, message",
    [
        (torch.relu, (torch.zeros(1),), TypeError, "module must be a torch.nn.Module, got builtin_function_or_method"),
        (nn.ReLU(), (torch.zeros(1),), ValueError, "module must be in eval mode, got one in training mode"),
        (nn.ReLU().eval(), (), ValueError, "inputs must hold at least one tensor, got none"),
        (nn.ReLU().eval(), ([],), ValueError, "inputs must hold at least one tensor, got none"),
        (nn.ReLU().eval(), (torch.zeros(1),), ValueError, "inputs must be on a CUDA device, got cpu"),
        (
            nn.ReLU().eval(),
            ([torch.zeros(1), 3],),
            TypeError,
            "inputs[0][1] must be a tensor or a list of tensors, got int",
        ),
    ],
)
def test_refuses_in_one_sentence(module, inputs, error, message):
    with pytest.raises(error) as raised:
        capture(module, *inputs)
    assert str(raised.value) == f"capture: {message}"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda maps, pose: (maps, pose[:1]),
            "inputs[1] must be torch.float32 [2, 17, 3] on cpu as captured, got torch.float32 [1, 17, 3] on cpu",
        ),
        (
            lambda maps, pose: ([maps[0], maps[1].double()], pose),
            "inputs[0][1] must be torch.float32 [2, 8, 2, 2] on cpu as captured, got torch.float64 [2, 8, 2, 2] on cpu",
        ),
        (
            lambda maps, pose: (maps, pose.to("meta")),
            "inputs[1] must be torch.float32 [2, 17, 3] on cpu as captured, got torch.float32 [2, 17, 3] on meta",
        ),
        (
            lambda maps, pose: (maps[:1], pose),
            "inputs must be inputs[0][0], inputs[0][1], inputs[1] as captured, got inputs[0][0], inputs[1]",
        ),
        (lambda maps, pose: (), "inputs must be inputs[0][0], inputs[0][1], inputs[1] as captured, got none"),
    ],
)
def test_other_inputs_than_captured_are_refused(change, message):
    graph = Recorder()
    captured = CapturedModule(nn.ReLU(), graph, draw("cpu"), None)
    with pytest.raises(ValueError) as raised:
        captured(*change(*draw("cpu")))
    assert str(raised.value) == f"capture: {message}"
    assert graph.replays == 0


@needs_gpu
def test_replay_equals_the_module():
    module = Mix().cuda().eval()
    captured = capture(module, *draw("cuda"))
    results = [captured(*draw("cuda", seed)) for seed in (1, 2)]
    for seed, result in zip((1, 2), results, strict=True):  # the second replay left the first result alone
        expected = module(*draw("cuda", seed))
        assert result.keys() == expected.keys()
        for name in expected:
            assert torch.equal(result[name], expected[name])
            assert not result[name].requires_grad


@needs_gpu
def test_weights_loaded_later_take_effect():
    module, other = Mix().cuda().eval(), Mix().cuda().eval()
    captured = capture(module, *draw("cuda"))
    module.load_state_dict(other.state_dict())
    assert torch.equal(captured(*draw("cuda"))["pose"], other(*draw("cuda"))["pose"])


@needs_gpu
def test_inputs_on_the_processor_are_refused():
    captured = capture(Mix().cuda().eval(), *draw("cuda"))
    with pytest.raises(ValueError, match="as captured, got torch.float32 .* on cpu"):
        captured(*draw("cpu"))
