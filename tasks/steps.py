"""One Prefect task per pipeline step. Thin: adopt the artifact if the store has it, else run the step and show it.

Retries are for machines that die. A wrong input or a gate that said no (exit 42) fails the same way every time and is
not retried. Prefect's own result cache stays off: the store knows what is finished, even to a new Prefect database.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from orbit_core.errors import InputError
from orbit_core.steps.contract import StepSpec
from orbit_core.store import open_store
from orbit_core.store.artifacts import Artifact, ArtifactStore
from tasks.dashboard import Follower, show_facts
from tasks.executors import executor_for
from tasks.watching import tell


@dataclass(frozen=True)
class StepResult:
    """What the flow knows of a step that is done; `seconds` are those of this run, near 0 when reused."""

    artifact: Artifact
    seconds: float
    reused: bool


def worth_retrying(task: Any, task_run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again may help; asked by Prefect after a failure."""
    return not isinstance(state.result(raise_on_failure=False), InputError)


_STEP: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [5, 30],
    "retry_condition_fn": worth_retrying,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}


@task(name="data", task_run_name="prepare prompts", **_STEP)
def data(spec: StepSpec, executor: str) -> StepResult:
    return _finish(spec, executor)


@task(name="pretrain", task_run_name="pretrain a small base", **_STEP)
def pretrain(spec: StepSpec, executor: str) -> StepResult:
    return _finish(spec, executor)


@task(name="quantize", task_run_name="quantize to {spec.params[precision][format]}", **_STEP)
def quantize(spec: StepSpec, executor: str) -> StepResult:
    return _finish(spec, executor)


@task(name="convert", task_run_name="convert to torch_dist", **_STEP)
def convert(spec: StepSpec, executor: str) -> StepResult:
    return _finish(spec, executor)


@task(name="preflight", task_run_name="compare trainer and rollout engine", **_STEP)
def preflight(spec: StepSpec, executor: str) -> StepResult:
    return _finish(spec, executor)


@task(name="train", task_run_name="train {spec.params[adapter][kind]}, {spec.params[algorithm][steps]} steps", **_STEP)
def train(spec: StepSpec, executor: str) -> StepResult:
    return _finish(spec, executor)


@task(name="evaluate", task_run_name="evaluate before and after", **_STEP)
def evaluate(spec: StepSpec, executor: str) -> StepResult:
    return _finish(spec, executor)


@task(name="publish", task_run_name="publish the adapter", **_STEP)
def publish(spec: StepSpec, executor: str) -> StepResult:
    return _finish(spec, executor)


@task(name="report", task_run_name="write the report", **_STEP)
def report(spec: StepSpec, executor: str) -> StepResult:
    return _finish(spec, executor)


def _finish(spec: StepSpec, executor: str) -> StepResult:
    logger, started = get_run_logger(), time.monotonic()
    tell(spec.step, {"orbit": "started"})
    artifact = ArtifactStore(open_store(spec.store)).find(spec.step, spec.digest)
    reused = artifact is not None
    if artifact is None:
        artifact = executor_for(executor).run(spec, Follower(spec.step, logger))
    result = StepResult(artifact, round(time.monotonic() - started, 3), reused)
    logger.info("%s %s/%s", "reused" if reused else "made", spec.step, spec.digest[:16])
    tell(spec.step, {"orbit": "finished", "seconds": result.seconds, "reused": reused, "facts": artifact.facts})
    show_facts(artifact)
    return result
