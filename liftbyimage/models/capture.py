"""Inference replayed from a CUDA graph: a forward pass of many small kernels costs the processor one launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from liftbyimage.ops._dispatch import autocast_is_on

Input = Tensor | Sequence["Input"]

_WARM_UP = 3  # calls that compile kernels, choose algorithms and fill workspaces, none of which a graph may do


class CapturedModule:
    """What `capture` makes: called like the module, with inputs of the captured shapes, dtypes and device."""

    def __init__(self, module: nn.Module, graph: torch.cuda.CUDAGraph, inputs: Sequence[Input], outputs: Any) -> None:
        self._module = module  # the graph reads its parameters, which must live as long
        self._graph = graph
        self._inputs = dict(_named_tensors("inputs", inputs))
        self._outputs = outputs

    def __call__(self, *inputs: Input) -> Any:
        """The module's outputs for `inputs`, in tensors of their own.

        Raises:
            TypeError: an input is neither a tensor nor a list of such.
            ValueError: the inputs are not as many, or not of the shapes, dtypes and device, that were captured.
        """
        given = dict(_named_tensors("inputs", inputs))
        _check_as_captured(given, self._inputs)
        with torch.no_grad(), torch.cuda.device(next(iter(given.values())).device):
            for name, buffer in self._inputs.items():
                buffer.copy_(given[name])
            self._graph.replay()
            return tree_map_only(Tensor, torch.clone, self._outputs)


@torch.no_grad()
def capture(module: nn.Module, *inputs: Input) -> CapturedModule:
    """Record `module(*inputs)` as a CUDA graph, to be replayed for other inputs of the same shapes.

    The graph reads the module's parameters where they lie: values changed in place (`load_state_dict`) take effect,
    tensors put in their stead (`to`) do not. A replay computes what the module computes, without gradients.

    Args:
        module: in eval mode, on the CUDA device of the inputs; its forward must not wait for the device.
        inputs: tensors, or lists of tensors, as the module takes them; their values do not matter.

    Returns:
        CapturedModule, called with inputs of the same shapes, dtypes and device.

    Raises:
        TypeError: module is no torch.nn.Module, or an input neither a tensor nor a list of such.
        ValueError: the module is in training mode, there is no input, or the inputs are not on one CUDA device.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"capture: module must be a torch.nn.Module, got {type(module).__name__}")
    if module.training:
        raise ValueError("capture: module must be in eval mode, got one in training mode")
    tensors = dict(_named_tensors("inputs", inputs))
    if not tensors:
        raise ValueError("capture: inputs must hold at least one tensor, got none")
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.device.type != "cuda":
            raise ValueError(f"capture: inputs must be on a CUDA device, got {tensor.device.type}")
        if tensor.device != device:
            raise ValueError(
                f"capture: inputs must be on one CUDA device, got {device} and, for {name}, {tensor.device}"
            )
    # Autocast's cache would hold casts of the weights that the graph reads, and drop them when autocast ends.
    uncached = torch.autocast("cuda", enabled=autocast_is_on("cuda"), cache_enabled=False)
    with torch.cuda.device(device), uncached:
        buffers = _copied(inputs)
        side = torch.cuda.Stream()  # warm-up leaves nothing behind on the stream that goes on
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                module(*buffers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = module(*buffers)
    return CapturedModule(module, graph, buffers, outputs)


def _named_tensors(name: str, value: Input) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its place: "inputs[0][2]"."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for i, element in enumerate(value):
            yield from _named_tensors(f"{name}[{i}]", element)
    else:
        raise TypeError(f"capture: {name} must be a tensor or a list of tensors, got {type(value).__name__}")


def _copied(value: Any) -> Any:
    """`value` with every tensor copied, its memory layout kept, in lists."""
    return value.clone() if isinstance(value, Tensor) else [_copied(element) for element in value]


def _check_as_captured(given: dict[str, Tensor], captured: dict[str, Tensor]) -> None:
    if given.keys() != captured.keys():
        raise ValueError(f"capture: inputs must be {', '.join(captured)} as captured, got {', '.join(given) or 'none'}")
    for name, tensor in given.items():
        if _kind(tensor) != _kind(captured[name]):
            raise ValueError(f"capture: {name} must be {_kind(captured[name])} as captured, got {_kind(tensor)}")


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
