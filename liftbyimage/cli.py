"""The command line. What takes long to import is imported by the command that needs it."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from liftbyimage import __version__
from liftbyimage._files import DEMO_CHECKPOINT

if TYPE_CHECKING:
    from liftbyimage.models import Pipeline

DEMO_MODEL = "lift-by-image"
DEMONSTRATION = (
    "This is a demonstration model, trained on synthetic scenes only: do not expect it to be accurate on photographs."
)
PACKAGE = Path(__file__).resolve().parent

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Lift people in pictures from 2D to 3D, on fused kernels.",
)


def main() -> None:
    app(prog_name="liftbyimage")


@contextmanager
def _mistakes_in_one_sentence() -> Iterator[None]:
    """Print what the library refuses, and files that cannot be read or written, as `error: …`; exit with 2.

    A ValueError or TypeError that some other package raised is a defect and keeps its traceback.
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not isinstance(error, OSError) and PACKAGE not in raised_in.resolve().parents:
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"liftbyimage {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo-output"),
    people: Annotated[int, typer.Option(min=1, help="How many people to draw; errors are over at least 256.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Which people.")] = 0,
    html: Annotated[
        bool, typer.Option("--html", help="Also write viewer.html: hover over joints, turn the pose.")
    ] = False,
) -> None:
    """Render unseen synthetic people, lift them, and say how well and how fast."""
    with _mistakes_in_one_sentence():
        _check_folder(out)
        from liftbyimage.demo import run_demo

        run_demo(out, people, seed, Console(), html)


@app.command()
def lift(
    files: Annotated[
        list[Path], typer.Argument(metavar="IMAGE…|VIDEO", help="Pictures, one person in each, or one video.")
    ],
    pose: Annotated[Path | None, typer.Option(help="JSON file with the 2D pose of each picture.")] = None,
    pose_model: Annotated[
        Path | None,
        typer.Option(help="Instead of --pose: a 2D pose model, .onnx or official HRNet weights."),
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(metavar="x0,y0,x1,y1", help="Where the pose model looks, in px; in a video, in its first frame."),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Your function that finds people; the largest is lifted."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The model that --checkpoint must hold: lift-by-image or context-aware-poseformer."),
    ] = None,
    encoder_weights: Annotated[
        Path | None, typer.Option(help="Official HRNet weights (w32 or w48) for the checkpoint's encoder.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A trained lifter; by default the demonstration model.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the poses and the pictures.")] = Path("lift-output"),
    format: Annotated[str, typer.Option(help="Of the file with the poses: json or npz.")] = "json",
    pictures: Annotated[bool, typer.Option(help="Draw a picture of each person, or the video.")] = True,
    frames: Annotated[
        str | None, typer.Option(metavar="A:B", help="Only frames A to B - 1 of the video, from 0.")
    ] = None,
    html: Annotated[
        bool, typer.Option("--html", help="Also write viewer.html: hover over joints, turn the pose; not of a video.")
    ] = False,
) -> None:
    """Lift the person in each picture, or in every frame of a video, to 3D."""
    console = Console()
    with _mistakes_in_one_sentence():
        _check_folder(out)
        from liftbyimage.lift_command import Options, run

        def load_pipeline() -> Pipeline:
            pipeline = _load_pipeline(checkpoint, encoder_weights, model)
            if checkpoint is None:
                console.print(DEMONSTRATION, soft_wrap=True)
            return pipeline

        note = DEMONSTRATION if checkpoint is None else ""
        options = Options(files, pose, pose_model, box, detector, out, format, pictures, frames, html, note)
        console.print(run(options, load_pipeline, console), markup=False, highlight=False, soft_wrap=True)


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: expected a folder, got a file")


def _load_pipeline(checkpoint: Path | None, encoder_weights: Path | None, model: str | None) -> Pipeline:
    from liftbyimage.checkpoint import load_pipeline

    if checkpoint is None and encoder_weights is not None:
        raise ValueError(
            "--encoder-weights needs --checkpoint too: a lifter trained on that encoder's features "
            "(the demonstration model has an encoder of its own)"
        )
    if checkpoint is None and model not in (None, DEMO_MODEL):
        raise ValueError(f"--model {model} needs --checkpoint: the demonstration model is {DEMO_MODEL}")
    return load_pipeline(checkpoint or DEMO_CHECKPOINT, encoder_weights, model=model)


