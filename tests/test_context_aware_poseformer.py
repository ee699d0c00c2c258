"""Context-Aware PoseFormer against its plain PyTorch twin, its published names and numbers, and its promises."""

import importlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from liftbyimage import checkpoint, models
from liftbyimage.data.crop import apply_affine, box_to_crop_matrix, flip_crop, flip_keypoints, normalise_image
from liftbyimage.models import ContextAwarePoseFormer, ContextAwarePoseFormerConfig, HRNet, Pipeline, TinyEncoder
from liftbyimage.models.context_aware_poseformer import config_of
from liftbyimage.nn import TokenBlock
from liftbyimage.reference import ReferenceContextAwarePoseFormer
from liftbyimage.testing import assert_close, spy

SMALL = ContextAwarePoseFormerConfig(channels=(6, 10), dim=24, heads=4, context_heads=2, samples=3, depth=2)
NO_CONTEXT = ContextAwarePoseFormerConfig.mpi_inf_3dhp(32)
GRIDS = ((64, 48), (32, 24), (16, 12), (8, 6))


def randomise(module):
    """Every weight away from its start: offsets, attention weights and position embedding begin at zero."""
    for name, parameter in module.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 and "pos_embed" not in name else 0.3
        nn.init.normal_(parameter, std=scale)
    return module


def twins(config, dtype):
    torch.manual_seed(0)
    lifter = randomise(ContextAwarePoseFormer(config)).to(dtype)
    reference = ReferenceContextAwarePoseFormer(config).to(dtype)
    reference.load_state_dict(lifter.state_dict())
    return lifter, reference


def inputs(config, batch, dtype, grids=GRIDS):
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(batch, c, *grids[i], generator=generator, dtype=dtype) for i, c in enumerate(config.channels)]
    poses = [torch.rand(batch, config.num_joints, 2, generator=generator, dtype=dtype) * 2.4 - 1.2 for _ in range(2)]
    return maps, *poses


