"""The skeleton in 3D on a canvas: what is drawn, in which colours, and what turns it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import opened

from liftbyimage.html import asset, page, write_page

SIDE = 240  # px
LEFT, RIGHT, MIDDLE = (0, 114, 178), (213, 94, 0), (28, 31, 36)  # --blue, --orange and --ink in light
# A cross: the pelvis, a left and a right hand beside it, and a head above.
JOINTS = [[0, 0, 0], [0.5, 0, 0], [-0.5, 0, 0], [0, -0.6, 0]]
SCRIPT = """
const view = orbit(document.getElementById("canvas"), { bones: [[0, 1], [0, 2], [0, 3]],
  sides: ["middle", "left", "right", "middle"], view: { yaw: 0, pitch: 0, zoom: 1 }, empty: "nobody" });
window.view = view;
const context = document.getElementById("canvas").getContext("2d");
// The middle and number of pixels of a colour, two frames from now, when what was asked for is drawn.
window.find = (colour) => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => {
  const { data, width, height } = context.getImageData(0, 0, context.canvas.width, context.canvas.height);
  let [count, x, y] = [0, 0, 0];
  for (let at = 0; at < data.length; at += 4) {
    if (data[at + 3] > 250 && colour.every((value, part) => Math.abs(value - data[at + part]) < 6)) {
      count += 1;
      x += (at / 4) % width;
      y += Math.floor(at / 4 / width);
    }
  }
  resolve({ count, x: x / count, y: y / count });
})));
"""


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Any]:
    canvas = f'<canvas id="canvas" style="width: {SIDE}px; height: {SIDE}px"></canvas>'
    write_page(tmp_path / "page.html", page("orbit", canvas, script=asset("orbit.js") + SCRIPT))
    with opened(tmp_path / "page.html") as shown:
        yield shown
        shown.assert_alone()


def _set(shown: Any, **poses: Any) -> None:
    shown.page.evaluate("(poses) => view.setPoses(poses)", poses)


def _find(shown: Any, colour: tuple[int, int, int]) -> dict[str, float]:
    return shown.page.evaluate("(colour) => find(colour)", list(colour))


def test_sides_colours_and_what_is_hidden(shown: Any) -> None:
    _set(shown, person={"joints": JOINTS})
    left, right, middle = (_find(shown, colour) for colour in (LEFT, RIGHT, MIDDLE))
    assert right["x"] < SIDE / 2 - 10 < SIDE / 2 + 10 < left["x"]  # x is to the right
    assert middle["y"] < left["y"] - 10  # y is down
    _set(shown, person={"joints": JOINTS, "visible": False}, other={"joints": None})
    assert [_find(shown, colour)["count"] for colour in (LEFT, RIGHT, MIDDLE)] == [0, 0, 0]
    _set(shown, truth={"joints": JOINTS, "colour": "#ff00ff"}, person={"joints": JOINTS, "colour": "--green"})
    assert _find(shown, LEFT)["count"] == 0
    assert _find(shown, (255, 0, 255))["count"] + _find(shown, (0, 129, 94))["count"] > 100


def test_turning_zooming_and_resetting(shown: Any) -> None:
    page = shown.page
    _set(shown, person={"joints": JOINTS})
    start = _find(shown, LEFT)
    page.evaluate("view.turn(180, 0)")
    assert _find(shown, LEFT)["x"] < SIDE / 2 - 10  # seen from behind
    page.evaluate("view.reset()")
    assert _find(shown, LEFT) == start
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 60)
    page.mouse.up()
    turned = _find(shown, LEFT)
    assert turned["x"] < start["x"] - 5
    page.mouse.move(box["x"] + 60, box["y"] + 60)  # with no button nothing turns
    assert _find(shown, LEFT) == turned
    page.keyboard.press("0")  # dragging has given it the focus
    assert _find(shown, LEFT) == start
    above = _find(shown, MIDDLE)
    for key, colour in (("ArrowLeft", LEFT), ("ArrowUp", MIDDLE), ("+", LEFT)):
        for _ in range(5):
            page.keyboard.press(key)
        assert _find(shown, colour) not in (start, above), key
        page.keyboard.press("Home")
        assert (_find(shown, LEFT), _find(shown, MIDDLE)) == (start, above), key
    page.mouse.wheel(0, -300)
    assert _find(shown, LEFT)["x"] > start["x"] + 5  # larger
    page.locator("#canvas").dblclick()
    assert _find(shown, LEFT) == start


def test_nearer_covers_farther(shown: Any) -> None:
    square = [[0, 0, 0], [0.4, 0, 0], [-0.4, 0, 0], [0, -0.4, 0]]
    near, far = ([[x, y, z + shift] for x, y, z in square] for shift in (-0.5, 0.5))
    _set(shown, one={"joints": far, "colour": "#ff0000"}, two={"joints": near, "colour": "#00ff00"})
    first = _find(shown, (0, 255, 0))["count"]
    _set(shown, two={"joints": near, "colour": "#00ff00"}, one={"joints": far, "colour": "#ff0000"})
    assert _find(shown, (0, 255, 0))["count"] == first
    assert first > _find(shown, (255, 0, 0))["count"]


def test_colours_follow_the_theme(shown: Any) -> None:
    _set(shown, person={"joints": JOINTS})
    assert _find(shown, LEFT)["count"] > 50
    shown.page.click("#theme")
    assert _find(shown, LEFT)["count"] == 0
    assert _find(shown, (86, 180, 233))["count"] > 50
