"""The pipeline that a training run starts from."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from liftbyimage import models
from liftbyimage.checkpoint import load_state, official_hrnet, read_checkpoint
from liftbyimage.models import Pipeline
from liftbyimage.training.config import TrainingConfig, check_values


@dataclasses.dataclass(frozen=True)
class Start:
    """A pipeline, and what `checkpoint.save_pipeline` must know of its encoder."""

    pipeline: Pipeline
    encoder: str | None
    encoder_config: dict[str, Any]
    encoder_is_new: bool  # its weights are random


def build_pipeline(config: TrainingConfig, crop_size: tuple[int, int]) -> Start:
    """The pipeline of a configuration for crops of `crop_size` (height, width), px; its seed draws new weights.

    Raises:
        TypeError, ValueError: settings that no encoder or lifter has, that do not fit each other or the crops, or files
            that cannot be read.
    """
    init = None if config.init is None else read_checkpoint(config.init)
    if init is not None and init["lifter"] != config.model:
        raise ValueError(f"TrainingConfig: init {config.init} must hold a {config.model}, got {init['lifter']!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder, name, encoder_config = _encoder(config, init)
        lifter = _lifter(config, init, encoder, crop_size)
    if init is not None:
        load_state(lifter, init["lifter_state"], f"init {config.init}: lifter")
    encoder_is_new = encoder is not None and init is None and config.encoder_weights is None
    return Start(Pipeline(encoder, lifter), name, encoder_config, encoder_is_new)


def _encoder(
    config: TrainingConfig, init: dict[str, Any] | None
) -> tuple[nn.Module | None, str | None, dict[str, Any]]:
    name = config.encoder or (init and init["encoder"])
    settings = config.encoder_config or (init["encoder_config"] if init and name == init["encoder"] else {})
    if name is None:
        for key in ("encoder_weights", "encoder_config"):
            if getattr(config, key):
                raise ValueError(f"TrainingConfig: {key} must not be given, for a {config.model} reads no image")
        return None, None, {}
    if config.encoder_weights is not None:
        encoder = official_hrnet(config.encoder_weights, "encoder weights")
        if name != f"hrnet-w{encoder.channels}":
            raise ValueError(
                f"encoder weights {config.encoder_weights} are of hrnet-w{encoder.channels}, "
                f"but TrainingConfig: encoder is {name!r}"
            )
        return encoder, name, {"num_joints": encoder.num_joints}
    try:
        built = models.build_encoder(name, **settings)
    except TypeError as error:
        raise ValueError(f"TrainingConfig: encoder_config does not fit {name}: {error}") from None
    if init is not None:
        if init["encoder_state"] is None:
            raise ValueError(
                f"TrainingConfig: init {config.init} holds no encoder weights, encoder_weights must give them"
            )
        load_state(built, init["encoder_state"], f"init {config.init}: encoder")
    return built, name, dict(settings)


def _lifter(
    config: TrainingConfig, init: dict[str, Any] | None, encoder: nn.Module | None, crop_size: tuple[int, int]
) -> nn.Module:
    kind = models.LIFTERS[config.model]
    check_values("TrainingConfig: lifter", kind.config_type, config.lifter)
    if kind.reads is not None and not hasattr(encoder, kind.reads):
        raise ValueError(f"TrainingConfig: encoder must be an HRNet for a {config.model}, which reads its {kind.reads}")
    needed = kind.sizes(encoder, crop_size)
    given = {**(init["lifter_config"] if init else {}), **config.lifter}
    for key, value in needed.items():
        if _as_list(given.get(key, value)) != _as_list(value):
            height, width = crop_size
            raise ValueError(
                f"TrainingConfig: lifter.{key} must be {_as_list(value)} for this encoder and crops of "
                f"{height}x{width} px, got {_as_list(given[key])}"
            )
    return models.build(config.model, **{**given, **needed})


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