def outputs_and_gradients(module, arguments, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    pose = module(*arguments)
    names, parameters = zip(*sorted(module.named_parameters()), strict=True)
    cotangent = torch.linspace(-1, 1, pose.numel(), dtype=torch.float64).to(pose.dtype).view_as(pose)
    gradients = torch.autograd.grad(pose, [*parameters, *arguments[1:]], cotangent)
    return {"pose": pose.detach(), **dict(zip((*names, "pose_2d", "pose_crop"), gradients, strict=True))}


def assert_equal_to(expected, actual, tolerance):
    assert expected.keys() == actual.keys()
    floor = 1e-3 * max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        error = (actual[name] - value).abs().max()
        assert error <= tolerance * torch.maximum(value.square().mean().sqrt(), floor), f"{name}: {error:.2e}"


@pytest.mark.parametrize("config", [SMALL, NO_CONTEXT], ids=["context", "no_context"])
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_plain_lifter_with_gradients(config, training):
    """In training with the masks of stochastic depth that the same seed gives."""
    lifter, reference = twins(config, torch.float64)
    maps, *poses = inputs(config, 3, torch.float64)
    arguments = (maps, *(pose.requires_grad_() for pose in poses))
    expected = outputs_and_gradients(reference.train(training), arguments, seed=2)
    actual = outputs_and_gradients(lifter.train(training), arguments, seed=2)
    assert_equal_to(expected, actual, 1e-9)


@pytest.mark.parametrize("batch", [1, 64])
def test_published_size(batch):
    """Float64 to 1e-9 with every gradient; float32 by the rule of liftbyimage.testing, without gradients: rounding
    carries a place over the edge of a pixel, where its gradient jumps."""
    config = ContextAwarePoseFormerConfig()
    lifter, reference = (module.eval() for module in twins(config, torch.float64))
    maps, *poses = inputs(config, batch, torch.float64)
    arguments = (maps, *(pose.requires_grad_() for pose in poses))
    expected = outputs_and_gradients(reference, arguments)
    assert_equal_to(expected, outputs_and_gradients(lifter, arguments), 1e-9)
    single = [one.float() for one in maps], *(pose.detach().float() for pose in poses)
    with torch.no_grad():
        assert_equal_to({"pose": expected["pose"]}, {"pose": lifter(*arguments)}, 1e-9)
        plain = reference.float()(*single)
        assert_close("pose", lifter.float()(*single), expected["pose"], plain, torch.float32)


@pytest.mark.parametrize("training", [False, True])
def test_composed_of_smaller_ops_where_no_kernel_fuses(training, monkeypatch):
    """As on a GPU, where samples are read and tokens attended by kernels of their own."""
    lifter, reference = twins(SMALL, torch.float64)
    maps, *poses = inputs(SMALL, 3, torch.float64)
    arguments = (maps, *(pose.requires_grad_() for pose in poses))
    expected = outputs_and_gradients(reference.train(training), arguments, seed=2)
    for block in ("token_block", "context_block"):
        monkeypatch.setattr(importlib.import_module(f"liftbyimage.nn.{block}"), "has_kernel", lambda *args: False)
    ran = {}
    with spy("attend_tokens", monkeypatch) as ran["tokens"], spy("sample_context", monkeypatch) as ran["context"]:
        assert_equal_to(expected, outputs_and_gradients(lifter.train(training), arguments, seed=2), 1e-9)
    assert len(ran["tokens"]) == 2 * SMALL.depth
    assert len(ran["context"]) == SMALL.depth + 1


def test_context_places_are_where_the_plain_lifter_reads(monkeypatch):
    lifter, reference = (module.eval() for module in twins(SMALL, torch.float64))
    arguments = inputs(SMALL, 3, torch.float64)
    expected, read = [], F.grid_sample

    def reading(feature_map, grid, **options):
        if options.get("padding_mode") == "border":  # a context block's
            expected.append(grid)
        return read(feature_map, grid, **options)

    shares = []
    for block in reference.context_blocks:
        block.attention_weights.register_forward_hook(lambda module, given, out: shares.append(out))
    with torch.no_grad():
        actual = lifter.context_places(*arguments)
        monkeypatch.setattr(F, "grid_sample", reading)
        reference(*arguments)
    shape = (3, 2, 17, SMALL.context_heads, SMALL.samples)
    assert [tuple(weights.shape) for _, weights in actual] == [shape] * SMALL.depth
    for block, (places, weights) in enumerate(actual):
        of_block = torch.stack(expected[2 * block : 2 * block + 2], dim=1)  # [B, L, J, H · S, 2]
        torch.testing.assert_close(places.flatten(3, 4), of_block, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(weights, shares[block].view(shape).softmax(dim=-1), rtol=1e-9, atol=1e-12)


def test_no_context_blocks_have_no_context_places():
    lifter, _ = twins(NO_CONTEXT, torch.float32)
    assert lifter.context_places(*inputs(NO_CONTEXT, 1, torch.float32)) == []


def test_bfloat16_is_near_single_precision():
    lifter, reference = (module.eval() for module in twins(SMALL, torch.float32))
    maps, *poses = inputs(SMALL, 4, torch.float32)
    with torch.no_grad():
        expected = lifter(maps, *poses)
        half = [one.bfloat16() for one in maps], *(pose.bfloat16() for pose in poses)
        actual = lifter.bfloat16()(*half).float()
        plain = reference.bfloat16()(*half).float()
    allowed = 2 * (plain - expected).abs().max() + 1e-2 * expected.square().mean().sqrt()
    assert (actual - expected).abs().max() <= allowed


def test_memory_layout_of_maps_changes_nothing():
    lifter = twins(SMALL, torch.float32)[0].eval()
    maps, *poses = inputs(SMALL, 2, torch.float32)
    with torch.no_grad():
        expected = lifter(maps, *poses)
        last = [one.contiguous(memory_format=torch.channels_last) for one in maps]
        assert torch.equal(lifter(last, *poses), expected)


def test_published_sizes_and_names():
    lifter = ContextAwarePoseFormer()
    assert sum(parameter.numel() for parameter in lifter.parameters()) == 14_094_147
    first = "context_blocks.3.embed_proj.3.weight", "res_blocks.0.attn.qkv.bias", "joint_blocks.3.mlp.fc2.weight"
    state = lifter.state_dict()
    assert {*first, "Spatial_pos_embed", "coord_embed.weight", "feat_embed.3.bias", "head.0.weight"} <= state.keys()
    assert state.keys() == ReferenceContextAwarePoseFormer(lifter.config).state_dict().keys()
    eps = {name: module.eps for name, module in lifter.named_modules() if isinstance(module, nn.LayerNorm)}
    assert {value for name, value in eps.items() if name.startswith(("res", "joint"))} == {1e-6}
    assert {value for name, value in eps.items() if name.startswith(("context", "head"))} == {1e-5}
    assert [block.drop_path for block in lifter.res_blocks] == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2])


