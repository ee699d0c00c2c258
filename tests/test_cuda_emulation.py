"""The CUDA kernels of csrc/cuda, run on the CPU thread by thread: the same sources, without a GPU.

This proves indexing and arithmetic. It does not prove freedom from races, beyond what two orders of threads
can show, nor anything about speed: only a run on a GPU does.
"""

from __future__ import annotations

import functools
import importlib
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cuda_emulation import emulated

from liftbyimage import ops
from liftbyimage._extension import CPU_MISSING
from liftbyimage.ops import _tensor_cores
from liftbyimage.ops._dispatch import Backend
from liftbyimage.testing import CASES, Case, assert_close, check_against_float64, differentiable, make_inputs

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ATTENTION_CASES = {case.name: case for case in CASES["pose_guided_attention"] if case.name != "many_patches"}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = emulated.compile_library(tmp_path_factory.mktemp("cuda_emulation"))
    return {
        "pose_guided_attention": emulated.PoseGuidedAttention(library),
        "prune_patches": emulated.PrunePatches(library),
        "sample_context": emulated.SampleContext(library),
    }


@pytest.fixture(scope="module")
def bindings(kernels):
    if CPU_MISSING is not None:
        pytest.skip(CPU_MISSING)
    return {op: emulated.Binding(op) for op in kernels}


@pytest.fixture(autouse=True)
def emulated_backend(kernels, monkeypatch):
    """Lets `backend="cuda"` of the public ops reach the emulated launchers."""
    for op, kernel in kernels.items():
        module = importlib.import_module(f"liftbyimage.ops.{op}")
        backend = Backend("cuda", lambda *tensors: None, kernel.forward, kernel.backward)
        others = tuple(other for other in module.BACKENDS if other.name != "cuda")
        monkeypatch.setattr(module, "BACKENDS", (*others, backend))
        monkeypatch.setitem(module._BY_NAME, "cuda", backend)


def check_attention(case, dtype=torch.float32, **arguments):
    inputs = make_inputs("pose_guided_attention", case, dtype)
    check_against_float64("pose_guided_attention", {**inputs, **arguments}, dtype, "cuda")


def check_prune(case, dtype=torch.float32):
    check_against_float64("prune_patches", make_inputs("prune_patches", case, dtype), dtype, "cuda")


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", ATTENTION_CASES)
def test_attention_agrees_with_float64(name):
    check_attention(ATTENTION_CASES[name])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["separate_heads", "odd_patches", "one_tensor_strided"])
def test_attention_agrees_with_float64_in_half_precision(name, dtype):
    check_attention(ATTENTION_CASES[name], dtype)


@pytest.mark.parametrize("shared_head", [True, False])
def test_widest_supported(shared_head):
    check_attention(Case("", B=1, H=2, J=3, P=5, E=512, F=512, D=512, shared_head=shared_head))


def raw_arguments(case, dtype=torch.float32):
    inputs = make_inputs("pose_guided_attention", case, dtype)
    value = None if inputs["value"] is inputs["key"] else inputs["value"]
    return inputs["query"], inputs["key"], value, inputs["pose_value"], inputs["patches"]


def cotangents(context, patches_out, importance):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(t.shape, generator=generator) for t in (context, patches_out, importance)]


