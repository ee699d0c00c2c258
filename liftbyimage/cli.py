"""The command line. What takes long to import is imported by the command that needs it."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from liftbyimage import __version__
from liftbyimage._files import DEMO_CHECKPOINT, require_place

if TYPE_CHECKING:
    from liftbyimage.models import Pipeline

DEMO_MODEL = "lift-by-image"
DEMONSTRATION = (
    "This is a demonstration model, trained on synthetic scenes only: do not expect it to be accurate on photographs."
)
PROGRAM = "liftbyimage"
COMPLETION_REQUEST = "_LIFTBYIMAGE_COMPLETE"  # the variable by which a shell asks for completions
INTERRUPTED = 130  # as shells report SIGINT
PACKAGE = Path(__file__).resolve().parent

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Lift people in pictures from 2D to 3D, on fused kernels.",
)


def main() -> None:
    if sys.stdout is not None and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name that a terminal cannot show ends no command
    if COMPLETION_REQUEST in os.environ:
        from typer.completion import completion_init

        completion_init()
    app(prog_name=PROGRAM)


@contextmanager
def _mistakes_in_one_sentence() -> Iterator[None]:
    """Print what the library refuses, files that cannot be read or written, and what this machine has not enough of, as
    `error: …`; exit with 2. Ctrl-C ends with a line, too, and 130.

    A ValueError or TypeError that some other package raised is a defect and keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # nobody reads on: typer ends the command without a word
        raise
    except Exception as error:
        sentence = _mistake(error)
        if sentence is None:
            raise
        typer.echo(f"error: {sentence}", err=True)
        raise typer.Exit(2) from None


def _mistake(error: Exception) -> str | None:
    """What to tell the user of an error; None for a defect."""
    text = str(error)
    if isinstance(error, OSError):
        return text
    if isinstance(error, (ValueError, TypeError)):
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        return text if PACKAGE in raised_in.resolve().parents else None
    if type(error).__name__ == "BrokenBuild":  # its module, _extension, would not import
        return f"{text}; `{PROGRAM} doctor` says more"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        size = re.search(r"allocate ([\d.]+ \w+)", text)
        asked = f" ({size[1]} more were asked for)" if size else ""
        return f"out of memory{asked}: smaller batches, fewer workers or a smaller model need less"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"{text.partition('. ')[0].rstrip('.')}: fewer --workers need less memory"
    return None


@contextmanager
def _reporting(as_json: bool) -> Iterator[dict[str, Any]]:
    """A report for a command to fill, printed as JSON if wanted, alone: then all else goes to standard error."""
    report: dict[str, Any] = {}
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield report
    if as_json:
        typer.echo(json.dumps(report, indent=1, allow_nan=False, default=os.fspath))


# What a shell completes, stated here because the library that knows takes seconds to import.
_MODELS = (DEMO_MODEL, "context-aware-poseformer", "pose-only")
_ENCODERS = ("hrnet-w32", "hrnet-w48", "tiny")
_PRECISIONS = ("float32", "bfloat16", "float16")
_FIGURES = ("ratios", "roofline", "scaling")
_DEVICES = ("auto", "cpu", "cuda")
_SOURCES = ("synthetic", "mocap", "pose2sim", "human3.6m", "mpi-inf-3dhp", "mpi-inf-3dhp-test", "pictures")


def _one_of(help: str, *choices: str) -> Any:
    """An option of a few words, which a shell completes; what is none of them the command itself refuses."""
    return typer.Option(help=help, autocompletion=lambda: list(choices))


def _line(help: str) -> Any:
    return typer.Option(metavar="LINE", help=help, autocompletion=lambda: list(_SOURCES))


_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and all else to standard error.")]


class _Shell(str, Enum):
    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def _show_completion(shell: _Shell | None) -> None:
    if shell is not None:
        from typer.completion import get_completion_script

        typer.echo(get_completion_script(prog_name=PROGRAM, complete_var=COMPLETION_REQUEST, shell=shell.value))
        raise typer.Exit


