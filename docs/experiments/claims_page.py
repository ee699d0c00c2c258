"""Tables and figures of claims.md, made of the numbers in claims.json."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from liftbyimage._files import write_atomically

Results = dict[str, Any]
LABORATORY, UNSEEN = WHERE = ("laboratory", "unseen")
PLAIN, PLAIN_SELECTED, ALL, GUIDED = ("plain", 1.0), ("plain", 0.3), ("guided", 1.0), ("guided", 0.3)
POSE_ONLY = ("2D only", None)
LABELS = {
    POSE_ONLY: "2D only",
    PLAIN: "plain",
    PLAIN_SELECTED: "plain + selection",
    ALL: "guided",
    GUIDED: "guided + selection",
}
PLACES = {PLAIN_SELECTED: "none", ("guided first", 0.3): "first", GUIDED: "middle", ("guided last", 0.3): "last"}
RETENTIONS = (0.1, 0.3, 0.5, 1.0)
COLOURS = {LABORATORY: "#0072B2", UNSEEN: "#D55E00"}
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def publish(results: Results, template: Path, page: Path, images: Path) -> None:
    """Write `page`, which is `template` with all its blocks of results made anew, and the figures into `images`."""
    images.mkdir(parents=True, exist_ok=True)
    for name, figure in (("claims", main_figure(results)), ("claims-ablations", ablation_figure(results))):
        write_atomically(images / f"{name}.png", lambda file, figure=figure: figure.savefig(file, dpi=90))
    text = fill(template.read_text(encoding="utf-8"), results)
    write_atomically(page, lambda file: file.write(text.encode()))


def fill(page: str, results: Results) -> str:
    """`page` with each block between `<!-- results: NAME -->` and `<!-- end of results -->` made anew."""
    return _BLOCK.sub(lambda block: block[1] + "\n" + BLOCKS[block[2]](results) + "\n\n" + block[3], page)


def values(results: Results, model: tuple[str, float | None], where: str, name: str) -> list[float]:
    """A number of one model on one test set, for every seed in order."""
    runs = [
        run
        for run in results["runs"]
        if run["model"] == model[0] and (model[1] is None or run["lifter"]["retention"] == model[1])
    ]
    return [run[where][name] for run in sorted(runs, key=lambda run: run["seed"])]


def lost(results: Results, model: tuple[str, float | None], name: str = "mpjpe_mm") -> list[float]:
    """How much larger an error is on unseen backgrounds than in the laboratory."""
    pairs = zip(values(results, model, UNSEEN, name), values(results, model, LABORATORY, name), strict=True)
    return [unseen - laboratory for unseen, laboratory in pairs]


def spread(numbers: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{mean(numbers):.{digits}f} ± {deviation:.{digits}f}"


def percent(shares: Sequence[float]) -> str:
    return spread([100 * share for share in shares]) + " %"


def verdict(differences: Sequence[float]) -> str:
    """Whether differences over seeds, positive where a claim is right, show it: alike in sign in every seed, and their
    mean more than two standard errors from zero."""
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    clear = abs(mean(differences)) > 2 * error
    if clear and min(differences) > 0:
        return "**holds**"
    if clear and max(differences) < 0:
        return "**does not hold here**"
    return "cannot be told"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def setting_block(results: Results) -> str:
    recipe, versions = results["recipe"], results["versions"]
    height, width = recipe["crop"]
    steps = -(-recipe["people"] // recipe["batch_size"])
    rows = [
        ("seeds", ", ".join(map(str, recipe["seeds"]))),
        ("crop, grid of patches", f"{height}×{width} px, {height // 4}×{width // 4}"),
        ("people to train on, before the laboratory", str(recipe["people"])),
        ("people to test on, before the laboratory and before textures", str(recipe["test_people"])),
        ("lifter", f"width {recipe['dim']}, {recipe['heads']} heads, no dropout"),
        ("encoder", f"TinyEncoder({recipe['channels']})"),
        ("pretraining of the encoder", f"{recipe['detector_people']} people, {recipe['detector_steps']} steps"),
        ("stage 1", f"{recipe['epochs']} epochs, {recipe['epochs'] * steps} steps"),
        ("stage 2", f"{recipe['stage2_epochs']} epochs, {recipe['stage2_epochs'] * steps} steps"),
        ("2D only", f"{(recipe['epochs'] + recipe['stage2_epochs']) * steps} steps"),
        ("every step", f"batch {recipe['batch_size']}, Adam, learning rate {recipe['learning_rate']:g} at its highest"),
        ("time", f"{results['minutes']:.0f} minutes of one core in all, two runs side by side"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return table(("", ""), rows)


@dataclass(frozen=True)
class Comparison:
    """Something that a claim says, as two numbers by seed of which the first should be the smaller."""

    letter: str
    claim: str
    smaller: list[float]
    larger: list[float]
    show: Callable[[Sequence[float]], str]

    @property
    def differences(self) -> list[float]:
        return [more - less for less, more in zip(self.smaller, self.larger, strict=True)]

    def in_words(self) -> str:
        numbers = f"{self.show(self.smaller)} against {self.show(self.larger)}"
        return f"{self.claim}: {verdict(self.differences)}, by {self.show(self.differences)} ({numbers})"


def comparisons(results: Results) -> list[Comparison]:
    """All that the page judges."""

    def of(model: tuple[str, float | None], where: str, name: str = "mpjpe_mm") -> list[float]:
        return values(results, model, where, name)

    def errors(letter: str, claim: str, model: Any, other: Any, where: str) -> Comparison:
        return Comparison(letter, f"{claim}, {where}", of(model, where), of(other, where), _mm)

    halfway, end = ([curve[at] for curve in unseen_curves(results, "plain")] for at in (_halfway(results), -1))
    plain, even = (of(PLAIN, LABORATORY, name) for name in ("background", "background_of_uniform"))
    compared = [
        *(errors("a", "guided + selection beats 2D only", GUIDED, POSE_ONLY, where) for where in WHERE),
        *(errors("a", "plain beats 2D only", PLAIN, POSE_ONLY, where) for where in WHERE),
        Comparison("b", "plain pays more than half its attention to background", [0.5] * len(plain), plain, percent),
        Comparison("b", "plain pays background more attention than an even spread would", even, plain, percent),
        Comparison("b", "plain errs more on unseen backgrounds", of(PLAIN, LABORATORY), of(PLAIN, UNSEEN), _mm),
        Comparison("b", "plain errs more on unseen backgrounds at the end than half-way", halfway, end, _mm),
    ]
    for stage, name in (("1", "background"), ("2", "background_stage2")):
        claim = f"guided + selection looks less at background than plain, stage {stage}"
        compared.append(
            Comparison("c", claim, of(GUIDED, LABORATORY, name), of(PLAIN, LABORATORY, name), percent),
        )
    compared += [
        Comparison("c", "guided + selection loses less than plain", lost(results, GUIDED), lost(results, PLAIN), _mm),
        Comparison("c", "the layer alone: guided loses less than plain", lost(results, ALL), lost(results, PLAIN), _mm),
        Comparison(
            "c",
            "selection alone: plain + selection loses less than plain",
            lost(results, PLAIN_SELECTED),
            lost(results, PLAIN),
            _mm,
        ),
        errors("c", "guided + selection beats plain", GUIDED, PLAIN, UNSEEN),
    ]
    for where in WHERE:
        for retention in RETENTIONS:
            if retention != GUIDED[1]:
                compared.append(errors("d", f"r = 0.3 beats r = {retention}", GUIDED, ("guided", retention), where))
        for model in (("guided first", 0.3), ("guided last", 0.3)):
            compared.append(errors("d", f"middle beats {PLACES[model]} layer", GUIDED, model, where))
    return compared


def verdicts_block(results: Results) -> str:
    """One line a comparison."""
    lines: list[str] = []
    compared = comparisons(results)
    for letter in dict.fromkeys(one.letter for one in compared):
        lines += [f"- ({letter})", *(f"  - {one.in_words()}" for one in compared if one.letter == letter)]
    return "\n".join(lines)


def differences_block(results: Results) -> str:
    rows = [
        (f"({one.letter})", one.claim, one.show(one.differences), _each(one), verdict(one.differences))
        for one in comparisons(results)
    ]
    return table(("", "claim", "difference in its favour", "by seed", ""), rows)


def _each(comparison: Comparison) -> str:
    scale = 100 if comparison.show is percent else 1
    return ", ".join(f"{scale * difference:+.1f}" for difference in comparison.differences)


def _mm(numbers: Sequence[float]) -> str:
    return spread(numbers) + " mm"


def unseen_curves(results: Results, model: str) -> list[list[float]]:
    """By seed, the coarse MPJPE on unseen backgrounds after each epoch of stage 1."""
    runs = sorted((run for run in results["stage1"] if run["model"] == model), key=lambda run: run["seed"])
    return [[point["mpjpe_mm"] for point in run[UNSEEN]] for run in runs]


def _halfway(results: Results) -> int:
    return (results["recipe"]["epochs"] - 1) // 2


def errors_block(results: Results) -> str:
    rows = []
    for model, label in LABELS.items():
        cells = [spread(values(results, model, where, name)) for name in ("mpjpe_mm", "p_mpjpe_mm") for where in WHERE]
        ratios = [
            unseen / laboratory
            for unseen, laboratory in zip(
                values(results, model, UNSEEN, "mpjpe_mm"), values(results, model, LABORATORY, "mpjpe_mm"), strict=True
            )
        ]
        rows.append((label, *cells, spread(lost(results, model)), spread(ratios, 2)))
    head = ("", "MPJPE laboratory", "unseen", "P-MPJPE laboratory", "unseen", "lost: MPJPE", "ratio")
    return table(head, rows)


def attention_block(results: Results) -> str:
    def shares(model: tuple[str, float | None], names: Sequence[str]) -> list[str]:
        return [percent(values(results, model, where, name)) for name in names for where in WHERE]

    rows = [("spread evenly", *shares(PLAIN, ["background_of_uniform"] * 3))]
    for model, label in LABELS.items():
        if model != POSE_ONLY:
            rows.append((label, *shares(model, ("background", "background_selected", "background_stage2"))))
    head = (
        "",
        "stage 1, laboratory",
        "unseen",
        "selected patches, laboratory",
        "unseen",
        "stage 2, laboratory",
        "unseen",
    )
    return table(head, rows)


def retention_block(results: Results) -> str:
    rows = []
    for retention in RETENTIONS:
        model = ("guided", retention)
        errors = [spread(values(results, model, where, "mpjpe_mm")) for where in WHERE]
        shares = [percent(values(results, model, LABORATORY, f"background_{name}")) for name in ("selected", "stage2")]
        rows.append((f"{retention}", *errors, spread(lost(results, model)), *shares))
    coarse = [spread(values(results, GUIDED, where, "coarse_mpjpe_mm")) for where in WHERE]
    rows.append(("stage 1 alone", *coarse, spread(lost(results, GUIDED, "coarse_mpjpe_mm")), "", ""))
    head = ("r", "MPJPE laboratory", "unseen", "lost", "background among selected patches", "in stage 2's attention")
    return table(head, rows)


def place_block(results: Results) -> str:
    rows = []
    for model, label in PLACES.items():
        errors = [
            spread(values(results, model, where, name)) for name in ("coarse_mpjpe_mm", "mpjpe_mm") for where in WHERE
        ]
        share = percent(values(results, model, LABORATORY, "background"))
        rows.append((label, *errors, spread(lost(results, model)), share))
    head = (
        "pose-guided layer",
        "coarse MPJPE laboratory",
        "unseen",
        "refined MPJPE laboratory",
        "unseen",
        "lost",
        "background in stage 1's attention",
    )
    return table(head, rows)


def epochs_block(results: Results) -> str:
    models = ("plain", "guided", "guided first", "guided last")
    curves = [list(zip(*unseen_curves(results, model), strict=True)) for model in models]  # by model, epoch, seed
    rows = [(f"{epoch + 1}", *(spread(curve[epoch]) for curve in curves)) for epoch in range(len(curves[0]))]
    return table(("after epoch", *models), rows)


BLOCKS = {
    "setting": setting_block,
    "verdicts": verdicts_block,
    "differences": differences_block,
    "errors": errors_block,
    "attention": attention_block,
    "retention": retention_block,
    "place": place_block,
    "epochs": epochs_block,
}


def main_figure(results: Results) -> Figure:
    """Errors of each model on both test sets, and the background's share of attention."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    models = list(LABELS)
    _bars(left, results, models, "mpjpe_mm")
    left.set(ylabel="MPJPE, mm", title="error of the final pose")
    image_models = [model for model in models if model != POSE_ONLY]
    _bars(right, results, image_models, "background_stage2", scale=100)
    even = 100 * mean(values(results, PLAIN, LABORATORY, "background_of_uniform"))
    right.axhline(even, color="#555555", linestyle="--", linewidth=1, label="attention spread evenly")
    right.set(ylabel="%, stage 2's last layer", title="attention on background")
    for axes, shown in ((left, models), (right, image_models)):
        axes.set_xticks(range(len(shown)), [LABELS[model].replace(" + ", " +\n") for model in shown], fontsize=8)
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def _bars(
    axes: Axes, results: Results, models: Sequence[tuple[str, float | None]], name: str, scale: float = 1
) -> None:
    for offset, where in ((-0.2, LABORATORY), (0.2, UNSEEN)):
        for at, model in enumerate(models):
            numbers = [scale * number for number in values(results, model, where, name)]
            label = where if at == 0 else None
            axes.bar(at + offset, mean(numbers), 0.38, color=COLOURS[where], alpha=0.55, label=label)
            axes.plot([at + offset] * len(numbers), numbers, "o", color=COLOURS[where], markersize=4)


