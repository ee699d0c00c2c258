"""A real browser for the pages that the library writes: Debian's or the system's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = "no Chromium found: `apt-get install chromium`"


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Page:
    """A page that was opened, `page` (playwright.sync_api.Page), and what must stay empty while a test uses it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: self.requests.append(request.url))

    def assert_alone(self) -> None:
        """No script failed, and nothing was loaded but the file itself and what it holds."""
        assert self.errors == []
        outside = [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]
        assert outside == []


@contextmanager
def opened(place: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Page]:
    """A file or URL in a headless browser. Skips where there is none; `--require-browser` makes that a failure."""
    program = chromium()
    if program is None:
        pytest.skip(INSTALL)
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # Inside containers Chromium's own sandbox cannot start; the page is ours.
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            size = {"width": width, "height": height}
            page = Page(browser.new_page(viewport=size, color_scheme="dark" if dark else "light"))
            page.page.goto(place if isinstance(place, str) else place.resolve().as_uri())
            yield page
        finally:
            browser.close()


def until(holds: Callable[[], bool]) -> None:
    """Wait. (The pages' policy refuses Playwright's wait_for_function, which evaluates text inside the page.)"""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.02)
