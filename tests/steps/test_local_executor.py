"""The local executor turns how a subprocess ended into what the flow has to do about it."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from samples import PACKAGE, spec_of

from orbit_core.errors import GateError, InputError, Interrupted
from orbit_core.executors.base import StepFailed
from orbit_core.executors.local import LocalExecutor

Events = list[dict[str, Any]]


def test_it_returns_the_artifact_and_passes_events_and_logs_on(tmp_path: Path) -> None:
    events: Events = []
    artifact = LocalExecutor(package=PACKAGE).run(spec_of(tmp_path / "s", "count", to=2), events.append)
    assert artifact.facts["resumed_from"] == 0
    assert [event["orbit"] for event in events if event["orbit"] != "log"] == ["progress", "progress", "done"]
    assert {"orbit": "log", "message": "noise of a library on stdout"} in events


def test_a_refusal_keeps_its_type_and_its_parts(tmp_path: Path) -> None:
    executor = LocalExecutor(package=PACKAGE)
    first = spec_of(tmp_path / "s", "count", to=5)
    executor.run(first, lambda event: None)
    with pytest.raises(GateError) as refusal:
        executor.run(spec_of(tmp_path / "s", "add", {"numbers": first.ref()}, at_most=1), lambda event: None)
    assert (refusal.value.expected, refusal.value.found) == ("at most 1", "10")


def test_a_crash_is_a_step_failed_with_the_tail_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"lost the GPU[\s\S]*Traceback"):
        LocalExecutor(package=PACKAGE).run(spec_of(tmp_path / "s", "fail"), lambda event: None)


@pytest.mark.parametrize("how", ["refuse", "crash"])
def test_secrets_are_masked_in_whatever_a_step_says(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_API_KEY", "canary-7d1f33aa")
    events: Events = []
    with pytest.raises((StepFailed, InputError)) as ended:
        LocalExecutor(package=PACKAGE).run(spec_of(tmp_path / "s", "leak", how=how), events.append)
    heard = json.dumps(events) + str(ended.value)
    assert {event["orbit"] for event in events} == {"log", "progress", "report", "error"}
    assert "canary-7d1f33aa" not in heard and heard.count("https://***@host/file?X-Amz-Signature=***&part=1") >= 5


def test_a_killed_step_is_a_step_failed_that_names_the_signal(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "linger", seconds=50)

    def kill(event: dict[str, Any]) -> None:
        import os

        if event["orbit"] == "progress":
            lock = tmp_path / "s" / ".work" / f"linger-{spec.digest[:16]}" / "lock"
            os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)

    with pytest.raises(StepFailed, match="killed by SIGKILL"):
        LocalExecutor(package=PACKAGE).run(spec, kill)


def test_an_exception_in_the_caller_stops_the_step_and_waits_for_it(tmp_path: Path) -> None:
    """Cancellation and Ctrl-C arrive as exceptions; the step finishes its number and its work is kept."""
    spec = spec_of(tmp_path / "s", "count", to=10_000, pause=0.02)

    def cancel(event: dict[str, Any]) -> None:
        if event.get("done") == 5:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        LocalExecutor(package=PACKAGE).run(spec, cancel)
    assert time.monotonic() - began < 60
    counted = tmp_path / "s" / ".work" / f"count-{spec.digest[:16]}" / "scratch" / "counted"
    assert int(counted.read_text()) >= 5


def test_a_step_that_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "s", "count", to=10, pause=30)

    def cancel(event: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        LocalExecutor(package=PACKAGE, grace_seconds=0.3).run(spec, cancel)
    assert time.monotonic() - began < 60


def test_a_step_stopped_from_outside_is_interrupted_and_resumable(tmp_path: Path) -> None:
    import os

    spec = spec_of(tmp_path / "s", "count", to=1000, pause=0.02)
    lock = tmp_path / "s" / ".work" / f"count-{spec.digest[:16]}" / "lock"

    def stop(event: dict[str, Any]) -> None:
        if event.get("done") == 3:
            os.kill(int(lock.read_text().split()[1]), signal.SIGTERM)

    with pytest.raises(Interrupted, match="counted to"):
        LocalExecutor(package=PACKAGE).run(spec, stop)


def test_events_arrive_in_the_callers_thread(tmp_path: Path) -> None:
    """Prefect's run context is bound to the thread."""
    threads: set[int] = set()
    LocalExecutor(package=PACKAGE).run(
        spec_of(tmp_path / "s", "count", to=2), lambda event: threads.add(threading.get_ident())
    )
    assert threads == {threading.get_ident()}
