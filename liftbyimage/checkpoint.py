"""Checkpoints of a pipeline: written atomically, read without running anything they contain."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liftbyimage import models

FORMAT = "liftbyimage-checkpoint-1"


def save_atomically(value: Any, path: str | os.PathLike[str]) -> None:
    """torch.save to a temporary file beside `path`, then rename: `path` is either the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(value, file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save_pipeline(
    pipeline: models.Pipeline,
    path: str | os.PathLike[str],
    *,
    encoder: str,
    encoder_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a Lifting by Image pipeline.

    Args:
        encoder, encoder_config: the name and keyword arguments that `models.build_encoder` needs to make it again.
        dtype: store floating-point weights in this dtype (float16 halves the file); None keeps theirs.
        extra: plain values and tensors to store beside the weights.
    """
    save_atomically(
        {
            "format": FORMAT,
            "lifter": "lift-by-image",
            "lifter_config": pipeline.lifter.config.to_dict(),
            "encoder": encoder,
            "encoder_config": dict(encoder_config or {}),
            "lifter_state": cast_state(pipeline.lifter, dtype),
            "encoder_state": cast_state(pipeline.encoder, dtype),
            **(extra or {}),
        },
        path,
    )


def cast_state(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A module's state dict with its floating-point tensors in `dtype`."""
    state = module.state_dict()
    return {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The raw contents of a checkpoint, read with `weights_only=True`.

    Raises:
        ValueError: the file is missing, is no PyTorch file, or is no liftbyimage checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: no such file")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken or foreign file
        raise ValueError(f"checkpoint {path}: not a readable PyTorch file of plain tensors") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        found = contents.get("format") if isinstance(contents, dict) else type(contents).__name__
        raise ValueError(f"checkpoint {path}: expected format {FORMAT!r}, got {found!r}")
    return contents


def load_pipeline(path: str | os.PathLike[str]) -> models.Pipeline:
    """The pipeline a checkpoint holds, in float32 and evaluation mode.

    Raises:
        ValueError: as `read_checkpoint`; or its weights do not fit the configuration it states.
    """
    contents = read_checkpoint(path)
    lifter = models.build(contents["lifter"], **contents["lifter_config"])
    encoder = models.build_encoder(contents["encoder"], **contents["encoder_config"])
    for part, module in (("lifter", lifter), ("encoder", encoder)):
        load_state(module, contents[f"{part}_state"], f"checkpoint {path}: {part}")
    return models.Pipeline(encoder, lifter).eval()  # type: ignore[arg-type]


def load_state(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict strictly; one sentence names what does not fit."""
    own = module.state_dict()
    for problem, names in (("misses", own.keys() - state.keys()), ("has unknown", state.keys() - own.keys())):
        if names:
            first = ", ".join(sorted(names)[:5])
            raise ValueError(f"{what} {problem} {len(names)} weights of this configuration: {first}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{what} is of another configuration: {name} must have shape {list(own[name].shape)}, "
                f"got {list(tensor.shape)}"
            )
    module.load_state_dict(state)
