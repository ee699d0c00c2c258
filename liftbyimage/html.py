"""Pages that need nothing but a browser: one file each, no network, readable in light and in dark."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liftbyimage._files import write_atomically

ASSETS = Path(__file__).resolve().parent / "assets"
# A browser that honours it loads nothing from anywhere, whatever a file name or a title in the page says.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(
    title: str,
    body: str,
    *,
    style: str = "",
    script: str = "",
    data: Mapping[str, Any] | None = None,
    fetches: bool = False,
) -> str:
    """A whole HTML document in the style that all pages of the library share (`assets/page.css`).

    Args:
        title: plain text; escaped here.
        body: HTML. Whatever comes from outside must have gone through `html.escape`.
        style, script: CSS and JavaScript of this page, after what is shared. The script runs at the end of the body.
        data: plain values for the script, which finds them in `DATA`. Numbers that are not finite become null.
        fetches: whether the script may fetch from the server that the page came from. From elsewhere nothing ever
            loads, and without this nothing at all.

    Returns:
        The document. It links to nothing; a button switches between light and dark, which at first follow the system.
    """
    text = json.dumps(_plain(data or {}), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    embedded = text.replace("<", "\\u003c")  # so that no value can end the element
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy(fetches)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{asset('page.css')}\n{style}</style>",
            f"<body>\n{body}",
            f'<script type="application/json" id="data">{embedded}</script>',
            f"<script>\n{asset('page.js')}\n{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def policy(fetches: bool = False) -> str:
    """The Content-Security-Policy of `page`."""
    return f"{_POLICY}; connect-src 'self'" if fetches else _POLICY


def asset(name: str) -> str:
    """The text of a file in `liftbyimage/assets`."""
    return (ASSETS / name).read_text(encoding="utf-8")


def write_page(path: str | os.PathLike[str], document: str) -> None:
    """Write a page atomically."""
    write_atomically(path, lambda file: file.write(document.encode()))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
