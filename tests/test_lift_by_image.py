"""The whole lifter against its plain PyTorch twin, and its promises."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from liftbyimage import models
from liftbyimage.models import LiftByImage, LiftByImageConfig, Pipeline, PoseOnlyConfig, PoseOnlyLifter, TinyEncoder
from liftbyimage.models.lift_by_image import position_channels
from liftbyimage.ops import explain
from liftbyimage.reference import ReferenceLiftByImage

SMALL = LiftByImageConfig(image_channels=6, grid=(8, 6), dim=32, heads=4, dropout=0.0)


def twins(config=SMALL, dtype=torch.float64):
    torch.manual_seed(0)
    lifter = LiftByImage(config).to(dtype)
    for parameter in lifter.parameters():
        nn.init.normal_(parameter, std=0.2)
    lifter.positions = position_channels(config.grid).to(dtype)
    reference = ReferenceLiftByImage(config, lifter.positions).to(dtype)
    reference.load_state_dict(lifter.state_dict())
    return lifter, reference


def inputs(config=SMALL, batch=3, dtype=torch.float64):
    torch.manual_seed(1)
    features = torch.randn(batch, config.image_channels, *config.grid, dtype=dtype)
    return features.requires_grad_(), torch.rand(batch, 17, 2, dtype=dtype) * 2 - 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"image_feed_forward": True},
        {"pose_guided_layer": 0},
        {"pose_guided_layer": 2},
        {"pose_guided_layer": None, "retention": 1.0},
    ],
    ids=str,
)
def test_equals_the_plain_lifter_with_gradients(change, training):
    config = LiftByImageConfig(**{**SMALL.to_dict(), "dim": 48, **change})
    lifter, reference = twins(config)
    features, pose_2d = inputs(config)
    results = []
    for module in (reference.train(training), lifter.train(training)):
        refined, coarse, importance, index = module(features, pose_2d)
        loss = refined.square().sum() + coarse.square().sum() + importance.square().sum()
        names, parameters = zip(*sorted(module.named_parameters()), strict=True)
        # Patches that the last layer updates are read by no loss of stage 1.
        gradients = torch.autograd.grad(loss, [features, *parameters], allow_unused=config.pose_guided_layer == 2)
        outputs = {"refined": refined, "coarse": coarse, "importance": importance, "index": index}
        results.append({**outputs, **dict(zip(("features", *names), gradients, strict=True))})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        if expected is None:
            assert results[1][name] is None, name
            continue
        torch.testing.assert_close(results[1][name], expected, rtol=1e-7, atol=1e-9, msg=name)


def reference_attention(reference, features, pose_2d):
    """[B, H, J, P] per layer of stage 1, as the plain lifter's own layers attend."""
    maps = []

    def keep(module, name):
        attend = getattr(module, name)

        def attending(joints, memory):
            query, key, _ = module.project(joints, memory)
            maps.append(torch.softmax(query @ key.transpose(2, 3) / query.shape[3] ** 0.5, dim=3))
            return attend(joints, memory)

        setattr(module, name, attending)

    for layer in reference.stage1:
        keep(layer.patch_attention, "attend")
        keep(layer.patch_attention, "attend_with_weights")
    reference(features, pose_2d)
    return maps


@pytest.mark.parametrize("formulation", ["auto", "projected", "absorbed", "factored"])
@pytest.mark.parametrize("layer", [1, 0, 2, None])
def test_attention_maps_are_those_of_the_plain_lifter(layer, formulation):
    config = LiftByImageConfig(**{**SMALL.to_dict(), "pose_guided_layer": layer})
    twin, reference = twins(config)
    lifter = LiftByImage(config, formulation).double().eval()
    lifter.load_state_dict(twin.state_dict())
    lifter.positions = twin.positions
    features, pose_2d = inputs(config)
    with torch.no_grad():
        maps = lifter.attention_maps(features, pose_2d)
        expected = reference_attention(reference.eval(), features, pose_2d)
        lifted = lifter(features, pose_2d)
    assert [tuple(one.shape) for one in maps] == [(3, 4, 17, 48)] * 3
    torch.testing.assert_close(maps, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(maps[-1].mean((1, 2)), lifted.importance, rtol=1e-9, atol=1e-12)


def test_attention_maps_refuse_what_forward_refuses():
    lifter, _ = twins()
    features, pose_2d = inputs()
    with pytest.raises(ValueError, match=r"^LiftByImage: pose_2d must have shape \[3, 17, 2\], got \[2, 17, 2\]$"):
        lifter.attention_maps(features, pose_2d[:2])


def test_no_gradient_from_stage_2_into_stage_1():
    lifter, _ = twins()
    features, pose_2d = inputs()
    lifter(features, pose_2d).pose_3d.sum().backward()
    assert features.grad is None
    assert all(p.grad is None for p in lifter.stage1_parameters())
    assert any(p.grad.abs().sum() > 0 for p in lifter.stage2_parameters())


def test_every_parameter_belongs_to_one_stage():
    lifter, _ = twins()
    groups = [{id(p) for p in group} for group in (lifter.stage1_parameters(), lifter.stage2_parameters())]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in lifter.parameters()}


