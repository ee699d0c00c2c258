"""Pictures of the pages that the library writes, for the documentation.

    PYTHONPATH=tests python docs/screenshots.py viewer        # docs/images/viewer-light.png, viewer-dark.png
    PYTHONPATH=tests python docs/screenshots.py profile       # profile-{light,dark}.png, of profile/profile.html

It needs Chromium and playwright, as the tests of the pages do.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from browser import Page, opened

from liftbyimage import demo
from liftbyimage._files import DEMO_CHECKPOINT
from liftbyimage.checkpoint import load_pipeline
from liftbyimage.data.skeleton import JOINT_NAMES
from liftbyimage.train_demo import render_scenes

IMAGES = Path(__file__).resolve().parent / "images"


def viewer_pictures() -> None:
    """The third person of `liftbyimage demo --html`: where two joints look, at two retentions."""
    with tempfile.TemporaryDirectory() as folder:
        scenes = render_scenes(demo.MEASURED_PEOPLE, seed=demo.FIRST_UNSEEN_SEED)
        path = demo.write_demo_page(load_pipeline(DEMO_CHECKPOINT), scenes, 3, Path(folder))
        _take(path, "viewer-light.png", dark=False, prepare=lambda page: _look(page, "right_wrist", layer=0, stop=4))
        _take(path, "viewer-dark.png", dark=True, prepare=lambda page: _look(page, "right_ankle", layer=1, stop=2))


def _look(shown: Page, joint: str, layer: int, stop: int) -> None:
    """Person 3, with a joint chosen."""
    page = shown.page
    page.select_option("#person", "2")
    page.select_option("#map", str(layer))
    page.locator("#retention").fill(str(stop))
    page.locator("#retention").blur()
    page.locator("#look .joint").nth(JOINT_NAMES.index(joint)).locator(".dot").hover()


def _take(path: Path, name: str, dark: bool, prepare: Callable[[Page], None]) -> None:
    with opened(path, width=1280, height=870, dark=dark) as shown:
        prepare(shown)
        shown.page.wait_for_timeout(300)  # until the crop is decoded
        shown.page.screenshot(path=IMAGES / name)
        shown.assert_alone()


def profile_pictures() -> None:
    """The report that docs/profile.md's command wrote into `profile/`, its last batch size, with a part pointed at."""
    for name, dark in (("profile-light.png", False), ("profile-dark.png", True)):
        _take(Path("profile/profile.html"), name, dark=dark, prepare=_point)


def _point(shown: Page) -> None:
    page = shown.page
    page.set_viewport_size({"width": 1280, "height": 1500})
    page.locator("section").last.evaluate("section => section.scrollIntoView()")
    page.locator("tr:not(.whole) td:first-child", has_text="stage 1 layer 1: attention").last.evaluate(
        "cell => cell.dispatchEvent(new PointerEvent('pointerover', { bubbles: true }))"
    )


PICTURES = {"viewer": viewer_pictures, "profile": profile_pictures}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or PICTURES:
        PICTURES[wanted]()
