"""A page on this machine that shows what a program does: the page, and the newest state whenever it asks."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from liftbyimage.html import policy

ADDRESS = "127.0.0.1"
HOLD = 1.0  # s that a question after something new is held before it is answered with nothing
GRACE = 0.5  # s that the last state is served
SLOW = 20.0  # s after which a connection that takes or sends nothing is closed

# Of another host's page that had its name point here (DNS rebinding), the browser sends the other name.
_OWN_NAMES = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": f"{policy(fetches=True)}; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class LiveServer:
    """Serves a page at /, and at /next?after=N the state that is not number N, held until there is one.

    Every connection has a thread of its own that takes the newest state when it is asked: nobody who watches, however
    slowly, holds up `publish`.

    Args:
        document: the page, HTML.
        port: on 127.0.0.1, which only this machine reaches; 0: a free one.

    Raises:
        ValueError: the port cannot be had.
    """

    def __init__(self, document: str, port: int = 0) -> None:
        self._document = document.encode()
        self._changed = threading.Condition()
        self._number = 0
        self._state: bytes | None = None
        self._asked: float | None = None
        self.closed = False
        try:
            self._server = _Server((ADDRESS, port), self)
        except OSError as error:
            raise ValueError(
                f"--port {port}: cannot be had ({error.strerror}): choose another, or 0 for a free one"
            ) from None
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="server", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self._server.server_address[1]}/"

    def __enter__(self) -> LiveServer:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop, but let a page that watches fetch the last state first."""
        if self._asked is not None and time.monotonic() - self._asked < 2 * HOLD:
            time.sleep(GRACE)
        self.closed = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def publish(self, state: Mapping[str, Any]) -> None:
        """Make plain values the state; its number is added as `number_of_state`."""
        body = json.dumps({**state, "number_of_state": self._number + 1}, allow_nan=False, separators=(",", ":"))
        with self._changed:
            self._number += 1
            self._state = body.encode()
            self._changed.notify_all()

    def wait_for_page(self) -> None:
        """Return once a page is open that asks for the state."""
        with self._changed:
            while self._asked is None:
                self._changed.wait(timeout=1)

    def page(self) -> bytes:
        return self._document

    def next_state(self, after: int) -> bytes | None:
        """The state, JSON, once its number is another than `after`; None if it still is after a second."""
        with self._changed:
            self._asked = time.monotonic()
            self._changed.notify_all()
            if self._changed.wait_for(lambda: self._state is not None and self._number != after, timeout=HOLD):
                return self._state
            return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], live: LiveServer) -> None:
        self.live = live
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A page that was closed, or a connection that hung, is no error of ours.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # a page asks many times over one connection
    server_version, sys_version = "liftbyimage", ""
    timeout = SLOW
    server: _Server

    def do_GET(self) -> None:
        if not _OWN_NAMES.fullmatch(self.headers.get("Host", "")):
            self._answer(HTTPStatus.FORBIDDEN, b"This page is for 127.0.0.1 and localhost only.\n")
            return
        url = urlsplit(self.path)
        if url.path == "/":
            self._answer(HTTPStatus.OK, self.server.live.page(), "text/html; charset=utf-8")
        elif url.path == "/next":
            self._answer_state(parse_qs(url.query).get("after", ["0"])[0])
        elif url.path == "/favicon.ico":
            self._answer(HTTPStatus.NO_CONTENT)
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"There is no such page.\n")

    def _answer_state(self, after: str) -> None:
        if not (after.isascii() and after.isdecimal() and len(after) <= 15):
            self._answer(HTTPStatus.BAD_REQUEST, b"after must be a number.\n")
            return
        state = self.server.live.next_state(int(after))
        if state is None:
            self._answer(HTTPStatus.NO_CONTENT)
        else:
            self._answer(HTTPStatus.OK, state, "application/json")

    def _answer(self, status: HTTPStatus, body: bytes = b"", kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        if self.server.live.closed:
            self.send_header("Connection", "close")  # or the connection's thread would go on answering
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass  # the terminal shows frames per second
