"""Triton kernels in the interpreter, where the ops' cases do not reach: many tiles, split and padded widths."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from liftbyimage import ops
from liftbyimage.testing import Case, check_against_float64, differentiable, make_inputs

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)


def kernels(name):
    return importlib.import_module(f"liftbyimage.kernels.{name}")


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that an output element nobody wrote shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def oracle(query, key, value, pose_value, patches, scale):
    attention = (scale * query @ key.transpose(-1, -2)).softmax(-1)
    update = (attention.transpose(-1, -2) @ pose_value).sum(1)
    return attention @ value, patches + update, attention.mean((1, 2))


@pytest.mark.parametrize(
    "dtype, groups, num_patches, widths",
    [
        (torch.float32, 2, 70, (20, 24, 40)),  # three patch tiles, two groups, two chunks of a padded width
        (torch.float32, 1, 33, (130, 140, 150)),  # every result split over two programs
        (torch.float16, 1, 130, (48, 48, 48)),  # three patch tiles, a padded whole width
        (torch.float16, 1, 33, (260, 270, 280)),  # every result split, contractions in chunks
    ],
)
def test_tiles_and_splits_against_float64(poisoned, dtype, groups, num_patches, widths):
    check_pose_guided_attention(dtype, groups, num_patches, widths)


@pytest.mark.parametrize("kibibytes, widths", [(48, (130, 140, 150)), (16, (40, 70, 24))])
def test_tiles_of_a_small_shared_memory_against_float64(poisoned, monkeypatch, kibibytes, widths):
    plans, resources = kernels("_attention_plans"), kernels("_resources")
    limits = resources.Device(kibibytes * 1024, warp_groups=True)
    monkeypatch.setattr(plans, "device_of", lambda tensor: limits)
    work = plans.Work(torch.float16, 38, widths, False)
    assert plans.fitting("forward", work, limits)[0] != plans.candidates("forward", work)[0]
    check_pose_guided_attention(torch.float16, 1, 70, widths)


@pytest.mark.parametrize(
    "dtype, number", [(torch.float32, 1), (torch.float32, 2), *((torch.float16, number) for number in range(1, 8))]
)
def test_every_candidate_against_float64(poisoned, monkeypatch, dtype, number):
    def choose(stage, work, *_):
        found = kernels("_attention_plans").candidates(stage, work)
        return found[min(number, len(found) - 1)]

    monkeypatch.setattr(kernels("_attention"), "chosen", choose)
    check_pose_guided_attention(dtype, 2, 70, (70, 40, 66))


def check_pose_guided_attention(dtype, groups, num_patches, widths):
    """Forward and backward, on 38 rows."""
    generator = torch.Generator().manual_seed(0)
    e, f, d = widths

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    heads, joints, scale = 2, 19, e**-0.5
    query, key, value = draw(1, heads, joints, e), draw(1, groups, num_patches, e), draw(1, groups, num_patches, f)
    pose_value, patches = draw(1, heads, joints, d), draw(1, num_patches, d)
    inputs = (query, key, value, pose_value, patches)
    module = kernels("pose_guided_attention")
    context, patches_out, importance, lse = module.forward(*inputs, scale)
    cotangents = (draw(*context.shape), draw(*patches_out.shape), draw(*importance.shape, dtype=torch.float32))
    gradients = module.backward(*cotangents, *inputs[:4], context, lse, scale, True, False)

    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    expected = oracle(*leaves, scale)
    expected_gradients = torch.autograd.grad(expected, leaves[:4], [cotangent.double() for cotangent in cotangents])
    bound = {torch.float32: 5e-6, torch.float16: 8e-3}[dtype]
    pairs = zip((context, patches_out, importance, *gradients), (*expected, *expected_gradients), strict=True)
    for position, (actual, wanted) in enumerate(pairs):
        error = (actual.double() - wanted).abs().max()
        assert error <= bound * wanted.abs().max(), f"output {position}: {error:.2e}"


def test_all_infinite_logits_of_one_tile_do_not_spoil_the_row(poisoned):
    key = torch.randn(1, 1, 100, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    key[:, :, :70, 0] = -torch.inf  # more than two float32 tiles of -inf logits, then finite ones
    value = torch.ones(1, 1, 100, 16, device=DEVICE)
    query = torch.ones(1, 1, 3, 16, device=DEVICE)
    context, importance, _, lse = kernels("attend_patches").forward(query, key, value, 0.25, False, True)
    assert torch.equal(importance[:, :70], torch.zeros(1, 70, device=DEVICE))
    torch.testing.assert_close(context, torch.ones_like(context))
    expected = torch.logsumexp(0.25 * key[0, 0].double().sum(-1), 0).float()
    torch.testing.assert_close(lse, expected.expand_as(lse))


def test_nan_logit_spoils_its_row_only(poisoned):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, 3, 16, generator=generator).to(DEVICE)
    query[0, 0, 1, 4] = torch.nan
    key = torch.randn(1, 1, 50, 16, generator=generator).to(DEVICE)
    context, importance, _, _ = kernels("attend_patches").forward(query, key, None, 0.25, False, True)
    assert context[0, 0].isnan().all(1).tolist() == [False, True, False]
    assert not context[0, 0, [0, 2]].isnan().any()
    assert importance.isnan().all()


def test_prune_over_several_blocks_orders_nan_zero_and_ties(poisoned, monkeypatch):
    prune = kernels("prune_patches")
    monkeypatch.setattr(prune, "LARGEST_BLOCK", 128)
    importance = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).mul(2).round().to(DEVICE)
    importance[0, ::7] = torch.nan
    importance[1] = torch.where(importance[1] > 0, 0.0, -0.0)
    patches = torch.randn(2, 300, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    kept, index = prune.forward(patches, importance, 280)
    lowest_last = importance.nan_to_num(nan=-torch.inf).add(0.0)
    expected = lowest_last.sort(dim=1, descending=True, stable=True).indices[:, :280].sort(dim=1).values
    assert torch.equal(index, expected)
    rows = expected[..., None].expand(-1, -1, 24)
    assert torch.equal(kept, patches.gather(1, rows))
    assert torch.equal(prune.backward(kept, index, 300), torch.zeros_like(patches).scatter(1, rows, kept))


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_context_of_places_that_are_no_numbers(poisoned, padding):
    """Forward and gradients are the reference's, NaN included; an infinite gradient stays where its place is."""
    inputs = make_inputs("sample_context", Case("", J=2, H=3, S=3, maps=((8, 5, 4), (3, 1, 6))), torch.float32, DEVICE)
    offsets = inputs["offsets"]
    offsets[0, 0, 1, 2, 1, 0] = torch.nan
    offsets[1, 1, 1, 0, 2, 1] = torch.nan
    offsets[0, 1, 0, 0, 0] = torch.tensor([torch.inf, -torch.inf])
    offsets[1, 0, 0, 0, 0] = torch.tensor([-torch.inf, 1e30])

    def everything(backend):
        leaves = differentiable({**inputs, "padding": padding}, torch.float32)
        contexts = ops.sample_context(**leaves, backend=backend)
        tensors = [*leaves["feature_maps"], leaves["reference"], leaves["offsets"], leaves["weights"]]
        grads = torch.autograd.grad(contexts, tensors, [context.cos() for context in contexts], retain_graph=True)
        infinite = torch.zeros_like(contexts[0])
        infinite[1, 1, 1, 5] = torch.inf
        return [*contexts, *grads, *torch.autograd.grad(contexts[0], leaves["feature_maps"][0], infinite)]

    for mine, theirs in zip(everything("triton"), everything("reference"), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_context_over_several_tiles_and_channel_blocks(poisoned):
    """A map of more pixels and channels than a tile, wanted alone among three."""
    case = Case("", B=1, J=2, H=2, S=3, maps=((5, 2, 2), (130, 9, 8), (9, 40, 30)), channels_last=True)
    inputs = make_inputs("sample_context", case, torch.float32, DEVICE)
    check_against_float64("sample_context", inputs, torch.float32, "triton")
    module = kernels("sample_context")
    tensors = [inputs[name] for name in ("feature_maps", "reference", "offsets", "weights")]
    grads = [torch.randn(1, 2, 2, values.shape[1], device=DEVICE) for values in inputs["feature_maps"]]
    everything = module.backward(grads, *tensors, False, True, True, [True, True, True])
    one_map = module.backward(grads, *tensors, False, False, False, [False, True, False])
    assert one_map[0].shape == one_map[1].shape == one_map[2][0].shape == one_map[2][2].shape == (0,)
    assert torch.equal(one_map[2][1], everything[2][1])


@pytest.mark.parametrize("tokens, width", [(64, 130), (33, 65), (16, 128)])
def test_tokens_at_the_limits_of_tiles_and_chunks(poisoned, tokens, width):
    case = Case("", B=1, H=2, J=tokens, D=2 * width)
    check_against_float64(
        "attend_tokens", make_inputs("attend_tokens", case, torch.float32, DEVICE), torch.float32, "triton"
    )


@pytest.mark.parametrize("op", ["residual_attention", "residual_feed_forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_branches_in_large_tiles(poisoned, monkeypatch, op, dtype):
    """Several row and column tiles of the sizes that many samples get, the last ones partial."""
    monkeypatch.setattr(kernels("_linear"), "ENOUGH_PROGRAMS", 1)
    inputs = make_inputs(op, Case("", B=5, J=17, D=136, F=150, dropped=2), dtype, DEVICE)
    check_against_float64(op, inputs, dtype, "triton")


@pytest.mark.parametrize("op", ["joint_queries", "update_joints"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_joints_in_large_tiles(poisoned, op, dtype):
    """1,026 rows, the last of their tiles partial; a width of keys beyond one tile of columns."""
    inputs = make_inputs(op, Case("", B=54, H=2, J=19, D=40, E=70, F=40), dtype, DEVICE)
    check_against_float64(op, inputs, dtype, "triton")


def test_layer_norm_of_a_mean_far_larger_than_the_deviation(poisoned):
    inputs = make_inputs("residual_feed_forward", Case("", B=1, J=5, D=600, F=20), torch.float32, DEVICE)
    tokens = inputs["tokens"]
    tokens += 1000  # several blocks of columns, whose means differ by less than a thousandth
    tokens[:, :, 0] = -3000
    check_against_float64("residual_feed_forward", inputs, torch.float32, "triton")


def test_infinite_key_of_one_token_does_not_spoil_another_head_or_the_gradient_of_padding(poisoned):
    packed = torch.randn(1, 5, 3 * 2 * 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    packed[0, 3, 8] = torch.inf  # the first head's key of token 3
    module = kernels("attend_tokens")
    attended = module.forward(packed, 2, 0.5)
    grad = module.backward(torch.ones_like(attended), packed, 2, 0.5)
    assert attended[..., 4:].isfinite().all()
    other_head = torch.arange(24) % 8 >= 4
    assert grad[..., other_head].isfinite().all()
