"""The shell that all pages share: what is embedded cannot break out of it, and nothing is loaded from anywhere."""

from __future__ import annotations

import math
from pathlib import Path

from browser import opened

from liftbyimage.html import page, write_page

HOSTILE = '</script><img src="https://example.invalid/x.png" onerror="window.broken = true">'


def test_hostile_text_stays_text_and_the_page_is_alone(tmp_path: Path) -> None:
    document = page(
        f"a & b {HOSTILE}",
        '<p id="text"></p>',
        style="#text { font-weight: bold }",
        script='document.getElementById("text").textContent = DATA.name + " " + DATA.missing;',
        data={"name": HOSTILE, "missing": math.nan},
    )
    write_page(tmp_path / "page.html", document)
    with opened(tmp_path / "page.html") as shown:
        assert shown.page.title() == f"a & b {HOSTILE}"
        assert shown.page.text_content("#text") == f"{HOSTILE} null"
        assert shown.page.evaluate("window.broken") is None
        shown.assert_alone()


def test_what_a_page_would_load_is_refused(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", page("loads", '<img src="https://example.invalid/x.png">'))
    with opened(tmp_path / "page.html") as shown:
        shown.page.wait_for_function("document.images[0].complete")
        assert any("Content Security Policy" in error for error in shown.errors)


def test_a_page_fetches_from_its_own_server_only_if_it_says_so() -> None:
    strict, open_ = page("strict", ""), page("open", "", fetches=True)
    assert "connect-src" not in strict
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\"" in strict
    assert open_.count("connect-src") == open_.count("script-src 'unsafe-inline'; connect-src 'self'\"") == 1


def test_light_and_dark_follow_the_system_and_the_button(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", page("colours", "<p>text</p>"))
    background = "getComputedStyle(document.body).backgroundColor"
    with opened(tmp_path / "page.html") as shown:
        light = shown.page.evaluate(background)
        shown.page.click("#theme")
        dark = shown.page.evaluate(background)
        shown.page.click("#theme")
        assert (light, dark, shown.page.evaluate(background)) == ("rgb(255, 255, 255)", "rgb(20, 23, 27)", light)
    with opened(tmp_path / "page.html", dark=True) as shown:
        assert shown.page.evaluate(background) == dark
