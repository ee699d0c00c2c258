"""The figures of `bench-report`, and its page: what they show, and that nothing is clipped or overlaps."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from bench_json import entry, write
from browser import opened
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from typer.testing import CliRunner

from liftbyimage import cli
from liftbyimage.bench_report.ratios import plot_ratios
from liftbyimage.bench_report.results import Machine, read_machines
from liftbyimage.bench_report.roofline import plot_roofline
from liftbyimage.bench_report.scaling import plot_scaling

STORED = Path(__file__).resolve().parents[1] / "bench" / "results" / "cpu-2-cores"
GPU = {"device_name": "Some GPU", "device": "cuda", "dtype": "bfloat16"}


def _run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["bench-report", *map(str, arguments)])


def _scaling(tmp_path: Path, sizes: list[tuple[int, int, int]]) -> Path:
    """Made-up medians: the reference grows as B·P·D, ours as B·P·√D."""
    entries = []
    for batch, patches, dim in sizes:
        facts = {"op": "lifter", "direction": "forward", "shape": {"B": batch, "P": patches, "D": dim}}
        for name, seconds in (("reference", batch * patches * dim), ("liftbyimage", batch * patches * dim**0.5)):
            entries.append(entry(f"lifter {batch} {patches} {dim}", name, 1e-6 * seconds, **facts))
    return write(tmp_path / "scaling.json", entries)


VARIED = [(1, 8, 64), (2, 8, 64), (4, 8, 64), (2, 8, 128), (2, 8, 256), (2, 16, 64)]


def test_scaling_shows_every_size_that_varies_with_its_exponent(tmp_path: Path) -> None:
    path = _scaling(tmp_path, VARIED)
    (machine,) = read_machines([path])
    visible = [axes for axes in plot_scaling(machine).axes if axes.get_visible()]
    labels = {axes.get_xlabel(): [text.get_text() for text in axes.get_legend().get_texts()] for axes in visible}
    assert labels == {
        "batch B": ["reference: B$^{1.00}$", "liftbyimage: B$^{1.00}$"],
        "token width D": ["reference: D$^{1.00}$", "liftbyimage: D$^{0.50}$"],
    }
    assert visible[0].lines[1].get_xdata().tolist() == [1, 2, 4]
    out = tmp_path / "scaling.png"
    run = _run(path, "--plot", out)
    assert (run.exit_code, run.stdout) == (0, f"Wrote {out}.\n")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_scaling_needs_a_size_that_varies(tmp_path: Path) -> None:
    path = _scaling(tmp_path, [(1, 8, 64), (2, 8, 64)])
    run = _run(path, "--plot", tmp_path / "none.png", "--figure", "scaling")
    assert run.exit_code == 2
    assert run.stderr == f"error: benchmark results {path}: no size takes 3 values: run with --scaling\n"
    assert not (tmp_path / "none.png").exists()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    work = {"flops": 1e9, "bytes": 1e7, "gflops": 50.0}
    entries = [
        entry("fast", "reference", 0.4, **work),
        entry("fast", "torch.compile", 0.2),
        entry("fast", "liftbyimage cpu", 0.1, **{**work, "flops": 5e8, "gflops": 100.0}),
        entry("slow", "reference", 0.1),
        entry("slow", "liftbyimage cpu", 0.2),
    ]
    return write(tmp_path / "results.json", entries)


@pytest.fixture
def two_machines(tmp_path: Path, results: Path) -> list[Machine]:
    rows = [entry("fast", "reference", 0.03, **GPU), entry("fast", "liftbyimage cuda", 0.01, **GPU)]
    return read_machines([results, write(tmp_path / "gpu.json", rows)])


def test_ratios_are_bars_from_1(results: Path) -> None:
    (axes,) = plot_ratios(read_machines([results]), ["Some CPU"]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fast", "slow"]
    assert [bar.get_x() for bar in axes.patches] == [1, 1]
    assert [1 + bar.get_width() for bar in axes.patches] == pytest.approx([4, 0.5])
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
    assert [text.get_text() for text in axes.texts] == ["4.00×", "0.50×"]
    (others,) = axes.collections
    assert others.get_offsets()[0].tolist() == [2, 0]


def test_a_run_that_is_slow_throughout_is_drawn_too(tmp_path: Path) -> None:
    path = write(tmp_path / "slow.json", [entry("slow", "reference", 0.1), entry("slow", "liftbyimage", 0.2)])
    figure = plot_ratios(read_machines([path]), ["Some CPU"])
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["liftbyimage"]


def test_ratios_of_several_machines_stand_side_by_side(two_machines: list[Machine]) -> None:
    (axes,) = plot_ratios(two_machines, ["Some CPU", "Some GPU"]).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Some CPU", "Some GPU"]
    assert [text.get_text() for text in axes.texts] == ["4.00×", "0.50×", "3.00×"]
    cpu, _, gpu = axes.patches
    assert cpu.get_y() + cpu.get_height() <= gpu.get_y()


def test_roofline_places_rates_over_intensities(results: Path) -> None:
    panel, key = plot_roofline(read_machines([results]), ["Some CPU"]).axes
    references, ours = (points.get_offsets().tolist() for points in panel.collections)
    assert (references, ours) == ([[100, 50]], [[50, 100]])
    roof = panel.lines[-1]
    expected = [min(194.6, 6.63 * x) for x in roof.get_xdata()]
    assert roof.get_ydata().tolist() == pytest.approx(expected)
    assert [text.get_text() for text in key.texts] == ["1", "fast"]
    assert [text.get_text() for text in panel.texts] == ["1"]


def test_roofline_needs_products_and_bytes(two_machines: list[Machine]) -> None:
    with pytest.raises(ValueError) as refused:
        plot_roofline(two_machines, ["a", "b"])
    assert str(refused.value) == (
        f"{two_machines[1].named()}: no liftbyimage row has counted products and bytes to draw a roofline of"
    )


def _drawn(figure: Figure) -> list[Text]:
    """Every text that a reader sees; matplotlib also keeps labels of ticks beyond the limits and of hidden axes."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            beyond = [tick for tick in ticks if not (axes.axison and low <= tick.get_loc() <= high)]
            hidden |= {id(label) for tick in beyond for label in (tick.label1, tick.label2)}
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and id(text) not in hidden]