@app.command("train-demo")
def train_demo(
    out: Annotated[Path, typer.Option(help="File for the checkpoint.")] = Path("demo.pt"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, scenes and order.")] = 0,
) -> None:
    """Train the demonstration model on synthetic scenes."""
    with _mistakes_in_one_sentence():
        if out.is_dir():
            raise ValueError(f"--out {out}: expected a file, got a folder")
        _check_folder(out.parent)
        from liftbyimage import train_demo as training

        training.train_demo(out, seed, Console())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Say which backend serves each op here, what is missing, and how to get it."""
    from liftbyimage.doctor import print_report, report

    findings = report()
    if as_json:
        typer.echo(json.dumps(findings, indent=1))
    else:
        print_report(Console(), findings)


@app.command("bench-report")
def bench_report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RESULTS.json…", help="JSON of `pytest bench --benchmark-json=FILE`.", show_default=False
        ),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="OLD.json", help="Judge RESULTS by this older run; exit with 3 if a row became slower."),
    ] = None,
    summary: Annotated[bool, typer.Option("--summary", help="One line per work instead of every row.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="START", help="Only works that start so; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw a figure into this .png or .svg.")] = None,
    figure: Annotated[
        str | None,
        typer.Option(
            help="Which: ratios, roofline or scaling; by default the last of a --scaling run, else the first."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with the table and the figures.")] = None,
    update: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.md", help="Make anew the tables of a Markdown file that name their results."),
    ] = None,
) -> None:
    """Say what a benchmark run measured: tables, figures, and what changed since an older run."""
    with _mistakes_in_one_sentence():
        from liftbyimage.bench_report.command import Options, run

        options = Options(results or [], compare or [], only or [], summary, as_json, plot, figure, html, update or [])
        code = run(options, typer.echo, lambda text: typer.echo(text, err=True))
    if code:
        raise typer.Exit(code)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and curves; a run that it holds goes on.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; flags come on top of it.")] = None,
    model: Annotated[
        str | None, typer.Option(help="lift-by-image (the default), context-aware-poseformer or pose-only.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="LINE", help="What to train on, NAME[:FOLDER][,KEY=VALUE]…")
    ] = None,
    validate: Annotated[str | None, typer.Option(metavar="LINE", help="What to validate on.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of the first stage.")] = None,
    stage2_epochs: Annotated[int | None, typer.Option(help="Of the second stage.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records of a step, over all processes.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The paper's by default.")] = None,
    encoder: Annotated[str | None, typer.Option(metavar="NAME", help="hrnet-w32, hrnet-w48 or tiny.")] = None,
    encoder_weights: Annotated[Path | None, typer.Option(help="Official HRNet weights to start from.")] = None,
    init: Annotated[Path | None, typer.Option(help="A checkpoint to start from.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read records.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order, flips and dropout.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder to keep what stage 2 starts from.")] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict", help="Stop at the first record that cannot be read.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, as lifter.dim=64.")
    ] = None,
) -> None:
    """Train a lifter; under torchrun, in several processes."""
    flags = dict(locals())
    with _mistakes_in_one_sentence():
        _check_folder(out)
        from liftbyimage.training import TrainingConfig, train

        named = {key: value for key, value in flags.items() if key not in ("out", "config", "set_")}
        overrides = {
            key: str(value) if isinstance(value, Path) else value for key, value in named.items() if value is not None
        }
        trained = train(TrainingConfig.read(config, {**overrides, **_settings(set_ or [])}), out)
        if not trained.finished and os.environ.get("RANK", "0") == "0":  # one of torchrun's processes says it
            typer.echo(f"Stopped; the same command goes on from {out / 'last.pt'}.")


def _settings(pairs: list[str]) -> dict[str, object]:
    """KEY=VALUE pairs, values as YAML."""
    import yaml

    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"--set must be KEY=VALUE, got {pair!r}")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {pair}: no readable YAML: {' '.join(str(error).split())}") from None
    return settings


_CHECKPOINT_HELP = "A trained lifter of any kind, or demo for the demonstration model."
_DATA_HELP = "NAME[:FOLDER][,OPTION=VALUE]…, such as human3.6m:/data/h36m,split=test."
_EncoderWeights = Annotated[Path | None, typer.Option(help="Official HRNet weights for the checkpoint's encoder.")]
_FlipTest = Annotated[bool, typer.Option("--flip-test", help="Average with the pose of the mirrored crop.")]
_BatchSize = Annotated[int, typer.Option(min=1, help="Records per pass.")]
_Workers = Annotated[int, typer.Option(min=0, help="Processes that read records.")]
_Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first record that cannot be read.")]
_Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
_Precision = Annotated[str, typer.Option(help="float32, bfloat16, or float16 on a GPU.")]


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help=_CHECKPOINT_HELP, show_default=False)],
    data: Annotated[str, typer.Option(metavar="LINE", help=_DATA_HELP)],
    encoder_weights: _EncoderWeights = None,
    flip_test: _FlipTest = False,
    batch_size: _BatchSize = 32,
    workers: _Workers = 0,
    device: _Device = "auto",
    precision: _Precision = "float32",
    strict: _Strict = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many records, evenly spread.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the results.")] = None,
    per_joint: Annotated[bool, typer.Option("--per-joint", help="The mean error of each joint too.")] = False,
) -> None:
    """Measure a lifter by the field's protocols, per action or sequence."""
    with _mistakes_in_one_sentence():
        from liftbyimage.evaluate_command import run

        run(
            _checkpoint_file(checkpoint),
            data,
            Console(),
            encoder_weights=encoder_weights,
            limit=limit,
            json_file=json_file,
            per_joint=per_joint,
            flip_test=flip_test,
            batch_size=batch_size,
            workers=workers,
            device=device,
            precision=precision,
            strict=strict,
        )


def _checkpoint_file(checkpoint: Path) -> Path:
    return DEMO_CHECKPOINT if checkpoint == Path("demo") else checkpoint


@app.command("lift-all")
def lift_all(
    data: Annotated[str, typer.Argument(metavar="LINE", help=_DATA_HELP, show_default=False)],
    out: Annotated[Path, typer.Option(metavar="SHARDS", help="Folder for the shards; what is there stays.")],
    checkpoint: Annotated[Path, typer.Option(help=_CHECKPOINT_HELP)] = Path("demo"),
    encoder_weights: _EncoderWeights = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Records in a shard.")] = 1024,
    batch_size: _BatchSize = 32,
    workers: _Workers = 0,
    part: Annotated[str, typer.Option(metavar="K/N", help="Of N machines the K-th from 0 runs this.")] = "0/1",
    device: _Device = "auto",
    precision: _Precision = "float32",
    flip_test: _FlipTest = False,
    strict: _Strict = False,
) -> None:
    """Lift every record of a source into shards, on one machine or many."""
    console = Console()
    with _mistakes_in_one_sentence():
        _check_folder(out)
        machine, slash, machines = part.partition("/")
        if not (slash and machine.isdecimal() and machines.isdecimal() and int(machine) < int(machines)):
            raise ValueError(f"--part: expected K/N with 0 ≤ K < N, got {part}")
        from liftbyimage.data.source import open_source
        from liftbyimage.lift_all import BatchLifter
        from liftbyimage.lift_all import lift_all as lift_records

        source = open_source(data)
        lifter = BatchLifter(_checkpoint_file(checkpoint), encoder_weights, device, precision, flip_test)
        if checkpoint == Path("demo"):
            console.print(DEMONSTRATION, soft_wrap=True)
        with _progress(console, "Lifting") as advance:
            lifted = lift_records(
                source,
                out,
                lifter,
                shard_size=shard_size,
                batch_size=batch_size,
                workers=workers,
                part=(int(machine), int(machines)),
                strict=strict,
                on_batch=advance,
            )
        text = f"{out}: {lifted.done} shards lifted, {lifted.present} already there, {lifted.others} left to others."
        if lifted.problems:
            text += f" {lifted.problems} records could not be read: their poses are NaN, and `problem` says why."
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def live(
    source: Annotated[str, typer.Argument(help="A camera, 0 or /dev/video0, or a video file.", show_default=False)],
    pose_model: Annotated[
        Path | None, typer.Option(help="The 2D pose model, .onnx or official HRNet weights; needed.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A trained lifter; by default the demonstration model.")
    ] = None,
    encoder_weights: _EncoderWeights = None,
    box: Annotated[
        str | None, typer.Option(metavar="x0,y0,x1,y1", help="Where the pose model looks in the first frame, px.")
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Your function that finds people; the largest is lifted."),
    ] = None,
    device: _Device = "auto",
    precision: _Precision = "float32",
    optimize: Annotated[bool, typer.Option("--optimize", help="Make the encoder fast first.")] = False,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Of the page on 127.0.0.1; by default a free one.")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Or only measure.")] = True,
    unpaced: Annotated[
        bool, typer.Option("--unpaced", help="Every frame of a video, as fast as they can be lifted.")
    ] = False,
    frames: Annotated[
        str | None, typer.Option(metavar="A:B", help="Only frames A to B - 1 of a video, from 0.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Draw into this video too, .mp4.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON for programs.")] = False,
) -> None:
    """Lift the person before a camera or in a video live, on a page, and measure every stage."""
    notes = Console(stderr=as_json)
    with _mistakes_in_one_sentence():
        from liftbyimage.live_command import Options, print_result, run

        def load_pipeline() -> Pipeline:
            pipeline = _load_pipeline(checkpoint, encoder_weights, None)
            if checkpoint is None:
                notes.print(DEMONSTRATION, soft_wrap=True)
            return pipeline

        looks = (pose_model, box, detector)
        options = Options(source, *looks, device, precision, optimize, port, browser, page, unpaced, out, frames)
        result = run(options, load_pipeline, "" if checkpoint else DEMONSTRATION, notes)
        if as_json:
            typer.echo(json.dumps(result.as_json(), indent=1, ensure_ascii=False, allow_nan=False))
        else:
            print_result(notes, result)
        if result.error is not None:
            raise result.error


@contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, and what moves it on: so many records more, of so many in all."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda count, total: progress.update(task, advance=count, total=total)
