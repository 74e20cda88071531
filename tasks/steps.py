"""One Prefect task per pipeline step. Thin: adopt the artifact if the store has it, else run the step and show it.

Retries are for machines that die. A wrong input or a gate that said no (exit 42) fails the same way every time and is
not retried, nor is a Job for which Kubernetes has used up its own retries. Prefect's own result cache stays off: the
store knows what is finished, even to a new Prefect database.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from orbit_core.errors import InputError
from orbit_core.executors.base import Executor, GaveUp
from orbit_core.steps.contract import StepSpec
from orbit_core.store import open_store
from orbit_core.store.artifacts import Artifact, ArtifactStore
from orbit_core.store.checking import ensure_fit
from tasks.dashboard import Follower, show_facts
from tasks.watching import tell


@dataclass(frozen=True)
class StepResult:
    """What the flow knows of a step that is done; `seconds` are those of this run, near 0 when reused."""

    artifact: Artifact
    seconds: float
    reused: bool


def worth_retrying(task: Any, task_run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again may help; asked by Prefect after a failure."""
    return not isinstance(state.result(raise_on_failure=False), InputError | GaveUp)


def _finish(spec: StepSpec, executor: Executor) -> StepResult:
    logger, started = get_run_logger(), time.monotonic()
    tell(spec.step, {"orbit": "started"})
    artifact = ArtifactStore(open_store(spec.store)).find(spec.step, spec.digest)
    reused = artifact is not None
    if artifact is None:
        ensure_fit(spec.store)
        artifact = executor.run(spec, Follower(spec.step, logger))
    result = StepResult(artifact, round(time.monotonic() - started, 3), reused)
    logger.info("%s %s/%s", "reused" if reused else "made", spec.step, spec.digest[:16])
    tell(spec.step, {"orbit": "finished", "seconds": result.seconds, "reused": reused, "facts": artifact.facts})
    show_facts(artifact)
    return result


def _task(step: str, title: str) -> Task[[StepSpec, Executor], StepResult]:
    settings = task(
        name=step,
        task_run_name=title,
        retries=2,
        retry_delay_seconds=[5.0, 60.0],
        retry_condition_fn=worth_retrying,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    return settings(_finish)


data = _task("data", "prepare prompts")
pretrain = _task("pretrain", "pretrain a small base")
quantize = _task("quantize", "quantize to {spec.params[precision][format]}")
convert = _task("convert", "convert to torch_dist")
preflight = _task("preflight", "compare trainer and rollout engine")
train = _task("train", "train {spec.params[adapter][kind]}, {spec.params[algorithm][steps]} steps")
evaluate = _task("evaluate", "evaluate before and after")
publish = _task("publish", "publish the adapter")
report = _task("report", "write the report")
