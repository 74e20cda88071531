"""What a Job is doing, said to a person in one sentence, from its conditions and its pods. Pure functions.

    suspended -> waiting (no pod yet) -> pending (no node, no image) -> running -> finishing -> complete | failed

Conditions of the Job decide; pods explain. `SuccessCriteriaMet` and `FailureTarget` come before `Complete` and
`Failed`, while pods are still ending: a Job with one of them is finishing and nothing else. Kueue suspends a Job by
`spec.suspend`, before it starts and when it is preempted: that is waiting, not failure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from k8s.naming import QUEUE_LABEL, STAGE_CONTAINER
from k8s.objects import Condition, Container, Job, Pod
from orbit_core.errors import ExitCode

KILLED = 137  # 128 + SIGKILL
NONE = Condition(False)


class Phase(StrEnum):
    SUSPENDED = "suspended"
    WAITING = "waiting"
    PENDING = "pending"
    RUNNING = "running"
    FINISHING = "finishing"
    COMPLETE = "complete"
    FAILED = "failed"
    DELETING = "deleting"


FINAL = {Phase.COMPLETE, Phase.FAILED}

# Reasons for which a container does not start until somebody changes something, and what.
STUCK = {
    "ErrImagePull": "check images in the site file: the name, the tag, the pull secret",
    "ImagePullBackOff": "check images in the site file: the name, the tag, the pull secret",
    "InvalidImageName": "correct images in the site file",
    "ErrImageNeverPull": "the pull policy is Never and the node does not have the image: load it or change the policy",
    "CreateContainerConfigError": "create the Secret or ConfigMap that the site file names, in the same namespace",
    "CreateContainerError": "see `kubectl describe pod`",
}
DISRUPTIONS = {
    "PreemptionByScheduler": "a pod of higher priority took its place",
    "DeletionByTaintManager": "its node became unusable",
    "EvictionByEvictionAPI": "it was evicted (a node is being drained)",
    "TerminationByKubelet": "its node evicted it (out of memory or disk, or shutting down)",
    "DeletionByPodGC": "its node is gone",
}


@dataclass(frozen=True)
class Situation:
    """`reason` is Kubernetes' own word; `message` the sentence; `fix` what a person can do, empty if nothing."""

    phase: Phase
    reason: str = ""
    message: str = ""
    fix: str = ""
    exit_code: int | None = None  # of the container that decided it, where one did

    @property
    def needs_help(self) -> bool:
        return self.reason in STUCK


def assess(job: Job, pods: Iterable[Pod] = (), refused: Sequence[str] = ()) -> Situation:
    """The situation of `job`, explained by its `pods` of any age and by why its pods were `refused`, newest last."""
    pods = sorted(pods, key=lambda pod: pod.created)
    true = {kind: condition for kind, condition in job.conditions.items() if condition.true}
    if "Failed" in true:
        return _failed(Phase.FAILED, job, true["Failed"], pods)
    if "Complete" in true:
        return Situation(Phase.COMPLETE, message="done")
    if job.deleting:
        return Situation(Phase.DELETING, message="the Job is being deleted")
    if "FailureTarget" in true:
        return _failed(Phase.FINISHING, job, true["FailureTarget"], pods)
    if "SuccessCriteriaMet" in true:
        return Situation(Phase.FINISHING, message="the step is done; its pod is ending")
    if job.suspended:
        return _suspended(job, bool(pods))
    living = [pod for pod in pods if not pod.ended]
    return _living(living[-1]) if living else _waiting(pods, refused)


def why_ended(pod: Pod) -> Situation | None:
    """Why a pod has ended or is ending; None while it lives."""
    if not pod.ended and not pod.deleting:
        return None
    container, disrupted = _decisive(pod), _disruption(pod)
    code = container.exit_code if container else None
    if disrupted:
        return Situation(Phase.FAILED, "DisruptionTarget", f"pod {pod.name} ended because {disrupted}", exit_code=code)
    if container is None:
        text = f": {pod.message}" if pod.message else ""
        return Situation(Phase.FAILED, "", f"pod {pod.name} ended{text}")
    whose = f"container {container.name} of pod {pod.name}"
    if container.reason == "OOMKilled":
        text = f"{whose} was killed: it needed more than its {pod.memory or 'limit'} of memory"
        return Situation(Phase.FAILED, "OOMKilled", text, "raise resources.<step>.memory_gib in the recipe", code)
    if code == 0:
        return Situation(Phase.COMPLETE, "Completed", f"pod {pod.name} ended well", exit_code=0)
    if code == ExitCode.RESUMABLE:
        return Situation(Phase.FAILED, "Stopped", f"pod {pod.name} was stopped and can be resumed", exit_code=code)
    how = "was killed (SIGKILL)" if code == KILLED else f"ended with exit code {code}"
    return Situation(Phase.FAILED, container.reason or "Error", f"{whose} {how}", exit_code=code)


