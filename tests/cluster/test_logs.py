"""A pod's log comes through the API server from the node, as the official client reads it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

import pytest
import urllib3
from cluster.asking import Asking, pod, python, until
from kubernetes import client, config

COUNTS = "import time\nfor number in range({}):\n    print('line', number)\n    time.sleep(0.1)"


@pytest.fixture
def core(ask: Asking) -> client.CoreV1Api:
    return client.CoreV1Api(config.new_client_from_config(str(ask.cluster.plane.kubeconfig("admin"))))


def test_log_is_followed_live_until_the_container_ends(ask: Asking, core: client.CoreV1Api) -> None:
    name = ask.start(pod("a", python(COUNTS.format(8))))
    ask.running(name)
    stream: Any = core.read_namespaced_pod_log(name, ask.namespace, follow=True, _preload_content=False)
    arrivals = [(time.monotonic(), line.decode()) for line in stream]
    assert [line for _, line in arrivals] == [f"line {number}\n" for number in range(8)]
    assert arrivals[-1][0] - arrivals[0][0] > 0.3  # not all at once at the end


def test_both_streams_are_there_with_the_time_of_each_line(ask: Asking, core: client.CoreV1Api) -> None:
    writes = "import sys, time\nfor stream in (sys.stdout, sys.stderr) * 2:\n    print(1, file=stream, flush=True)"
    name = ask.start(pod("a", python(writes + "\n    time.sleep(0.1)")))
    ask.ended(name)
    lines = core.read_namespaced_pod_log(name, ask.namespace, timestamps=True).splitlines()
    times = [line.split(" ")[0] for line in lines]
    assert len(lines) == 4 and times == sorted(times) and all(len(stamp) == 30 for stamp in times)


def test_log_can_be_read_from_a_moment_or_from_its_end(ask: Asking, core: client.CoreV1Api) -> None:
    name = ask.start(pod("a", python(COUNTS.format(25))))
    ask.ended(name)
    stamped = core.read_namespaced_pod_log(name, ask.namespace, timestamps=True).splitlines()
    moment = datetime.fromisoformat(stamped[0][:19] + "+00:00") + timedelta(seconds=2)
    expected = [line for line in stamped if line >= moment.strftime("%Y-%m-%dT%H:%M:%S")]
    log = f"{ask.pods}/{name}/log?timestamps=true&sinceTime={moment:%Y-%m-%dT%H:%M:%SZ}"
    assert 0 < len(expected) < 25 and ask.api.text(log).splitlines() == expected
    assert core.read_namespaced_pod_log(name, ask.namespace, tail_lines=2) == "line 23\nline 24\n"


def test_dropped_connection_ends_the_stream_and_not_the_pod(ask: Asking, core: client.CoreV1Api) -> None:
    name = ask.start(pod("a", python(COUNTS.format(1000))))
    ask.says(name, "line 0")
    stream: Any = core.read_namespaced_pod_log(name, ask.namespace, follow=True, _preload_content=False)
    lines: list[bytes] = []
    reader = threading.Thread(target=_read_until_broken, args=(stream, lines))
    reader.start()
    until(lambda: lines, "the log is being followed")
    assert ask.cluster.node.drop_log_connections() == 1
    reader.join(timeout=10)
    assert not reader.is_alive()
    assert "running" in ask.pod(name)["status"]["containerStatuses"][0]["state"]


def test_log_of_a_container_that_waits_is_refused(ask: Asking, core: client.CoreV1Api) -> None:
    name = ask.start(pod("a", python(""), image="missing:1"))

    def refused() -> int | None:
        try:
            core.read_namespaced_pod_log(name, ask.namespace)
        except client.ApiException as refusal:
            return int(refusal.status) if refusal.status != 404 else None  # not yet known to its node
        return None

    assert until(refused, "its log is refused") == 400


def _read_until_broken(stream: Iterable[bytes], lines: list[bytes]) -> None:
    with contextlib.suppress(urllib3.exceptions.HTTPError):
        for line in stream:
            lines.append(line)
