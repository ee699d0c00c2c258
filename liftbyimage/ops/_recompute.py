"""Gradients of an op by running its reference again: for ops so small that nothing is kept for the backward pass.

Half precision is differentiated in float32: a softmax of large logits has no gradient to speak of where its scores are
rounded to bfloat16 (of PyTorch's own at `joint_queries`' large logits the cosine similarity with float64's is 0.985).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def wanted_of(inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    """The inputs whose gradients are wanted."""
    return [tensor for tensor, want in zip(inputs, wanted, strict=True) if want and tensor is not None]


def gradients(
    reference: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the wanted inputs, contiguous and in their order; a missing cotangent counts as zero."""
    device, given_dtype = next((tensor.device.type, tensor.dtype) for tensor in inputs if tensor is not None)
    dtype = torch.promote_types(given_dtype, torch.float32)
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        leaves = [
            tensor if tensor is None else tensor.detach().to(dtype).requires_grad_(want)
            for tensor, want in zip(inputs, wanted, strict=True)
        ]
        outputs = reference(*leaves)
    sought = wanted_of(leaves, wanted)
    pairs = zip(outputs, cotangents, strict=True)
    roots = {
        output: cotangent.to(dtype) for output, cotangent in pairs if cotangent is not None and output.requires_grad
    }
    if not roots:
        return [torch.zeros_like(leaf, dtype=given_dtype, memory_format=torch.contiguous_format) for leaf in sought]
    grads = torch.autograd.grad([*roots], sought, [*roots.values()], allow_unused=True, materialize_grads=True)
    given = {cotangent.untyped_storage().data_ptr() for cotangent in roots.values()}
    return [
        # A sum over one row may be a view of the cotangent; an op must not return its own input.
        (grad.clone() if grad.untyped_storage().data_ptr() in given else grad.contiguous()).to(given_dtype)
        for grad in grads
    ]


def spread(grads: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """`grads` of the wanted inputs, with None in the place of the others."""
    rest = iter(grads)
    return tuple(next(rest) if want else None for want in wanted)
