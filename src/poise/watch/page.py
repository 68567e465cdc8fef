"""The page and the metrics over HTTP: read only, seven paths, no framework."""

from __future__ import annotations

import ipaddress
import json
import socket
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socket import AF_INET, AF_INET6
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from poise.util.errors import OptionError
from poise.watch.board import Board
from poise.watch.metrics import Metrics

POLICY = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'"
IDLE_S = 20.0
"""Seconds after which a connection without a request is closed."""
MOST_CLIENTS = 64
"""Connections that are answered at a time; one more closes the oldest, so that none can be kept from being answered."""


@dataclass(frozen=True, slots=True)
class PageResponse:
    """Status, type and body."""

    status: HTTPStatus
    kind: str
    body: bytes


def answers(board: Board, metrics: Metrics, *, stale_s: float) -> Callable[[str], PageResponse]:
    """What each path answers. ``stale_s``: seconds without a look at the source after which ``/healthz`` fails."""
    folder, style = files("poise.watch"), files("poise.report")
    page = (folder / "page.html").read_bytes()
    sheet = (style / "page.css").read_bytes() + (folder / "page.css").read_bytes()
    script = (folder / "page.js").read_bytes()

    def answer(target: str) -> PageResponse:
        try:
            parts = urlsplit(target)
            after = int(parse_qs(parts.query).get("after", ["-1"])[-1])
        except ValueError:
            return PageResponse(HTTPStatus.BAD_REQUEST, "text/plain", b"after must be a whole number\n")
        if parts.path == "/":
            return PageResponse(HTTPStatus.OK, "text/html", page)
        if parts.path == "/page.css":
            return PageResponse(HTTPStatus.OK, "text/css", sheet)
        if parts.path == "/page.js":
            return PageResponse(HTTPStatus.OK, "text/javascript", script)
        if parts.path == "/state.json":
            return PageResponse(
                HTTPStatus.OK, "application/json", json.dumps(board.state(after), allow_nan=False).encode()
            )
        if parts.path == "/metrics":
            return PageResponse(HTTPStatus.OK, metrics.content_type, metrics.text())
        if parts.path == "/metrics/details":
            return PageResponse(HTTPStatus.OK, metrics.content_type, metrics.details())
        if parts.path == "/healthz":
            idle = board.idle_seconds()
            if idle > stale_s:
                return PageResponse(
                    HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"no look for {idle:.0f} s\n".encode()
                )
            return PageResponse(HTTPStatus.OK, "text/plain", b"ok\n")
        return PageResponse(HTTPStatus.NOT_FOUND, "text/plain", b"not found\n")

    return answer


def listen_address(spec: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``, ``[HOST]:PORT`` or ``PORT`` (this machine only); port 0: any free one.

    Raises
    ------
    OptionError : it is none of these.
    """
    host, _, port = spec.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) < 65_536):
        raise OptionError(f"cannot listen on {spec!r:.80}", hint="HOST:PORT, or PORT for this machine only")
    return host, int(port)


def is_host(header: str, names: Collection[str]) -> bool:
    """Whether a Host header names this server: an IP address, this machine, or one of ``names``.

    A page of another site can make its own name point here (DNS rebinding) and would then read what is served; its
    browser still sends that name. An address is nobody's name.
    """
    host = header.strip().lower()
    if not host.startswith("["):
        host = host.partition(":")[0].rstrip(".")
    elif "]" in host:
        host = host[1 : host.index("]")]
    if host == "localhost" or host.endswith(".localhost") or host in names:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Page:
    """A server in threads of its own: :meth:`start`, :attr:`url`, :meth:`close`.

    Parameters
    ----------
    address : host and port to listen on.
    answer : what a path answers.
    hosts : names under which it is asked, beside addresses, ``localhost``, the host listened on and this machine's.

    Raises
    ------
    OptionError : the address cannot be listened on.
    """

    def __init__(
        self, address: tuple[str, int], answer: Callable[[str], PageResponse], *, hosts: Collection[str] = ()
    ) -> None:
        host, port = address
        try:
            self._server = _Server(host, port, answer, hosts)
        except OSError as error:
            raise OptionError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="poise-page", daemon=True)

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_port = False
    request_queue_size = 256

    def __init__(self, host: str, port: int, answer: Callable[[str], PageResponse], hosts: Collection[str]) -> None:
        self.address_family = AF_INET6 if ":" in host else AF_INET
        self.answer = answer
        self.hosts = frozenset(name.lower().rstrip(".") for name in (*hosts, host, socket.gethostname()))
        self._open: dict[Any, None] = {}  # in the order in which they came
        self._lock = threading.Lock()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server for this machine's name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread; where there are too many, the oldest connection has to go."""
        with self._lock:
            self._open[request] = None
            oldest = next(iter(self._open)) if len(self._open) > MOST_CLIENTS else None
            if oldest is not None:
                del self._open[oldest]
                _shut(oldest)
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had: this one goes without an answer, the next may not
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, and count it no more."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Listen no more, and let go of who still holds a connection."""
        super().server_close()
        with self._lock:
            for request in self._open:
                _shut(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that goes away is no error; what else fails is that reader's answer alone."""
        if not isinstance(sys.exception(), OSError | MemoryError):
            super().handle_error(request, client_address)


def _shut(request: socket.socket) -> None:
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:  # gone already
        return


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "poise", ""
    error_content_type, error_message_format = "text/plain; charset=utf-8", "%(message)s\n"
    timeout = IDLE_S
    server: _Server

    def do_GET(self) -> None:
        """Answer with a body."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Answer without."""
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: stderr is for the watch."""

    def _answer(self, *, body: bool) -> None:
        answer = self._wrong() or self.server.answer(self.path)
        kind = answer.kind if "charset" in answer.kind else f"{answer.kind}; charset=utf-8"
        self.send_response(answer.status)
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.send_header("Connection", "close")  # what was sent along is not read, nor taken for the next request
        for name, value in (
            ("Content-Type", kind), ("Content-Length", str(len(answer.body))), ("Cache-Control", "no-store"),
            ("Content-Security-Policy", POLICY), ("X-Content-Type-Options", "nosniff"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(answer.body)

    def _wrong(self) -> PageResponse | None:
        """The answer to who asks under a name that is not this server's; None: the name is right.

        HTTP/1.0 knows no Host header, and no browser speaks it.
        """
        hosts = self.headers.get_all("Host", [])
        if len(hosts) > 1 or (not hosts and self.request_version != "HTTP/1.0"):
            return PageResponse(HTTPStatus.BAD_REQUEST, "text/plain", b"one Host header, please\n")
        if hosts and not is_host(hosts[0], self.server.hosts):
            said = b"this name is not known here: poise watch --allow-host NAME\n"
            return PageResponse(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", said)
        return None
