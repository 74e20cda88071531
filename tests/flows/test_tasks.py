"""Tasks on a real Prefect server, with real small steps: adoption, retries, refusals, cancellation, the dashboard."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from samples import PACKAGE, spec_of

from orbit_core.errors import GateError, InputError
from orbit_core.executors.base import StepFailed
from orbit_core.executors.local import LocalExecutor
from orbit_core.store import open_store
from orbit_core.store.artifacts import ArtifactStore


@pytest.fixture
def events(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What watchers hear."""
    import tasks.watching

    heard: list[tuple[str, str]] = []
    monkeypatch.setattr(tasks.watching, "_watchers", [lambda step, event: heard.append((step, event["orbit"]))])
    return heard


def artifacts_on_the_dashboard(flow_run_id: Any) -> dict[str, Any]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        return {str(each.key): each for each in client.read_artifacts(artifact_filter=chosen)}


def test_steps_run_once_and_are_adopted_by_the_next_run(events: list[tuple[str, str]], tmp_path: Path) -> None:
    from prefect import flow
    from prefect.runtime import flow_run

    from tasks import steps

    first = spec_of(tmp_path / "store", "count", to=4)
    second = spec_of(tmp_path / "store", "add", {"numbers": first.ref()}, at_most=6)

    @flow
    def pipeline() -> tuple[Any, ...]:
        return (
            steps.data(first, LocalExecutor(package=PACKAGE)),
            steps.evaluate(second, LocalExecutor(package=PACKAGE)),
            flow_run.id,
        )

    counted, added, made = pipeline()
    assert (counted.reused, added.reused, added.artifact.facts) == (False, False, {"total": 6})
    shown = artifacts_on_the_dashboard(made)
    assert {"orbit-count-progress", "orbit-count-facts", "orbit-add-sum", "orbit-add-facts"} <= set(shown)
    assert '"total": 6' in shown["orbit-add-sum"].data
    events.clear()
    counted, added, _ = pipeline()
    assert counted.reused and added.reused
    assert [event for _, event in events] == ["started", "finished"] * 2, "no subprocess was started"


def test_a_refusal_fails_the_flow_at_once_with_its_message(events: list[tuple[str, str]], tmp_path: Path) -> None:
    from prefect import flow

    from tasks import steps

    first = spec_of(tmp_path / "store", "count", to=4)
    second = spec_of(tmp_path / "store", "add", {"numbers": first.ref()}, at_most=5)

    @flow
    def pipeline() -> None:
        steps.data(first, LocalExecutor(package=PACKAGE))
        steps.evaluate(second, LocalExecutor(package=PACKAGE))

    state = pipeline(return_state=True)
    assert state.is_failed() and "at most 5" in str(state.message)
    with pytest.raises(GateError, match="count less far"):
        state.result()
    assert events.count(("add", "started")) == 1, "a refusal is not retried"


def test_no_secret_reaches_prefect(
    events: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step that says all it knows: states, logs, artifacts and parameters as the API gives them back."""
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.runtime import flow_run

    from tasks import steps

    monkeypatch.setenv("CANARY_API_KEY", "canary-7d1f33aa")
    ids: list[Any] = []

    @flow
    def pipeline(store: str) -> None:
        ids.append(flow_run.id)
        steps.data(spec_of(store, "leak", how="refuse"), LocalExecutor(package=PACKAGE))

    with pytest.raises(InputError):
        pipeline(str(tmp_path / "store"))
    for handler in logging.getLogger("prefect.flow_runs").handlers:
        handler.flush()
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(ids[0])
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=ids)))
    assert any("***@host" in log.message for log in logs), "the canary has sung"
    said = [run.model_dump_json(), *(log.message for log in logs)]
    said += [each.model_dump_json() for each in artifacts_on_the_dashboard(ids[0]).values()]
    assert "403 for ***" in run.model_dump_json()
    assert not [text for text in said if "canary-7d1f33aa" in text]


def test_a_crash_is_retried(events: list[tuple[str, str]], tmp_path: Path) -> None:
    from prefect import flow

    from tasks import steps

    @flow
    def pipeline() -> None:
        steps.train.with_options(retry_delay_seconds=0, task_run_name="crash")(
            spec_of(tmp_path, "fail"), LocalExecutor(package=PACKAGE)
        )

    with pytest.raises(StepFailed, match="lost the GPU"):
        pipeline()
    assert events.count(("fail", "started")) == 3


CANCELLED = """
import sys
from prefect import flow
import tasks.steps
from flows.running import short_errors
from orbit_core.executors.local import LocalExecutor
from orbit_core.steps.contract import StepSpec
from tasks.watching import watching

@flow
def pipeline(spec: StepSpec):
    tasks.steps.data(spec, LocalExecutor(package="samples"))

with short_errors(), watching(lambda step, event: print(event["orbit"], flush=True)):
    pipeline(StepSpec.model_validate_json(sys.argv[1]))
"""


def test_a_cancelled_flow_stops_its_step_and_the_next_run_resumes_it(
    prefect_api: str, events: list[tuple[str, str]], tmp_path: Path
) -> None:
    from prefect import flow

    from tasks import steps

    spec = spec_of(tmp_path / "store", "count", to=120, pause=0.02)
    flow_process = subprocess.Popen(
        [sys.executable, "-c", CANCELLED, spec.model_dump_json()],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PREFECT_API_URL": prefect_api},
    )
    assert flow_process.stdout is not None
    assert any(line == "progress\n" for line in flow_process.stdout)
    step = int((tmp_path / "store" / ".work" / f"count-{spec.digest[:16]}" / "lock").read_text().split()[1])
    flow_process.send_signal(signal.SIGTERM)
    flow_process.stdout.read()
    assert flow_process.wait(timeout=60) != 0
    deadline = time.monotonic() + 5
    while Path(f"/proc/{step}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{step}").exists()

    @flow
    def again() -> None:
        steps.data(spec, LocalExecutor(package=PACKAGE))

    again()
    artifact = ArtifactStore(open_store(spec.store)).find("count", spec.digest)
    assert artifact is not None and artifact.facts["resumed_from"] > 0