@pytest.mark.parametrize("name", ["2026-11-20.json", "2026-11-20-context.json"])
@pytest.mark.parametrize("plot", [plot_ratios, plot_roofline])
def test_nothing_is_clipped_or_overlaps(name: str, plot: Any) -> None:
    figure = plot(read_machines([STORED / name]), ["AMD EPYC"])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    # Of a number's box, not that of the line to its point.
    boxes = [(text.get_text(), Text.get_window_extent(text, renderer)) for text in _drawn(figure)]
    assert len(boxes) > 20
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (text, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.padded(-1.5).overlaps(other_box.padded(-1.5)), (text, other)


def test_svg_is_text_and_the_same_each_time(results: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for out in (first, second):
        run = _run(results, "--plot", out, "--figure", "roofline", "--json")
        assert (run.exit_code, run.stderr) == (0, f"Wrote {out}.\n")
        assert run.stdout.startswith("{")
    assert ">fast</text>" in first.read_text()
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("dark", [False, True])
def test_page_holds_the_table_and_the_figures(results: Path, tmp_path: Path, dark: bool) -> None:
    out = tmp_path / "page.html"
    run = _run(results, "--html", out)
    assert (run.exit_code, run.stdout) == (0, f"Wrote {out}.\n")
    with opened(out, dark=dark) as page:
        page.assert_alone()
        assert page.page.locator("tbody tr").count() == 5
        assert page.page.locator("#ratios svg").count() == page.page.locator("#roofline svg").count() == 1
        texts = page.page.locator("#ratios svg text").all_text_contents()
        assert {"fast", "slow", "4.00×", "0.50×"} <= set(texts)
        colours = {
            page.page.locator("#ratios svg text", has_text=text).first.evaluate("node => getComputedStyle(node).fill")
            for text in ("fast", "4.00×")
        }
        ink = page.page.evaluate("getComputedStyle(document.body).color")
        assert colours == {ink}


def test_page_escapes_and_says_why_a_figure_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "results.json", [entry("<img src=x>", "reference", 1.0)])
    new = write(tmp_path / "new.json", [entry("<img src=x>", "reference", 1.5), entry("<img src=x>", "ours", 1.5)])
    out = tmp_path / "page.html"
    run = _run(new, "--compare", path, "--html", out)
    assert (run.exit_code, run.stdout) == (
        0,
        f"Wrote {out}.\nBeyond noise, 0 rows are slower and 0 faster; 0 within it.\n",
    )
    text = out.read_text()
    assert "<img" not in text
    assert text.count("no work has both a row of plain PyTorch (reference) and one of liftbyimage") == 2


def test_page_of_a_scaling_run_shows_it(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert _run(_scaling(tmp_path, VARIED), "--html", out).exit_code == 0
    with opened(out) as page:
        assert page.page.locator("#scaling svg").count() == 1
    assert "#000000" not in out.read_text()  # which would not be seen in the dark
