"""Pictures of the pages that the library writes, for the documentation.

    PYTHONPATH=tests python docs/screenshots.py viewer        # docs/images/viewer-light.png, viewer-dark.png

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


PICTURES = {"viewer": viewer_pictures}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or PICTURES:
        PICTURES[wanted]()
