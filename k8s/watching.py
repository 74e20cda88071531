"""List, then watch from where the list ended; again from the list when the server no longer knows that place.

One thread per kind of object hands over whole snapshots, so that whoever reads them never has to put changes together,
and a relist after an outage cannot lose or invent an object.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import urllib3
from kubernetes.client.exceptions import ApiException
from kubernetes.watch import Watch

from k8s.api import LONGEST_PAUSE, TIMEOUT, is_denial, passing, refusal

WATCH_SECONDS = 240  # then the server ends the stream and we ask for another
SILENCE_SECONDS = 90.0  # bookmarks come every minute: a longer silence is a dead connection
GONE = 410

logger = logging.getLogger(__name__)


class Identified(Protocol):
    @property
    def uid(self) -> str: ...


T = TypeVar("T", bound=Identified)


class ListWatch(Generic[T]):
    """Follows `list_call(**selectors)` in a daemon thread, each object read by `parse`.

    `on_change(objects)` after the list and every change; `on_trouble(None | error)` when the server is lost or found
    again; an error that repeating cannot help ends the thread and is handed over as a second argument True.
    """

    def __init__(
        self,
        what: str,
        list_call: Callable[..., Any],
        parse: Callable[[Any], T],
        on_change: Callable[[list[T]], None],
        on_trouble: Callable[[Exception | None, bool], None],
        **selectors: str,
    ) -> None:
        self.what, self.list_call, self.parse, self.selectors = what, list_call, parse, selectors
        self.on_change, self.on_trouble = on_change, on_trouble
        self._stopped = threading.Event()
        self._watch: Watch | None = None
        self._objects: dict[str, T] = {}  # by uid
        self._version: str | None = None
        self._thread = threading.Thread(target=self._follow, name=f"watch {what}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end, also if it is reading."""
        self._stopped.set()
        if self._watch is not None:
            self._watch.stop()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _follow(self) -> None:
        pause, lost, denied_since = 0.25, False, 0.0
        while not self._stopped.is_set():
            try:
                if self._version is None:
                    self._list()
                    if lost:
                        self.on_trouble(None, False)
                    pause, lost = 0.25, False
                self._watch_on()
            except (ApiException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                if self._stopped.is_set():
                    return
                if isinstance(error, ApiException) and error.status == GONE:
                    logger.info("watch of %s expired; listing again", self.what)
                    self._version = None
                    continue
                if isinstance(error, urllib3.exceptions.ReadTimeoutError) and self._version is not None:
                    continue  # a silent connection: the next watch goes on from the same place
                denied_since = (denied_since or time.monotonic()) if is_denial(error) else 0.0
                if not passing(error) and not is_denial(error, denied_since):
                    self.on_trouble(refusal(f"watching {self.what}", error), True)
                    return
                lost, self._version = True, None
                self.on_trouble(error, False)
                self._stopped.wait(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    def _list(self) -> None:
        answer = self.list_call(**self.selectors, _request_timeout=TIMEOUT)
        self._objects = {item.uid: item for item in map(self.parse, answer.items)}
        self._version = answer.metadata.resource_version
        self.on_change(list(self._objects.values()))

    def _watch_on(self) -> None:
        self._watch = Watch()
        started = time.monotonic()
        stream = self._watch.stream(
            self.list_call,
            **self.selectors,
            resource_version=self._version,
            allow_watch_bookmarks=True,
            timeout_seconds=WATCH_SECONDS,
            _request_timeout=(TIMEOUT[0], SILENCE_SECONDS),
        )
        try:
            for event in stream:
                if self._stopped.is_set():
                    return
                if event["type"] == "BOOKMARK":
                    continue
                found = self.parse(event["object"])
                if event["type"] == "DELETED":
                    self._objects.pop(found.uid, None)
                else:
                    self._objects[found.uid] = found
                self.on_change(list(self._objects.values()))
        finally:
            self._version = self._watch.resource_version or self._version
            if time.monotonic() - started < 0.2:
                self._stopped.wait(0.2)  # a server that ends every stream at once must not be asked without pause