def test_mpi_inf_3dhp_has_no_context_blocks_and_its_own_layout():
    lifter = ContextAwarePoseFormer(ContextAwarePoseFormerConfig.mpi_inf_3dhp(48))
    assert not lifter.context_blocks
    assert lifter.config.dim == 96
    assert lifter.config.root == 14
    pose = torch.randn(2, 17, 3)
    published = lifter.as_published(pose)
    assert published.shape == (2, 3, 1, 17, 1)
    assert torch.equal(published[:, :, 0, :, 0], pose.transpose(1, 2))
    assert ContextAwarePoseFormer(SMALL).as_published(pose).shape == (2, 1, 17, 3)


def test_context_starts_near_the_joint():
    lifter = ContextAwarePoseFormer()
    offsets = lifter.context_blocks[0].sampling_offsets
    steps = offsets.bias.detach().view(4, 4, 2)
    assert not offsets.weight.any()
    torch.testing.assert_close(steps.abs().amax(2), 0.01 * torch.arange(1.0, 5).expand(4, 4))
    torch.testing.assert_close(steps[0], 0.01 * torch.arange(1.0, 5)[:, None] * torch.tensor([1.0, 0.0]))


def test_token_block_is_a_pre_norm_encoder_layer():
    torch.manual_seed(0)
    block = randomise(TokenBlock(24, 4)).eval()
    layer = nn.TransformerEncoderLayer(24, 4, 48, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).eval()
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj": "attn.proj", "linear": "mlp.fc"}
    state = {}
    for name in layer.state_dict():
        renamed = name
        for old, new in names.items():
            renamed = renamed.replace(old, new)
        state[name] = block.state_dict()[renamed]
    layer.load_state_dict(state)
    tokens = torch.randn(3, 17, 24)
    torch.testing.assert_close(block(tokens), layer(tokens), rtol=1e-5, atol=1e-5)


class Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_few_operations_per_forward():
    lifter = ContextAwarePoseFormer().eval()
    arguments = inputs(lifter.config, 1, torch.float32)
    counts = []
    for module in (lifter, ReferenceContextAwarePoseFormer(lifter.config).eval()):
        with torch.no_grad(), Counter() as counter:
            module(*arguments)
        counts.append(counter.count)
    assert counts[0] < 80 < counts[1]


def test_no_joint_changes_another_sample_and_nan_stays_in_its_own():
    lifter = twins(SMALL, torch.float32)[0].eval()
    maps, pose_2d, pose_crop = inputs(SMALL, 3, torch.float32)
    with torch.no_grad():
        whole = lifter(maps, pose_2d, pose_crop)
        alone = lifter([one[1:2] for one in maps], pose_2d[1:2], pose_crop[1:2])
        assert torch.equal(whole[1:2], alone)
        pose_crop[0, 3] = torch.nan
        spoiled = lifter(maps, pose_2d, pose_crop)
    assert spoiled[0].isnan().all()
    assert torch.equal(spoiled[1:], whole[1:])


