"""Convolutions of a traced network on oneDNN: weights laid out once in the blocks its kernels read, and a residual and
a rectifier applied while the result is still in registers.

The ops are those that torch.compile emits for a frozen network on a CPU.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from liftbyimage.models.folding import has_hooks, is_call_of_one

_ADDITIONS = (operator.add, torch.add)
_RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


def why_not_pack(dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why convolutions of that kind cannot be packed here, or None."""
    if device.type != "cpu":
        return f"oneDNN computes on the CPU, not on {device.type}"
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return "this PyTorch has no oneDNN"
    if dtype == torch.bfloat16:
        return None if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "this CPU has no AVX-512 for bfloat16"
    return None if dtype == torch.float32 else f"oneDNN packs float32 and bfloat16, not {dtype}"


class PackedConv2d(nn.Module):
    """relu(conv2d(x) + residual), both extras optional, channels-last; equals nn.Conv2d to rounding. Inference only.

    The rectifier makes NaN zero, as oneDNN's does.

    Args:
        conv: zero-padded by numbers; its weights are read, not kept.
        input_shape: of the inputs to lay the weights out for; others work too.

    Attributes:
        relu: whether the result is rectified.
    """

    def __init__(self, conv: nn.Conv2d, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.relu = False
        self.out_channels, self.kernel_size = conv.out_channels, conv.kernel_size
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.input_shape = list(input_shape)
        bias = None if conv.bias is None else conv.bias.detach().clone()
        # No buffers: 300 of them are looked up in every pass, and nothing else can read the packed layout.
        self.weights = (self._pack(conv.weight.detach()), bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        arguments = (*self.weights, *self.geometry)
        if residual is None:
            unary = "relu" if self.relu else "none"
            return torch.ops.mkldnn._convolution_pointwise.default(x, *arguments, unary, [], None)
        if residual.shape == self._output_shape(x) and residual.dtype == x.dtype:
            relu = "relu" if self.relu else None
            return torch.ops.mkldnn._convolution_pointwise.binary(x, residual, *arguments, "add", 1.0, relu, [], None)
        # The fused op neither broadcasts nor promotes.
        out = torch.ops.mkldnn._convolution_pointwise.default(x, *arguments, "none", [], None) + residual
        return out.relu_() if self.relu else out

    def _pack(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, self.input_shape)

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        sizes = zip(x.shape[2:], self.kernel_size, *self.geometry[:3], strict=True)
        spatial = ((size + 2 * pad - dil * (kernel - 1) - 1) // step + 1 for size, kernel, pad, step, dil in sizes)
        return (x.shape[0], self.out_channels, *spatial)

    def __getstate__(self) -> dict[str, Any]:
        """A packed tensor cannot be copied: copies carry the dense weight and pack it again."""
        weight, bias = self.weights
        return {**self.__dict__, "weights": (weight.to_dense(), bias)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        weight, bias = self.weights
        self.weights = (self._pack(weight), bias)


def pack_convolutions(network: fx.GraphModule, images: Tensor) -> fx.GraphModule:
    """Replace the convolutions of a traced network, in place, by packed ones that add and rectify as well.

    What follows a convolution is taken in only where nothing else reads the convolution's result, and an addition only
    where no step between the two changes a tensor in place. `images` is an example input.
    """
    ShapeProp(network).propagate(images)
    convs = {}
    for node in [node for node in network.graph.nodes if _can_pack(network, node)]:
        convs[node] = PackedConv2d(network.get_submodule(node.target), node.args[0].meta["tensor_meta"].shape)
        # Directly under the root, where one look-up finds it.
        node.target = f"packed_{len(convs)}"
        network.add_submodule(node.target, convs[node])
    for node, conv in list(convs.items()):
        if _take_relu(network, node, conv):
            del convs[node]
    for step in [node for node in network.graph.nodes if _is_addition(node)]:
        _take_addition(network, step, convs)
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _can_pack(network: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module" or not is_call_of_one(node):
        return False
    conv = network.get_submodule(node.target)
    if type(conv) is not nn.Conv2d or has_hooks(conv):
        return False
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _take_relu(network: fx.GraphModule, node: fx.Node, conv: PackedConv2d) -> bool:
    """Let `conv`, called at `node`, rectify if that is all that is done with its result."""
    relu = next(iter(node.users)) if len(node.users) == 1 else None
    if relu is None or relu.op == "output":
        return False
    is_module = relu.op == "call_module"
    if not (type(network.get_submodule(relu.target)) is nn.ReLU if is_module else relu.target in _RELUS):
        return False
    conv.relu = True
    _replace(network, relu, node)
    return True


def _is_addition(node: fx.Node) -> bool:
    operands = len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)
    return operands and node.target in _ADDITIONS and not node.kwargs


def _take_addition(network: fx.GraphModule, addition: fx.Node, convs: dict[fx.Node, PackedConv2d]) -> None:
    """Let a convolution that `addition` adds up, the second if both are, do it in its place."""
    order = list(network.graph.nodes)
    own = [arg for arg in addition.args if arg in convs and len(arg.users) == 1 and addition.args.count(arg) == 1]
    if not own:
        return
    node = own[-1]
    between = order[order.index(node) + 1 : order.index(addition)]
    if any(_changes_in_place(network, step) for step in between):
        return
    (residual,) = (arg for arg in addition.args if arg is not node)
    with network.graph.inserting_before(addition):
        fused = network.graph.call_module(node.target, (*node.args, residual))
    _replace(network, addition, fused)
    network.graph.erase_node(node)
    _take_relu(network, fused, convs.pop(node))


def _replace(network: fx.GraphModule, old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    network.graph.erase_node(old)


def _changes_in_place(network: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(node.target), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    flagged = any(arg is True for arg in (*node.args, *node.kwargs.values())) or "out" in node.kwargs
    return flagged or node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
