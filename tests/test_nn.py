"""Layers against torch.nn.TransformerDecoderLayer, formulations against each other, and the plain pose-guided layer."""

import pytest
import torch
from torch import nn

from liftbyimage import _extension
from liftbyimage.nn import FeatureSelection, PoseGuidedLayer, TransformerLayer
from liftbyimage.reference.lift_by_image import GuidedLayer
from liftbyimage.testing import spy

DIM, HEADS, JOINTS, PATCHES = 64, 4, 17, 53


def decoder_layer(dtype=torch.float32, dim=DIM, heads=HEADS):
    torch.manual_seed(3)
    layer = nn.TransformerDecoderLayer(
        dim, heads, 4 * dim, 0.0, activation="gelu", batch_first=True, norm_first=False, dtype=dtype
    )
    for parameter in layer.parameters():  # biases and norms start at 0 and 1, which would hide mistakes
        nn.init.normal_(parameter, std=0.2)
    return layer


def tokens(dtype=torch.float32, dim=DIM, batch=2):
    torch.manual_seed(4)
    joints = torch.randn(batch, JOINTS, dim, dtype=dtype, requires_grad=True)
    patches = torch.randn(batch, PATCHES, dim, dtype=dtype, requires_grad=True)
    return joints, patches


@pytest.mark.parametrize("formulation", ["auto", "projected", "absorbed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_decoder_layer(formulation, dtype):
    torch_layer = decoder_layer(dtype)
    layer = TransformerLayer(DIM, HEADS, 4.0, dropout=0.0, formulation=formulation).to(dtype)
    layer.load_decoder_layer(torch_layer.state_dict())
    joints, patches = tokens(dtype)
    expected, actual = torch_layer(joints, patches), layer(joints, patches)
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(actual, expected, **tolerance)
    weights = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad((actual * weights).sum(), (joints, patches)),
        torch.autograd.grad((expected * weights).sum(), (joints, patches)),
        strict=True,
    ):
        torch.testing.assert_close(a, e, **tolerance)


def test_parameter_gradients_equal_torch_decoder_layer():
    torch_layer = decoder_layer(torch.float64)
    layer = TransformerLayer(DIM, HEADS, dropout=0.0, formulation="absorbed").double()
    layer.load_decoder_layer(torch_layer.state_dict())
    joints, patches = tokens(torch.float64)
    for module in (layer, torch_layer):
        module(joints, patches).square().sum().backward()
    actual, expected = dict(layer.named_parameters()), dict(torch_layer.named_parameters())
    names = {"self_attn": "self_attention", "multihead_attn": "patch_attention"}
    for name, parameter in expected.items():
        module, _, rest = name.partition(".")
        ours = f"feed_forward.{name}" if module.startswith("linear") else f"{names.get(module, module)}.{rest}"
        torch.testing.assert_close(actual[ours].grad, parameter.grad, rtol=1e-8, atol=1e-9)


def test_importance_is_the_mean_attention_of_multihead_attention():
    torch_layer = decoder_layer()
    layer = TransformerLayer(DIM, HEADS, dropout=0.0)
    layer.load_decoder_layer(torch_layer.state_dict())
    joints, patches = tokens()
    after, importance = layer(joints, patches, need_importance=True)
    looked = torch_layer.norm1(joints + torch_layer.self_attn(joints, joints, joints)[0])
    weights = torch_layer.multihead_attn(looked, patches, patches, need_weights=True)[1]  # [B, J, P]
    torch.testing.assert_close(importance, weights.mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after, layer(joints, patches))


@pytest.mark.parametrize("formulation", ["projected", "absorbed"])
@pytest.mark.parametrize("image_feed_forward", [False, True])
def test_pose_guided_layer_equals_the_plain_one(formulation, image_feed_forward):
    torch.manual_seed(5)
    plain = GuidedLayer(DIM, HEADS, 4.0, 0.0, image_feed_forward).double()
    layer = PoseGuidedLayer(DIM, HEADS, 4.0, 0.0, formulation, image_feed_forward).double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
    layer.load_state_dict(plain.state_dict())
    joints, patches = tokens(torch.float64)
    results = []
    for module in (plain, layer):
        outputs = module(joints, patches)
        loss = sum((output * output.detach().cos()).sum() for output in outputs)
        parameters = [parameter for _, parameter in sorted(module.named_parameters())]
        results.append((*outputs, *torch.autograd.grad(loss, [joints, patches, *parameters])))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def test_dropout_leaves_patches_to_attention_rows():
    """With dropout 1 on the rows nothing is sent, so patches stay exactly as they were."""
    layer = PoseGuidedLayer(DIM, HEADS, dropout=1.0).train()
    joints, patches = tokens()
    assert torch.equal(layer(joints, patches)[1], patches)
    assert not torch.equal(layer.eval()(joints, patches)[1], patches)


def test_dropout_is_not_applied_to_attention():
    layer = TransformerLayer(DIM, HEADS, dropout=0.5).train()
    joints, patches = tokens()
    layer.self_attention.out_proj.weight.data.zero_()
    torch.manual_seed(0)
    first = layer(joints, patches, need_importance=True)[1]
    torch.testing.assert_close(first, layer.eval()(joints, patches, need_importance=True)[1])


def test_feature_selection_keeps_floor_of_retention():
    patches, importance = torch.randn(2, 53, 8), torch.rand(2, 53)
    kept = FeatureSelection(0.3)(patches, importance)
    assert kept.patches.shape == (2, 15, 8)
    assert (kept.index.diff(dim=1) > 0).all()


@pytest.mark.parametrize("module", [TransformerLayer, PoseGuidedLayer])
def test_bad_input(module):
    name = module.__name__
    with pytest.raises(ValueError, match="^dim must be a positive multiple of heads, got dim = 10, heads = 4$"):
        module(10, 4)
    expected = "formulation must be one of auto, projected, absorbed, factored, got 'fast'"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        module(8, 4, formulation="fast")
    layer = module(8, 4)
    with pytest.raises(ValueError, match=rf"^{name}: joints must have shape \[B, J, 8\], got \[2, 17\]$"):
        layer(torch.zeros(2, 17), torch.zeros(2, 5, 8))
    with pytest.raises(ValueError, match=rf"^{name}: patches must have shape \[B, P, 8\], got \[2, 5, 7\]$"):
        layer(torch.zeros(2, 17, 8), torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match=f"^{name}: patches must have joints' batch size 2, got 3$"):
        layer(torch.zeros(2, 17, 8), torch.zeros(3, 5, 8))


def test_retention_is_checked_at_construction():
    with pytest.raises(ValueError, match="^keep_count: retention must satisfy 0 < retention <= 1, got 2$"):
        FeatureSelection(2)


def test_load_decoder_layer_is_strict():
    state = decoder_layer().state_dict()
    del state["norm3.bias"]
    with pytest.raises(RuntimeError, match="norm3.bias"):
        TransformerLayer(DIM, HEADS).load_decoder_layer(state)


@pytest.mark.parametrize("layer", [TransformerLayer, PoseGuidedLayer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_runs_the_joint_side_in_two_ops(layer, dtype, monkeypatch):
    """Without gradients the fused ops serve, and give what the steps one by one give."""
    torch.manual_seed(6)
    module = layer(DIM, HEADS, dropout=0.5).to(dtype).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    joints, patches = tokens(dtype)
    expected = module(joints, patches)
    with torch.no_grad(), spy("joint_queries", monkeypatch) as asked, spy("update_joints", monkeypatch) as digested:
        actual = module(joints, patches)
    served = [] if _extension.CPU_MISSING else ["cpu"]
    assert asked == digested == served
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["dropout", "backend", "dtype"])
def test_the_joint_side_goes_step_by_step_where_no_kernel_serves(change, monkeypatch):
    module = TransformerLayer(DIM, HEADS, dropout=0.5).train(change == "dropout")
    joints, patches = (tensor.detach() for tensor in tokens())
    if change == "backend":
        monkeypatch.setenv("LIFTBYIMAGE_BACKEND", "reference")
    if change == "dtype":
        module, joints, patches = module.bfloat16(), joints.bfloat16(), patches.bfloat16()
    with torch.no_grad(), spy("joint_queries", monkeypatch) as ran:
        assert module(joints, patches).isfinite().all()
    assert ran == []
