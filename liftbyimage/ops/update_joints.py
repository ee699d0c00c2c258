"""What joints do with what the image answered: output projection, residual and layer norm, then feed-forward.

    attended_h = context_h unfold_h + b_value,h, heads side by side                                [B, J, D]
    X' = LayerNorm_1(X + attended W_o + b_o)                                                       [B, J, D]
    joints_out = LayerNorm_2(X' + gelu(X' W_1 + b_1) W_2 + b_2)                                    [B, J, D]

B batch, J joints, D model width, H heads, W value width of the attention to patches, F width of the feed-forward; gelu
is exact (by the error function). All weights are used transposed, as torch.nn.Linear stores them. `unfold`
[H, W, D / H] takes each head's context back: in the absorbed formulation it is the value projection, in the factored
one also the embedding (docs/kernels). Without it W = D / H.

Source: torch.nn.TransformerDecoderLayer (norm_first=False, activation="gelu"), from its cross-attention's output
projection on; a layer of F. Zhou, J. Yin, P. Li, "Lifting by Image", AAAI 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from liftbyimage.ops._checks import check_eps, check_like, check_positive, check_sizes, check_tensor
from liftbyimage.ops._dispatch import (
    Backend,
    autocast,
    count_flops,
    native_op,
    needs_graph,
    never,
    no_autocast,
    python_op,
    select,
    triton_op,
    why_not_cpu_in_full_precision,
    why_not_triton_of_any_width,
)
from liftbyimage.ops._recompute import gradients, spread, wanted_of

OP = "update_joints"


def _check(
    joints: Tensor,
    context: Tensor,
    unfold: Tensor | None,
    value_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    linear1_weight: Tensor,
    linear1_bias: Tensor,
    linear2_weight: Tensor,
    linear2_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    *,
    eps: float,
) -> None:
    check_tensor(OP, "joints", joints, "B J D")
    check_positive(OP, "joints", joints, "B J D", "J", "D")
    batch, num_joints, dim = joints.shape
    check_tensor(OP, "context", context, "B H J W")
    check_positive(OP, "context", context, "B H J W", "H", "W")
    heads, width = context.shape[1], context.shape[3]
    if dim % heads:
        raise ValueError(f"{OP}: context must have a number of heads H that divides D = {dim}, got {heads}")
    check_eps(OP, eps)
    if unfold is None:
        check_sizes(OP, "context", context, (batch, heads, num_joints, dim // heads), "B H J D/H")
    else:
        check_like(OP, "joints", joints, "unfold", unfold, (heads, width, dim // heads), "H W D/H")
    check_like(OP, "joints", joints, "context", context, (batch, heads, num_joints, width), "B H J W")
    if value_bias is not None:
        check_like(OP, "joints", joints, "value_bias", value_bias, (dim,), "D")
    check_like(OP, "joints", joints, "out_proj_weight", out_proj_weight, (dim, dim), "D D")
    check_like(OP, "joints", joints, "out_proj_bias", out_proj_bias, (dim,), "D")
    check_like(OP, "joints", joints, "norm1_weight", norm1_weight, (dim,), "D")
    check_like(OP, "joints", joints, "norm1_bias", norm1_bias, (dim,), "D")
    check_tensor(OP, "linear1_weight", linear1_weight, "F D")
    check_positive(OP, "linear1_weight", linear1_weight, "F D", "F")
    hidden = linear1_weight.shape[0]
    check_like(OP, "joints", joints, "linear1_weight", linear1_weight, (hidden, dim), "F D")
    check_like(OP, "joints", joints, "linear1_bias", linear1_bias, (hidden,), "F")
    check_like(OP, "joints", joints, "linear2_weight", linear2_weight, (dim, hidden), "D F")
    check_like(OP, "joints", joints, "linear2_bias", linear2_bias, (dim,), "D")
    check_like(OP, "joints", joints, "norm2_weight", norm2_weight, (dim,), "D")
    check_like(OP, "joints", joints, "norm2_bias", norm2_bias, (dim,), "D")


def reference(
    joints: Tensor,
    context: Tensor,
    unfold: Tensor | None,
    value_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    linear1_weight: Tensor,
    linear1_bias: Tensor,
    linear2_weight: Tensor,
    linear2_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """The definition, in plain PyTorch, for any device and dtype; gradients are PyTorch's own."""
    size = joints.shape[2:]
    attended = context if unfold is None else context @ unfold  # [B, H, J, D / H]
    attended = attended.transpose(1, 2).flatten(2)  # [B, J, D]
    attended = attended if value_bias is None else attended + value_bias
    attended = F.linear(attended, out_proj_weight, out_proj_bias)
    joints = F.layer_norm(joints + attended, size, norm1_weight, norm1_bias, eps)
    hidden = F.gelu(F.linear(joints, linear1_weight, linear1_bias))  # [B, J, F]
    return F.layer_norm(joints + F.linear(hidden, linear2_weight, linear2_bias), size, norm2_weight, norm2_bias, eps)


