"""Asking an engine over HTTP: one deadline for name, connection, headers and body, however slowly bytes come.

A socket's timeout starts anew with every byte, and nothing bounds the look-up of a name. So the exchange runs in a
thread of its own: who asks waits for it until the deadline, or until a signal comes, and cuts the connection then.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from poise.util.errors import CommunicationError, OptionError

MAX_ANSWER = 16 * 2**20
"""Bytes of an answer."""
PIECE = 1 << 16


class RefusedError(CommunicationError):
    """Nobody listens there."""


@dataclass(frozen=True, slots=True)
class EngineResponse:
    """Status and body. Redirects are not followed: a key must not go to another machine."""

    status: int
    body: bytes


def engine_address(url: str) -> str:
    """An address of an engine without the slash at its end.

    Raises
    ------
    OptionError : it is none.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or parts.username or parts.query or parts.fragment:
        raise OptionError(f"{url:.80} is no address of an engine", hint="as in http://127.0.0.1:30000")
    return url.rstrip("/")


class Asker:
    """Asks one engine, one request at a time; no proxy is used.

    Parameters
    ----------
    url : ``http://host:port`` or ``https://...``, a path in front of all paths allowed.
    most : bytes that an answer may have.
    """

    def __init__(self, url: str, *, most: int = MAX_ANSWER) -> None:
        self.url, self._most = url, most
        parts = urlsplit(url)
        self._host, self._port, self._prefix = parts.hostname or "", parts.port, parts.path
        self._context = ssl.create_default_context() if parts.scheme == "https" else None
        self._exchange: _RequestThread | None = None

    def ask(self, method: str, path: str, headers: Mapping[str, str], *, until: float) -> EngineResponse:
        """One request and its whole answer.

        Parameters
        ----------
        method, path, headers : of the request; a POST has an empty body.
        until : :func:`time.monotonic` at which waiting ends.

        Raises
        ------
        RefusedError : nobody listens.
        CommunicationError : no whole answer by then, a larger one, or none that is HTTP.
        """
        where = f"{self.url}{path}"
        if self._exchange is not None:  # cut, but perhaps still looking up a name, which nothing can cut
            self._exchange.join(max(0.0, until - time.monotonic()))
            if self._exchange.is_alive():
                raise CommunicationError(f"no answer from {where}: the request before it still hangs")
        seconds = until - time.monotonic()
        if seconds <= 0:
            raise CommunicationError(f"no time left to ask {where}")
        kind = http.client.HTTPConnection if self._context is None else http.client.HTTPSConnection
        more: dict[str, Any] = {} if self._context is None else {"context": self._context}
        connection = kind(self._host, self._port, timeout=seconds, **more)
        exchange = self._exchange = _RequestThread(connection, method, self._prefix + path, headers, self._most)
        try:
            exchange.start()
            exchange.join(seconds)
            hangs = exchange.is_alive()
        finally:  # also when a signal ends the wait
            exchange.cut()
        if hangs:
            raise CommunicationError(f"no answer from {where} in {seconds:.1f} s: {exchange.received} bytes came")
        self._exchange = None
        if isinstance(exchange.outcome, EngineResponse):
            return exchange.outcome
        error = exchange.outcome
        refused = isinstance(error, ConnectionRefusedError)
        why = str(error) or type(error).__name__
        raise (RefusedError if refused else CommunicationError)(f"no answer from {where}: {why}") from None


class _RequestThread(threading.Thread):
    """A request and its answer, read whole; :meth:`cut` ends it from outside."""

    def __init__(
        self, connection: http.client.HTTPConnection, method: str, path: str, headers: Mapping[str, str], most: int
    ) -> None:
        super().__init__(name="poise-ask", daemon=True)
        self._connection, self._request, self._most = connection, (method, path, headers), most
        self._lock, self._cut = threading.Lock(), False
        self._socket: socket.socket | None = None  # the connection forgets it while its answer is still read
        self.received = 0
        self.outcome: EngineResponse | BaseException | None = None

    def run(self) -> None:
        method, path, headers = self._request
        try:
            self._connection.connect()
            with self._lock:
                self._socket = self._connection.sock
                if self._cut:
                    return
            body = None if method == "GET" else b""
            self._connection.request(method, path, body=body, headers=dict(headers))
            with self._connection.getresponse() as answer:
                pieces = []
                while piece := answer.read1(PIECE):
                    self.received += len(piece)
                    if self.received > self._most:
                        raise CommunicationError(f"the answer has more than {self._most} bytes")
                    pieces.append(piece)
                left = answer.length
                if left:
                    raise CommunicationError(f"the answer ended {left} bytes early")
                self.outcome = EngineResponse(answer.status, b"".join(pieces))
        except BaseException as error:  # it is raised where it is waited for
            self.outcome = error
        finally:
            self._connection.close()

    def cut(self) -> None:
        """End it now: who reads or writes the socket is woken."""
        with self._lock:
            self._cut = True
            if self._socket is not None:
                try:
                    self._socket.shutdown(socket.SHUT_RDWR)
                except OSError:  # closed already
                    return