@pytest.mark.parametrize("training", [False, True])
def test_empty_batch(training):
    lifter = ContextAwarePoseFormer(SMALL).train(training)
    maps, *poses = inputs(SMALL, 0, torch.float32)
    pose = lifter(maps, *poses)
    assert pose.shape == (0, 17, 3)
    pose.sum().backward()
    assert all(not parameter.grad.any() for parameter in lifter.parameters())
    with torch.no_grad():
        assert lifter(maps, *poses).shape == (0, 17, 3)


@pytest.mark.parametrize("inference", [False, True])
def test_autocast_is_no_worse_than_plain_pytorch(inference):
    """Places stay float32, as F.grid_sample keeps them, and so do the tokens that layers add to."""
    lifter, reference = (module.eval() for module in twins(ContextAwarePoseFormerConfig(dim=64), torch.float32))
    arguments = inputs(lifter.config, 4, torch.float32)
    errors = []
    with torch.set_grad_enabled(not inference):
        expected = reference(*arguments).detach()
        for module in (reference, lifter):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                errors.append((module(*arguments).float() - expected).square().mean().sqrt())
    assert errors[1] <= 1.25 * errors[0]


def test_demanded_backend_serves_the_whole_lifter(monkeypatch):
    lifter, reference = (module.eval() for module in twins(SMALL, torch.float64))
    arguments = inputs(SMALL, 2, torch.float64)
    monkeypatch.setenv("LIFTBYIMAGE_BACKEND", "reference")
    with torch.no_grad():
        torch.testing.assert_close(lifter(*arguments), reference(*arguments))


def test_joints_outside_the_crop_are_lifted():
    lifter = twins(SMALL, torch.float32)[0].eval()
    maps, pose_2d, pose_crop = inputs(SMALL, 2, torch.float32)
    pose_crop[0, 0], pose_crop[0, 1] = 40.0, torch.tensor([-torch.inf, torch.inf])
    with torch.no_grad():
        assert lifter(maps, pose_2d, pose_crop).isfinite().all()


def test_compiles_whole():
    lifter = twins(SMALL, torch.float32)[0].eval()
    arguments = inputs(SMALL, 2, torch.float32)
    with torch.no_grad():
        expected = lifter(*arguments)
        torch.testing.assert_close(torch.compile(lifter, fullgraph=True, backend="aot_eager")(*arguments), expected)


def test_pose_inputs_are_the_published_normalisations():
    lifter = ContextAwarePoseFormer(SMALL)
    keypoints = np.random.default_rng(0).uniform(0, 900, (2, 17, 2))
    matrix = np.stack([box_to_crop_matrix(box) for box in ([100, 50, 300, 600], [0, 0, 900, 700])])
    pose_2d, pose_crop = lifter.pose_inputs(keypoints, matrix, np.array([[1000, 800], [1920, 1080]]))
    x, y = keypoints[1, 4]
    np.testing.assert_allclose(pose_2d[1, 4], [x / 1920 * 2 - 1, y / 1920 * 2 - 1080 / 1920], rtol=1e-6)
    crop_x, crop_y = apply_affine(matrix[1], keypoints[1, 4])
    np.testing.assert_allclose(pose_crop[1, 4], [crop_x / 96 - 1, crop_y / 128 - 1], atol=1e-6)