@pytest.mark.parametrize("absent", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("value_is_key", [True, False])
def test_missing_gradient_equals_zero_gradient(kernels, absent, value_is_key):
    kernel = kernels["pose_guided_attention"]
    query, key, value, pose_value, patches = raw_arguments(Case("", J=9, P=70, value_is_key=value_is_key))
    context, patches_out, importance, lse = kernel.forward(query, key, value, pose_value, patches, 0.3)
    given = cotangents(context, patches_out, importance)
    saved = (query, key, value, pose_value, context, lse, 0.3, True, False)
    with_none = kernel.backward(*(None if i in absent else g for i, g in enumerate(given)), *saved)
    with_zeros = kernel.backward(*(g * 0 if i in absent else g for i, g in enumerate(given)), *saved)
    for missing, zero in zip(with_none, with_zeros, strict=True):
        torch.testing.assert_close(missing, zero, rtol=0, atol=0)


def test_token_gradients_are_skipped_on_request(kernels):
    kernel = kernels["pose_guided_attention"]
    arguments = raw_arguments(Case("", P=20))
    context, patches_out, importance, lse = kernel.forward(*arguments, 0.3)
    saved = (*arguments[:4], context, lse, 0.3)
    given = cotangents(context, patches_out, importance)
    full = kernel.backward(*given, *saved, True, False)
    rows_only = kernel.backward(*given, *saved, False, False)
    assert rows_only[1].shape == rows_only[2].shape == (0,)
    assert torch.equal(rows_only[0], full[0])
    assert torch.equal(rows_only[3], full[3])


@pytest.mark.parametrize("scale", [0.0, -0.7, 30.0])
def test_any_scale(scale):
    check_attention(Case("", J=5, P=70), scale=scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_key_spoils_what_depends_on_it(bad):
    inputs = make_inputs("pose_guided_attention", Case("", B=2, P=70, shared_head=False), torch.float32)
    inputs["key"][0, 1, 66] = bad  # second tile, head 1 of sample 0
    actual = ops.pose_guided_attention(**inputs, backend="cuda")
    plain = ops.pose_guided_attention(**inputs, backend="reference")
    assert actual.context[0, 1].isnan().all()
    for name in actual._fields:
        mine, theirs = getattr(actual, name), getattr(plain, name)
        assert torch.equal(mine.isnan(), theirs.isnan()), name
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_minus_infinity_masks_a_whole_tile():
    query = torch.ones(1, 1, 3, 1)
    key = torch.zeros(1, 1, 70, 1)
    key[:, :, :64] = -torch.inf
    value = torch.arange(70.0).reshape(1, 1, 70, 1)
    inputs = (query, key, value, torch.ones(1, 1, 3, 2), torch.zeros(1, 70, 2))
    context, patches, importance = ops.pose_guided_attention(*inputs, backend="cuda")
    torch.testing.assert_close(context, torch.full_like(context, 66.5))
    assert importance[0, :64].eq(0).all() and patches[0, :64].eq(0).all()
    torch.testing.assert_close(importance[0, 64:], torch.full((6,), 1 / 6))


def test_result_is_the_same_bit_for_bit_in_any_order_of_threads_and_beside_any_other_sample(kernels):
    """A missing barrier between a write and a read shows in one of the two orders."""
    kernel = kernels["pose_guided_attention"]
    case = Case("", H=3, J=13, P=70, E=40, F=24, D=72, shared_head=False)
    arguments = raw_arguments(case)

    def everything(*tensors):
        context, patches_out, importance, lse = kernel.forward(*tensors, 0.2)
        given = [c[: len(context)] for c in cotangents(*full)]
        saved = (*tensors[:4], context, lse, 0.2, True, False)
        return [context, patches_out, importance, lse, *kernel.backward(*given, *saved)]

    full = kernel.forward(*arguments, 0.2)[:3]
    ascending = everything(*arguments)
    kernel.library.set_descending(1)
    descending = everything(*arguments)
    kernel.library.set_descending(0)
    alone = everything(*(tensor[:1] for tensor in arguments))
    for first, second, single in zip(ascending, descending, alone, strict=True):
        assert torch.equal(bits(first), bits(second))
        assert torch.equal(bits(first[:1]), bits(single))


@pytest.mark.parametrize("case", CASES["sample_context"], ids=str)
def test_context_agrees_with_float64(case):
    check_against_float64("sample_context", make_inputs("sample_context", case, torch.float32), torch.float32, "cuda")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_context_agrees_with_float64_in_half_precision(dtype, channels_last):
    """Units of eight channels, and single ones where there are nine or they lie apart."""
    case = Case("", J=3, S=2, maps=((16, 5, 4), (9, 3, 3)), channels_last=channels_last)
    check_against_float64("sample_context", make_inputs("sample_context", case, dtype), dtype, "cuda")


def test_context_of_misaligned_channels():
    """A map and a gradient that begin 4 bytes after a multiple of 16 are read one channel at a time."""
    case = Case("", J=3, maps=((16, 5, 4),), channels_last=True)
    inputs = make_inputs("sample_context", case, torch.float32)
    memory = torch.zeros(2 * 5 * 4 * 16 + 1)[1:].unflatten(0, (2, 5, 4, 16))
    memory.copy_(inputs["feature_maps"][0].permute(0, 2, 3, 1))
    check_against_float64(
        "sample_context", {**inputs, "feature_maps": [memory.permute(0, 3, 1, 2)]}, torch.float32, "cuda"
    )


def test_context_of_more_places_than_threads():
    """272 places per level: more than one list of those that reach a block's lines."""
    case = Case("", B=1, maps=((5, 3, 4), (32, 16, 12)), channels_last=True)
    check_against_float64("sample_context", make_inputs("sample_context", case, torch.float32), torch.float32, "cuda")


def context_arguments(case, dtype=torch.float32):
    inputs = make_inputs("sample_context", case, dtype)
    tensors = [inputs[name] for name in ("feature_maps", "reference", "offsets", "weights")]
    return tensors, inputs["padding"] == "zeros"


def test_context_does_not_depend_on_the_order_of_threads_or_the_batch(kernels):
    kernel = kernels["sample_context"]
    tensors, zeros = context_arguments(Case("", B=2, maps=((32, 7, 5), (7, 3, 2)), channels_last=True))

    def everything(maps, *places):
        contexts = kernel.forward(maps, *places, zeros)
        grads = [context.flip(3) for context in contexts]
        offsets, weights, grad_maps = kernel.backward(grads, maps, *places, zeros, True, True, [True, True])
        return [*contexts, offsets, weights, *grad_maps]

    ascending = everything(*tensors)
    kernel.library.set_descending(1)
    descending = everything(*tensors)
    kernel.library.set_descending(0)
    alone = everything([values[1:] for values in tensors[0]], *(values[1:] for values in tensors[1:]))
    for first, second, single in zip(ascending, descending, alone, strict=True):
        assert torch.equal(bits(first), bits(second))
        assert torch.equal(bits(first[1:]), bits(single))


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_context_of_places_that_are_no_numbers(padding):
    """Forward and gradients are the reference's, NaN included; an infinite gradient stays where its place is."""
    inputs = make_inputs("sample_context", Case("", J=3, maps=((8, 5, 4), (3, 1, 6))), torch.float32)
    offsets = inputs["offsets"]
    offsets[0, 0, 1, 2, 3, 0] = torch.nan
    offsets[1, 1, 2, 0, 1, 1] = torch.nan
    offsets[0, 1, 0, 0, 0] = torch.tensor([torch.inf, -torch.inf])
    offsets[1, 0, 0, 0, 0] = torch.tensor([-torch.inf, 1e30])

    def everything(backend):
        leaves = differentiable({**inputs, "padding": padding}, torch.float32)
        contexts = ops.sample_context(**leaves, backend=backend)
        tensors = [*leaves["feature_maps"], leaves["reference"], leaves["offsets"], leaves["weights"]]
        grads = torch.autograd.grad(contexts, tensors, [context.cos() for context in contexts], retain_graph=True)
        infinite = torch.zeros_like(contexts[0])
        infinite[1, 2, 1, 5] = torch.inf
        return [*contexts, *grads, *torch.autograd.grad(contexts[0], leaves["feature_maps"][0], infinite)]

    for mine, theirs in zip(everything("cuda"), everything("reference"), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES["prune_patches"], ids=str)
def test_prune_agrees_with_reference(case):
    check_prune(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prune_orders_every_kind_of_number(dtype):
    infinity, nan = float("inf"), float("nan")
    special = [0.0, -0.0, nan, -infinity, infinity, 1e-7, -1e-7, 1.0, -1.0, nan, 0.0, 2.0]
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(special), (3, 700), generator=generator)
    importance = torch.tensor(special, dtype=dtype)[order]
    patches = torch.arange(3 * 700 * 2, dtype=torch.float32).reshape(3, 700, 2)
    for keep in (1, 55, 300, 512, 640, 700):
        actual = ops.prune_patches(patches, importance, keep, backend="cuda")
        expected = ops.prune_patches(patches, importance, keep, backend="reference")
        assert torch.equal(actual.index, expected.index)
        assert torch.equal(actual.patches, expected.patches)


@pytest.mark.parametrize("width", [1, 2, 3, 8, 9], ids=lambda width: f"{2 * width}_bytes")
def test_prune_moves_rows_of_any_length(width):
    check_prune(Case("", B=2, P=130, D=width, K=77), torch.float16)


def test_prune_with_more_patches_than_fit_in_shared_memory():
    check_prune(Case("", B=1, P=9001, K=4000, D=2, ties=True))


# Samples whose slots are shared out among several blocks: up to six at once, of 16 KiB at least.
SHARED_OUT = [
    Case("stage_1", B=1, P=3072, K=921, D=48),
    Case("two_samples", B=2, P=1300, K=401, D=128),
    Case("one_kept", B=1, P=700, K=1, D=30000),
    Case("two_kept", B=1, P=30, K=2, D=20000),
    Case("all_kept", B=1, P=700, K=700, D=64),
    Case("ties", B=1, P=1300, K=400, D=100, ties=True),
    Case("many_patches", B=1, P=9001, K=4000, D=9, ties=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHARED_OUT, ids=str)
def test_prune_shares_out_the_slots(kernels, case, dtype):
    inputs = make_inputs("prune_patches", case, dtype)
    inputs["importance"][:, ::5] = torch.nan
    inputs["importance"][:, 1::7] = -0.0
    expected = ops.prune_patches(**inputs, backend="reference")
    for descending in (0, 1):
        kernels["prune_patches"].library.set_descending(descending)
        kept, index = kernels["prune_patches"].forward(**inputs)
        kernels["prune_patches"].library.set_descending(0)
        assert torch.equal(index, expected.index) and torch.equal(kept, expected.patches)


@pytest.mark.parametrize("keep", [1, 299, 300, 301, 599, 600, 601, 900])
def test_prune_of_ties_between_digits(keep):
    """Keys that differ in one of their four bytes only: the search ends after any number of digits."""
    for bits_apart in (1, 1 << 8, 1 << 16, 1 << 24):
        levels = torch.tensor([0x3F000000 + level * bits_apart for level in range(3)], dtype=torch.int32)
        importance = levels.view(torch.float32)[torch.arange(900) % 3][None]
        patches = torch.arange(900 * 20.0).reshape(1, 900, 20)
        actual = ops.prune_patches(patches, importance, keep, backend="cuda")
        expected = ops.prune_patches(patches, importance, keep, backend="reference")
        assert torch.equal(actual.index, expected.index) and torch.equal(actual.patches, expected.patches)


def test_prune_does_not_depend_on_the_order_of_threads(kernels):
    kernel = kernels["prune_patches"]
    inputs = make_inputs("prune_patches", Case("", B=2, P=1300, K=400, D=3, ties=True), torch.float32)
    kept, index = kernel.forward(**inputs)
    grad = kernel.backward(kept, index, 1300)
    kernel.library.set_descending(1)
    again_kept, again_index = kernel.forward(**inputs)
    again_grad = kernel.backward(kept, index, 1300)
    kernel.library.set_descending(0)
    assert torch.equal(index, again_index) and torch.equal(kept, again_kept) and torch.equal(grad, again_grad)


def equal(mine, theirs):
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("need_token_grads", [True, False])
@pytest.mark.parametrize(
    "name",
    ["separate_heads", "widths_differ", "strided_heads", "expanded", "one_tensor_strided", "empty_batch"],
)
def test_binding_hands_everything_to_the_attention_launchers(kernels, bindings, name, need_token_grads):
    kernel, binding = kernels["pose_guided_attention"], bindings["pose_guided_attention"]
    case = ATTENTION_CASES[name]
    query, key, value, pose_value, patches = raw_arguments(case)
    patches = None if case.patches_is_key else patches
    expected = kernel.forward(query, key, value, pose_value, patches, 0.3)
    assert equal(binding.forward(query, key, value, pose_value, patches, 0.3), expected)
    context, patches_out, importance, lse = expected
    given = [grad.flip(-1) for grad in cotangents(context, patches_out, importance)]
    given[1] = given[1].transpose(1, 2).contiguous().transpose(1, 2)
    saved = (query, key, value, pose_value, context, lse, 0.3, need_token_grads, case.patches_is_key)
    for absent in (None, 0, 1, 2):
        grads = [None if i == absent else grad for i, grad in enumerate(given)]
        assert equal(binding.backward(*grads, *saved), kernel.backward(*grads, *saved))


@pytest.mark.parametrize("name", ["plain", "strided", "expanded", "empty_batch"])
def test_binding_hands_everything_to_the_prune_launchers(kernels, bindings, name):
    kernel, binding = kernels["prune_patches"], bindings["prune_patches"]
    case = next(case for case in CASES["prune_patches"] if case.name == name)
    inputs = make_inputs("prune_patches", case, torch.float32)
    importance = inputs["importance"].bfloat16()
    kept, index = kernel.forward(inputs["patches"], importance, case.K)
    assert equal(binding.forward(inputs["patches"], importance, case.K), (kept, index))
    grad = kept.transpose(1, 2).contiguous().transpose(1, 2)
    assert equal([binding.backward(grad, index, case.P)], [kernel.backward(grad, index, case.P)])


@pytest.mark.parametrize(
    "wanted", [(True, True, True), (False, True, False), (True, False, True), (False, False, True)]
)
@pytest.mark.parametrize("name", ["five_levels", "one_joint", "one_pixel", "expanded", "empty_batch"])
def test_binding_hands_everything_to_the_context_launchers(kernels, bindings, name, wanted):
    kernel, binding = kernels["sample_context"], bindings["sample_context"]
    (maps, *places), zeros = context_arguments(next(case for case in CASES["sample_context"] if case.name == name))
    expected = kernel.forward(maps, *places, zeros)
    assert equal(binding.forward(maps, *places, zeros), expected)
    grads = [context.transpose(1, 2).contiguous().transpose(1, 2) for context in expected]
    need_maps = [wanted[2] and level % 2 == 0 for level in range(len(maps))]
    arguments = (grads, maps, *places, zeros, *wanted[:2], need_maps)
    offsets, weights, grad_maps = binding.backward(*arguments)
    expected_offsets, expected_weights, expected_maps = kernel.backward(*arguments)
    assert equal((offsets, weights, *grad_maps), (expected_offsets, expected_weights, *expected_maps))
    assert [grad.stride() for grad in grad_maps] == [grad.stride() for grad in expected_maps]


def test_binding_refuses_what_would_be_read_out_of_bounds(bindings):
    attention, prune = bindings["pose_guided_attention"], bindings["prune_patches"]
    query, key, value, pose_value, patches = raw_arguments(Case(""))
    bad = [
        ("key must have size 16 in dimension 3, got 15", (query, key[..., 1:], None, pose_value, patches)),
        ("key must have 1 or 4 heads, got 2", (query, key.repeat(1, 2, 1, 1), value, pose_value, patches)),
        (
            "value must have size 48 in dimension 2, got 47",
            (query, key, value[:, :, 1:], pose_value, patches),
        ),
        ("patches must have size 48 in dimension 1, got 47", (query, key, value, pose_value, patches[:, 1:])),
        ("pose_value has the wrong dtype", (query, key, value, pose_value.half(), patches)),
        (
            "query must be float32, float16 or bfloat16",
            tuple(t.double() for t in (query, key, value, pose_value, patches)),
        ),
    ]
    for message, arguments in bad:
        with pytest.raises(RuntimeError, match=message):
            attention.forward(*arguments, 0.3)
    with pytest.raises(RuntimeError, match="keep must be between 1 and 48, got 49"):
        prune.forward(patches, patches[..., 0], 49)
    with pytest.raises(RuntimeError, match="importance must have size 48 in dimension 1, got 47"):
        prune.forward(patches, patches[:, 1:, 0], 5)
    context = bindings["sample_context"]
    (maps, *places), _ = context_arguments(CASES["sample_context"][0])
    with pytest.raises(RuntimeError, match="feature_maps and offsets must have one number of levels, at most 8, got 3"):
        context.forward(maps[1:], *places, False)
    with pytest.raises(RuntimeError, match="feature_maps must have size 2 in dimension 0, got 1"):
        context.forward([values[1:] for values in maps], *places, False)


# Kernels for tensor cores, forward: csrc/cuda/tensor_attention.cu on Hopper, csrc/cuda/mma_attention.cu before it.

TENSOR_OPS = ("attend_patches", "guide_patches", "pose_guided_attention")
TENSOR_CASES = [
    *(Case(name, H=8, P=130, E=width, F=width, D=width) for name, width in (("widest", 256), ("factored", 48))),
    Case("factored_guided", H=8, P=77, E=184, F=184, D=184),
    Case("most_rows", H=8, J=18, P=65, E=64, F=64, D=64),
    Case("one_warpgroup", H=4, J=17, P=64, E=128, F=128, D=128),
    Case("one_row", H=1, J=1, P=3, E=8, F=8, D=8),
    Case("many_tiles", B=1, H=2, J=5, P=700, E=16, F=16, D=16),
    Case("one_share", B=7, H=2, J=5, P=300, E=16, F=16, D=16),
    Case("empty_batch", B=0, E=16, F=16, D=16),
    Case("large_logits", H=3, J=7, P=200, E=16, F=16, D=16, magnitude=100.0),
    Case("rising_logits", H=2, J=5, P=200, E=16, F=16, D=16, scale=30.0),
    Case("negative_scale", P=100, E=16, F=16, D=16, scale=-1.0),
    Case("zero_scale", P=100, E=16, F=16, D=16, scale=0.0),
    Case("ties", P=100, E=16, F=16, D=16, ties=True),
]


@pytest.fixture(scope="module")
def tensor_forward(bindings):
    """The raw forward ops, by op."""
    library = bindings["pose_guided_attention"].library
    forward = {op: emulated.Binding.define(library, f"{op}_forward") for op in TENSOR_OPS[:2]}
    return {**forward, "pose_guided_attention": bindings["pose_guided_attention"].forward}


@pytest.fixture(params=[90, 80], ids=["hopper", "ampere"])
def tensor_cores(request, kernels, tensor_forward):
    """The same on an emulated GPU of compute capability 9.0 or 8.0."""
    library = kernels["pose_guided_attention"].library
    library.set_capability(request.param)
    yield tensor_forward
    library.set_capability(80)


def tensor_inputs(case, dtype):
    """query, tokens [B, 1, P, E], pose_value and scale."""
    inputs = make_inputs("pose_guided_attention", replace(case, value_is_key=True, patches_is_key=True), dtype)
    scale = case.E**-0.5 if case.scale is None else case.scale
    return inputs["query"], inputs["key"], inputs["pose_value"], scale


def tensor_results(tensor_cores, op, case, dtype):
    query, tokens, pose_value, scale = tensor_inputs(case, dtype)
    if op == "attend_patches":
        context, importance, attention, _ = tensor_cores[op](query, tokens, None, scale, True, True)
        return {"context": context, "importance": importance, "attention": attention}
    if op == "guide_patches":
        context, channels, _ = tensor_cores[op](query, tokens[:, 0], scale)
        return {"context": context, "channels": channels}
    context, patches, importance, _ = tensor_cores[op](query, tokens, None, pose_value, None, scale)
    return {"context": context, "patches": patches, "importance": importance}


def tensor_reference(op, case, dtype, as_dtype):
    query, tokens, pose_value, scale = tensor_inputs(case, dtype)
    query, tokens, pose_value = (tensor.to(as_dtype) for tensor in (query, tokens, pose_value))
    options = {"scale": scale, "backend": "reference"}
    if op == "attend_patches":
        return ops.attend_patches(query, tokens, tokens, need_attention=True, **options)._asdict()
    if op == "guide_patches":
        return ops.guide_patches(query, tokens[:, 0], **options)._asdict()
    return ops.pose_guided_attention(query, tokens, tokens, pose_value, tokens, **options)._asdict()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", TENSOR_CASES, ids=str)
@pytest.mark.parametrize("op", TENSOR_OPS)
def test_tensor_cores_agree_with_float64(tensor_cores, op, case, dtype):
    actual = tensor_results(tensor_cores, op, case, dtype)
    oracle = tensor_reference(op, case, dtype, torch.float64)
    plain = tensor_reference(op, case, dtype, dtype)
    for name, result in actual.items():
        assert_close(name, result, oracle[name], plain[name], dtype)


@pytest.mark.parametrize("op", TENSOR_OPS)
def test_tensor_cores_do_not_depend_on_the_order_of_threads(kernels, tensor_cores, op):
    case, library = TENSOR_CASES[1], kernels["pose_guided_attention"].library
    results = []
    for descending in (0, 1):
        library.set_descending(descending)
        results.append(tensor_results(tensor_cores, op, case, torch.bfloat16))
    library.set_descending(0)
    for name, result in results[0].items():
        assert torch.equal(bits(result), bits(results[1][name])), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_token_spoils_what_depends_on_it_on_tensor_cores(tensor_cores, bad):
    query, tokens, pose_value, scale = tensor_inputs(Case("", B=2, H=2, J=5, P=70, E=16, F=16, D=16), torch.bfloat16)
    tokens[0, 0, 66, 3] = bad
    context, patches, importance, lse = tensor_cores["pose_guided_attention"](
        query, tokens, None, pose_value, None, scale
    )
    plain = ops.pose_guided_attention(query, tokens, tokens, pose_value, tokens, scale=scale, backend="reference")
    for mine, theirs in ((context, plain.context), (patches, plain.patches), (importance, plain.importance)):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert mine[1].isfinite().all()


def test_rows_that_lie_unaligned_are_copied(tensor_cores):
    query, tokens, pose_value, scale = tensor_inputs(TENSOR_CASES[-1], torch.bfloat16)
    expected = tensor_cores["pose_guided_attention"](query, tokens, None, pose_value, None, scale)
    wide = torch.zeros(*tokens.shape[:3], tokens.shape[3] + 3, dtype=tokens.dtype)
    wide[..., 1:-2] = tokens
    actual = tensor_cores["pose_guided_attention"](query, wide[..., 1:-2], None, pose_value, None, scale)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "capability, sizes, dtype",
    [
        (90, (9, 17, 16), torch.bfloat16),
        (80, (2, 3, 12), torch.bfloat16),
        (80, (2, 3, 264), torch.bfloat16),
        (80, (2, 3, 16), torch.float32),
        (75, (2, 3, 16), torch.bfloat16),
    ],
)
def test_tensor_cores_refuse_what_they_do_not_serve(kernels, tensor_forward, capability, sizes, dtype):
    heads, joints, width = sizes
    query, tokens = torch.zeros(1, heads, joints, width, dtype=dtype), torch.zeros(1, 1, 5, width, dtype=dtype)
    library = kernels["pose_guided_attention"].library
    library.set_capability(capability)
    with pytest.raises(RuntimeError, match="attend_patches_forward: the CUDA kernel serves float16 and bfloat16"):
        tensor_forward["attend_patches"](query, tokens, None, 1.0, True, True)
    library.set_capability(80)


# The backward on tensor cores: csrc/cuda/tensor_gradient.cu or csrc/cuda/mma_gradient.cu between matrix products.


@pytest.fixture(scope="module")
def tensor_kernels(bindings):
    """The raw steps of liftbyimage/ops/_tensor_cores.py."""
    names = ("weigh_patches", "differentiate_scores")
    overloads = {name: getattr(torch.ops.liftbyimage_emulated, name).default for name in names}
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return SimpleNamespace(**{name: functools.partial(o.redispatch, keys) for name, o in overloads.items()})


def tensor_gradients(tensor_cores, tensor_kernels, case, dtype, wanted, need_token_grads=True):
    """Gradients through the library's backward, float64 and in the dtype's plain PyTorch."""
    query, tokens, pose_value, scale = tensor_inputs(case, dtype)
    context, _, _, lse = tensor_cores["pose_guided_attention"](query, tokens, None, pose_value, None, scale)
    generator = torch.Generator().manual_seed(3)
    rows = case.H * case.J
    arriving = {
        "context": torch.randn(context.shape, generator=generator).to(dtype),
        "patches": torch.randn(case.B, case.P, case.D, generator=generator).to(dtype),
        "importance": torch.randn(case.B, case.P, generator=generator),
        "attention": torch.randn(case.B, case.P, rows, generator=generator).to(dtype),
    }
    arriving = {name: gradient if name in wanted else None for name, gradient in arriving.items()}
    incoming = _tensor_cores.Incoming(**arriving)
    saved = (query, tokens[:, 0], pose_value, context, lse, scale, need_token_grads)
    actual = _tensor_cores.backward(incoming, *saved, kernels=tensor_kernels)

    def plain(as_dtype):
        leaves = [t.to(as_dtype).requires_grad_() for t in (query, tokens, pose_value)]
        q, t, u = leaves
        logits = scale * q.flatten(1, 2) @ t[:, 0].transpose(1, 2)  # [B, R, P]
        attention = logits.softmax(2)
        results = {
            "context": (attention @ t[:, 0]).view(context.shape),
            "patches": t[:, 0] + attention.transpose(1, 2) @ u.flatten(1, 2),
            "importance": attention.mean(1, dtype=torch.promote_types(as_dtype, torch.float32)),
            "attention": attention.transpose(1, 2),
        }
        roots = [results[name] for name in wanted]
        given = [arriving[name].to(root.dtype) for name, root in zip(wanted, roots, strict=True)]
        gradients = torch.autograd.grad(roots, leaves, given, materialize_grads=True)
        return gradients[0], gradients[1][:, 0], gradients[2]

    return actual, plain(torch.float64), plain(dtype)


ARRIVING = [
    ("context", "patches"),
    ("context", "patches", "importance", "attention"),
    ("context",),
    ("patches",),
    ("importance",),
    ("attention",),
]


# Parts of the gradient are tried at the small sizes.
GRADIENT_CASES = [
    pytest.param(case, wanted, id=f"{case}-{'+'.join(wanted)}")
    for case in TENSOR_CASES
    for wanted in ARRIVING
    if case.B and (wanted in ARRIVING[:2] or case.P <= 80)
]


@pytest.mark.parametrize(
    "tensor_cores, dtype",
    [(90, torch.float16), (90, torch.bfloat16), (80, torch.bfloat16)],  # forward is tried in both types everywhere
    ids=["hopper-float16", "hopper-bfloat16", "ampere-bfloat16"],
    indirect=["tensor_cores"],
)
@pytest.mark.parametrize("case, wanted", GRADIENT_CASES)
def test_gradients_on_tensor_cores_agree_with_float64(tensor_cores, tensor_kernels, case, wanted, dtype):
    actual, oracle, plain = tensor_gradients(tensor_cores, tensor_kernels, case, dtype, wanted)
    for name, mine, exact, other in zip(actual._fields, actual, oracle, plain, strict=True):
        assert_close(f"gradient of {name}", mine, exact, other, dtype)


def test_samples_of_a_long_batch_are_taken_in_turns(tensor_cores, tensor_kernels, monkeypatch):
    case, wanted = Case("", B=5, H=2, J=5, P=70, E=16, F=16, D=16), ARRIVING[1]
    together, _, _ = tensor_gradients(tensor_cores, tensor_kernels, case, torch.bfloat16, wanted)
    monkeypatch.setattr(_tensor_cores, "SAMPLES_AT_ONCE", 2)
    in_turns, _, _ = tensor_gradients(tensor_cores, tensor_kernels, case, torch.bfloat16, wanted)
    for mine, theirs in zip(in_turns, together, strict=True):
        assert torch.equal(mine, theirs)


def test_token_gradients_on_tensor_cores_are_skipped_on_request(tensor_cores, tensor_kernels):
    case = Case("", H=2, J=5, P=70, E=16, F=16, D=16)
    full, _, _ = tensor_gradients(tensor_cores, tensor_kernels, case, torch.bfloat16, ARRIVING[0])
    rows_only, _, _ = tensor_gradients(tensor_cores, tensor_kernels, case, torch.bfloat16, ARRIVING[0], False)
    assert rows_only.tokens is None
    assert torch.equal(rows_only.query, full.query) and torch.equal(rows_only.pose_value, full.pose_value)
