"""The few requests a kubelet makes, as plain JSON: the node shares no code with the client that is under test."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3

Object = dict[str, Any]
MERGE = "application/strategic-merge-patch+json"
RETRY_SECONDS = 0.2


class ApiUnreachable(Exception):
    """No answer: down, paused or restarting. Whoever asks tries again."""


class ApiError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Api:
    """`server` is https://host:port; `token` says who asks."""

    def __init__(self, server: str, token: str, authority: Path) -> None:
        self.cut_off = False  # a network of which nothing comes through, in either direction
        self._server = server
        self._pool = urllib3.PoolManager(
            maxsize=32,
            ca_certs=str(authority),
            retries=False,
            timeout=urllib3.Timeout(connect=2, read=5),
            headers={"Authorization": f"Bearer {token}", "Accept": "application/json"},
        )

    def text(self, path: str) -> str:
        return self._answer("GET", path, None, "", {}).decode()

    def get(self, path: str, **query: Any) -> Object:
        return self._request("GET", path, None, "", query)

    def post(self, path: str, body: Object) -> Object:
        return self._request("POST", path, body, "application/json", {})

    def patch(self, path: str, body: Object) -> Object:
        return self._request("PATCH", path, body, MERGE, {})

    def delete(self, path: str, body: Object | None = None) -> Object:
        return self._request("DELETE", path, body, "application/json", {})

    def watch(self, path: str, **query: Any) -> Iterator[Object]:
        """Events until the server ends the stream, after about half a minute."""
        url = f"{self._server}{path}?{urlencode({**query, 'watch': 'true', 'timeoutSeconds': 30})}"
        self._check_network()
        try:
            timeout = urllib3.Timeout(connect=2, read=40)
            response = self._pool.request("GET", url, preload_content=False, timeout=timeout)
            if response.status != 200:
                raise ApiError(response.status, response.data.decode(errors="replace"))
            left = b""
            for chunk in response.stream(amt=None):
                self._check_network()
                *lines, left = (left + chunk).split(b"\n")
                yield from (json.loads(line) for line in lines)
        except urllib3.exceptions.HTTPError as error:
            raise ApiUnreachable(str(error)) from error

    def follow(
        self,
        path: str,
        stopped: threading.Event,
        on_object: Callable[[Object], None],
        on_deleted: Callable[[Object], None] = lambda value: None,
        on_list: Callable[[list[Object]], None] = lambda values: None,
        **query: Any,
    ) -> None:
        """List, then watch from there; from the start again whenever that ends, for whatever reason."""
        while not stopped.is_set():
            with contextlib.suppress(ApiUnreachable, ApiError):
                listed = self.get(path, **query)
                on_list(listed["items"])
                for value in listed["items"]:
                    on_object(value)
                for event in self.watch(path, **query, resourceVersion=listed["metadata"]["resourceVersion"]):
                    if stopped.is_set() or event["type"] == "ERROR":
                        break
                    (on_deleted if event["type"] == "DELETED" else on_object)(event["object"])
            stopped.wait(RETRY_SECONDS)

    def _check_network(self) -> None:
        if self.cut_off:
            raise ApiUnreachable("cut off")

    def _request(self, method: str, path: str, body: Object | None, content: str, query: dict[str, Any]) -> Object:
        answer: Object = json.loads(self._answer(method, path, body, content, query))
        return answer

    def _answer(self, method: str, path: str, body: Object | None, content: str, query: dict[str, Any]) -> bytes:
        url = f"{self._server}{path}" + (f"?{urlencode(query)}" if query else "")
        headers = {**self._pool.headers, **({"Content-Type": content} if body is not None else {})}
        self._check_network()
        try:
            sent = None if body is None else json.dumps(body)
            response = self._pool.request(method, url, body=sent, headers=headers)
        except urllib3.exceptions.HTTPError as error:
            raise ApiUnreachable(str(error)) from error
        if response.status >= 400:
            raise ApiError(response.status, response.data.decode(errors="replace"))
        return bytes(response.data)
