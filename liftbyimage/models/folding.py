"""Batch norms of inference folded into the convolutions before them, found by tracing, never by names or order."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from liftbyimage.models._images import check_images


def fold_batch_norm(module: nn.Module, method: str = "forward") -> fx.GraphModule:
    """A copy of `module.method` in which every BatchNorm2d that follows a Conv2d is part of that convolution.

    With s = weight / sqrt(running_var + eps) per output channel, conv' has weight s·W and bias
    s·(b - running_mean) + bias, formed in float64: equal to rounding. A pair is folded where the traced data flow
    shows a plain Conv2d whose result goes to one batch norm with running statistics and nowhere else, both without
    hooks; all else stays as it is.

    Args:
        module: in evaluation mode; it is copied, never changed.
        method: the method to trace, of one tensor; the copy's `forward` is that method.

    Returns:
        A GraphModule in evaluation mode, for inference only: no parameter of it requires a gradient.

    Raises:
        TypeError: `module` is no nn.Module.
        ValueError: `module` or a part of it is in training mode, or its control flow depends on tensor values so that
            torch.fx cannot trace it.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"fold_batch_norm: module must be an nn.Module, got {type(module).__name__}")
    training = next((name or type(module).__name__ for name, part in module.named_modules() if part.training), None)
    if training is not None:
        raise ValueError(f"fold_batch_norm: module must be in evaluation mode, got {training} in training mode")
    traced = _trace(copy.deepcopy(module), method)
    for number, norm in enumerate([node for node in traced.graph.nodes if _is_norm(traced, node)]):
        before = norm.args[0]
        conv = traced.get_submodule(before.target) if before.op == "call_module" else None
        if type(conv) is not nn.Conv2d or has_hooks(conv) or len(before.users) > 1:
            continue
        # A module of its own, for the convolution's weights may serve elsewhere too.
        before.target = f"folded_{number}"
        traced.add_submodule(before.target, _folded(conv, traced.get_submodule(norm.target)))
        norm.replace_all_uses_with(before)
        traced.graph.erase_node(norm)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.requires_grad_(False).eval()


class _Tracer(fx.Tracer):
    def __init__(self, method: str = "forward") -> None:
        # Checks of an input read its type and sizes: they stay calls, made anew for every input.
        super().__init__(autowrap_functions=(check_images,))
        self.traced_func_name = method


def _trace(module: nn.Module, method: str) -> fx.GraphModule:
    try:
        return fx.GraphModule(module, _Tracer(method).trace(module))
    # What a forward does with a proxy in place of a tensor can fail in any way at all.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"fold_batch_norm: {type(module).__name__}.{method} must be traceable by torch.fx, got: {reason}"
        ) from error


def _is_norm(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` normalises the result of another with running statistics."""
    if node.op != "call_module" or not is_call_of_one(node):
        return False
    norm = network.get_submodule(node.target)
    return type(norm) is nn.BatchNorm2d and norm.running_mean is not None and not has_hooks(norm)


def is_call_of_one(node: fx.Node) -> bool:
    """Whether the result of one other node is all that `node` is given."""
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    def exact(value: Tensor | None, default: float) -> Tensor:
        return norm.running_mean.new_full((), default).double() if value is None else value.double()

    scale = exact(norm.weight, 1.0) / (norm.running_var.double() + norm.eps).sqrt()  # [C_out]
    bias = scale * (exact(conv.bias, 0.0) - norm.running_mean.double()) + exact(norm.bias, 0.0)
    dtype = conv.weight.dtype
    folded = copy.deepcopy(conv)
    folded.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(dtype))
    folded.bias = nn.Parameter(bias.to(dtype))
    return folded