def test_mirrored_inputs_are_those_of_the_mirrored_picture():
    lifter = ContextAwarePoseFormer(SMALL)
    crop_px = np.random.default_rng(0).uniform(0, 191, (17, 2))
    unchanged = np.array([[[1.0, 0, 0], [0, 1, 0]]])
    size = np.array([[192, 256]])
    straight = lifter.pose_inputs(crop_px[None], unchanged, size)
    _, pose_crop = lifter.pose_inputs(flip_keypoints(crop_px)[None], unchanged, size)  # pixel x lands on 191 − x
    pose_2d_flipped, pose_crop_flipped = lifter.flip_inputs(*straight)
    torch.testing.assert_close(pose_crop_flipped, pose_crop, rtol=0, atol=1e-6)
    torch.testing.assert_close(pose_2d_flipped[0, 4], straight[0][0, 1] * torch.tensor([-1.0, 1.0]))


class Maps(nn.Module):
    """A backbone of plain convolutions with maps at strides 4 and 8."""

    branch_channels = (6, 10)

    def __init__(self):
        super().__init__()
        self.coarse = nn.Conv2d(3, 10, 8, 8)
        self.fine = nn.Conv2d(3, 6, 4, 4)
        self.norm = nn.BatchNorm2d(6)

    def branches(self, images):
        return [self.norm(self.fine(images)), self.coarse(images)]


def pipeline_of_maps():
    torch.manual_seed(0)
    return Pipeline(Maps(), randomise(ContextAwarePoseFormer(SMALL)))


def crops(batch=2):
    return torch.randn(batch, 3, 256, 192, generator=torch.Generator().manual_seed(3))


def test_any_backbone_is_frozen_and_read():
    pipeline = pipeline_of_maps().train()
    assert pipeline.lifter.training
    assert not pipeline.encoder.training
    _, *poses = inputs(SMALL, 2, torch.float32)
    pipeline(crops(), *poses).sum().backward()
    assert all(parameter.grad is None for parameter in pipeline.encoder.parameters())
    assert all(parameter.grad is not None for parameter in pipeline.lifter.parameters())


def test_flip_test_is_the_mean_of_both_passes():
    pipeline = pipeline_of_maps().eval()
    picture = np.random.default_rng(0).integers(0, 255, (1, 256, 192, 3), dtype=np.uint8)
    _, pose_2d, pose_crop = inputs(SMALL, 1, torch.float32)
    with torch.no_grad():
        both = pipeline.flip_test(normalise_image(picture), pose_2d, pose_crop)
        one = pipeline(normalise_image(picture), pose_2d, pose_crop)
        other = pipeline(normalise_image(flip_crop(picture)), *pipeline.lifter.flip_inputs(pose_2d, pose_crop))
    expected = (one[0, 1] + other[0, 4] * torch.tensor([-1.0, 1.0, 1.0])) / 2
    torch.testing.assert_close(both[0, 1], expected)


def test_optimized_backbone_gives_the_same_maps():
    pipeline = pipeline_of_maps().eval()
    images = crops()
    fast = pipeline.optimize(images)
    _, *poses = inputs(SMALL, 2, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(fast(images, *poses), pipeline(images, *poses), rtol=1e-4, atol=1e-4)
    assert {"plain", "folded"} <= {candidate.name for candidate in fast.report.candidates}
    with pytest.raises(RuntimeError, match=r"^OptimizedEncoder: was made of branches\(\), and has no features\(\)$"):
        fast.encoder.features(images)


def test_checkpoint_and_registry(tmp_path):
    lifter = models.build("context-aware-poseformer", dim=32, depth=1)
    pipeline = Pipeline(HRNet(32, num_joints=None), randomise(lifter)).eval()
    path = tmp_path / "capf.pt"
    checkpoint.save_pipeline(pipeline, path, encoder="hrnet-w32", encoder_config={"num_joints": None})
    loaded = checkpoint.load_pipeline(path, model="context-aware-poseformer")
    assert loaded.lifter.config == lifter.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in pipeline.state_dict().items())
    with pytest.raises(ValueError, match="^checkpoint .*: lifter must be 'lift-by-image', got 'context-aware-pose"):
        checkpoint.load_pipeline(path, model="lift-by-image")