def last_words(pods: Iterable[Pod]) -> str:
    """The end of the failed container's log as Kubernetes keeps it in the pod: what is left when the log is lost."""
    for pod in sorted(pods, key=lambda pod: pod.created, reverse=True):
        container = _decisive(pod)
        if container and container.exit_code:
            return container.message
    return ""


def _failed(phase: Phase, job: Job, found: Condition, pods: Sequence[Pod]) -> Situation:
    last = _last_end(pods) or Situation(phase)
    if found.reason == "DeadlineExceeded":
        text = f"its deadline of {(job.deadline_seconds or 0) / 3600:.4g} hours has passed"
        fix = "raise resources.<step>.hours; a Retry goes on from what is committed"
        return Situation(phase, found.reason, text, fix)
    if found.reason == "BackoffLimitExceeded":
        text = f"failed {job.retries + 1} times; the last time {last.message or found.message}"
        return Situation(phase, last.reason or found.reason, text, last.fix, last.exit_code)
    # Our only rule that fails a Job is the one for exit code 42; the pod that said it may be gone with its node.
    code = int(ExitCode.REFUSED) if found.reason == "PodFailurePolicy" else last.exit_code
    return Situation(phase, found.reason, last.message or found.message, last.fix, code)


def _suspended(job: Job, ran: bool) -> Situation:
    queue = job.labels.get(QUEUE_LABEL)
    before = "stopped for others and " if ran or job.tried else ""
    if queue:
        return Situation(Phase.SUSPENDED, "Suspended", f"{before}waiting in queue {queue}")
    fix = "set spec.suspend of the Job to false"
    return Situation(Phase.SUSPENDED, "Suspended", f"{before}waiting: somebody has suspended the Job", fix)


def _living(pod: Pod) -> Situation:
    if pod.deleting:
        why = _disruption(pod) or "it was deleted"
        return Situation(Phase.PENDING, "Terminating", f"pod {pod.name} is ending: {why}")
    scheduled = pod.conditions.get("PodScheduled", NONE)
    if not scheduled.true and scheduled.reason == "Unschedulable":
        text = f"no node has room for it: {scheduled.message}"
        return Situation(
            Phase.PENDING, "Unschedulable", text, "wait, free a node, or lower resources.<step> in the recipe"
        )
    for container in pod.containers:
        if container.state == "waiting" and container.reason in STUCK:
            why = container.message or container.image
            text = f"container {container.name} does not start: {container.reason}: {why}"
            return Situation(Phase.PENDING, container.reason, text, STUCK[container.reason])
    running = [container.name for container in pod.containers if container.state == "running"]
    where = f"pod {pod.name} on node {pod.node}" if pod.node else f"pod {pod.name}"
    if STAGE_CONTAINER in running:
        return Situation(Phase.RUNNING, "Staging", f"{where} fetches its inputs")
    if running:
        return Situation(Phase.RUNNING, "Running", f"{where} runs")
    return Situation(Phase.PENDING, "Starting", f"{where} is starting")


def _waiting(pods: Sequence[Pod], refused: Sequence[str]) -> Situation:
    last = _last_end(pods)
    if last:
        return Situation(Phase.WAITING, last.reason, f"{last.message}; waiting for what follows", last.fix)
    if refused:
        fix = "check quota, priority class and pod security of the namespace"
        return Situation(Phase.WAITING, "FailedCreate", f"its pod is refused: {refused[-1]}", fix)
    return Situation(Phase.WAITING, message="waiting for its pod")


def _last_end(pods: Sequence[Pod]) -> Situation | None:
    return next((said for pod in reversed(pods) if (said := why_ended(pod)) is not None), None)


def _decisive(pod: Pod) -> Container | None:
    """The container that decided how the pod ended: the first that failed, else the last that ended."""
    ended = [container for container in pod.containers if container.state == "terminated"]
    failed = [container for container in ended if container.exit_code]
    return next(iter(failed or ended[-1:]), None)


def _disruption(pod: Pod) -> str:
    found = pod.conditions.get("DisruptionTarget", NONE)
    return DISRUPTIONS.get(found.reason, found.message or found.reason or "it was disrupted") if found.true else ""
