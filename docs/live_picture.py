"""Show a captured walk on the page of `liftbyimage live`, and take a picture of the page.

    python docs/live_picture.py ../shared/data/cmu_mocap docs/images/live.png

A rendered person walks as somebody did, and the packaged model, which was trained on such people, lifts them. The 2D
joints are the renderer's own, in the place of a pose model, so that its stage does next to nothing; all figures are
those of the machine and the moment. Needs Playwright and a Chromium.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import torch
from playwright.sync_api import sync_playwright
from rich.console import Console
from torch import Tensor

from liftbyimage import live_command
from liftbyimage._files import DEMO_CHECKPOINT, write_atomically
from liftbyimage.checkpoint import load_pipeline
from liftbyimage.data.crop import apply_affine, box_to_crop_matrix
from liftbyimage.data.mocap import MocapPeople
from liftbyimage.data.scenes import Scenes, photograph
from liftbyimage.data.skeleton import COCO_NAMES, JOINT_NAMES
from liftbyimage.models.heatmaps import HEATMAP_STRIDE
from liftbyimage.pose_model import HEATMAP_SHAPE

CLIP, FPS, SIZE, SEED = "02_01", 15, (512, 384), 4
SHOWN_AT = 1.8  # s into the video


class OneCamera(MocapPeople):
    """One clip before one camera that follows: every frame draws the same camera, lamp and background."""

    def frames(self) -> Scenes:
        count = len(self)
        generators = [np.random.default_rng(SEED) for _ in range(count)]
        return photograph(self._world, self._people.take(self._clip), generators, self._scene)


class KnownJoints:
    """In the place of a detector and a pose model: recognises the frame, and knows its joints."""

    def __init__(self, images: np.ndarray, joints: np.ndarray) -> None:
        self._thumbnails = np.stack([self._thumbnail(image) for image in images])
        self._box = np.array([0.0, 0.0, SIZE[1], SIZE[0]])
        heatmap_pixels = apply_affine(box_to_crop_matrix(self._box), joints) / HEATMAP_STRIDE  # [N, 17, 2]
        self._joints = heatmap_pixels[:, [JOINT_NAMES.index(_human36m_name(name)) for name in COCO_NAMES]]
        self._frame = 0

    @staticmethod
    def _thumbnail(image: np.ndarray) -> np.ndarray:
        return cv2.resize(image, (48, 64), interpolation=cv2.INTER_AREA).astype(np.float32)

    def detect(self, image: np.ndarray) -> np.ndarray:
        self._frame = int(np.abs(self._thumbnails - self._thumbnail(image)).mean(axis=(1, 2, 3)).argmin())
        return self._box[None]

    def __call__(self, images: Tensor) -> Tensor:
        _, _, height, width = HEATMAP_SHAPE
        x, y = self._joints[self._frame].T[..., None, None]  # [17, 1, 1]
        squares = (np.arange(width) - x) ** 2 + (np.arange(height)[:, None] - y) ** 2
        return torch.from_numpy(np.exp(-squares / 8)).float()[None]


def _human36m_name(coco: str) -> str:
    return "head" if coco.endswith("ear") else "nose" if coco.endswith("eye") else coco


def write_video(path: str, images: np.ndarray) -> None:
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), FPS, SIZE[::-1])
    for image in images:
        writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    writer.release()


def take_picture(url: str) -> bytes:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1050})
        page.goto(url)
        page.wait_for_selector("#stages tbody tr")
        time.sleep(SHOWN_AT)
        picture = page.screenshot()
        page.wait_for_selector("#state.ended")
        browser.close()
    return picture


def main(mocap: Path, out: Path) -> None:
    scenes = OneCamera(mocap, clips=CLIP, fps=FPS, size=SIZE, seed=SEED, background="laboratory").frames()
    images = scenes.image.numpy()
    known = KnownJoints(images, scenes.pose_2d_clean.numpy().astype(np.float64))
    printed = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(live_command, "load_pose_model", lambda path, device: known),
        patch.object(live_command, "where_to_look", lambda box, detector: {"box": None, "detect": known.detect}),
    ):
        os.chdir(folder)
        write_video("walk.avi", images)
        options = live_command.Options(
            source="walk.avi",
            pose_model=Path("known joints"),
            box=None,
            detector=None,
            device="cpu",
            precision="float32",
            optimize=False,
            port=None,
            browser=False,
            page=True,
            unpaced=False,
            out=None,
            frames=None,
        )
        arguments = (options, lambda: load_pipeline(DEMO_CHECKPOINT), "", Console(file=printed, width=200))
        running = threading.Thread(target=live_command.run, args=arguments)
        running.start()
        while not (found := re.search(r"http://\S+", printed.getvalue())):
            time.sleep(0.1)
        picture = take_picture(found[0])
        running.join()
        os.chdir(out.parent)
    write_atomically(out, lambda file: file.write(picture))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).resolve())
