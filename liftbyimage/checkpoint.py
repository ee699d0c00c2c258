"""Checkpoints of a pipeline: written atomically, read without running anything they contain."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from liftbyimage import models
from liftbyimage._files import require_file, write_atomically
from liftbyimage.models.context_aware_poseformer import config_of

_PUBLISHED_LIFTER, _PUBLISHED_BACKBONE = "volume_net.", "backbone."
FORMAT = "liftbyimage-checkpoint-1"
_TRAINING = "liftbyimage-training-"  # what training continues from
PARTS = ("lifter", "lifter_config", "encoder", "encoder_config", "lifter_state", "encoder_state")


def save_atomically(value: Any, path: str | os.PathLike[str]) -> None:
    """torch.save, such that `path` is either the old file or the whole new one."""

    def save(file: BinaryIO) -> None:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, which torch turns into a remark on positions
                raise error.__context__ from None
            raise

    write_atomically(path, save)


def save_pipeline(
    pipeline: models.Pipeline,
    path: str | os.PathLike[str],
    *,
    encoder: str | None,
    encoder_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, Any] | None = None,
    with_encoder: bool = True,
) -> None:
    """Write a pipeline.

    Args:
        encoder, encoder_config: the name and keyword arguments with which `models.build_encoder` makes it; None for a
            pipeline without one.
        dtype: store floating-point weights in this dtype (float16 halves the file); None keeps theirs.
        extra: plain values and tensors to store beside the weights.
        with_encoder: False leaves the encoder's weights out, for an HRNet whose official file is at hand.

    Raises:
        ValueError: no encoder of that name and configuration has the pipeline's weights, so that the file could not be
            read back: another configuration, an encoder of your own, or a pipeline that `optimize` made.
    """
    with_encoder = with_encoder and pipeline.encoder is not None
    if with_encoder:
        with torch.device("meta"):
            twin = models.build_encoder(encoder, **(encoder_config or {}))
        _check_fits(twin, pipeline.encoder.state_dict(), f"save_pipeline: the encoder, as {encoder!r},")
    save_atomically(
        {
            "format": FORMAT,
            "lifter": pipeline.lifter.name,
            "lifter_config": pipeline.lifter.config.to_dict(),
            "encoder": encoder,
            "encoder_config": dict(encoder_config or {}),
            "lifter_state": cast_state(pipeline.lifter, dtype),
            "encoder_state": cast_state(pipeline.encoder, dtype) if with_encoder else None,
            **(extra or {}),
        },
        path,
    )


def cast_state(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A module's state dict with its floating-point tensors in `dtype`."""
    state = module.state_dict()
    return {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for name, tensor in state.items()
    }


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The raw contents of a checkpoint, read with `weights_only=True`.

    Raises:
        ValueError: the file is missing, is no PyTorch file, or is no liftbyimage checkpoint.
    """
    return _require_format(_read_tensors(path, "checkpoint"), path)


def _require_format(contents: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
    if _published_weights(contents) is not None:
        raise ValueError(
            f"checkpoint {path}: is a published file, which load_pipeline reads; save_pipeline makes a checkpoint of it"
        )
    if isinstance(contents, dict) and str(contents.get("format")).startswith(_TRAINING):
        raise ValueError(f"checkpoint {path}: continues a training run; its lifter is in model.pt or best.pt beside it")
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path}: expected what save_pipeline writes ({FORMAT!r}), or weights named "
            f"{_PUBLISHED_BACKBONE}* and {_PUBLISHED_LIFTER}*, got {_contents_in_short(contents)}"
        )
    missing = [part for part in PARTS if part not in contents]
    if missing:
        raise ValueError(f"checkpoint {path}: expected {', '.join(PARTS)}, got none of {', '.join(missing)}")
    return contents


def _contents_in_short(contents: Any) -> str:
    if not isinstance(contents, dict):
        return f"a {type(contents).__name__}"
    if "format" in contents:
        return f"format {contents['format']!r}"
    return f"the names {_first([str(name) for name in contents], 3)}" if contents else "nothing"


def _read_tensors(path: str | os.PathLike[str], what: str) -> Any:
    require_file(f"{what} {path}", Path(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken or foreign file
        raise ValueError(f"{what} {path}: not a readable PyTorch file of plain tensors") from error


def load_pipeline(
    path: str | os.PathLike[str],
    encoder_weights: str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
) -> models.Pipeline:
    """The pipeline a checkpoint holds, in float32 and evaluation mode.

    Args:
        path: the checkpoint, or a published file of Context-Aware PoseFormer (backbone and lifter, flat or under
            "model", all names with or without the prefix "module.").
        encoder_weights: a file of official HRNet weights to use instead of the checkpoint's own encoder
            weights; of the width, w32 or w48, that the checkpoint's lifter was made for.
        model: the lifter it must hold, one of `models.LIFTERS`; None takes any.

    Raises:
        ValueError: as `read_checkpoint`; it holds another lifter; its weights do not fit the configuration it states;
            it holds no encoder weights and none are given; or the given ones are not of the HRNet that its lifter
            needs.
    """
    known = tuple(models.LIFTERS)
    if model not in (None, *known):
        raise ValueError(f"load_pipeline: model must be one of {', '.join(known)}, got {model!r}")
    contents = _read_tensors(path, "checkpoint")
    published = _published_weights(contents)
    if published is None:
        contents = _require_format(contents, path)
    name = contents["lifter"] if published is None else models.ContextAwarePoseFormer.name
    if name not in known:
        raise ValueError(f"checkpoint {path}: lifter must be one of {', '.join(known)}, got {name!r}")
    if model not in (None, name):
        raise ValueError(f"checkpoint {path}: lifter must be {model!r}, got {name!r}")
    if published is not None:
        return _published_pipeline(published, encoder_weights, path)
    try:
        lifter = models.build(name, **contents["lifter_config"])
    except TypeError as error:
        raise ValueError(f"checkpoint {path}: lifter_config does not fit {name}: {error}") from error
    load_state(lifter, contents["lifter_state"], f"checkpoint {path}: lifter")
    if lifter.reads is None:
        if encoder_weights is not None:
            raise ValueError(f"checkpoint {path}: a {name} reads no image and takes no encoder weights")
        return models.Pipeline(None, lifter).eval()  # type: ignore[arg-type]
    if encoder_weights is not None:
        encoder: nn.Module = _official_encoder(encoder_weights, contents["encoder"], path)
    elif contents["encoder_state"] is None:
        raise ValueError(
            f"checkpoint {path}: holds no encoder weights, give a file of official {contents['encoder']} weights"
        )
    else:
        encoder = models.build_encoder(contents["encoder"], **contents["encoder_config"])
        load_state(encoder, contents["encoder_state"], f"checkpoint {path}: encoder")
    return models.Pipeline(encoder, lifter).eval()  # type: ignore[arg-type]


def _published_weights(contents: Any) -> dict[str, Tensor] | None:
    """The weights of a published Context-Aware PoseFormer file under their bare names; None if it is none."""
    named = contents.get("model", contents) if isinstance(contents, dict) else {}
    if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named):
        return None
    if not all(isinstance(value, Tensor) for value in named.values()):
        return None
    bare = {name.removeprefix("module."): value for name, value in named.items()}
    return bare if any(name.startswith(_PUBLISHED_LIFTER) for name in bare) else None


def _published_pipeline(
    weights: Mapping[str, Tensor], encoder_weights: str | os.PathLike[str] | None, path: str | os.PathLike[str]
) -> models.Pipeline:
    unknown = [name for name in weights if not name.startswith((_PUBLISHED_LIFTER, _PUBLISHED_BACKBONE))]
    if unknown:
        raise ValueError(f"checkpoint {path} has {len(unknown)} unknown weights: {_first(unknown)}")
    lifter = _published_lifter(weights, path)
    width = lifter.config.channels[0]
    if encoder_weights is not None:  # in place of the backbone that the file may hold
        return models.Pipeline(_official_encoder(encoder_weights, f"hrnet-w{width}", path), lifter).eval()
    encoder_state = _part(weights, _PUBLISHED_BACKBONE)
    if not encoder_state:
        raise ValueError(
            f"checkpoint {path}: holds no backbone weights, give a file of official HRNet-w{width} weights"
        )
    if f"hrnet-w{width}" not in models.ENCODERS or not any(name.startswith("stage2.") for name in encoder_state):
        raise ValueError(
            f"checkpoint {path}: backbone must be an HRNet, w32 or w48, got another one; build your own Pipeline with "
            "it and load the lifter alone by load_published_lifter"
        )
    encoder = models.HRNet(width, num_joints=None)
    load_state(encoder, encoder_state, f"checkpoint {path}: {_PUBLISHED_BACKBONE}*")
    return models.Pipeline(encoder, lifter).eval()


def _published_lifter(weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> models.ContextAwarePoseFormer:
    state = _part(weights, _PUBLISHED_LIFTER)
    try:
        config = config_of(state)
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"checkpoint {path}: {_PUBLISHED_LIFTER}* has weights of shapes that no lifter has") from error
    lifter = models.ContextAwarePoseFormer(config)
    load_state(lifter, state, f"checkpoint {path}: {_PUBLISHED_LIFTER}*")
    return lifter


def load_published_lifter(path: str | os.PathLike[str]) -> models.ContextAwarePoseFormer:
    """The lifter of a published Context-Aware PoseFormer file, whatever its backbone; float32, evaluation mode.

    Raises:
        ValueError: no readable file of such weights, or names or shapes that do not fit each other.
    """
    published = _published_weights(_read_tensors(path, "checkpoint"))
    if published is None:
        raise ValueError(
            f"checkpoint {path}: expected weights of a published Context-Aware PoseFormer, got none whose names begin "
            f"with {_PUBLISHED_LIFTER}"
        )
    return _published_lifter(published, path).eval()


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _official_encoder(
    weights_path: str | os.PathLike[str], wanted: str, checkpoint: str | os.PathLike[str]
) -> models.HRNet:
    encoder = official_hrnet(weights_path, "encoder weights")
    if wanted != f"hrnet-w{encoder.channels}":
        raise ValueError(
            f"encoder weights {weights_path} are of hrnet-w{encoder.channels}, but the lifter of "
            f"checkpoint {checkpoint} was made for the encoder {wanted}"
        )
    return encoder


def official_hrnet(path: str | os.PathLike[str], what: str) -> models.HRNet:
    """The HRNet whose width and joints are those of an official file's heatmap layer, with the file's weights.

    Args:
        what: what the file is for, the first words of every refusal.
    """
    weights = _read_tensors(path, what)
    named = weights if isinstance(weights, dict) else {}
    heads = [named[name] for name in ("final_layer.weight", "module.final_layer.weight") if name in named]
    if not heads or not isinstance(heads[0], Tensor) or heads[0].dim() != 4:
        raise ValueError(
            f"{what} {path}: expected official HRNet pose weights with final_layer.weight "
            "[joints, width, 1, 1], got no such tensor"
        )
    joints, width = heads[0].shape[:2]
    return models.HRNet(width, joints).load_official(weights)


def load_state(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict strictly; one sentence names what does not fit. `num_batches_tracked` may be missing."""
    _check_fits(module, state, what)
    module.load_state_dict({**module.state_dict(), **state})


def _check_fits(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith(".num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    problems = [f"misses {len(missing)} weights of this configuration: {_first(missing)}"] if missing else []
    problems += [f"has {len(unknown)} unknown weights: {_first(unknown)}"] if unknown else []
    if problems:
        raise ValueError(f"{what} {'; and '.join(problems)}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{what} is of another configuration: {name} must have shape {list(own[name].shape)}, "
                f"got {list(tensor.shape)}"
            )


def _first(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