def ablation_figure(results: Results) -> Figure:
    """Errors by retention and by place, and on unseen backgrounds as stage 1 goes on; every seed is a dot."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    by_retention, by_place, by_epoch = figure.subplots(1, 3)
    for where in WHERE:
        for axes, models in (
            (by_retention, [("guided", retention) for retention in RETENTIONS]),
            (by_place, list(PLACES)),
        ):
            numbers = [values(results, model, where, "mpjpe_mm") for model in models]
            axes.plot([mean(each) for each in numbers], "-", color=COLOURS[where], label=where)
            for at, each in enumerate(numbers):
                axes.plot([at] * len(each), each, "o", color=COLOURS[where], markersize=4)
    by_retention.set_xticks(range(len(RETENTIONS)), [f"{retention}" for retention in RETENTIONS])
    by_retention.set(xlabel="retention r", ylabel="MPJPE, mm", title="share of patches that stage 2 reads")
    by_place.set_xticks(range(len(PLACES)), list(PLACES.values()))
    by_place.set(xlabel="pose-guided layer", title="place of the pose-guided layer, r = 0.3")
    for model, style in (("plain", "--"), ("guided", "-")):
        curves = unseen_curves(results, model)
        epochs = range(1, len(curves[0]) + 1)
        by_epoch.plot(
            epochs, [mean(each) for each in zip(*curves, strict=True)], style, color=COLOURS[UNSEEN], label=model
        )
        for curve in curves:
            by_epoch.plot(epochs, curve, style, color=COLOURS[UNSEEN], alpha=0.3, linewidth=0.8)
        by_epoch.set_xticks(epochs)
    by_epoch.set(xlabel="epoch of stage 1", ylabel="coarse MPJPE, mm", title="unseen backgrounds over training")
    for axes in (by_retention, by_place, by_epoch):
        axes.grid(True, color="#DADADA", linewidth=0.5)
        axes.legend(frameon=False, fontsize=8)
    return figure
