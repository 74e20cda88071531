"""A proxy in front of the S3 server of the tests that does what networks and busy servers do.

    slow         `latency` seconds before each request is passed on
    errors       the server says 500 or 503 SlowDown and has done nothing
    cut_up       the connection is reset while the request's body is on its way; the server never sees the request
    cut_down     the server has done it; the connection is reset in the middle of the answer
    lost         the server has done it; the connection is reset before the answer: whoever repeats it, does it twice
    stale        a listing shows the bucket as it was `stale` seconds ago: what is new is missing, what is gone is there
    outage       every connection is reset, also those that were open, until it ends
    deaf         headers that the server never gets to see, as if it did not know them

Which request is hit is drawn from `seed` in the order of arrival; `aim` hits chosen requests instead. Real sockets: the
client sees what it would see.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>Please reduce your request rate.</Message></Error>"
GHOST = "<Contents><Key>{}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified><Size>0</Size></Contents>"


@dataclass
class Faults:
    """Shares of requests (0 to 1), seconds, names of headers."""

    errors: float = 0.0
    cut_up: float = 0.0
    cut_down: float = 0.0
    lost: float = 0.0
    stale: float = 0.0
    latency: float = 0.0
    deaf: frozenset[str] = frozenset()


BAD = Faults(errors=0.1, cut_up=0.03, cut_down=0.04, lost=0.05, stale=3.0)  # a day on which nothing works well


@dataclass
class Aim:
    """`times` requests of `method` whose path and query contain `text` meet `fault`."""

    fault: str
    method: str
    text: str
    times: int = 1


@dataclass
class Proxy:
    backend: str
    faults: Faults = field(default_factory=Faults)
    seed: int = 0

    def __post_init__(self) -> None:
        self.chance, self.lock = random.Random(self.seed), threading.Lock()
        self.aims: list[Aim] = []
        self.seen: list[str] = []  # "METHOD path?query" of every request that arrived
        self.hit: list[str] = []  # the fault that each of those that were hit met
        self.written: dict[str, float] = {}  # "bucket/key" -> when the server wrote it
        self.deleted: dict[str, float] = {}
        self._down_until = 0.0
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def aim(self, fault: str, method: str, text: str, times: int = 1) -> None:
        self.aims.append(Aim(fault, method, text, times))

    def outage(self, seconds: float) -> None:
        self._down_until = time.monotonic() + seconds

    @property
    def down(self) -> bool:
        return time.monotonic() < self._down_until

    def choose(self, method: str, target: str) -> str:
        """The fault that this request meets; "" if none. One at most, so that a run of retries ends."""
        with self.lock:
            self.seen.append(f"{method} {target}")
            fault = self._aimed(method, target) or self._drawn()
            self.hit += [fault] if fault else []
        return fault

    def _aimed(self, method: str, target: str) -> str:
        for aim in self.aims:
            if aim.times and aim.method == method and aim.text in unquote(target):
                aim.times -= 1
                return aim.fault
        return ""

    def _drawn(self) -> str:
        drawn = self.chance.random()
        for fault in ("errors", "cut_up", "cut_down", "lost"):
            share = getattr(self.faults, fault)
            if drawn < share:
                return fault
            drawn -= share
        return ""

    def note(self, method: str, target: str, status: int) -> None:
        """Remember what the server has changed, for stale listings."""
        parts = urlsplit(target)
        key, query = unquote(parts.path).strip("/"), parse_qs(parts.query, keep_blank_values=True)
        whole = (method == "PUT" and "partNumber" not in query) or (method == "POST" and "uploadId" in query)
        with self.lock:
            if status < 300 and whole:
                self.written[key] = time.monotonic()
                self.deleted.pop(key, None)
            if status < 300 and method == "DELETE" and "uploadId" not in query and key in self.written:
                self.deleted[key] = time.monotonic()

    def aged(self, target: str, body: bytes) -> bytes:
        """The answer to a listing as it was `stale` seconds ago."""
        parts = urlsplit(target)
        bucket, text = parts.path.strip("/"), body.decode()
        prefix = parse_qs(parts.query).get("prefix", [""])[0]
        since = time.monotonic() - self.faults.stale
        with self.lock:
            hidden = {key for key, when in self.written.items() if when > since}
            ghosts = {key for key, when in self.deleted.items() if when > since and self.written[key] <= since}
        for entry in re.findall(r"<Contents>.*?</Contents>", text, re.DOTALL):
            if f"{bucket}/{unquote(re.search(r'<Key>(.*?)</Key>', entry)[1])}" in hidden:  # type: ignore[index]
                text = text.replace(entry, "")
        for ghost in sorted(ghosts):
            if ghost.startswith(f"{bucket}/{prefix}"):
                text = text.replace("</ListBucketResult>", GHOST.format(escape(ghost.removeprefix(f"{bucket}/"))))
                text += "</ListBucketResult>"
        return text.encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that we reset ourselves are no news."""


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection(urlsplit(self.proxy.backend).netloc)

    def handle_one_request(self) -> None:
        """As the base class does, but that an outage also ends the connections that were open before it."""
        if self.proxy.down:
            return self._reset()
        super().handle_one_request()

    def _relay(self) -> None:
        if self.proxy.down:
            return self._reset()
        fault = self.proxy.choose(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        if fault == "cut_up":
            self.rfile.read(length // 2)
            return self._reset()
        body = self.rfile.read(length)
        time.sleep(self.proxy.faults.latency)
        if fault == "errors":
            code, name = self.proxy.chance.choice([(500, "InternalError"), (503, "SlowDown")])
            return self._answer(code, [("Content-Type", "application/xml")], ERROR.format(name).encode())
        status, headers, answer = self._forward(body)
        if self.proxy.down or fault == "lost":
            return self._reset()
        if self.command == "GET" and "list-type=2" in self.path and status == 200 and self.proxy.faults.stale:
            answer = self.proxy.aged(self.path, answer)
        self._answer(status, headers, answer, cut=fault == "cut_down")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _relay

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        unwanted = {"expect", "connection", "transfer-encoding"} | self.proxy.faults.deaf
        headers = {name: value for name, value in self.headers.items() if name.lower() not in unwanted}
        self.upstream.request(self.command, self.path, body, headers)
        response = self.upstream.getresponse()
        answer = response.read()
        self.proxy.note(self.command, self.path, response.status)
        return response.status, response.getheaders(), answer

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        head = self.command == "HEAD"
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding") and (head or name.lower() != "content-length"):
                self.send_header(name, value)
        if not head:
            self.send_header("Content-Length", str(len(body)))
        if cut and (head or not body):  # nothing to cut but the head itself
            first, *others = self._headers_buffer
            self._headers_buffer = [first, *others[: len(others) // 2]]
            self.flush_headers()
            return self._reset()
        self.end_headers()
        self.wfile.write(b"" if head else body[: len(body) // 2] if cut else body)
        if cut:
            self._reset()

    def _reset(self) -> None:
        """End the connection as a crash would: RST, and nothing of what is still on its way is read."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def finish(self) -> None:
        self.upstream.close()
        try:
            super().finish()
        except (OSError, ValueError):
            return

    def log_message(self, format: str, *arguments: Any) -> None:
        """The tests ask `proxy.seen`."""
