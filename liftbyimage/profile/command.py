"""`liftbyimage profile`: from its options to a profile in a folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from liftbyimage._files import write_atomically
from liftbyimage.checkpoint import load_pipeline
from liftbyimage.data.crop import CROP_SIZE
from liftbyimage.html import write_page
from liftbyimage.models import LIFTERS, Pipeline, build_encoder
from liftbyimage.predict import chosen_device
from liftbyimage.profile.measure import PEERS, Profile, profile
from liftbyimage.profile.page import document
from liftbyimage.profile.parts import example_inputs
from liftbyimage.profile.report import as_csv, as_json, print_profile

DEFAULT_ENCODER = "hrnet-w32"


@dataclass(frozen=True)
class Options:
    """The options of the command as they were written."""

    model: str
    checkpoint: Path | None  # None: `model` is a name, its weights are random
    encoder: str | None
    encoder_weights: Path | None
    batches: list[int]
    device: str
    dtype: str
    against: str
    trace: bool
    out: Path


def run(options: Options, console: Console) -> Profile:
    """Profile a model, print the table and write `profile.json`, `.csv`, `.html` and, if wanted, `trace.json`.

    Raises:
        ValueError: one sentence on options that do not serve.
    """
    against = [peer for peer in options.against.split(",") if peer]
    for peer in against:
        if peer not in PEERS:
            raise ValueError(f"--against: expected {' or '.join(PEERS)}, or both with a comma, got {peer}")
    device = chosen_device("profile", options.device, options.dtype)
    pipeline = _pipeline(options).to(device, getattr(torch, options.dtype)).eval()
    crop = _crop_size(pipeline)
    measured = profile(pipeline, model=options.model, batches=options.batches, against=against, crop=crop)
    print_profile(console, measured)
    files = _write(options, measured)
    if options.trace:
        files.append(_trace(options.out / "trace.json", pipeline, options.batches[0], crop))
    console.print(f"Wrote {', '.join(map(str, files))}.", markup=False, highlight=False, soft_wrap=True)
    return measured


def _pipeline(options: Options) -> Pipeline:
    if options.checkpoint is not None:
        if options.encoder is not None:
            raise ValueError("--encoder goes before a model with random weights; a checkpoint has its own")
        if not options.checkpoint.exists():
            raise ValueError(f"profile: expected {', '.join(LIFTERS)}, demo or a checkpoint, got {options.model}")
        return load_pipeline(options.checkpoint, options.encoder_weights)
    if options.encoder_weights is not None:
        raise ValueError("--encoder-weights needs a checkpoint: this model's weights are random")
    kind = LIFTERS[options.model]
    if kind.reads is None:
        if options.encoder is not None:
            raise ValueError(f"--encoder: a {options.model} lifter reads no image")
        return Pipeline(None, kind(kind.config_type()))
    torch.manual_seed(0)
    encoder = build_encoder(options.encoder or DEFAULT_ENCODER)
    if not hasattr(encoder, kind.reads):
        raise ValueError(
            f"--encoder: a {options.model} lifter needs an encoder with {kind.reads}, got {options.encoder}"
        )
    return Pipeline(encoder, kind(kind.config_type(**kind.sizes(encoder, CROP_SIZE))))


def _crop_size(pipeline: Pipeline) -> tuple[int, int]:
    """(height, width) px: what a LiftByImage was made for, else the usual."""
    grid, stride = getattr(pipeline.lifter.config, "grid", None), getattr(pipeline.encoder, "stride", None)
    return CROP_SIZE if grid is None or stride is None else (grid[0] * stride, grid[1] * stride)


def _write(options: Options, measured: Profile) -> list[Path]:
    files = {"profile.json": as_json(measured), "profile.csv": as_csv(measured)}
    for name, text in files.items():
        write_atomically(options.out / name, lambda file, text=text: file.write(text.encode()))
    write_page(options.out / "profile.html", document(measured, _command(options)))
    return [options.out / name for name in (*files, "profile.html")]


def _command(options: Options) -> str:
    """What would measure it again."""
    parts = ["liftbyimage", "profile", options.model, "--device", options.device, "--dtype", options.dtype]
    parts += [word for batch in options.batches for word in ("--batch", str(batch))]
    for flag, value in (("--encoder", options.encoder), ("--encoder-weights", options.encoder_weights)):
        parts += [] if value is None else [flag, str(value)]
    parts += ["--against", options.against] if options.against else []
    return shlex.join([*parts, "--out", str(options.out)])


@torch.no_grad()
def _trace(path: Path, pipeline: Pipeline, batch: int, crop: tuple[int, int]) -> Path:
    """One pass in Chrome's trace format, as Perfetto and chrome://tracing read it."""
    inputs = example_inputs(pipeline, batch, crop)
    pipeline(*inputs)
    with torch.profiler.profile() as profiler:
        pipeline(*inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part.json")
    profiler.export_chrome_trace(str(part))
    part.replace(path)
    return path
