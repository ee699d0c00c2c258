"""The first half of a context block: joint tokens ask their level's feature map, and add what they read.

    n = LayerNorm(tokens_l + pose)                                                                [B, J, D]
    w = softmax(n W_w + b_w)  over the S samples of each head                                     [B, J, H, S]
    o = tanh(n W_o + b_o)                                                                         [B, J, H, S, 2]
    c = Σ_s w_s · bilinear(F_l, reference + o_s)  with border padding (ops.sample_context)        [B, J, H, C_l]
    tokens_out_l = tokens_l + branch_scale · [c_1 E_l + e_l … c_H E_l + e_l]  heads side by side  [B, J, D]

for each level l of L. B batch, J joints, D model width, H heads, S samples per head, C_l channels of level l. All
weights are used transposed, as torch.nn.Linear stores them; those of levels differ in E_l and e_l only. `branch_scale`
[B] is stochastic depth (drop path), as in `residual_feed_forward`.

Source: Q. Zhao, C. Zheng, M. Liu, C. Chen, "A Single 2D Pose with Context is Worth Hundreds for 3D Human Pose
Estimation", NeurIPS 2023, its context block up to the feed-forward; there every sample is projected before the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from liftbyimage.ops._checks import check_eps, check_heads, check_like, check_positive, check_tensor
from liftbyimage.ops._dispatch import (
    Backend,
    autocast_to_float32,
    count_flops,
    native_op,
    needs_graph,
    never,
    no_autocast,
    select,
    why_not_cpu,
)
from liftbyimage.ops._recompute import spread, wanted_of
from liftbyimage.ops._residual import add_branch
from liftbyimage.ops.sample_context import channels_last, check_maps
from liftbyimage.ops.sample_context import reference as sampling_reference

OP = "residual_context"
LEVEL_LISTS = (3, 10, 11)  # places among the arguments that hold a tensor for each level


def _check(
    tokens: Tensor,
    pose: Tensor,
    reference: Tensor,
    feature_maps: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights_weight: Tensor,
    weights_bias: Tensor,
    offsets_weight: Tensor,
    offsets_bias: Tensor,
    embed_weights: Sequence[Tensor],
    embed_biases: Sequence[Tensor],
    branch_scale: Tensor | None,
    *,
    heads: int,
    eps: float,
) -> None:
    check_tensor(OP, "tokens", tokens, "B L J D")
    check_positive(OP, "tokens", tokens, "B L J D", "L", "J", "D")
    batch, levels, joints, dim = tokens.shape
    check_heads(OP, heads, dim)
    check_eps(OP, eps)
    check_like(OP, "tokens", tokens, "pose", pose, (batch, joints, dim), "B J D")
    check_like(OP, "tokens", tokens, "reference", reference, (batch, joints, 2), "B J 2")
    check_maps(OP, "tokens", tokens, feature_maps)
    check_like(OP, "tokens", tokens, "norm_weight", norm_weight, (dim,), "D")
    check_like(OP, "tokens", tokens, "norm_bias", norm_bias, (dim,), "D")
    check_tensor(OP, "weights_weight", weights_weight, "HS D")
    places = weights_weight.shape[0]
    if places < heads or places % heads:
        raise ValueError(f"{OP}: weights_weight must have a multiple of H = {heads} rows, got {places}")
    check_like(OP, "tokens", tokens, "weights_weight", weights_weight, (places, dim), "HS D")
    check_like(OP, "tokens", tokens, "weights_bias", weights_bias, (places,), "HS")
    check_like(OP, "tokens", tokens, "offsets_weight", offsets_weight, (2 * places, dim), "2HS D")
    check_like(OP, "tokens", tokens, "offsets_bias", offsets_bias, (2 * places,), "2HS")
    for name, tensors in (("embed_weights", embed_weights), ("embed_biases", embed_biases)):
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{OP}: {name} must be a list of L tensors, got {type(tensors).__name__}")
        if len(tensors) != levels:
            raise ValueError(f"{OP}: {name} must hold L = {levels} tensors as tokens does, got {len(tensors)}")
    for level, feature_map in enumerate(feature_maps):
        sizes = (dim // heads, feature_map.shape[1])
        check_like(OP, "tokens", tokens, f"embed_weights[{level}]", embed_weights[level], sizes, "D/H C")
        check_like(OP, "tokens", tokens, f"embed_biases[{level}]", embed_biases[level], sizes[:1], "D/H")
    if branch_scale is not None:
        check_like(OP, "tokens", tokens, "branch_scale", branch_scale, (batch,), "B")


def reference(*arguments: Any, heads: int, eps: float = 1e-5) -> Tensor:
    """The definition, in plain PyTorch, for any device and dtype; gradients are PyTorch's own.

    16-bit types in float32, or offsets would be coarse.
    """
    dtype = torch.promote_types(arguments[0].dtype, torch.float32)
    *tensors, branch_scale = arguments
    wide: list[Any] = _unflatten([t.to(dtype) for t in _flatten(tensors)], len(tensors[LEVEL_LISTS[0]]))
    tokens, pose, reference, feature_maps, norm_weight, norm_bias, weights_weight, weights_bias, *rest = wide
    offsets_weight, offsets_bias, embed_weights, embed_biases = rest
    asking = F.layer_norm(tokens + pose[:, None], pose.shape[2:], norm_weight, norm_bias, eps)  # [B, L, J, D]
    weights = F.linear(asking, weights_weight, weights_bias).unflatten(3, (heads, -1)).softmax(4)  # [B, L, J, H, S]
    offsets = F.linear(asking, offsets_weight, offsets_bias).unflatten(3, (heads, -1, 2)).tanh()  # [B, L, J, H, S, 2]
    contexts = sampling_reference(feature_maps, reference, offsets, weights)
    embeds = zip(contexts, embed_weights, embed_biases, strict=True)
    branch = torch.stack([F.linear(c, weight, bias).flatten(2) for c, weight, bias in embeds], dim=1)  # [B, L, J, D]
    return add_branch(tokens, branch, branch_scale).to(arguments[0].dtype)


_definition = reference  # which the arguments of this name hide


def _flatten(arguments: Sequence[Any]) -> list[Any]:
    """The tensors of the arguments in their order, those of levels one by one: as autograd takes them."""
    flat: list[Any] = []
    for argument in arguments:
        flat += argument if isinstance(argument, (list, tuple)) else [argument]
    return flat


def _unflatten(flat: Sequence[Any], levels: int) -> list[Any]:
    rest = iter(flat)
    count = len(flat) - len(LEVEL_LISTS) * (levels - 1)
    return [[next(rest) for _ in range(levels)] if i in LEVEL_LISTS else next(rest) for i in range(count)]


def _fake_forward(tokens: Tensor, *rest: Any) -> Tensor:
    return tokens.new_empty(tokens.shape)


def _fake_backward(grad_tokens: Tensor, *rest: Any) -> list[Tensor]:
    *arguments, _, _, wanted = rest
    feature_maps = arguments[LEVEL_LISTS[0]]
    like = [tensor if tensor is None else tensor.new_empty(tensor.shape) for tensor in _flatten(arguments)]
    like[LEVEL_LISTS[0] : LEVEL_LISTS[0] + len(feature_maps)] = [channels_last(m) for m in feature_maps]
    return wanted_of(like, wanted)


_native_forward = native_op(f"{OP}_forward", _fake_forward)
_native_backward = native_op(f"{OP}_backward", _fake_backward)


def _flops(tokens: Any, feature_maps: Any, places: int, heads: int) -> int:
    """Multiply-adds, counted as 2: weights and offsets, the weighted sums, and their embedding."""
    batch, levels, joints, dim = tokens
    channels = sum(shape[1] for shape in feature_maps)
    return int(2 * batch * joints * (levels * dim * 3 * places + channels * (places + dim)))


def _forward_flops(
    tokens: Any, pose: Any, reference: Any, feature_maps: Any, *rest: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return _flops(tokens, feature_maps, rest[2][0], rest[-2])


def _backward_flops(grad_tokens: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 3 * _forward_flops(*rest[:-1])  # two products for each of the forward's, and most of that again


count_flops((_native_forward,), _forward_flops)
count_flops((_native_backward,), _backward_flops)

BACKENDS = (
    Backend("cpu", why_not_cpu, _native_forward, _native_backward, batch_independent=True),
    Backend("reference", never),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def _run(heads: int, eps: float, levels: int, backend: str, *flat: Tensor | None) -> Tensor:
    forward = _BY_NAME[backend].forward
    assert forward is not None
    tokens: Tensor = forward(*_unflatten(flat, levels), heads, eps)
    return tokens


class _ResidualContext(torch.autograd.Function):
    """Saves its inputs only; backward computes what lies between again, piece by piece in the cache."""

    @staticmethod
    def forward(ctx: Any, heads: int, eps: float, levels: int, backend: str, *flat: Tensor | None) -> Tensor:
        ctx.save_for_backward(*flat)
        ctx.heads, ctx.eps, ctx.levels, ctx.backend = heads, eps, levels, backend
        return _run(heads, eps, levels, backend, *flat)

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
        backward = _BY_NAME[ctx.backend].backward
        assert backward is not None
        wanted = [*ctx.needs_input_grad[4:-1], False]  # branch_scale is given, not learned
        arguments = _unflatten(ctx.saved_tensors, ctx.levels)
        grads = backward(grad_tokens, *arguments, ctx.heads, ctx.eps, wanted)
        return None, None, None, None, *spread(grads, wanted)


def residual_context(
    tokens: Tensor,
    pose: Tensor,
    reference: Tensor,
    feature_maps: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights_weight: Tensor,
    weights_bias: Tensor,
    offsets_weight: Tensor,
    offsets_bias: Tensor,
    embed_weights: Sequence[Tensor],
    embed_biases: Sequence[Tensor],
    branch_scale: Tensor | None = None,
    *,
    heads: int,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Tokens of every level and joint, plus what their heads read from the level's feature map.

    Args:
        tokens: [B, L, J, D], float32, float16, bfloat16 or float64; every other tensor has its dtype and device.
        pose: [B, J, D], added to the tokens of every level before they ask.
        reference: [B, J, 2], (x, y) of the joints in [-1, 1] (align_corners=True); offsets reach as far as that again.
        feature_maps: L maps [B, C_l, Hf_l, Wf_l], any strides, channels-last is fastest.
        norm_weight, norm_bias: [D] each.
        weights_weight, weights_bias: [H·S, D] and [H·S], of the weights of each head's S samples before the softmax.
        offsets_weight, offsets_bias: [H·S·2, D] and [H·S·2], of the offsets (x, y) before tanh.
        embed_weights, embed_biases: L of [D / H, C_l] and of [D / H], shared by the heads.
        branch_scale: [B], the factor on each sample's branch; a sample at 0 keeps its tokens and its branch is not
            computed. None for 1 everywhere. It is taken as a constant and gets no gradient.
        heads: H, a divisor of D.
        eps: added to the variance in the layer norm.
        backend: "cpu" or "reference"; None chooses (`liftbyimage.ops.explain` says how).

    Returns:
        tokens [B, L, J, D] in the input dtype (16-bit types: float32 inside), differentiable with respect to every
        tensor argument but branch_scale; the inputs alone are kept for the backward pass. A NaN in a token or its pose
        gives NaN in that token, unless its sample's branch_scale is 0 and a NaN in the token merely passes through.
        Under autocast all becomes float32: places need its digits.

    Raises:
        TypeError: an argument is no floating-point tensor or list of such, or dtypes differ, or heads is no int, or eps
            no float.
        ValueError: ranks, sizes, numbers of levels or devices do not fit, heads does not divide D or the rows of
            weights_weight, eps is negative or not finite, or the backend is unknown or cannot serve.
    """
    arguments: list[Any] = [tokens, pose, reference, feature_maps, norm_weight, norm_bias, weights_weight, weights_bias]
    arguments += [offsets_weight, offsets_bias, embed_weights, embed_biases, branch_scale]
    flat = autocast_to_float32(*_flatten(arguments))
    rest = iter(flat)
    arguments = [[next(rest) for _ in a] if isinstance(a, (list, tuple)) else next(rest) for a in arguments]
    _check(*arguments, heads=heads, eps=eps)
    chosen = select(OP, BACKENDS, backend, *flat)
    if chosen.forward is None:
        with no_autocast(tokens):
            return _definition(*arguments, heads=heads, eps=eps)
    run = _ResidualContext.apply if needs_graph(flat) else _run
    updated: Tensor = run(heads, eps, len(feature_maps), chosen.name, *flat)
    return updated
