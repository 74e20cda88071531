"""Follow the logs of every container of a Job's pods, over lost connections and into new pods.

The server is asked for timestamps; after a lost connection it is asked again for somewhat more than the time since the
last line, and lines up to that timestamp are dropped. No clocks are compared: the time since is measured here.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import urllib3
from kubernetes.client.exceptions import ApiException

from k8s.api import TIMEOUT, Api
from k8s.objects import Pod

OVERLAP_SECONDS = 5
ADOPTED_LINES = 100  # of a pod that has been running before we came
SILENCE_SECONDS = 300.0  # then the connection is taken for dead and made again
RETRY_SECONDS = 1.0

logger = logging.getLogger(__name__)
OnLine = Callable[[str], None]


class LogFollower:
    """One thread per container that has started; `see(pods)` after each change of the pods."""

    def __init__(self, api: Api, namespace: str, on_line: OnLine, adopted: bool) -> None:
        self.api, self.namespace, self.on_line = api, namespace, on_line
        self._adopted = adopted
        self._followed: dict[tuple[str, str], _Stream] = {}

    def see(self, pods: Iterable[Pod]) -> None:
        """Start following containers that have started, tell the streams of those that have ended or are gone."""
        seen = set()
        for pod in pods:
            for container in pod.containers:
                if container.state == "waiting":
                    continue
                key = (pod.uid, container.name)
                seen.add(key)
                if key not in self._followed:
                    tail = ADOPTED_LINES if self._adopted else None
                    stream = _Stream(self.api, self.namespace, pod.name, container.name, self.on_line, tail)
                    self._followed[key] = stream
                    stream.start()
                if container.state == "terminated":
                    self._followed[key].ended.set()
        for key in self._followed.keys() - seen:  # the pod object is gone, and its log with it
            self._followed[key].ended.set()
        self._adopted = False

    def drain(self, seconds: float) -> None:
        """Wait until every line of the containers that have ended is handed over, for at most `seconds`."""
        deadline = time.monotonic() + seconds
        for stream in self._followed.values():
            stream.ended.set()
            stream.join(max(0.0, deadline - time.monotonic()))

    def stop(self) -> None:
        for stream in self._followed.values():
            stream.stop()

    @property
    def threads(self) -> list[threading.Thread]:
        return list(self._followed.values())


class _Stream(threading.Thread):
    """The log of one container, from its start (or its last `tail` lines) to its end."""

    def __init__(
        self, api: Api, namespace: str, pod: str, container: str, on_line: OnLine, tail: int | None = None
    ) -> None:
        super().__init__(name=f"log {pod}/{container}", daemon=True)
        self.api, self.namespace, self.pod, self.container, self.on_line = api, namespace, pod, container, on_line
        self.tail = tail
        self.ended = threading.Event()  # the container has ended: what is there now is all there will be
        self._stopped = threading.Event()
        self._response: urllib3.HTTPResponse | None = None
        self._last, self._heard = "", 0.0  # timestamp of the last line, and when we got it
        self._resumed_after = ""  # `_last` when this connection was made

    def run(self) -> None:
        while not self._stopped.is_set():
            ended = self.ended.is_set()
            try:
                self._read(follow=not ended)
            except ApiException as error:
                if ended and error.status in (400, 404):  # while it runs both only mean "not yet"
                    return
            except (urllib3.exceptions.HTTPError, OSError) as error:
                logger.debug("log of %s/%s: %s", self.pod, self.container, error)
            else:
                if ended:
                    return
            # Ended by us, by the server or by the container's end: the watch of the pods says which, soon.
            self.ended.wait(RETRY_SECONDS)

    def stop(self) -> None:
        self._stopped.set()
        self.ended.set()
        if self._response is not None:
            self._response.shutdown()

    def _read(self, follow: bool) -> None:
        options: dict[str, Any] = {}
        if self._last:
            options["since_seconds"] = math.ceil(time.monotonic() - self._heard) + OVERLAP_SECONDS
        elif self.tail is not None:
            options["tail_lines"] = self.tail
        answer: Any = self.api.core.read_namespaced_pod_log(
            self.pod,
            self.namespace,
            container=self.container,
            follow=follow,
            timestamps=True,
            _preload_content=False,
            _request_timeout=(TIMEOUT[0], SILENCE_SECONDS),
            **options,
        )
        if not 200 <= answer.status < 300:
            raise ApiException(status=answer.status, reason=answer.reason)
        self._response = answer
        self._resumed_after, rest = self._last, b""
        try:
            while chunk := answer.read1(65_536):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._hand_over(line)
            if rest and not follow:
                self._hand_over(rest)
        finally:
            self._response = None
            answer.release_conn()

    def _hand_over(self, line: bytes) -> None:
        stamp, _, text = line.decode(errors="replace").partition(" ")
        stamp = stamp.removesuffix("Z").ljust(29, "0")  # as many digits in all, so that text sorts like time
        if stamp <= self._resumed_after:
            return
        self._last, self._heard = max(stamp, self._last), time.monotonic()
        self.on_line(text)