@pytest.fixture(scope="module")
def published():
    """A small lifter behind HRNet-w32, under the published names."""
    torch.manual_seed(0)
    config = ContextAwarePoseFormerConfig(dim=32, depth=2)
    pipeline = Pipeline(HRNet(32, num_joints=None), randomise(ContextAwarePoseFormer(config))).eval()
    parts = {"backbone": pipeline.encoder, "volume_net": pipeline.lifter}
    state = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    return pipeline, state


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("tracked", [False, True])
def test_published_files_load_strictly(tmp_path, published, prefix, nested, tracked):
    pipeline, state = published
    state = {prefix + name: value for name, value in state.items() if tracked or "num_batches" not in name}
    path = tmp_path / "best_epoch.bin"
    torch.save({"epoch": 3, "model": state} if nested else state, path)
    loaded = checkpoint.load_pipeline(path)
    assert loaded.lifter.config == pipeline.lifter.config
    images, (_, *poses) = crops(1), inputs(pipeline.lifter.config, 1, torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(images, *poses), pipeline(images, *poses))


def save(tmp_path, state):
    path = tmp_path / "changed.bin"
    torch.save({"model": state}, path)
    return path


def refused(path, message, load=checkpoint.load_pipeline):
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value) == message


def test_published_file_of_other_keys_names_the_first_five_of_each(tmp_path, published):
    state = {name: value for name, value in published[1].items() if "joint_blocks.1.attn" not in name}
    state = {name.replace("volume_net.head", "volume_net.tail"): value for name, value in state.items()}
    path = save(tmp_path, state)
    refused(
        path,
        f"checkpoint {path}: volume_net.* misses 8 weights of this configuration: joint_blocks.1.attn.qkv.weight, "
        "joint_blocks.1.attn.qkv.bias, joint_blocks.1.attn.proj.weight, joint_blocks.1.attn.proj.bias, head.0.weight, "
        "…; and has 4 unknown weights: tail.0.weight, tail.0.bias, tail.1.weight, tail.1.bias",
    )
    path = save(tmp_path, {**published[1], "backbone.conv9.weight": torch.zeros(1)})
    refused(path, f"checkpoint {path}: backbone.* has 1 unknown weights: conv9.weight")
    path = save(tmp_path, {**published[1], "loss.scale": torch.zeros(1)})
    refused(path, f"checkpoint {path} has 1 unknown weights: loss.scale")


def test_published_file_without_parts(tmp_path, published):
    state = published[1]
    path = save(tmp_path, {name: value for name, value in state.items() if "context_blocks" not in name})
    with pytest.raises(
        ValueError, match=r"volume_net\.\* misses 40 weights of this configuration: context_blocks\.0\.norm1"
    ):
        checkpoint.load_pipeline(path)
    path = save(tmp_path, {name: value for name, value in state.items() if "feat_embed.2" not in name})
    with pytest.raises(
        ValueError, match=r"misses 2 weights of this configuration: feat_embed\.2\.weight, feat_embed\.2"
    ):
        checkpoint.load_pipeline(path)
    path = save(tmp_path, {name: value for name, value in state.items() if "backbone.stage4.0." not in name})
    with pytest.raises(ValueError, match=r"backbone\.\* misses \d+ weights of this configuration: stage4\.0"):
        checkpoint.load_pipeline(path)
    path = save(tmp_path, {name: value for name, value in state.items() if "backbone" not in name})
    refused(path, f"checkpoint {path}: holds no backbone weights, give a file of official HRNet-w32 weights")
    path = save(tmp_path, {**state, "volume_net.Spatial_pos_embed": torch.zeros(3)})
    refused(path, f"checkpoint {path}: volume_net.* has weights of shapes that no lifter has")


