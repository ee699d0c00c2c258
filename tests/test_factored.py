"""Factored tokens: equal to formed ones in every layer and the model, forward and every gradient; the cost model."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from liftbyimage import _extension, ops
from liftbyimage.models import LiftByImage, LiftByImageConfig
from liftbyimage.nn import FactoredPatches, FeatureSelection, PoseGuidedLayer, TransformerLayer
from liftbyimage.nn.formulation import AttentionSize
from liftbyimage.reference import ReferenceLiftByImage
from liftbyimage.testing import spy

DIM, HEADS, JOINTS, PATCHES, WIDTH, BATCH = 64, 4, 5, 53, 12, 2
FORMULATIONS = ("projected", "absorbed", "factored", "auto")


def factored(shared=True, dtype=torch.float64, dim=DIM, patches=PATCHES, width=WIDTH, batch=BATCH):
    torch.manual_seed(6)
    embedding = torch.randn(width, dim, dtype=dtype) if shared else torch.randn(batch, width, dim, dtype=dtype)
    factors = (torch.randn(batch, patches, width, dtype=dtype), embedding / 3, torch.randn(dim, dtype=dtype))
    return FactoredPatches(*(factor.requires_grad_() for factor in factors))


def random_joints(dtype=torch.float64, dim=DIM, batch=BATCH, joints=JOINTS):
    torch.manual_seed(7)
    return torch.randn(batch, joints, dim, dtype=dtype, requires_grad=True)


def randomise(module):
    """Biases and norms start at 0 and 1, which would hide mistakes."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
        for buffer in module.buffers():  # a variance stays positive
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=generator).to(buffer))
    return module


def outputs_and_gradients(outputs, leaves):
    tensors = [tensor for tensor in outputs if tensor.is_floating_point()]
    loss = sum((tensor * tensor.detach().cos()).sum() for tensor in tensors)
    return [*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True)]


def assert_all_close(actual, expected, tolerance=1e-9):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shared", [True, False])
def test_dense_and_gather_are_the_definition(shared):
    patches = factored(shared)
    expected = patches.channels @ patches.embedding + patches.bias
    torch.testing.assert_close(patches.dense(), expected)
    assert patches.shape == expected.shape
    index = torch.tensor([[0, 4, 52], [7, 7, 1]])
    torch.testing.assert_close(patches.gather(index), expected[torch.arange(BATCH)[:, None], index])


