"""What is measured: a setting, the ways to compute it, and the call that is verified and timed alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from machine import DEVICE, DTYPE, synchronise
from torch import Tensor, nn

from liftbyimage.nn import FactoredPatches

FORWARD, TRAINING = "forward", "forward + backward"
JOINTS, HEADS = 17, 8
CENTRAL, SMOKE = {"P": 3072, "D": 256}, {"P": 48, "D": 64}
VERIFIED_SAMPLES = 8
# torch.compile adds up the bias gradient of 24,576 tokens one after the other, which rounds more than eager PyTorch
# does: of a compiled peer only this is asked, relative to the result's RMS, beyond twice the reference's error.
COMPILED_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Setting:
    """What is computed: sizes in the symbols of docs/ops, and in which direction. Compiled rows only where central."""

    B: int
    P: int
    D: int
    direction: str = FORWARD
    central: bool = False

    def __str__(self) -> str:
        return f"{self.direction} B{self.B} P{self.P} D{self.D}"


@dataclass(frozen=True)
class Implementation:
    """One way to compute a setting.

    `build(setting)` gives a module that maps the inputs to a tuple of outputs and has the reference's state dict.
    `why_not(setting)` is the reason it has no row, or None. `dtype` is what it computes in, where it is not that of the
    run: its errors are then judged beside those of the reference in that dtype.
    """

    name: str
    build: Callable[[Setting], nn.Module]
    compiled: bool = False
    why_not: Callable[[Setting], str | None] = lambda setting: None
    dtype: torch.dtype = DTYPE

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Workload:
    """What the rows of one group share.

    Args:
        op, setting: the group.
        reference: builds the module that defines outputs and weights.
        inputs: draws one set of inputs of a dtype.
        outputs: their names, in order; the batch is their first axis.
        compulsory_bytes: what any implementation must read and write at least.
        needed_bytes: what the reference takes, to skip a setting before the machine runs out of memory.
        cotangents: shapes of the outputs that backward starts from.
        bounds: for whole models, the largest error relative to the output's RMS per dtype, beyond twice that of the
            reference in the dtype; without, the rule of liftbyimage.testing.
        trained: whether the parameter of a name gets a gradient.
        coupled: samples depend on each other (batch norm in training).
        frozen: places of the inputs that get no gradient.
    """

    op: str
    setting: Setting
    reference: Callable[[Setting], nn.Module]
    inputs: Callable[[torch.Generator, torch.dtype], tuple[Tensor, ...]]
    outputs: tuple[str, ...]
    compulsory_bytes: int
    needed_bytes: int
    cotangents: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    bounds: Mapping[torch.dtype, float] | None = None
    trained: Callable[[str], bool] = lambda name: True
    coupled: bool = False
    frozen: Sequence[int] = ()

    @property
    def group(self) -> str:
        return f"{self.op} {self.setting} {dtype_name()} {DEVICE}"

    @property
    def verified_whole(self) -> bool:
        """Small batches are verified whole, weight gradients included; of large ones the first and last samples."""
        return self.coupled or self.setting.B <= VERIFIED_SAMPLES


@dataclass(frozen=True)
class Call:
    """One set of inputs and, by output name, the cotangents that backward starts from."""

    inputs: tuple[Tensor, ...]
    cotangents: Mapping[str, Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        inputs = tuple(change(t.detach()).requires_grad_(t.requires_grad) for t in self.inputs)
        return Call(inputs, {name: change(t) for name, t in self.cotangents.items()})

    def size(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.inputs, *self.cotangents.values()))


class Step:
    """The timed call: forward, or forward and every gradient; nothing accumulates from call to call."""

    def __init__(self, workload: Workload, module: nn.Module, compiled: bool = False) -> None:
        self.workload = workload
        self.parameters = {name: p for name, p in module.named_parameters() if workload.trained(name)}
        self.module = _compile(module) if compiled else module

    def __call__(self, call: Call) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """Outputs, and the gradients of inputs and parameters (none in a forward setting)."""
        results = self.launch(call)
        synchronise()
        return results

    def launch(self, call: Call) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """The same without waiting for the GPU."""
        if self.workload.setting.direction == FORWARD:
            with torch.no_grad():
                outputs = self.module(*call.inputs)
            gradients: Sequence[Tensor | None] = ()
        else:
            outputs = self.module(*call.inputs)
            roots = [output for name, output in self._named(outputs) if name in call.cotangents]
            leaves = [*call.inputs, *self.parameters.values()]
            gradients = torch.autograd.grad(
                roots,
                [leaf for leaf in leaves if leaf.requires_grad],
                list(call.cotangents.values()),
                allow_unused=True,
            )
        return outputs, gradients

    def results(self, call: Call) -> dict[str, Tensor]:
        """Every result by name, factored tokens formed; cloned, because a compiled module may reuse its memory."""
        outputs, gradients = self(call)
        names = [f"gradient of input {i}" for i, tensor in enumerate(call.inputs) if tensor.requires_grad]
        names += [f"gradient of {name}" for name in self.parameters]
        formed = [output.dense() if isinstance(output, FactoredPatches) else output for output in outputs]
        named = [*self._named(formed), *zip(names, gradients, strict=False)]
        return {name: tensor.detach().clone() for name, tensor in named if tensor is not None}

    def _named(self, outputs: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        return zip(self.workload.outputs, outputs, strict=True)


def _compile(module: nn.Module) -> nn.Module:
    mode = "max-autotune" if DEVICE == "cuda" else "default"
    return torch.compile(module, mode=mode, dynamic=False)  # type: ignore[return-value]


def dtype_name() -> str:
    return str(DTYPE).removeprefix("torch.")


def draw(workload: Workload, seed: int) -> Call:
    """A seeded set of inputs, drawn where they are used; cotangents only where there is a backward."""
    training = workload.setting.direction == TRAINING
    shapes = workload.cotangents if training else {}
    with torch.device(DEVICE):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        drawn = enumerate(workload.inputs(generator, DTYPE))
        inputs = [tensor.to(DEVICE).requires_grad_(training and i not in workload.frozen) for i, tensor in drawn]
        cotangents = {name: torch.randn(shape, generator=generator).to(DTYPE) for name, shape in shapes.items()}
    return Call(tuple(inputs), cotangents)


def draw_weights(workload: Workload) -> dict[str, Tensor]:
    """Seeded weights of the reference, rounded to the dtype; zero biases are moved so that they are verified too."""
    torch.manual_seed(0)
    module = workload.reference(workload.setting)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return module.to(DTYPE).state_dict()


def build(workload: Workload, builder: Callable[[Setting], nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    module = builder(workload.setting).to(DTYPE)
    module.load_state_dict(weights)
    return module.to(DEVICE).train(workload.setting.direction == TRAINING)


def textbook_memory(setting: Setting) -> int:
    """About what the textbook layer takes: tokens, keys, values and results, and the attention matrix three times."""
    per_patch = 6 * setting.D + 3 * JOINTS * HEADS
    backward = 2.5 if setting.direction == TRAINING else 1.0
    return int(backward * setting.B * setting.P * per_patch * DTYPE.itemsize)