def test_output_contract():
    lifter = models.build("lift-by-image", image_channels=6, grid=(8, 6), dim=32, heads=4)
    lifted = lifter.eval()(torch.randn(2, 6, 8, 6), torch.rand(2, 17, 2))
    assert lifted.pose_3d.shape == lifted.coarse_pose_3d.shape == (2, 17, 3)
    assert not lifted.pose_3d[:, 0].any() and not lifted.coarse_pose_3d[:, 0].any()
    assert lifted.index.shape == (2, 14)  # floor(0.3 · 48)
    torch.testing.assert_close(lifted.importance.sum(1), torch.ones(2))


def test_whole_lifter_compiles():
    lifter, _ = twins(dtype=torch.float32)
    features, pose_2d = inputs(dtype=torch.float32)
    with torch.no_grad():
        expected = lifter(features, pose_2d)
        actual = torch.compile(lifter, fullgraph=True)(features, pose_2d)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_position_channels():
    channels = position_channels((2, 3))
    assert channels.shape == (6, 16)
    x = torch.tensor([-2 / 3, 0.0, 2 / 3]).repeat(2)
    y = torch.tensor([-0.5, 0.5]).repeat_interleave(3)
    for octave in range(4):
        angle = torch.pi / 2 * 2**octave
        expected = torch.stack([(x * angle).sin(), (y * angle).sin(), (x * angle).cos(), (y * angle).cos()], 1)
        torch.testing.assert_close(channels[:, 4 * octave : 4 * octave + 4], expected)


def test_pipeline_goes_from_image_to_pose():
    lifter = models.build("lift-by-image", dim=32, heads=4)
    pipeline = Pipeline(TinyEncoder(channels=32), lifter).eval()
    lifted = pipeline(torch.randn(1, 3, 256, 192), torch.rand(1, 17, 2))
    assert lifted.pose_3d.shape == (1, 17, 3) and lifted.index.shape == (1, 921)