_FORWARD_SCHEMA = (
    "(Tensor joints, Tensor context, Tensor? unfold, Tensor? value_bias, Tensor out_proj_weight, Tensor out_proj_bias,"
    " Tensor norm1_weight, Tensor norm1_bias, Tensor linear1_weight, Tensor linear1_bias, Tensor linear2_weight,"
    " Tensor linear2_bias, Tensor norm2_weight, Tensor norm2_bias, float eps) -> Tensor"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_joints, Tensor joints, Tensor context, Tensor? unfold, Tensor? value_bias, Tensor out_proj_weight,"
    " Tensor out_proj_bias, Tensor norm1_weight, Tensor norm1_bias, Tensor linear1_weight, Tensor linear1_bias,"
    " Tensor linear2_weight, Tensor linear2_bias, Tensor norm2_weight, Tensor norm2_bias, float eps, bool[] wanted)"
    " -> Tensor[]"
)


def _fake_forward(joints: Tensor, *rest: Any) -> Tensor:
    return joints.new_empty(joints.shape)


def _recompute(grad_joints: Tensor, *rest: Any) -> list[Tensor]:
    *inputs, eps, wanted = rest
    return gradients(lambda *leaves: (reference(*leaves, eps=eps),), inputs, (grad_joints,), wanted)


def _fake_backward(grad_joints: Tensor, *rest: Any) -> list[Tensor]:
    *inputs, _, wanted = rest
    return [tensor.new_empty(tensor.shape) for tensor in wanted_of(inputs, wanted)]


_native_forward = native_op(f"{OP}_forward", _fake_forward)
_triton_forward = triton_op(f"{OP}_forward", _FORWARD_SCHEMA, _fake_forward)
_backward = python_op(f"{OP}_backward", _BACKWARD_SCHEMA, _recompute, _fake_backward)


def _forward_flops(joints: Any, context: Any, unfold: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Multiply-adds, counted as 2: unfold, out-projection and both linear layers."""
    batch, num_joints, dim = joints
    width = 0 if unfold is None else unfold[1]
    hidden = rest[5][0]
    return int(2 * batch * num_joints * dim * (width + dim + 2 * hidden))


def _backward_flops(grad_joints: Any, *inputs: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 3 * _forward_flops(*inputs)  # forward again, and two products for each of its own


count_flops((_native_forward, _triton_forward), _forward_flops)
count_flops((_backward,), _backward_flops)

# Triton stands behind the reference, on demand only, until a run on a GPU shows it ahead and as exact.
BACKENDS = (
    Backend("cpu", why_not_cpu_in_full_precision, _native_forward, _backward, batch_independent=True),
    Backend("reference", never),
    Backend("triton", why_not_triton_of_any_width, _triton_forward, _backward),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def _run(eps: float, backend: str, *inputs: Tensor | None) -> Tensor:
    forward = _BY_NAME[backend].forward
    assert forward is not None
    joints: Tensor = forward(*inputs, eps)
    return joints


class _UpdateJoints(torch.autograd.Function):
    """Saves its inputs only; backward differentiates the reference by recomputation."""

    @staticmethod
    def forward(ctx: Any, eps: float, backend: str, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.eps, ctx.backend = eps, backend
        return _run(eps, backend, *inputs)

    @staticmethod
    def backward(ctx: Any, grad_joints: Tensor) -> tuple[Tensor | None, ...]:
        backward = _BY_NAME[ctx.backend].backward
        assert backward is not None
        wanted = list(ctx.needs_input_grad[2:])
        return None, None, *spread(backward(grad_joints, *ctx.saved_tensors, ctx.eps, wanted), wanted)


def update_joints(
    joints: Tensor,
    context: Tensor,
    unfold: Tensor | None,
    value_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    linear1_weight: Tensor,
    linear1_bias: Tensor,
    linear2_weight: Tensor,
    linear2_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """The rest of a decoder layer on the joint side, from the contexts of its attention to patches on.

    Args:
        joints: [B, J, D], float32, float16, bfloat16 or float64; every other tensor has its dtype and device.
        context: [B, H, J, W], what each joint gathered from the patches through each head.
        unfold: [H, W, D / H], applied to each head's context; None where W = D / H already.
        value_bias: [D], added to the merged heads (rows of an attention sum to 1); None for none.
        out_proj_weight, out_proj_bias: [D, D] and [D].
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: [D] each.
        linear1_weight, linear1_bias: [F, D] and [F].
        linear2_weight, linear2_bias: [D, F] and [D].
        eps: added to the variance in both layer norms.
        backend: "cpu" (float32 and float64), "triton" (float32, float16 and bfloat16) or "reference"; None chooses
            (`liftbyimage.ops.explain` says how).

    Returns:
        joints [B, J, D] in the input dtype, differentiable with respect to every tensor argument: the inputs alone are
        kept, and the backward pass differentiates the reference by recomputation, in float32 for half precision. A NaN
        in a joint or its context gives NaN in that joint.

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes differ, or eps is no float.
        ValueError: ranks, sizes or devices do not fit, H does not divide D, eps is negative or not finite, or the
            backend is unknown or cannot serve.
    """
    inputs: tuple[Any, ...] = autocast(
        joints,
        context,
        unfold,
        value_bias,
        out_proj_weight,
        out_proj_bias,
        norm1_weight,
        norm1_bias,
        linear1_weight,
        linear1_bias,
        linear2_weight,
        linear2_bias,
        norm2_weight,
        norm2_bias,
    )
    _check(*inputs, eps=eps)
    chosen = select(OP, BACKENDS, backend, inputs[0])
    if chosen.forward is None:
        with no_autocast(inputs[0]):
            return reference(*inputs, eps=eps)
    run = _UpdateJoints.apply if needs_graph(inputs) else _run
    updated: Tensor = run(eps, chosen.name, *inputs)
    return updated
