"""What a training run is asked to do: plain values, from Python, a YAML file or flags, checked before anything runs."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from liftbyimage import models
from liftbyimage.models import ContextAwarePoseFormer, LiftByImage, PoseOnlyLifter

# How each lifter's paper trains it: what a configuration takes where it says nothing. Context-Aware PoseFormer's epochs
# and flip augmentation are not stated where we read them; they are Lifting by Image's.
_LIFT_BY_IMAGE = {
    "encoder": "hrnet-w32",
    "epochs": 20,
    "batch_size": 128,
    "optimiser": "adam",
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "decay": 0.9,
    "decay_every": 4,
    "loss": "mse",
    "flip": True,
    "flip_test": False,
}
RECIPES: dict[str, dict[str, Any]] = {
    LiftByImage.name: _LIFT_BY_IMAGE,
    PoseOnlyLifter.name: {**_LIFT_BY_IMAGE, "encoder": None},
    ContextAwarePoseFormer.name: {
        **_LIFT_BY_IMAGE,
        "batch_size": 512,
        "optimiser": "adamw",
        "learning_rate": 6.4e-4,
        "weight_decay": 0.1,
        "decay": 0.99,
        "decay_every": 1,
        "loss": "mpjpe",
        "flip_test": True,
    },
}

# Where and how often, not what: a run may continue with other values of these. (The records are compared themselves.)
MAY_CHANGE = ("data", "validate", "workers", "device", "cache", "strict", "save_every_minutes", "pictures")

_AT_LEAST: dict[str, float] = {
    "epochs": 0,
    "stage2_epochs": 0,
    "batch_size": 1,
    "accumulate": 1,
    "decay_every": 1,
    "warm_up": 0,
    "weight_decay": 0,
    "workers": 0,
    "seed": 0,
    "limit_validation": 1,
    "pictures": 0,
}
_MORE_THAN: dict[str, float] = {"learning_rate": 0, "decay": 0, "clip_norm": 0, "save_every_minutes": 0}


@dataclass(frozen=True)
class TrainingConfig:
    """A training run. A value of None where None is not described takes the recipe of the lifter's paper (`RECIPES`).

    Args:
        model: the lifter, one of `models.LIFTERS`.
        lifter: settings of the lifter's configuration. What the encoder and the crops decide (channels, grid) need not
            be given.
        encoder, encoder_config: name and arguments for `models.build_encoder`; of `init`, where that is given.
        encoder_weights: a file of official HRNet weights that the encoder starts from.
        init: a liftbyimage checkpoint whose weights (and, where not given here, settings) training starts from.
        data, validate: lines for `data.source.open_source`; no validation where the latter is None.
        epochs: of the first stage; 0 skips it.
        stage2_epochs: of Lifting by Image's second stage; None: as many as `epochs`.
        batch_size: records of a step over all processes.
        accumulate: parts in which each process takes its share of a step, one after the other, to save memory.
        optimiser: "adam" or "adamw", with `weight_decay`.
        learning_rate: times `decay` every `decay_every` epochs ("step"), or down half a cosine to 0 ("cosine").
        warm_up: steps over which it first rises linearly, in each stage.
        clip_norm: largest norm of the gradient; None: any.
        loss: "mse" (mean squared error of coordinates, m²) or "mpjpe" (mean distance of joints, m).
        flip: mirror every second record at random.
        flip_test: validate by the mean with the mirrored crop.
        precision: "float32", or "bfloat16" or "float16" (CUDA only, with loss scaling) by autocast.
        ema: decay per step of an average of the weights, which is what is validated and kept; None: none.
        workers: processes that read records, per training process; 0: the training process itself.
        seed: of weights, order, flips and dropout.
        strict: stop at the first record that cannot be read, instead of putting the next one in its place.
        cache: folder for what stage 2 starts from, computed once; None: computed again every epoch.
        save_every_minutes: between two writings of last.pt within an epoch.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", …
        limit_validation: validate on so many records, evenly spread; None: on all.
        pictures: how many of them to draw for TensorBoard after every validation, half a second each.

    Raises:
        TypeError, ValueError: a value of another kind or range, naming the key.
    """

    model: str = LiftByImage.name
    lifter: dict[str, Any] = field(default_factory=dict)
    encoder: str | None = None
    encoder_config: dict[str, Any] = field(default_factory=dict)
    encoder_weights: str | None = None
    init: str | None = None
    data: str | None = None
    validate: str | None = None
    epochs: int | None = None
    stage2_epochs: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    optimiser: Literal["adam", "adamw"] | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    schedule: Literal["step", "cosine"] = "step"
    decay: float | None = None
    decay_every: int | None = None
    warm_up: int = 0
    clip_norm: float | None = None
    loss: Literal["mse", "mpjpe"] | None = None
    flip: bool | None = None
    flip_test: bool | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    ema: float | None = None
    workers: int = 0
    seed: int = 0
    strict: bool = False
    cache: str | None = None
    save_every_minutes: float = 10.0
    device: str = "auto"
    limit_validation: int | None = None
    pictures: int = 3

    def __post_init__(self) -> None:
        check_values("TrainingConfig", TrainingConfig, vars(self))
        if self.model not in models.LIFTERS:
            raise ValueError(f"TrainingConfig: model must be one of {', '.join(models.LIFTERS)}, got {self.model!r}")
        for key, value in RECIPES[self.model].items():
            if getattr(self, key) is None and not (key == "encoder" and self.init is not None):
                object.__setattr__(self, key, value)
        if self.stage2_epochs is None:
            object.__setattr__(self, "stage2_epochs", self.epochs)
        for key, least in _AT_LEAST.items():
            self._check_range(key, ">=", least, lambda value, least: value >= least)
        for key, bound in _MORE_THAN.items():
            self._check_range(key, ">", bound, lambda value, bound: value > bound)
        if self.seed >= 2**63:
            raise ValueError(f"TrainingConfig: seed must be < 2**63, got {self.seed}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"TrainingConfig: ema must be between 0 and 1, got {self.ema}")
        if self.encoder is not None and self.encoder not in models.ENCODERS:
            raise ValueError(
                f"TrainingConfig: encoder must be one of {', '.join(models.ENCODERS)}, got {self.encoder!r}"
            )

        if self.cache is not None and self.model != LiftByImage.name:
            raise ValueError(f"TrainingConfig: cache must be None for a {self.model}, which has no second stage")

    def _check_range(self, key: str, sign: str, bound: float, fits: Any) -> None:
        value = getattr(self, key)
        if value is not None and not (math.isfinite(value) and fits(value, bound)):
            raise ValueError(f"TrainingConfig: {key} must be {sign} {bound:g}, got {value}")

    @classmethod
    def read(
        cls, path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
    ) -> TrainingConfig:
        """The configuration of a YAML file, if any, with `overrides` put in, whose keys may reach into the mappings:
        ``{"learning_rate": 1e-3, "lifter.dim": 64}``.

        Raises:
            TypeError, ValueError: no such file, no mapping of known keys, or a value that `TrainingConfig` refuses.
        """
        values = {} if path is None else _read_yaml(Path(path))
        for dotted, value in (overrides or {}).items():
            key, dot, rest = dotted.partition(".")
            if not dot:
                values[key] = value
                continue
            inner = values.get(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"TrainingConfig: {key} must be a mapping to take {dotted}, got {inner!r}")
            values[key] = {**inner, rest: value}
        hints = get_type_hints(cls)
        return cls(
            **{key: _as_float(value, hints[key]) for key, value in _known("TrainingConfig", cls, values).items()}
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_values(owner: str, kind: type, values: Mapping[str, Any]) -> None:
    """`values` are fields of the dataclass `kind`, each of the type it states.

    Raises:
        TypeError, ValueError: one is not; the sentence begins with `owner`.
    """
    hints = get_type_hints(kind)
    for key, value in _known(owner, kind, values).items():
        if not _fits(value, hints[key]):
            raise TypeError(f"{owner}: {key} must be {_in_words(hints[key])}, got {value!r}")


def _known(owner: str, kind: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    names = [one.name for one in fields(kind)]
    unknown = [key for key in values if key not in names]
    if unknown:
        raise ValueError(f"{owner}: no setting is called {unknown[0]!r}, only {', '.join(names)}")
    return values


def _fits(value: Any, hint: Any) -> bool:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is Literal:
        return value in options
    if origin is tuple:  # YAML has lists only
        return isinstance(value, (list, tuple)) and all(_fits(one, options[0]) for one in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _in_words(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(option) for option in options)
    if origin is Literal:
        return " or ".join(repr(option) for option in options)
    if origin is tuple:
        return f"a list of {options[0].__name__}"
    names = {int: "an int", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}
    return "None" if hint is type(None) else names[origin or hint]


def _as_float(value: Any, hint: Any) -> Any:
    """1e-3 is text to YAML, which wants 1.0e-3; where a number is expected, it is one."""
    if isinstance(value, str) and (hint is float or float in get_args(hint)):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: {'is a folder' if path.is_dir() else 'no such file'}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: no readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"--config {path}: expected a mapping of settings, got {values!r}")
    return values