def test_published_file_with_another_backbone(tmp_path, published):
    lifter = {name: value for name, value in published[1].items() if name.startswith("volume_net.")}
    path = save(tmp_path, {**lifter, "backbone.resnet.conv1.weight": torch.zeros(1)})
    refused(
        path,
        f"checkpoint {path}: backbone must be an HRNet, w32 or w48, got another one; build your own Pipeline with it "
        "and load the lifter alone by load_published_lifter",
    )
    loaded = checkpoint.load_published_lifter(path)
    assert torch.equal(loaded.head[1].weight, published[0].lifter.head[1].weight)
    path = save(tmp_path, {"conv1.weight": torch.zeros(1)})
    message = (
        f"checkpoint {path}: expected weights of a published Context-Aware PoseFormer, got none whose names begin with "
        "volume_net."
    )
    refused(path, message, checkpoint.load_published_lifter)


@pytest.mark.parametrize(
    "config",
    [
        ContextAwarePoseFormerConfig(),
        ContextAwarePoseFormerConfig(channels=(256,) * 4),
        ContextAwarePoseFormerConfig.mpi_inf_3dhp(48),
        ContextAwarePoseFormerConfig.mpi_inf_3dhp(32),
        ContextAwarePoseFormerConfig(channels=(8, 16), dim=32, context_heads=2, samples=5, depth=3, mlp_ratio=3.0),
    ],
)
def test_configuration_is_read_from_the_weights(config):
    with torch.device("meta"):
        assert config_of(ContextAwarePoseFormer(config).state_dict()) == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"channels": ()}, "channels must be positive ints, one per level, got ()"),
        ({"dim": 0}, "dim must be an int >= 1, got 0"),
        ({"depth": 2.5}, "depth must be an int >= 1, got 2.5"),
        ({"mlp_ratio": 0}, "mlp_ratio must be more than 0, got 0"),
        ({"dim": 100}, "dim must be a multiple of heads, got 100 and 8"),
        ({"heads": 4, "dim": 20, "context_heads": 3}, "dim must be a multiple of context_heads, got 20 and 3"),
        ({"drop_path": 1.0}, "drop_path must be in [0, 1), got 1.0"),
        ({"skeleton": "coco"}, "skeleton must be one of human3.6m, mpi-inf-3dhp, got 'coco'"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError) as caught:
        ContextAwarePoseFormerConfig(**changes)
    assert str(caught.value) == f"ContextAwarePoseFormerConfig: {message}"


def test_bad_inputs():
    lifter = ContextAwarePoseFormer(SMALL).eval()
    maps, pose_2d, pose_crop = inputs(SMALL, 2, torch.float32)
    cases = [
        ((maps[:1], pose_2d, pose_crop), "feature_maps must be 2 maps, one per level, got 1"),
        (
            ([maps[0], maps[0]], pose_2d, pose_crop),
            "feature_maps[1] must have shape [B, 10, H, W] with pose_2d's B = 2, got [2, 6, 64, 48]",
        ),
        ((maps, pose_2d[:, :5], pose_crop), "pose_2d must have shape [B, 17, 2], got [2, 5, 2]"),
        ((maps, pose_2d, pose_crop[:, :5]), "pose_crop must have shape [B, 17, 2], got [2, 5, 2]"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError) as caught:
            lifter(*arguments)
        assert str(caught.value) == f"ContextAwarePoseFormer: {message}"
    with pytest.raises(
        TypeError, match=r"^ContextAwarePoseFormer: pose_crop must have the model's dtype torch.float32"
    ):
        lifter(maps, pose_2d, pose_crop.double())
    with pytest.raises(ValueError, match=r"^Pipeline: encoder must have the method branches\(\) and branch_channels"):
        Pipeline(TinyEncoder(6), lifter)
    with pytest.raises(ValueError, match=r"^Pipeline: encoder must give maps of the lifter's \[6, 10\] channels, got"):
        Pipeline(HRNet(32), lifter)


def test_backbone_without_head_has_no_heatmaps():
    with pytest.raises(ValueError, match=r"^HRNet: taps must not name heatmaps, for this backbone has no pose head"):
        HRNet(32, num_joints=None)(crops(1), ("heatmaps",))
