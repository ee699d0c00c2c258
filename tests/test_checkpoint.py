from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from liftbyimage import checkpoint, models

CONFIG = models.LiftByImageConfig(dim=32, heads=4)


@pytest.fixture
def pipeline() -> models.Pipeline:
    torch.manual_seed(3)
    return models.Pipeline(models.TinyEncoder(), models.LiftByImage(CONFIG)).eval()


@pytest.fixture
def saved(tmp_path: Path, pipeline: models.Pipeline) -> Path:
    path = tmp_path / "pipeline.pt"
    checkpoint.save_pipeline(pipeline, path, encoder="tiny", extra={"note": "a test"})
    return path


def _refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        checkpoint.load_pipeline(path, **options)


def _change(path: Path, **changes: Any) -> None:
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def _hrnet_checkpoint(path: Path, width: int = 32, channels: int | None = None) -> Path:
    lifter = models.LiftByImage(models.LiftByImageConfig(image_channels=channels or width, dim=32, heads=4))
    torch.save(
        {
            "format": checkpoint.FORMAT,
            "lifter": "lift-by-image",
            "lifter_config": lifter.config.to_dict(),
            "encoder": f"hrnet-w{width}",
            "encoder_config": {},
            "lifter_state": lifter.state_dict(),
            "encoder_state": None,
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, models.HRNet]:
    torch.manual_seed(4)
    encoder = models.hrnet_w32().eval()
    path = tmp_path_factory.mktemp("official") / "w32.pth"
    torch.save(encoder.state_dict(), path)
    return path, encoder


def test_round_trip_is_exact(saved: Path, pipeline: models.Pipeline) -> None:
    loaded = checkpoint.load_pipeline(saved)
    assert not loaded.training
    assert loaded.lifter.config == CONFIG
    images, pose_2d = torch.randn(2, 3, 256, 192), torch.rand(2, 17, 2) * 2 - 1
    with torch.inference_mode():
        expected, actual = pipeline(images, pose_2d), loaded(images, pose_2d)
    for name in expected._fields:
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert checkpoint.read_checkpoint(saved)["note"] == "a test"


def test_half_precision_weights_load_as_float32(tmp_path: Path, pipeline: models.Pipeline, saved: Path) -> None:
    path = tmp_path / "half.pt"
    checkpoint.save_pipeline(pipeline, path, encoder="tiny", dtype=torch.float16)
    assert path.stat().st_size < 0.6 * saved.stat().st_size
    state = checkpoint.load_pipeline(path).state_dict()
    for name, tensor in pipeline.state_dict().items():
        assert state[name].dtype == tensor.dtype, name
        expected = tensor.half().to(tensor.dtype) if tensor.is_floating_point() else tensor
        assert torch.equal(state[name], expected), name


def test_failed_write_leaves_the_old_file_and_no_other(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        checkpoint.save_atomically({"large": torch.zeros(1000), "unpicklable": lambda: None}, saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.pt"
    _refused(path, f"checkpoint {path}: no such file")


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 half a zip"])
def test_unreadable_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    _refused(path, f"checkpoint {path}: not a readable PyTorch file of plain tensors")


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_foreign_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "evil.pt", tmp_path / "was-run"
    torch.save({"format": checkpoint.FORMAT, "lifter": _Payload(target)}, path)
    _refused(path, f"checkpoint {path}: not a readable PyTorch file of plain tensors")
    assert not target.exists()


def test_wrong_format(tmp_path: Path, saved: Path) -> None:
    _change(saved, format="other-7")
    expected = (
        "expected what save_pipeline writes ('liftbyimage-checkpoint-1'), or weights named backbone.* and volume_net.*"
    )
    _refused(saved, f"checkpoint {saved}: {expected}, got format 'other-7'")
    path = tmp_path / "list.pt"
    torch.save([1, 2], path)
    _refused(path, f"checkpoint {path}: {expected}, got a list")
    torch.save(models.build("pose-only", dim=32, heads=4).state_dict(), path)
    with pytest.raises(ValueError, match=r"got the names \S+, \S+, \S+, …$"):
        checkpoint.load_pipeline(path)


def test_incomplete_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "short.pt"
    torch.save({"format": checkpoint.FORMAT, "lifter": "lift-by-image", "lifter_state": {}}, path)
    _refused(
        path,
        f"checkpoint {path}: expected lifter, lifter_config, encoder, encoder_config, lifter_state, "
        "encoder_state, got none of lifter_config, encoder, encoder_config, encoder_state",
    )


def test_other_configuration(saved: Path) -> None:
    _change(saved, lifter_config={**CONFIG.to_dict(), "dim": 64})
    _refused(
        saved,
        f"checkpoint {saved}: lifter is of another configuration: joint_embedding must have shape [17, 64], "
        "got [17, 32]",
    )


def test_encoder_of_other_channels(saved: Path) -> None:
    state = models.TinyEncoder(48).state_dict()
    _change(saved, encoder_config={"channels": 48}, encoder_state=state)
    _refused(saved, "Pipeline: encoder must give the lifter's 32 channels, got 48")


def test_other_lifter(saved: Path) -> None:
    _change(saved, lifter="videopose")
    _refused(
        saved,
        f"checkpoint {saved}: lifter must be one of lift-by-image, context-aware-poseformer, pose-only, "
        "got 'videopose'",
    )


def test_missing_and_unknown_weights(saved: Path, pipeline: models.Pipeline) -> None:
    state = pipeline.lifter.state_dict()
    _change(saved, lifter_state={k: v for k, v in state.items() if not k.startswith("coarse_head")})
    _refused(
        saved,
        f"checkpoint {saved}: lifter misses 2 weights of this configuration: coarse_head.weight, coarse_head.bias",
    )
    _change(saved, lifter_state={**state, "extra.weight": torch.zeros(1)})
    _refused(saved, f"checkpoint {saved}: lifter has 1 unknown weights: extra.weight")


def test_official_weights_fill_a_checkpoint_without_encoder(
    tmp_path: Path, official: tuple[Path, models.HRNet]
) -> None:
    path = _hrnet_checkpoint(tmp_path / "lifter.pt")
    _refused(path, f"checkpoint {path}: holds no encoder weights, give a file of official hrnet-w32 weights")
    weights, encoder = official
    loaded = checkpoint.load_pipeline(path, encoder_weights=weights)
    assert isinstance(loaded.encoder, models.HRNet)
    assert not loaded.encoder.training
    state = loaded.encoder.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in encoder.state_dict().items())


def test_pipeline_saved_without_encoder_loads_with_official_weights(
    tmp_path: Path, official: tuple[Path, models.HRNet]
) -> None:
    weights, encoder = official
    path = tmp_path / "lifter.pt"
    lifter = models.LiftByImage(CONFIG)
    checkpoint.save_pipeline(models.Pipeline(encoder, lifter), path, encoder="hrnet-w32", with_encoder=False)
    assert path.stat().st_size < 1_000_000
    loaded = checkpoint.load_pipeline(path, encoder_weights=weights)
    assert torch.equal(loaded.lifter.embed.weight, lifter.embed.weight)


def test_official_weights_of_another_width(tmp_path: Path, official: tuple[Path, models.HRNet]) -> None:
    path, weights = _hrnet_checkpoint(tmp_path / "lifter.pt", width=48), official[0]
    _refused(
        path,
        f"encoder weights {weights} are of hrnet-w32, but the lifter of checkpoint {path} was made for the "
        "encoder hrnet-w48",
        encoder_weights=weights,
    )


def test_official_weights_for_a_tiny_encoder(saved: Path, official: tuple[Path, models.HRNet]) -> None:
    weights = official[0]
    _refused(
        saved,
        f"encoder weights {weights} are of hrnet-w32, but the lifter of checkpoint {saved} was made for the "
        "encoder tiny",
        encoder_weights=weights,
    )


def test_lifter_of_other_channels_than_its_encoder(tmp_path: Path, official: tuple[Path, models.HRNet]) -> None:
    path = _hrnet_checkpoint(tmp_path / "lifter.pt", channels=48)
    _refused(path, "Pipeline: encoder must give the lifter's 48 channels, got 32", encoder_weights=official[0])


def test_encoder_weights_that_are_none(tmp_path: Path) -> None:
    path, weights = _hrnet_checkpoint(tmp_path / "lifter.pt"), tmp_path / "other.pth"
    _refused(path, f"encoder weights {weights}: no such file", encoder_weights=weights)
    weights.write_bytes(b"text")
    message = f"encoder weights {weights}: not a readable PyTorch file of plain tensors"
    _refused(path, message, encoder_weights=weights)
    torch.save({"conv1.weight": torch.zeros(1)}, weights)
    _refused(
        path,
        f"encoder weights {weights}: expected official HRNet pose weights with final_layer.weight "
        "[joints, width, 1, 1], got no such tensor",
        encoder_weights=weights,
    )


def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path, pipeline: models.Pipeline) -> None:
    path = tmp_path / "lifter.pt"
    with pytest.raises(ValueError, match="^encoder must be one of hrnet-w32, hrnet-w48, tiny, got 'hrnet'$"):
        checkpoint.save_pipeline(pipeline, path, encoder="hrnet")
    with pytest.raises(
        ValueError, match="^save_pipeline: the encoder, as 'hrnet-w32', misses 1462 weights of this conf"
    ):
        checkpoint.save_pipeline(pipeline, path, encoder="hrnet-w32")
    fast = pipeline.eval().optimize(torch.randn(1, 3, 256, 192))
    with pytest.raises(ValueError, match="^save_pipeline: the encoder, as 'tiny', misses"):
        checkpoint.save_pipeline(fast, path, encoder="tiny")
    assert not path.exists()


def test_model_that_does_not_exist(saved: Path) -> None:
    with pytest.raises(
        ValueError,
        match="^load_pipeline: model must be one of lift-by-image, context-aware-poseformer, pose-only, got 'capf'$",
    ):
        checkpoint.load_pipeline(saved, model="capf")


def test_encoder_weights_for_a_lifter_without_an_encoder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pose.pt"
    pose_only = models.Pipeline(None, models.build("pose-only", dim=16, heads=2, layers=1))
    checkpoint.save_pipeline(pose_only, path, encoder=None)
    with pytest.raises(ValueError) as error:
        checkpoint.load_pipeline(path, tmp_path / "none.pth")
    assert str(error.value) == f"checkpoint {path}: a pose-only reads no image and takes no encoder weights"


def test_what_training_continues_from_is_no_lifter(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"format": "liftbyimage-training-1"}, path)
    _refused(path, f"checkpoint {path}: continues a training run; its lifter is in model.pt or best.pt beside it")
    _refused(tmp_path, f"checkpoint {tmp_path}: is a folder")


def test_a_published_file_is_no_checkpoint_to_start_training_from(tmp_path: Path) -> None:
    path = tmp_path / "published.pt"
    torch.save({"volume_net.coord_embed.weight": torch.zeros(2, 2)}, path)
    message = (
        f"checkpoint {path}: is a published file, which load_pipeline reads; save_pipeline makes a checkpoint of it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checkpoint.read_checkpoint(path)
