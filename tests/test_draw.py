from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.axes3d import Axes3D

from liftbyimage import draw
from liftbyimage.data.crop import read_image
from liftbyimage.data.synthetic import generate

GRID = (16, 12)


@pytest.fixture(scope="module")
def person() -> dict[str, Any]:
    scene = generate(1, seed=2).scene(0)
    rng = np.random.default_rng(0)
    importance = rng.dirichlet(np.full(GRID[0] * GRID[1], 0.3))
    return {
        "crop": scene["image"].numpy(),
        "pose_2d": scene["pose_2d"],
        "importance": importance,
        "index": np.sort(np.argsort(-importance)[:57]),
        "grid": GRID,
        "pose_3d": scene["pose_3d"].numpy(),
    }


def _panel(figure: Figure, title: str) -> Any:
    [axes] = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(title)]
    return axes


def _displayed(axes: Any) -> np.ndarray:
    return np.asarray(axes.images[0].get_array())


def test_four_panels_and_title(person) -> None:
    figure = draw.picture_of_person(**person, title="someone")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title for title in titles if title] == [
        "input: crop and 2D pose",
        "stage 1 looks here",
        "stage 2 sees only these patches",
        "3D pose",
    ]
    assert [text.get_text() for text in figure.texts] == ["someone"]


def test_skeleton_lies_on_the_joints_and_sides_differ(person) -> None:
    axes = _panel(draw.picture_of_person(**person), "input")
    np.testing.assert_array_equal(_displayed(axes), person["crop"])
    assert len(axes.lines) == 16
    pose = person["pose_2d"].numpy()
    colours = {}
    for line, (parent, child) in zip(axes.lines, draw.BONES, strict=True):
        np.testing.assert_allclose(line.get_xydata(), pose[[parent, child]], rtol=1e-6)
        colours[child] = line.get_color()
    assert colours[4] == colours[13] == draw.LEFT
    assert colours[1] == colours[16] == draw.RIGHT
    assert colours[7] == draw.MIDDLE
    assert axes.get_ylim() == (255.5, -0.5)


def test_kept_patches_are_shown_and_the_others_dimmed(person) -> None:
    axes = _panel(draw.picture_of_person(**person), "stage 2")
    shown = _displayed(axes)  # [256, 192, 3]
    kept = np.zeros(GRID[0] * GRID[1], dtype=bool)
    kept[person["index"]] = True
    mask = kept.reshape(GRID).repeat(16, axis=0).repeat(16, axis=1)
    np.testing.assert_allclose(shown[mask], person["crop"][mask] / 255)
    assert shown[~mask].min() >= 0.8 - 1e-9
    assert [text.get_text() for text in axes.texts] == ["57 of 192 patches kept (30%)"]


def test_heat_is_brightest_where_attention_is(person) -> None:
    importance = np.full(GRID[0] * GRID[1], 1e-5)
    importance[5 * GRID[1] + 7] = 1.0  # row 5, column 7
    axes = _panel(draw.picture_of_person(**{**person, "importance": importance}), "stage 1")
    shown = _displayed(axes).sum(axis=2)
    assert shown[88, 120] > 2 * np.median(shown)
    hottest = np.unravel_index(shown.argmax(), shown.shape)
    assert abs(hottest[0] - 87.5) <= 12
    assert abs(hottest[1] - 119.5) <= 12


@pytest.mark.parametrize("importance", [np.zeros(192), np.full(192, 1 / 192), np.eye(192)[5], np.full(192, np.nan)])
def test_degenerate_attention_still_draws(person, importance, tmp_path: Path) -> None:
    figure = draw.picture_of_person(**{**person, "importance": importance})
    draw.save_figure(figure, tmp_path / "p.png", dpi=40)
    assert read_image(tmp_path / "p.png").std() > 0
    assert np.isfinite(_displayed(_panel(figure, "stage 1"))).all()


def test_pose_stands_upright_with_equal_scales(person) -> None:
    pose = person["pose_3d"]
    axes = _panel(draw.picture_of_person(**person), "3D pose")
    assert isinstance(axes, Axes3D)
    bones = axes.lines[-16:]
    for line, (parent, child) in zip(bones, draw.BONES, strict=True):
        x, y, z = np.array(line.get_data_3d())
        np.testing.assert_allclose(x, pose[[parent, child], 0])
        np.testing.assert_allclose(y, pose[[parent, child], 2])
        np.testing.assert_allclose(z, -pose[[parent, child], 1])
    limits = np.array([axes.get_xlim(), axes.get_ylim(), axes.get_zlim()])
    scale = np.asarray(axes._box_aspect) / np.ptp(limits, axis=1)
    np.testing.assert_allclose(scale, scale[0])


def test_truth_and_coarse_pose_beside_the_refined(person) -> None:
    truth = person["pose_3d"]
    refined, coarse = truth + [0.03, 0, 0.04], truth + [0, 0.08, 0]
    figure = draw.picture_of_person(
        **{**person, "pose_3d": refined}, coarse_pose_3d=torch.tensor(coarse), truth_3d=truth
    )
    axes = _panel(figure, "3D pose")
    assert axes.get_title(loc="left") == "3D pose: 50 mm off (coarse 80 mm)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["left", "right", "coarse", "truth"]
    colours = [line.get_color() for line in axes.lines]
    assert colours.count(draw.TRUTH) == colours.count(draw.COARSE) == 16


def test_without_patches_two_panels(person) -> None:
    figure = draw.picture_of_person(**{**person, "importance": None, "index": None, "grid": None}, title="someone")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title for title in titles if title] == ["input: crop and 2D pose", "3D pose"]
    assert figure.get_figwidth() < draw.picture_of_person(**person).get_figwidth()


def test_palette_stays_apart_in_blue() -> None:
    # Red-green blindness leaves the difference between blue and yellow.
    left, right, coarse = (np.array(to_rgb(c)) for c in (draw.LEFT, draw.RIGHT, draw.COARSE))
    assert abs(left[2] - right[2]) > 0.5
    assert abs(coarse[2] - right[2]) > 0.3


def test_drawing_leaves_matplotlibs_settings(person) -> None:
    before = dict(matplotlib.rcParams)
    draw.picture_of_person(**person)
    assert dict(matplotlib.rcParams) == before


def test_failed_save_leaves_the_old_file_and_no_other(person, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(b"old")

    class Unfinished(Figure):
        def savefig(self, file: Any, **options: Any) -> None:
            file.write(b"half")
            raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        draw.save_figure(Unfinished(), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["p.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"crop": np.zeros((256, 192, 3))},
            "crop must be uint8 [H, W, 3], got float64 [256, 192, 3]",
        ),
        ({"pose_2d": np.zeros((16, 2))}, "pose_2d must be [17, 2], got [16, 2]"),
        ({"importance": np.zeros(190)}, "importance must be [192], got [190]"),
        ({"index": np.array([3, 192])}, "index must be [K] of patches 0 … 191, got 3 … 192"),
        ({"index": np.zeros((2, 2), dtype=int)}, "index must be [K] of patches 0 … 191, got [2, 2]"),
        ({"importance": None}, "importance, index and grid must be given together, got no importance"),
        ({"index": None, "grid": None}, "importance, index and grid must be given together, got no index and no grid"),
        ({"pose_3d": np.zeros((17, 2))}, "pose_3d must be [17, 3], got [17, 2]"),
        ({"truth_3d": np.zeros((1, 17, 3))}, "truth_3d must be [17, 3], got [1, 17, 3]"),
    ],
)
def test_bad_input(person, changes, message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'picture_of_person: {message}')}$"):
        draw.picture_of_person(**{**person, **changes})
