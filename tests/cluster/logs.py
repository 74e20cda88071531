"""The kubelet's log endpoint over HTTPS: what the API server asks when somebody reads a pod's log."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from cluster.containers import Container

POLL_SECONDS = 0.05

Find = Callable[[str, str, str], Container]  # (namespace, pod, container); LookupError, whose text says what is missing


class LogServer:
    """Serves until `close`. Connections that follow a log can be cut with `drop_connections`."""

    def __init__(self, find: Find, certificate: Path, key: Path) -> None:
        self._connections: set[socket.socket] = set()
        owner = self

        class Handler(_Handler):
            server_owner = owner
            lookup = staticmethod(find)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.closed = threading.Event()
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def drop_connections(self) -> int:
        """Cuts every log that is being read; returns how many."""
        connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        return len(connections)

    def close(self) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self.drop_connections()

    @contextlib.contextmanager
    def connected(self, connection: socket.socket) -> Iterator[None]:
        self._connections.add(connection)
        try:
            yield
        finally:
            self._connections.discard(connection)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_owner: LogServer
    lookup: Find

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = dict(parse_qsl(address.query))
        parts = address.path.strip("/").split("/")
        if len(parts) != 4 or parts[0] != "containerLogs":
            return self._refuse(404, f"no such path: {address.path}")
        _, namespace, pod, name = parts
        try:
            container = self.lookup(namespace, pod, name)
        except LookupError as error:
            return self._refuse(404, str(error.args[0]))
        if query.get("previous") == "true":
            return self._refuse(400, f'previous terminated container "{name}" in pod "{pod}" not found')
        if not container.started:
            reason = container.state.get("waiting", {}).get("reason", "ContainerCreating")
            return self._refuse(400, f'container "{name}" in pod "{pod}" is waiting to start: {reason}')
        with self.server_owner.connected(self.connection), contextlib.suppress(OSError):
            self._send(container, query)

    def _send(self, container: Container, query: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        left = int(query["limitBytes"]) if "limitBytes" in query else None
        for line in _lines(container, query, self.server_owner.closed):
            part = line if left is None else line[:left]
            if part:
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                self.wfile.flush()
            if left is not None and (left := left - len(part)) <= 0:
                break
        self.wfile.write(b"0\r\n\r\n")

    def _refuse(self, status: int, message: str) -> None:
        body = message.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _lines(container: Container, query: dict[str, str], closed: threading.Event) -> Iterator[bytes]:
    """The lines asked for, as they are sent; with `follow` until the container has ended."""
    since, stamped, stream = _since(query), query.get("timestamps") == "true", query.get("stream", "All").lower()
    tail = int(query["tailLines"]) if "tailLines" in query else None
    for line in _raw_lines(container, query.get("follow") == "true", closed, tail):
        stamp, source, text = line.split(b" ", 2)
        if stamp.decode() >= since and stream in ("all", source.decode()):
            yield (stamp + b" " + text if stamped else text)


def _raw_lines(container: Container, follow: bool, closed: threading.Event, tail: int | None) -> Iterator[bytes]:
    """Whole lines only: one that is just being written is read again when it is complete."""
    if not container.log.exists():
        return
    with container.log.open("rb") as log:
        ended = container.ended.is_set()  # asked before reading: what is written before the end is read after it
        whole, left = _whole_lines(log.read())
        yield from whole[len(whole) - min(tail, len(whole)) :] if tail is not None else whole
        while follow and not ended and not closed.is_set():
            time.sleep(POLL_SECONDS)
            ended = container.ended.is_set()
            whole, left = _whole_lines(left + log.read())
            yield from whole


def _whole_lines(data: bytes) -> tuple[list[bytes], bytes]:
    whole, newline, left = data.rpartition(b"\n")
    return (whole + newline).splitlines(keepends=True), left


def _since(query: dict[str, str]) -> str:
    """As the stamps of the lines are written, so that they compare as text."""
    if "sinceTime" in query:
        since = datetime.fromisoformat(query["sinceTime"].replace("Z", "+00:00"))
    elif "sinceSeconds" in query:
        since = datetime.now(UTC) - timedelta(seconds=int(query["sinceSeconds"]))
    else:
        return ""
    return since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
