"""What tests and benchmarks share: the cases of every op, the tolerance table and the comparison against float64.

The rule (one for all cases, forward and gradients): against the float64 reference on the same inputs, the largest
error is at most twice what the plain PyTorch reference makes in the same dtype, plus `TOLERANCE[dtype]` times the
RMS of the output, and the cosine similarity is at least `MIN_COSINE[dtype]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liftbyimage import ops
from liftbyimage.ops._explain import backends_of

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MIN_COSINE = {torch.float64: 0.99999, torch.float32: 0.99999, torch.float16: 0.999, torch.bfloat16: 0.999}


@dataclass(frozen=True)
class Case:
    """One call: sizes in the symbols of docs/ops, how tensors alias, how they lie in memory, and how large they are."""

    name: str
    B: int = 2
    H: int = 4
    J: int = 17
    P: int = 48
    E: int = 16
    F: int = 16
    D: int = 16
    K: int = 12
    S: int = 4
    maps: tuple[tuple[int, int, int], ...] = ((32, 8, 6), (7, 5, 9), (48, 4, 3), (70, 2, 2))  # [C, Hf, Wf] by level
    padding: str = "border"
    shared_head: bool = True
    value_is_key: bool = False
    patches_is_key: bool = False
    need_attention: bool = False
    need_importance: bool = True
    layout: str = (
        "contiguous"  # "strided": every tensor is a transposed view; "expanded": one sample for the whole batch
    )
    channels_last: bool = False  # the maps
    magnitude: float = 1.0
    scale: float | None = None
    ties: bool = False
    dropped: int | None = None  # samples whose branch_scale is 0; None: no branch_scale
    slow_interpreter: bool = False  # too much work for an interpreted kernel

    def __str__(self) -> str:
        return self.name


_ATTENTION_CASES = (
    Case("separate_heads", shared_head=False),
    Case("shared_head"),
    Case("value_is_key", value_is_key=True),
    Case("one_patch", P=1),
    Case("one_joint", J=1, P=17, value_is_key=True),
    Case("odd_patches", P=17, J=25, E=48, F=48, value_is_key=True),
    Case("many_patches", B=1, P=3071, E=32, F=32, D=24, value_is_key=True, slow_interpreter=True),
    Case("widths_differ", E=8, F=40, D=24),
    Case("odd_widths", P=21, E=5, F=3, D=7),
    Case("wide", B=1, H=8, P=130, E=256, F=256, D=256, value_is_key=True, slow_interpreter=True),
    Case("factored_width", H=8, P=70, E=184, F=184, D=64, value_is_key=True, slow_interpreter=True),
    Case("empty_batch", B=0),
    Case("strided", layout="strided", value_is_key=True),
    Case("strided_heads", layout="strided", shared_head=False),
    Case("expanded", layout="expanded", B=3),
    Case("large_logits", magnitude=100.0),
    Case("ties", ties=True, value_is_key=True),
    Case("zero_scale", scale=0.0, value_is_key=True),
    Case("negative_scale", scale=-1.0, P=50, value_is_key=True),
    Case("sharp", scale=30.0),
)

# The widths of factored tokens, before and after a pose-guided update; enough patches for several tiles.
_FACTORED_CASES = tuple(
    Case(
        f"factored_{width}{suffix}",
        H=8,
        P=patches,
        E=width,
        F=width,
        value_is_key=True,
        need_attention=need_attention,
        need_importance=need_importance,
        slow_interpreter=True,
    )
    for width, patches in ((48, 401), (184, 390))
    for suffix, need_attention, need_importance in (
        ("", False, True),
        ("_with_attention", True, True),
        ("_context_alone", False, False),
    )
)

_JOINT_CASES = (
    Case("folded", D=32, F=80, E=24),
    Case("plain_heads", D=32, F=80, shared_head=False),
    Case("one_joint", J=1, D=32, F=40),
    Case("five_joints", J=5, D=48, E=33, F=70),
    Case("head_width_80", H=2, J=19, D=160, E=48, F=50),
    Case("head_width_3", B=3, H=5, D=15, E=7, F=21),
    Case("one_head", H=1, D=20, E=130, F=20),
    Case("many_samples", B=19, H=8, D=64, E=48, F=96),
    Case("wide", B=1, H=8, D=256, E=256, F=1024),
    Case("empty_batch", B=0),
    Case("strided", layout="strided", D=32),
    Case("strided_plain_heads", layout="strided", shared_head=False),
    Case("expanded", layout="expanded", B=3),
    Case("large_logits", magnitude=8.0, D=32),
)

_SAMPLING_CASES = (
    Case("four_levels", J=3, S=2),
    Case("channels_last", channels_last=True, slow_interpreter=True),
    Case("one_sample", H=1, S=1, maps=((16, 5, 4), (33, 3, 7))),
    Case("one_level", J=25, S=3, maps=((128, 12, 9),), channels_last=True, slow_interpreter=True),
    Case("five_levels", J=5, S=2, maps=((16, 9, 7), (1, 5, 5), (8, 3, 4), (65, 2, 3), (20, 7, 1)), channels_last=True),
    Case("one_joint", J=1),
    Case("one_pixel", J=3, maps=((5, 1, 1), (40, 1, 6)), padding="zeros"),
    Case("zeros", J=3, padding="zeros", channels_last=True),
    Case("outside", magnitude=3.0, slow_interpreter=True),
    Case("outside_zeros", J=3, magnitude=3.0, padding="zeros"),
    Case("empty_batch", B=0),
    Case("strided", J=3, layout="strided"),
    Case("expanded", J=3, layout="expanded", B=3),
    Case("expanded_zeros", J=3, layout="expanded", B=3, padding="zeros", channels_last=True, slow_interpreter=True),
    Case("many_samples", B=9, J=3, S=2, maps=((64, 6, 4), (32, 3, 2)), channels_last=True),
)

# J tokens of width D.
_TOKEN_CASES = (
    Case("plain", J=17, D=64),
    Case("one_token", J=1, D=64),
    Case("five_tokens", B=19, H=8, J=5, D=128),
    Case("head_width_80", H=8, J=17, D=640),
    Case("head_width_3", B=3, H=5, J=17, D=15),
    Case("many_tokens", H=2, J=33, D=32),
    Case("one_head", H=1, J=70, D=20),
    Case("empty_batch", B=0),
    Case("strided", layout="strided", D=32),
    Case("expanded", layout="expanded", B=3),
    Case("large_logits", magnitude=100.0, D=32),
    Case("zero_scale", scale=0.0),
    Case("negative_scale", scale=-1.0, J=5, D=32),
)

_FEED_FORWARD_CASES = (
    Case("plain", D=32, F=80),
    Case("one_token", J=1, D=32, F=40),
    Case("five_tokens", B=30, J=5, D=128, F=256),
    Case("head_width_80", H=2, J=17, D=160, F=320),
    Case("odd_widths", B=3, H=3, J=7, D=21, F=45),
    Case("many_rows", B=19, J=68, D=64, F=96),
    Case("wide", B=2, H=8, D=640, F=1280),
    Case("scaled", B=3, D=32, F=80, dropped=0),
    Case("some_dropped", B=9, D=32, F=80, dropped=4),
    Case("all_dropped", B=3, D=32, F=80, dropped=3),
    Case("empty_batch", B=0),
    Case("empty_batch_scaled", B=0, dropped=0),
    Case("strided", layout="strided", D=32, dropped=1),
    Case("expanded", layout="expanded", B=3),
    Case("large", magnitude=100.0, D=32),
)

_RESIDUAL_ATTENTION_CASES = (
    Case("plain", D=32),
    Case("one_token", J=1, D=32),
    Case("five_tokens", B=30, H=8, J=5, D=128),
    Case("head_width_80", H=2, J=17, D=160),
    Case("head_width_3", B=3, H=5, J=7, D=15),
    Case("many_tokens", B=3, H=2, J=90, D=34),
    Case("wide", B=2, H=8, D=640),
    Case("scaled", B=3, D=32, dropped=0),
    Case("some_dropped", B=9, D=32, dropped=4),
    Case("all_dropped", B=3, D=32, dropped=3),
    Case("empty_batch", B=0),
    Case("empty_batch_scaled", B=0, dropped=0),
    Case("strided", layout="strided", D=32, dropped=1),
    Case("expanded", layout="expanded", B=3),
    Case("large_logits", magnitude=3.0, D=32),
)

_RESIDUAL_CASES = (
    Case("four_levels", D=32),
    Case("channels_last", D=32, channels_last=True),
    Case("one_sample", H=1, S=1, D=20, maps=((16, 5, 4), (33, 3, 7))),
    Case("one_joint", J=1, D=24),
    Case("five_joints", J=5, S=3, D=36, maps=((20, 7, 5), (5, 1, 1))),
    Case("published_width", B=3, D=128, maps=((64, 6, 5), (96, 4, 3)), channels_last=True),
    Case("many_samples", B=9, J=19, H=2, S=2, D=6, maps=((9, 6, 4), (32, 3, 2)), channels_last=True),
    Case("empty_batch", B=0),
    Case("strided", layout="strided", D=32),
    Case("expanded", layout="expanded", B=3),
    Case("outside", magnitude=3.0, D=32),
    Case("scaled", B=3, D=32, dropped=0),
    Case("some_dropped", B=9, J=5, D=32, dropped=4),
    Case("all_dropped", B=3, D=32, dropped=3),
    Case("many_parts", B=37, J=3, D=24, maps=((20, 5, 4), (33, 2, 3)), dropped=1),
)

CASES: dict[str, tuple[Case, ...]] = {
    "attend_patches": (
        *_ATTENTION_CASES,
        Case("with_attention", need_attention=True),
        Case("with_attention_odd", need_attention=True, P=33, J=25, shared_head=False),
        Case("context_alone", need_importance=False),
        Case("context_alone_separate_heads", need_importance=False, shared_head=False, P=33),
        Case("attention_without_importance", need_attention=True, need_importance=False, P=33, value_is_key=True),
        *_FACTORED_CASES,
    ),
    "pose_guided_attention": (
        *_ATTENTION_CASES,
        Case("one_tensor", D=16, value_is_key=True, patches_is_key=True),
        Case("one_tensor_strided", D=16, value_is_key=True, patches_is_key=True, layout="strided"),
        Case("patches_is_key_alone", D=16, patches_is_key=True),
    ),
    "guide_patches": (
        *(case for case in _ATTENTION_CASES if case.shared_head),
        Case("factored_48", H=8, P=401, E=48, slow_interpreter=True),
        Case("factored_184", H=8, P=390, E=184, slow_interpreter=True),
    ),
    "prune_patches": (
        Case("plain"),
        Case("keep_all", K=48),
        Case("keep_one", K=1),
        Case("one_patch", P=1, K=1),
        Case("odd", B=3, P=3071, K=921, D=33, slow_interpreter=True),
        Case("large_map", B=2, P=6912, K=2073, D=8, slow_interpreter=True),
        Case("ties", ties=True, K=20),
        Case("empty_batch", B=0),
        Case("strided", layout="strided"),
        Case("expanded", layout="expanded", B=3),
    ),
    "joint_queries": _JOINT_CASES,
    "update_joints": _JOINT_CASES,
    "sample_context": _SAMPLING_CASES,
    "attend_tokens": _TOKEN_CASES,
    "residual_feed_forward": _FEED_FORWARD_CASES,
    "residual_attention": _RESIDUAL_ATTENTION_CASES,
    "residual_context": _RESIDUAL_CASES,
}


def _tensor(case: Case, generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal float64 values in the case's layout; with ties every second row of the patch axis repeats."""
    if case.layout == "expanded":
        values = torch.randn(1, *shape[1:], generator=generator, dtype=torch.float64)
        return values.expand(shape)
    if case.layout == "strided":
        order = list(range(len(shape)))[::-1]
        values = torch.randn([shape[i] for i in order], generator=generator, dtype=torch.float64)
        return values.permute(order)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make_inputs(
    op: str, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of `ops.<op>` for a case; values are drawn in float64, rounded to `dtype`, and seeded."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = _tensor(case, generator, *shape)
        return values.to(dtype).to(device)

    if op == "prune_patches":
        importance = draw(case.B, case.P)
        if case.ties:
            importance = importance.mul(2).round().div(2)
        return {"patches": draw(case.B, case.P, case.D), "importance": importance, "keep": case.K}

    if op in ("joint_queries", "update_joints"):
        return _joint_inputs(op, case, draw)

    if op == "sample_context":
        return _sampling_inputs(case, draw)
    if op == "attend_tokens":
        packed = draw(case.B, case.J, 3 * case.D) * case.magnitude**0.5  # query times key has the magnitude
        return {"query_key_value": packed, "heads": case.H, "scale": case.scale}
    if op == "residual_feed_forward":
        return _feed_forward_inputs(case, draw)

    if op == "residual_attention":
        return _residual_attention_inputs(case, draw)
    if op == "residual_context":
        return _residual_inputs(case, draw)

    key_heads = 1 if case.shared_head else case.H
    key = draw(case.B, key_heads, case.P, case.E)
    if case.ties:
        key = torch.cat([key[:, :, ::2], key[:, :, ::2]], dim=2)[:, :, : case.P].contiguous()
    if op == "guide_patches":
        query = draw(case.B, case.H, case.J, case.E) * case.magnitude
        return {"query": query, "channels": key[:, 0], "scale": case.scale}
    value_width = case.E if case.value_is_key else case.F
    inputs: dict[str, Any] = {
        "query": draw(case.B, case.H, case.J, case.E) * case.magnitude,
        "key": key,
        "value": key if case.value_is_key else draw(case.B, key_heads, case.P, value_width),
        "scale": case.scale,
    }
    if op == "pose_guided_attention":
        inputs["pose_value"] = draw(case.B, case.H, case.J, case.D)
        inputs["patches"] = key if case.patches_is_key else draw(case.B, case.P, case.D)
    else:
        inputs["need_attention"] = case.need_attention
        inputs["need_importance"] = case.need_importance
    return inputs


def _weights(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Draws weights that keep the size of what passes through them."""

    def weight(*shape: int) -> Tensor:
        values: Tensor = draw(1, *shape)[0] * shape[-1] ** -0.5  # a batch of one, or "expanded" would make rows equal
        return values

    return weight


def _joint_inputs(op: str, case: Case, draw: Callable[..., Tensor]) -> dict[str, Any]:
    """Weights that keep the size of what passes through them; without a shared head nothing is folded (E = D / H)."""
    dim, hidden, head = case.D, case.F, case.D // case.H
    width = case.E if case.shared_head else head

    weight = _weights(draw)
    joints = draw(case.B, case.J, dim)
    if op == "joint_queries":
        return {
            "joints": joints,
            "in_proj_weight": weight(3 * dim, dim) * case.magnitude,
            "in_proj_bias": weight(3 * dim),
            "out_proj_weight": weight(dim, dim),
            "out_proj_bias": weight(dim),
            "norm_weight": 1 + weight(dim),
            "norm_bias": weight(dim),
            "query_weight": weight(dim, dim),
            "query_bias": weight(dim),
            "fold": weight(case.H, head, width) if case.shared_head else None,
            "heads": case.H,
        }
    return {
        "joints": joints,
        "context": draw(case.B, case.H, case.J, width) * case.magnitude,
        "unfold": weight(case.H, width, head) if case.shared_head else None,
        "value_bias": weight(dim) if case.shared_head else None,
        "out_proj_weight": weight(dim, dim),
        "out_proj_bias": weight(dim),
        "norm1_weight": 1 + weight(dim),
        "norm1_bias": weight(dim),
        "linear1_weight": weight(hidden, dim),
        "linear1_bias": weight(hidden),
        "linear2_weight": weight(dim, hidden),
        "linear2_bias": weight(dim),
        "norm2_weight": 1 + weight(dim),
        "norm2_bias": weight(dim),
    }


def _maps(case: Case, draw: Callable[..., Tensor]) -> list[Tensor]:
    maps = [draw(case.B, *sizes) for sizes in case.maps]
    return [values.to(memory_format=torch.channels_last) for values in maps] if case.channels_last else maps


def _residual_inputs(case: Case, draw: Callable[..., Tensor]) -> dict[str, Any]:
    """Weights that keep the size of what passes through them, those of the places times the case's magnitude."""
    dim, places, head = case.D, case.H * case.S, case.D // case.H

    weight = _weights(draw)
    inputs: dict[str, Any] = {
        "tokens": draw(case.B, len(case.maps), case.J, dim),
        "pose": draw(case.B, case.J, dim),
        "reference": draw(case.B, case.J, 2) * 0.4,
        "feature_maps": _maps(case, draw),
        "norm_weight": 1 + weight(dim),
        "norm_bias": weight(dim),
        "weights_weight": weight(places, dim) * case.magnitude,
        "weights_bias": weight(places),
        "offsets_weight": weight(2 * places, dim) * case.magnitude,
        "offsets_bias": weight(2 * places),
        "embed_weights": [weight(head, channels) for channels, _, _ in case.maps],
        "embed_biases": [weight(head) for _ in case.maps],
        "heads": case.H,
    }
    if case.dropped is not None:
        inputs["branch_scale"] = _branch_scale(case, inputs["tokens"])
    return inputs


def _sampling_inputs(case: Case, draw: Callable[..., Tensor]) -> dict[str, Any]:
    """Places about the middle of the maps, some of them outside; weights as a softmax gives them."""
    levels, places = len(case.maps), (case.J, case.H, case.S)
    return {
        "feature_maps": _maps(case, draw),
        "reference": draw(case.B, case.J, 2) * 0.4 * case.magnitude,
        "offsets": draw(case.B, levels, *places, 2) * 0.4 * case.magnitude,
        "weights": draw(case.B, levels, *places).softmax(4),
        "padding": case.padding,
    }


def _feed_forward_inputs(case: Case, draw: Callable[..., Tensor]) -> dict[str, Any]:
    dim, hidden = case.D, case.F

    weight = _weights(draw)
    inputs: dict[str, Any] = {
        "tokens": draw(case.B, case.J, dim) * case.magnitude,
        "norm_weight": 1 + weight(dim),
        "norm_bias": weight(dim),
        "linear1_weight": weight(hidden, dim),
        "linear1_bias": weight(hidden),
        "linear2_weight": weight(dim, hidden),
        "linear2_bias": weight(dim),
    }
    if case.dropped is not None:
        inputs["branch_scale"] = _branch_scale(case, inputs["tokens"])
    return inputs


def _residual_attention_inputs(case: Case, draw: Callable[..., Tensor]) -> dict[str, Any]:
    dim = case.D

    weight = _weights(draw)
    inputs: dict[str, Any] = {
        "tokens": draw(case.B, case.J, dim),
        "norm_weight": 1 + weight(dim),
        "norm_bias": weight(dim),
        "in_proj_weight": weight(3 * dim, dim) * case.magnitude,
        "in_proj_bias": weight(3 * dim),
        "out_proj_weight": weight(dim, dim),
        "out_proj_bias": weight(dim),
        "heads": case.H,
    }
    if case.dropped is not None:
        inputs["branch_scale"] = _branch_scale(case, inputs["tokens"])
    return inputs


def _branch_scale(case: Case, tokens: Tensor) -> Tensor:
    """1.25 for the samples that are kept; dropped are the odd ones first, so that kept ones lie between them."""
    scale = tokens.new_full((case.B,), 1.25)
    scale[[*range(1, case.B, 2), *range(0, case.B, 2)][: case.dropped]] = 0
    return scale


def named_outputs(result: Any) -> dict[str, Tensor]:
    """An op's outputs by name; a single one is the tokens, those of a list are the contexts of each level."""
    if isinstance(result, list):
        return {f"context{level}": value for level, value in enumerate(result)}
    outputs = {"tokens": result} if isinstance(result, Tensor) else result._asdict()
    return {name: value for name, value in outputs.items() if value is not None}


def named_tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among an op's inputs, those of a list by their place: "feature_maps[0]"."""
    tensors: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, list):
            tensors |= {f"{name}[{i}]": tensor for i, tensor in enumerate(value)}
        elif isinstance(value, Tensor):
            tensors[name] = value
    return tensors


def convert(inputs: Mapping[str, Any], transform: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """`inputs` with every tensor transformed once, so that arguments that were one tensor stay one tensor."""
    done: dict[int, Tensor] = {}

    def once(value: Any) -> Any:
        if isinstance(value, list):
            return [once(element) for element in value]
        if not isinstance(value, Tensor):
            return value
        if id(value) not in done:
            done[id(value)] = transform(value)
        return done[id(value)]

    return {name: once(value) for name, value in inputs.items()}


def differentiable(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Leaves in `dtype` that require gradients and keep each tensor's memory layout."""
    return convert(inputs, lambda tensor: tensor.detach().to(dtype).requires_grad_())


def run(op: str, inputs: Mapping[str, Any], backend: str | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs by name and, for a fixed seeded cotangent on every differentiable output, gradients by input name."""
    outputs = named_outputs(getattr(ops, op)(**inputs, backend=backend))
    leaves: dict[str, Tensor] = {}
    for name, value in named_tensors(inputs).items():
        if value.requires_grad and not any(value is leaf for leaf in leaves.values()):
            leaves[name] = value
    roots = {name: value for name, value in outputs.items() if value.requires_grad}
    if not leaves or not roots:
        return {name: value.detach() for name, value in outputs.items()}, {}
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device, value.dtype)
        for value in roots.values()
    ]
    grads = torch.autograd.grad(list(roots.values()), list(leaves.values()), cotangents, allow_unused=True)
    gradients = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return {name: value.detach() for name, value in outputs.items()}, gradients


def assert_close(name: str, actual: Tensor, oracle: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """`actual` meets the module's rule against `oracle` (float64), given what plain PyTorch made in the same dtype."""
    assert actual.shape == oracle.shape, f"{name}: shape {list(actual.shape)}, expected {list(oracle.shape)}"
    if oracle.numel() == 0:
        return
    actual, plain = actual.double(), plain.double()
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    rms = oracle.square().mean().sqrt().item()
    error = (actual - oracle).abs().max().item()
    allowed = 2 * (plain - oracle).abs().max().item() + TOLERANCE[dtype] * rms
    assert error <= allowed, f"{name}: largest error {error:.3e}, allowed {allowed:.3e} (RMS of output {rms:.3e})"
    if rms > 0:
        cosine = torch.nn.functional.cosine_similarity(actual.flatten(), oracle.flatten(), dim=0).item()
        assert cosine >= MIN_COSINE[dtype], f"{name}: cosine similarity {cosine:.7f}"


def check_against_float64(op: str, inputs: Mapping[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Forward and every gradient of `backend` against the float64 reference, by the module's rule."""
    oracle, oracle_grads = run(op, differentiable(inputs, torch.float64), "reference")
    plain, plain_grads = run(op, differentiable(inputs, dtype), "reference")
    actual, actual_grads = run(op, differentiable(inputs, dtype), backend)
    assert actual.keys() == oracle.keys()
    assert actual_grads.keys() == oracle_grads.keys()
    for name in oracle:
        if oracle[name].dtype == torch.int64:
            assert torch.equal(actual[name], plain[name]), f"{name}: differs from the reference"
        else:
            assert_close(name, actual[name], oracle[name], plain[name], dtype)
    for name in oracle_grads:
        assert_close(f"gradient of {name}", actual_grads[name], oracle_grads[name], plain_grads[name], dtype)


@contextmanager
def spy(op: str, monkeypatch: Any) -> Iterator[list[str]]:
    """Collects the names of the backends whose forward actually ran."""
    import importlib

    module = importlib.import_module(f"liftbyimage.ops.{op}")
    ran: list[str] = []

    def watched(backend: Any) -> Any:
        if backend.forward is None:
            return backend

        def forward(*args: Any) -> Any:
            ran.append(backend.name)
            return backend.forward(*args)

        return backend._replace(forward=forward)

    watched_backends = {backend.name: watched(backend) for backend in backends_of(op)}
    with monkeypatch.context() as patch:
        patch.setattr(module, "_BY_NAME", watched_backends)
        yield ran