@pytest.mark.parametrize("formulation", ["projected", "absorbed", "factored"])
@pytest.mark.parametrize("pose_guided_layer", [0, 2, None])
def test_every_formulation_agrees_wherever_the_pose_guided_layer_is(formulation, pose_guided_layer):
    config = LiftByImageConfig(**{**SMALL.to_dict(), "pose_guided_layer": pose_guided_layer})
    reference = twins(config)[1].eval()
    lifter = LiftByImage(config, formulation).double().eval()
    lifter.load_state_dict(reference.state_dict())
    lifter.positions = position_channels(config.grid).double()
    with torch.no_grad():
        for actual, expected in zip(lifter(*inputs(config)), reference(*inputs(config)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_a_pipeline_without_an_encoder_lifts_from_the_pose_alone():
    pipeline = Pipeline(None, models.build("pose-only", dim=32, heads=4, layers=2)).eval()
    images, pose_2d = torch.randn(2, 3, 64, 48), torch.rand(2, 17, 2)
    assert torch.equal(pipeline(images, pose_2d), pipeline.lifter(pose_2d))
    mirrored = pipeline.lifter.flip_output(pipeline.lifter(*pipeline.lifter.flip_inputs(pose_2d)))
    assert torch.equal(pipeline.flip_test(images, pose_2d), (pipeline.lifter(pose_2d) + mirrored) / 2)
    with pytest.raises(
        ValueError, match="^Pipeline.optimize: pipeline must have an encoder, got one that reads no image$"
    ):
        pipeline.optimize(images)
    with pytest.raises(ValueError, match="^Pipeline: encoder must be None for a PoseOnlyLifter, got TinyEncoder$"):
        Pipeline(TinyEncoder(), pipeline.lifter)


def test_pose_only_lifter_sees_no_image_but_every_joint():
    lifter = PoseOnlyLifter(PoseOnlyConfig(dim=32, heads=4, layers=2)).eval()
    pose_2d = torch.rand(2, 17, 2)
    pose = lifter(pose_2d)
    assert pose.shape == (2, 17, 3) and not pose[:, 0].any()
    moved = pose_2d.clone()
    moved[:, 16] += 0.5
    assert (lifter(moved) != pose)[:, 1:].any(dim=2).all()


def test_bad_input():
    lifter, _ = twins()
    features, pose_2d = inputs()
    with pytest.raises(ValueError, match=r"^LiftByImage: features must have shape \[B, 6, 8, 6\], got \[3, 5, 8, 6\]$"):
        lifter(features[:, :5], pose_2d)
    with pytest.raises(ValueError, match=r"^LiftByImage: pose_2d must have shape \[3, 17, 2\], got \[3, 16, 2\]$"):
        lifter(features, pose_2d[:, :16])
    with pytest.raises(ValueError, match=r"^PoseOnlyLifter: pose_2d must have shape \[B, 17, 2\], got \[3, 16, 2\]$"):
        PoseOnlyLifter(PoseOnlyConfig(dim=32, heads=4))(pose_2d[:, :16])
    with pytest.raises(
        ValueError, match="^lifter must be one of lift-by-image, context-aware-poseformer, pose-only, got 'videopose'$"
    ):
        models.build("videopose")
    with pytest.raises(ValueError, match="^encoder must be one of hrnet-w32, hrnet-w48, tiny, got 'resnet'$"):
        models.build_encoder("resnet")
    with pytest.raises(ValueError, match="^Pipeline: encoder must give the lifter's 6 channels, got 32$"):
        Pipeline(TinyEncoder(), lifter)
    with pytest.raises(
        ValueError, match=r"^LiftByImageConfig: grid must be \(Hf, Wf\) of positive ints, got \(0, 4\)$"
    ):
        LiftByImageConfig(grid=(0, 4))
    with pytest.raises(TypeError, match="^LiftByImage: config must be a LiftByImageConfig, got str$"):
        LiftByImage("factored")
    with pytest.raises(
        TypeError,
        match="^Pipeline: lifter must be a LiftByImage, ContextAwarePoseFormer or PoseOnlyLifter, got TinyEncoder$",
    ):
        Pipeline(TinyEncoder(), TinyEncoder())
    with pytest.raises(ValueError, match="^LiftByImageConfig: pose_guided_layer must be 0, 1, 2 or None, got 3$"):
        LiftByImageConfig(pose_guided_layer=3)
    with pytest.raises(TypeError, match="^PoseOnlyLifter: config must be a PoseOnlyConfig, got int$"):
        PoseOnlyLifter(32)
    with pytest.raises(ValueError, match="^LiftByImageConfig: num_joints must be >= 1, got 0$"):
        LiftByImageConfig(num_joints=0)


@pytest.mark.parametrize("formulation", ["auto", "factored", "absorbed", "projected"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_forward_reads_no_value_of_a_tensor(backend, formulation, monkeypatch):
    """Tensors without values go through it: nothing waits for the device, as a CUDA graph demands."""
    status = {found.name: found for found in explain("prune_patches", torch.zeros(1, 1, 1))}[backend]
    if status.why_not is not None:
        pytest.skip(f"{backend}: {status.why_not}")
    monkeypatch.setenv("LIFTBYIMAGE_BACKEND", backend)
    with FakeTensorMode(), torch.no_grad():
        lifter = LiftByImage(SMALL, formulation).eval()
        pose = lifter(torch.randn(2, 6, 8, 6), torch.randn(2, 17, 2))
    assert pose.pose_3d.shape == (2, 17, 3) and pose.index.shape == (2, 14)


@pytest.mark.parametrize(
    "batch, training, error, message",
    [
        (True, False, TypeError, "batch must be an int >= 1, got bool"),
        (2.0, False, TypeError, "batch must be an int >= 1, got float"),
        (0, False, ValueError, "batch must be an int >= 1, got 0"),
        (2, True, ValueError, "the model must be in eval mode, got one in training mode"),
        (2, False, ValueError, "parameters must be on a CUDA device, got cpu for joint_embedding"),
    ],
)
def test_capture_refuses_in_one_sentence(batch, training, error, message):
    with pytest.raises(error) as raised:
        LiftByImage(SMALL).train(training).capture(batch)
    assert str(raised.value) == f"LiftByImage.capture: {message}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 5])
def test_captured_lifter_equals_itself(batch, dtype):
    lifter = twins(dtype=dtype)[0].cuda().eval()
    captured = lifter.capture(batch)
    for seed in (1, 2):
        torch.manual_seed(seed)
        features = torch.randn(batch, 6, 8, 6, device="cuda", dtype=dtype)
        pose_2d = torch.rand(batch, 17, 2, device="cuda", dtype=dtype) * 2 - 1
        with torch.no_grad():
            expected = lifter(features, pose_2d)
        for actual, wanted in zip(captured(features, pose_2d), expected, strict=True):
            assert torch.equal(actual, wanted)