@pytest.mark.parametrize("shared", [True, False])
def test_guided_adds_what_patches_receive(shared):
    patches = factored(shared)
    rows = torch.randn(BATCH, HEADS, JOINTS, DIM, dtype=torch.float64)

    def guide(patches, expected):
        query = torch.randn(BATCH, HEADS, JOINTS, patches.width, dtype=torch.float64)
        guided = ops.guide_patches(query, patches.channels)
        attention = torch.softmax(patches.width**-0.5 * query @ patches.channels[:, None].transpose(2, 3), dim=3)
        expected = expected + torch.einsum("bhjp,bhjd->bpd", attention, rows)
        updated = patches.guided(guided.channels, rows)
        torch.testing.assert_close(updated.dense(), expected)
        return updated, expected

    updated, expected = guide(patches, patches.dense())
    again, _ = guide(updated, expected)
    assert again.width == WIDTH + 2 * HEADS * JOINTS and not again.shared


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_transformer_layer_on_factored_patches(shared, formulation):
    layer = randomise(TransformerLayer(DIM, HEADS, dropout=0.0, formulation=formulation)).double()
    dense = TransformerLayer(DIM, HEADS, dropout=0.0, formulation="projected").double()
    dense.load_state_dict(layer.state_dict())
    patches, joints = factored(shared), random_joints()
    leaves = [joints, patches.channels, patches.embedding, patches.bias]
    expected = outputs_and_gradients(
        dense(joints, patches.dense(), need_importance=True), [*leaves, *dense.parameters()]
    )
    actual = outputs_and_gradients(layer(joints, patches, need_importance=True), [*leaves, *layer.parameters()])
    assert_all_close(actual, expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("image_feed_forward", [False, True])
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_pose_guided_layer_on_factored_patches(shared, image_feed_forward, formulation):
    sizes = (DIM, HEADS, 4.0, 0.0)
    layer = randomise(PoseGuidedLayer(*sizes, formulation, image_feed_forward)).double()
    dense = PoseGuidedLayer(*sizes, "projected", image_feed_forward).double()
    dense.load_state_dict(layer.state_dict())
    patches, joints = factored(shared), random_joints()
    leaves = [joints, patches.channels, patches.embedding, patches.bias]
    expected = outputs_and_gradients(dense(joints, patches.dense()), [*leaves, *dense.parameters()])
    out_joints, out_patches = layer(joints, patches)
    assert isinstance(out_patches, FactoredPatches) == (formulation in ("factored", "auto") and not image_feed_forward)
    if isinstance(out_patches, FactoredPatches):
        out_patches = out_patches.dense()
    assert_all_close(outputs_and_gradients((out_joints, out_patches), [*leaves, *layer.parameters()]), expected)


def test_selection_gathers_the_same_patches():
    patches = factored(shared=False)
    importance = torch.rand(BATCH, PATCHES)
    kept = FeatureSelection(0.3)(patches, importance)
    formed = FeatureSelection(0.3)(patches.dense(), importance)
    assert torch.equal(kept.index, formed.index)
    torch.testing.assert_close(kept.patches.dense(), formed.patches)
    torch.testing.assert_close(patches.gather(kept.index), formed.patches)


CONFIG = LiftByImageConfig(image_channels=6, grid=(8, 6), dim=DIM, heads=HEADS, dropout=0.0, num_joints=JOINTS)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "formulation, image_feed_forward", [*((f, False) for f in FORMULATIONS), ("absorbed", True), ("auto", True)]
)
def test_model_equals_the_reference(formulation, training, image_feed_forward):
    """Outputs and every gradient, with the batch norm on running statistics and on those of the batch."""
    config = LiftByImageConfig(**{**CONFIG.to_dict(), "image_feed_forward": image_feed_forward})
    model = randomise(LiftByImage(config, formulation).double())
    reference = ReferenceLiftByImage(config, model.positions).double()
    reference.load_state_dict(model.state_dict())
    torch.manual_seed(9)
    features = (torch.randn(BATCH, 6, 8, 6, dtype=torch.float64) * 3 + 2).requires_grad_()
    pose_2d = torch.rand(BATCH, JOINTS, 2, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (reference, model):
        parameters = [parameter for _, parameter in sorted(module.named_parameters())]
        outputs = tuple(module.train(training)(features, pose_2d))
        results.append(outputs_and_gradients(outputs, [features, pose_2d, *parameters]))
    assert_all_close(*results)
    for name, buffer in reference.feature_norm.named_buffers():
        torch.testing.assert_close(dict(model.feature_norm.named_buffers())[name], buffer)


def test_folded_batch_norm_keeps_digits_of_a_large_mean():
    """Features a thousand deviations away from zero: float32 must stay as close to float64 as the plain model does."""
    torch.manual_seed(10)
    model = LiftByImage(CONFIG).eval()
    model.feature_norm.running_mean.fill_(1e3)
    features, pose_2d = torch.randn(1, 6, 8, 6) + 1e3, torch.rand(1, JOINTS, 2)
    reference = ReferenceLiftByImage(CONFIG, model.positions).eval()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain, actual = reference(features, pose_2d)[1], model(features, pose_2d).coarse_pose_3d
        exact = reference.double()(features.double(), pose_2d.double())[1]
    assert (actual - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6 * exact.square().mean().sqrt()


def test_no_token_is_ever_formed(monkeypatch):
    """At the default sizes not even the kept patches are."""
    formed = []
    monkeypatch.setattr(FactoredPatches, "_embed", lambda self, channels: formed.append(channels.shape))
    with torch.no_grad():
        LiftByImage().eval()(torch.randn(1, 32, 64, 48), torch.rand(1, 17, 2))
    assert formed == []


def count(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dim, heads, joints", [(64, 4, 5), (32, 8, 17), (48, 2, 1)])
def test_cost_model_equals_counted_flops(dim, heads, joints, shared, guided):
    """Counted FLOPs differ between formulations by exactly what the cost model says, a multiply-add as 2."""
    patches = factored(shared, torch.float32, dim)
    tokens = random_joints(torch.float32, dim, joints=joints)
    size = AttentionSize(heads, joints, guided)
    counted = {}
    for formulation in ("projected", "absorbed", "factored"):
        layer = (PoseGuidedLayer if guided else TransformerLayer)(dim, heads, dropout=0.0, formulation=formulation)
        with torch.no_grad():
            counted[formulation] = count(lambda layer=layer: layer(tokens, patches))
    costs = {formulation: size.multiply_adds(formulation, patches) for formulation in counted}
    for formulation in counted:
        difference = counted[formulation] - counted["projected"]
        assert difference == 2 * (costs[formulation] - costs["projected"]), formulation
    assert counted[size.cheapest(patches)] == min(counted.values())
    formed = {f: size.multiply_adds(f, patches.dense()) for f in ("projected", "absorbed")}
    forming = patches.channels.numel() * dim
    assert formed == {f: costs[f] - forming for f in formed}


def test_auto_takes_the_cheaper_formulation():
    dense = torch.empty(1, 3072, 256, device="meta")
    assert AttentionSize(8, 17).cheapest(dense) == "absorbed"  # R = 136 < 273
    assert AttentionSize(8, 17).cheapest(torch.empty(1, 3072, 64, device="meta")) == "projected"  # R = 136 > 81
    channels = FactoredPatches(torch.empty(1, 3072, 48), torch.empty(48, 256), torch.empty(256))
    assert AttentionSize(8, 17).cheapest(channels) == "factored"
    wide = FactoredPatches(torch.empty(1, 3072, 184), torch.empty(1, 184, 64), torch.empty(64))
    assert AttentionSize(8, 17).cheapest(wide) == "projected"  # W = 184 > D = 64


def test_tokens_are_formed_once_where_many_read_them():
    patches = FactoredPatches(torch.randn(1, 900, 184), torch.randn(1, 184, 128), torch.randn(128))
    size = AttentionSize(8, 17)
    assert size.cheapest_to_read(patches, 1) is patches
    assert torch.equal(size.cheapest_to_read(patches, 3), patches.dense())
    dense = patches.dense()
    assert size.cheapest_to_read(dense, 3) is dense


def test_whole_model_compiles():
    model = LiftByImage(CONFIG).eval()
    features, pose_2d = torch.randn(1, 6, 8, 6), torch.rand(1, JOINTS, 2)
    with torch.no_grad():
        expected = model(features, pose_2d)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(features, pose_2d)
    torch.testing.assert_close(compiled.pose_3d, expected.pose_3d, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("demanded", ["", "cpu"])
@pytest.mark.parametrize("half_features", [False, True])
def test_autocast_is_the_same_with_and_without_gradients(demanded, half_features, monkeypatch):
    """Under autocast the joint side's steps are cast one by one, as they are in training."""
    if demanded and _extension.CPU_MISSING:
        pytest.skip(_extension.CPU_MISSING)
    monkeypatch.setenv("LIFTBYIMAGE_BACKEND", demanded)
    model = randomise(LiftByImage(CONFIG)).eval()
    features, pose_2d = torch.randn(2, 6, 8, 6), torch.rand(2, JOINTS, 2)
    features = features.bfloat16() if half_features else features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recorded = model(features, pose_2d)
        with torch.no_grad(), spy("joint_queries", monkeypatch) as ran:
            result = model(features, pose_2d)
        assert model.train()(features, pose_2d).pose_3d.isfinite().all()
    assert ran == []
    assert recorded.pose_3d.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(recorded, result, strict=True))


@pytest.mark.parametrize("patches, joints, heads", [(1, 5, 4), (53, 1, 4), (1, 1, 1)])
def test_one_patch_and_one_joint(patches, joints, heads):
    layer = randomise(PoseGuidedLayer(DIM, heads, dropout=0.0, formulation="factored")).double()
    dense = PoseGuidedLayer(DIM, heads, dropout=0.0, formulation="projected").double()
    dense.load_state_dict(layer.state_dict())
    tokens, rows = factored(patches=patches), random_joints(joints=joints)
    (a, updated), (b, expected) = layer(rows, tokens), dense(rows, tokens.dense())
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(updated.dense(), expected)


def test_bad_factors():
    channels = torch.zeros(2, 5, 12)
    with pytest.raises(ValueError, match=r"^FactoredPatches: channels must have shape \[B, P, W\], got \[2, 5\]$"):
        FactoredPatches(torch.zeros(2, 5), torch.zeros(5, 8), torch.zeros(8))
    expected = r"^FactoredPatches: embedding must have shape \[12, D\] or \[2, 12, D\], got \[3, 12, 8\]$"
    with pytest.raises(ValueError, match=expected):
        FactoredPatches(channels, torch.zeros(3, 12, 8), torch.zeros(8))
    with pytest.raises(ValueError, match=r"^FactoredPatches: bias must have shape \[8\], got \[7\]$"):
        FactoredPatches(channels, torch.zeros(12, 8), torch.zeros(7))
    with pytest.raises(TypeError, match="^FactoredPatches: channels must be a tensor, got list$"):
        FactoredPatches([1], torch.zeros(12, 8), torch.zeros(8))
    expected = "^FactoredPatches: bias must have channels' dtype torch.float32, got torch.float64$"
    with pytest.raises(TypeError, match=expected):
        FactoredPatches(channels, torch.zeros(12, 8), torch.zeros(8).double())
    with pytest.raises(ValueError, match="^FactoredPatches: embedding must be on channels' device cpu, got meta$"):
        FactoredPatches(channels, torch.zeros(12, 8, device="meta"), torch.zeros(8))


def test_factors_move_together_and_say_what_they_are():
    patches = factored().to(torch.float32)
    assert patches.dtype == patches.embedding.dtype == patches.bias.dtype == torch.float32
    assert patches.to("meta").device == patches.to("meta").bias.device == torch.device("meta")
    assert repr(patches) == "FactoredPatches([2, 53, 64] as 12 channels, one embedding, torch.float32, cpu)"
    assert patches == patches and patches != patches.detach()


@pytest.mark.parametrize("layer", [TransformerLayer(8, 4), PoseGuidedLayer(8, 4)], ids=["plain", "guided"])
def test_bad_patches(layer):
    name = type(layer).__name__
    joints = torch.zeros(2, 5, 8)
    with pytest.raises(TypeError, match=f"^{name}: patches must be a tensor or FactoredPatches, got list$"):
        layer(joints, [])
    with pytest.raises(TypeError, match=f"^{name}: joints must be a tensor, got NoneType$"):
        layer(None, torch.zeros(2, 5, 8))
    wrong = FactoredPatches(torch.zeros(2, 5, 3), torch.zeros(3, 7), torch.zeros(7))
    with pytest.raises(ValueError, match=rf"^{name}: patches must have shape \[B, P, 8\], got \[2, 5, 7\]$"):
        layer(joints, wrong)
    with pytest.raises(
        TypeError, match=f"^{name}: patches must have the layer's dtype torch.float32, got torch.float64$"
    ):
        layer(joints, torch.zeros(2, 5, 8).double())
    with pytest.raises(
        TypeError, match=f"^{name}: joints must have the layer's dtype torch.float32, got torch.bfloat16$"
    ):
        layer(joints.bfloat16(), torch.zeros(2, 5, 8))
    layer.formulation = "factored"
    expected = f"^{name}: formulation 'factored' needs FactoredPatches, got a tensor of tokens$"
    with pytest.raises(TypeError, match=expected):
        layer(joints, torch.zeros(2, 5, 8))


def test_ops_refuse_factored_patches():
    """An op that needs formed tokens says so."""
    patches, rows = factored(), torch.zeros(BATCH, HEADS, JOINTS, DIM)
    with pytest.raises(TypeError, match=r"^attend_patches: key must be a tensor \[B, Hk, P, E\], got FactoredPatches$"):
        ops.attend_patches(rows, patches, patches)
    with pytest.raises(TypeError, match=r"^prune_patches: patches must be a tensor \[B, P, D\], got FactoredPatches$"):
        ops.prune_patches(patches, torch.zeros(BATCH, PATCHES), 3)


def test_a_map_of_another_grid_is_refused():
    expected = r"^LiftByImage: features must have shape \[B, 6, 8, 6\], got \[1, 6, 6, 8\]$"
    with pytest.raises(ValueError, match=expected):
        LiftByImage(CONFIG)(torch.zeros(1, 6, 6, 8), torch.zeros(1, JOINTS, 2))
    expected = "^LiftByImage: features must have the model's dtype torch.float32, got torch.float64$"
    with pytest.raises(TypeError, match=expected):
        LiftByImage(CONFIG)(torch.zeros(1, 6, 8, 6).double(), torch.zeros(1, JOINTS, 2))


def test_a_feed_forward_on_patches_forms_them():
    config = LiftByImageConfig(**{**CONFIG.to_dict(), "image_feed_forward": True})
    expected = "LiftByImage: formulation 'factored' needs image_feed_forward=False; a feed-forward forms the tokens"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        LiftByImage(config, "factored")


def test_unused_parameters_keep_their_names():
    """State dicts are those of the plain twin: formulations share weights."""
    model = LiftByImage(CONFIG, "factored")
    assert model.state_dict().keys() == ReferenceLiftByImage(CONFIG, model.positions).state_dict().keys()
    assert isinstance(model.embed, nn.Linear)