def _install_completion(shell: _Shell | None) -> None:
    if shell is not None:
        from typer.completion import install

        with _mistakes_in_one_sentence():
            _, path = install(shell.value, PROGRAM, COMPLETION_REQUEST)
        typer.echo(f"Wrote {path}; new shells complete {PROGRAM}.")
        raise typer.Exit


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"liftbyimage {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    show_completion: Annotated[
        _Shell | None,
        typer.Option(callback=_show_completion, is_eager=True, help="Print what makes the shell complete commands."),
    ] = None,
    install_completion: Annotated[
        _Shell | None,
        typer.Option(callback=_install_completion, is_eager=True, help="Add that to the shell's own settings."),
    ] = None,
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
    as_json: _Json = False,
) -> None:
    """Render unseen synthetic people, lift them, and say how well and how fast."""
    with _mistakes_in_one_sentence(), _reporting(as_json) as report:
        _check_folder(out)
        from liftbyimage.demo import run_demo

        report.update(run_demo(out, people, seed, Console(), html))


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
        _one_of("The model that --checkpoint must hold: lift-by-image or context-aware-poseformer.", *_MODELS[:2]),
    ] = None,
    encoder_weights: Annotated[
        Path | None, typer.Option(help="Official HRNet weights (w32 or w48) for the checkpoint's encoder.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A trained lifter; by default the demonstration model.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the poses and the pictures.")] = Path("lift-output"),
    format: Annotated[str, _one_of("Of the file with the poses: json or npz.", "json", "npz")] = "json",
    pictures: Annotated[bool, typer.Option(help="Draw a picture of each person, or the video.")] = True,
    frames: Annotated[
        str | None, typer.Option(metavar="A:B", help="Only frames A to B - 1 of the video, from 0.")
    ] = None,
    html: Annotated[
        bool, typer.Option("--html", help="Also write viewer.html: hover over joints, turn the pose; not of a video.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Lift the person in each picture, or in every frame of a video, to 3D."""
    console = Console()
    with _mistakes_in_one_sentence(), _reporting(as_json) as report:
        _check_folder(out)
        from liftbyimage.lift_command import Options, run

        def load_pipeline() -> Pipeline:
            pipeline = _load_pipeline(checkpoint, encoder_weights, model)
            if checkpoint is None:
                console.print(DEMONSTRATION, soft_wrap=True)
            return pipeline

        note = DEMONSTRATION if checkpoint is None else ""
        options = Options(files, pose, pose_model, box, detector, out, format, pictures, frames, html, note)
        sentence, facts = run(options, load_pipeline, console)
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
        report.update(facts, checkpoint=checkpoint or DEMO_CHECKPOINT)


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: expected a folder, got a file")
    require_place(f"--out {out}", out)


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
    as_json: _Json = False,
) -> None:
    """Train the demonstration model on synthetic scenes."""
    with _mistakes_in_one_sentence(), _reporting(as_json) as report:
        if out.is_dir():
            raise ValueError(f"--out {out}: expected a file, got a folder")
        _check_folder(out.parent)
        from liftbyimage import train_demo as training

        trained = training.train_demo(out, seed, Console())
        minutes = trained.pop("minutes")
        report.update(checkpoint=out, seed=seed, mpjpe_mm=trained, minutes=minutes)


@app.command()
def doctor(as_json: _Json = False) -> None:
    """Say which backend serves each op here, what is missing, and how to get it."""
    with _mistakes_in_one_sentence(), _reporting(as_json) as findings:
        from liftbyimage.doctor import print_report, report

        findings.update(report())
        if not as_json:
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
    as_json: _Json = False,
    plot: Annotated[Path | None, typer.Option(help="Draw a figure into this .png or .svg.")] = None,
    figure: Annotated[
        str | None,
        _one_of(
            "Which: ratios, roofline or scaling; by default the last of a --scaling run, else the first.", *_FIGURES
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
        str | None, _one_of("lift-by-image (the default), context-aware-poseformer or pose-only.", *_MODELS)
    ] = None,
    data: Annotated[str | None, _line("What to train on, NAME[:FOLDER][,KEY=VALUE]…")] = None,
    validate: Annotated[str | None, _line("What to validate on.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of the first stage.")] = None,
    stage2_epochs: Annotated[int | None, typer.Option(help="Of the second stage.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records of a step, over all processes.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The paper's by default.")] = None,
    encoder: Annotated[str | None, _one_of("hrnet-w32, hrnet-w48 or tiny.", *_ENCODERS)] = None,
    encoder_weights: Annotated[Path | None, typer.Option(help="Official HRNet weights to start from.")] = None,
    init: Annotated[Path | None, typer.Option(help="A checkpoint to start from.")] = None,
    precision: Annotated[str | None, _one_of("float32, bfloat16 or float16.", *_PRECISIONS)] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read records.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order, flips and dropout.")] = None,
    device: Annotated[str | None, _one_of("auto, cpu or cuda.", *_DEVICES)] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder to keep what stage 2 starts from.")] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict", help="Stop at the first record that cannot be read.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, as lifter.dim=64.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Train a lifter; under torchrun, in several processes."""
    flags = dict(locals())
    first = os.environ.get("RANK", "0") == "0"  # one of torchrun's processes talks
    with _mistakes_in_one_sentence(), _reporting(as_json and first) as report:
        _check_folder(out)
        from liftbyimage.training import TrainingConfig, train

        named = {key: value for key, value in flags.items() if key not in ("out", "config", "set_", "as_json")}
        overrides = {
            key: str(value) if isinstance(value, Path) else value for key, value in named.items() if value is not None
        }
        trained = train(TrainingConfig.read(config, {**overrides, **_settings(set_ or [])}), out)
        if not trained.finished and first:
            typer.echo(f"Stopped; the same command goes on from {out / 'last.pt'}.")
        report.update(trained.report(out))


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


class _FileOrAlone(TyperCommand):
    """`--json` without a file stands for `--json -`, standard output."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        pieces = []
        for word, following in pairwise([*args, "--"]):
            pieces += [word, "-"] if word == "--json" and following.startswith("--") else [word]
        return super().parse_args(ctx, pieces)


_CHECKPOINT_HELP = "A trained lifter of any kind, or demo for the demonstration model."
_DATA_HELP = "NAME[:FOLDER][,OPTION=VALUE]…, such as human3.6m:/data/h36m,split=test."
_EncoderWeights = Annotated[Path | None, typer.Option(help="Official HRNet weights for the checkpoint's encoder.")]
_FlipTest = Annotated[bool, typer.Option("--flip-test", help="Average with the pose of the mirrored crop.")]
_BatchSize = Annotated[int, typer.Option(min=1, help="Records per pass.")]
_Workers = Annotated[int, typer.Option(min=0, help="Processes that read records.")]
_Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first record that cannot be read.")]
_Device = Annotated[str, _one_of("auto, cpu or cuda.", *_DEVICES)]
_Precision = Annotated[str, _one_of("float32, bfloat16, or float16 on a GPU.", *_PRECISIONS)]


@app.command(cls=_FileOrAlone)
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help=_CHECKPOINT_HELP, show_default=False)],
    data: Annotated[str, _line(_DATA_HELP)],
    encoder_weights: _EncoderWeights = None,
    flip_test: _FlipTest = False,
    batch_size: _BatchSize = 32,
    workers: _Workers = 0,
    device: _Device = "auto",
    precision: _Precision = "float32",
    strict: _Strict = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many records, evenly spread.")] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="[FILE]", help="File for the results; without one they are printed, alone."),
    ] = None,
    per_joint: Annotated[bool, typer.Option("--per-joint", help="The mean error of each joint too.")] = False,
) -> None:
    """Measure a lifter by the field's protocols, per action or sequence."""
    printed = json_file == Path("-")
    with _mistakes_in_one_sentence(), _reporting(printed) as report:
        from liftbyimage.evaluate_command import run

        document = run(
            _checkpoint_file(checkpoint),
            data,
            Console(),
            encoder_weights=encoder_weights,
            limit=limit,
            json_file=None if printed else json_file,
            per_joint=per_joint,
            flip_test=flip_test,
            batch_size=batch_size,
            workers=workers,
            device=device,
            precision=precision,
            strict=strict,
        )
        report.update(document)


def _checkpoint_file(checkpoint: Path) -> Path:
    return DEMO_CHECKPOINT if checkpoint == Path("demo") else checkpoint


@app.command("lift-all")
def lift_all(
    data: Annotated[
        str,
        typer.Argument(metavar="LINE", help=_DATA_HELP, show_default=False, autocompletion=lambda: list(_SOURCES)),
    ],
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
    as_json: _Json = False,
) -> None:
    """Lift every record of a source into shards, on one machine or many."""
    console = Console()
    with _mistakes_in_one_sentence(), _reporting(as_json) as report:
        _check_folder(out)
        machine, slash, machines = part.partition("/")
        if not (slash and machine.isdecimal() and machines.isdecimal() and int(machine) < int(machines)):
            raise ValueError(f"--part: expected K/N with 0 ≤ K < N, got {part}")
        from liftbyimage.data.source import open_source
        from liftbyimage.lift_all import BatchLifter
        from liftbyimage.lift_all import lift_all as lift_records
        from liftbyimage.predict import chosen_device

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
        report.update(
            out=out,
            records=len(source),
            shards={"lifted": lifted.done, "present": lifted.present, "others": lifted.others},
            problems=lifted.problems,
            device=str(chosen_device("lift_all", device)),
            checkpoint=_checkpoint_file(checkpoint),
            precision=precision,
            flip_test=flip_test,
        )


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
    as_json: _Json = False,
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


@app.command()
def profile(
    model: Annotated[
        str,
        typer.Argument(
            help="lift-by-image, context-aware-poseformer or pose-only with random weights, demo, or a checkpoint.",
            show_default=False,
            autocompletion=lambda: [*_MODELS, "demo"],
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for profile.json, .csv and .html.")] = Path("profile"),
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Crops per pass; may be repeated.")] = None,
    encoder: Annotated[
        str | None,
        _one_of("Before a model with random weights: hrnet-w32 (the default), hrnet-w48 or tiny.", *_ENCODERS),
    ] = None,
    encoder_weights: _EncoderWeights = None,
    device: _Device = "auto",
    dtype: _Precision = "float32",
    against: Annotated[
        str, typer.Option(metavar="PEERS", help="What to compare with: reference, compile, or both with a comma.")
    ] = "",
    trace: Annotated[bool, typer.Option("--trace", help="Also write trace.json, for Perfetto.")] = False,
    as_json: _Json = False,
) -> None:
    """Measure a model part by part: FLOPs, bytes, time, memory, and how near the machine's ceilings it comes."""
    with _mistakes_in_one_sentence(), _reporting(as_json) as report:
        _check_folder(out)
        from liftbyimage.profile.command import Options, run

        checkpoint = None if model in _MODELS else _checkpoint_file(Path(model))
        options = Options(model, checkpoint, encoder, encoder_weights, batch or [1], device, dtype, against, trace, out)
        report.update(run(options, Console()).as_json())


@contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, and what moves it on: so many records more, of so many in all."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda count, total: progress.update(task, advance=count, total=total)
