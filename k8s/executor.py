"""Run a step as one Kubernetes Job: the same spec, the same artifact.

The Job's name is a function of the step's digest, so whoever asks for a step first creates its Job and whoever asks
next adopts it: a second run of the same recipe, a Retry on the dashboard, an orchestrator that was killed and came
back. A finished Job that left no artifact is replaced. Kubernetes starts new pods after failures, within the limits of
the recipe; the step itself goes on from what it has committed, and holds a lease in the store while it works.

Called off (Ctrl-C, cancellation) the Job is deleted; an orchestrator that merely ends leaves it running.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from kubernetes.client import V1Job

from k8s.api import Api, connect
from k8s.following import Following
from k8s.jobs import Jobs
from k8s.manifests import job as manifest_of
from k8s.naming import DIGEST_ANNOTATION, STORE_ANNOTATION, job_name
from k8s.objects import Job, Pod
from k8s.site import Site
from k8s.state import FINAL, Phase, Situation, assess, last_words
from orbit_core.errors import ExitCode, InputError, Interrupted, OrbitError
from orbit_core.executors.base import Event, GaveUp, StepFailed
from orbit_core.executors.outcome import Said, error_of, parsed
from orbit_core.recipe import Resources
from orbit_core.steps.contract import StepSpec
from orbit_core.store import open_store
from orbit_core.store.artifacts import Artifact, ArtifactStore

DRAIN_SECONDS = 20.0  # for the last lines of a log after the Job's end
OnEvent = Callable[[Event], None]


class KubernetesExecutor:
    """`resources`: by step. `called_off(error)`: whether an exception in the caller's thread means that nobody wants
    the step any more; by default every Ctrl-C, SIGTERM and cancellation does."""

    def __init__(
        self,
        site: Site,
        resources: Mapping[str, Resources],
        called_off: Callable[[BaseException], bool] = lambda error: True,
        api: Api | None = None,
    ) -> None:
        self.site, self.resources, self.called_off = site, resources, called_off
        self.api = api or connect()
        self.jobs = Jobs(self.api, site.namespace)

    def run(self, spec: StepSpec, on_event: OnEvent) -> Artifact:
        """See Executor.run. Raises GaveUp when the Job's retries or its deadline are used up."""
        job, adopted = self._create_or_adopt(spec, on_event)
        if job is None:
            return self._artifact(spec)
        on_event({"orbit": "report", "name": "job", "content": _about(job, adopted)})
        try:
            with Following(self.api, job, adopted) as following:
                failure = self._follow(spec, following, on_event)
        except BaseException as error:
            # Trouble of our own is not the step's: the Job goes on, and whoever asks next adopts it.
            asked_to_stop = isinstance(error, Interrupted) or not isinstance(error, Exception)
            if asked_to_stop and self.called_off(error):
                self.jobs.delete(job)
            raise
        if failure is not None:
            raise failure
        return self._artifact(spec)

    def _create_or_adopt(self, spec: StepSpec, on_event: OnEvent) -> tuple[Job | None, bool]:
        """The Job that works on `spec`, and whether it was there before us; None if it has finished the step."""
        wanted: V1Job = manifest_of(spec, self.resources.get(spec.step, Resources()), self.site)

        def say(message: str) -> None:
            on_event({"orbit": "status", "message": message})

        while True:
            made = self.jobs.create(wanted, say)
            if made is not None:
                return made, False
            found = self.jobs.read(job_name(spec), say)
            if found is None:
                continue  # deleted between the two calls
            _check_ours(found, spec)
            if not found.deleting:
                phase = assess(found).phase
                if phase not in FINAL:
                    return found, True
                if phase is Phase.COMPLETE and self._find(spec) is not None:
                    return None, True
                say(f"Job {found.name} of an earlier try is {phase} and left no artifact: it is replaced")
                self.jobs.delete(found)
            say(f"waiting until the pods of the earlier Job {found.name} have ended")
            self.jobs.wait_until_gone(found)

    def _follow(self, spec: StepSpec, following: Following, on_event: OnEvent) -> OrbitError | None:
        """Hand on events until the Job ends; None if it did its work, else the error to raise."""
        said = Said(on_event)
        situation = Situation(Phase.WAITING)
        stuck_since: float | None = None
        for kind, content in following:
            if kind == "line":
                said.line(content)
            elif kind == "status":
                on_event({"orbit": "status", "message": content})
            elif following.gone:
                if self._find(spec) is not None:
                    return None
                return StepFailed(f"step {spec.step}: Job {following.job.name} was deleted before it was done")
            else:
                before, situation = situation, assess(following.job, following.pods, following.why_no_pod())
                if situation != before and situation.message and situation.phase not in FINAL:
                    on_event({"orbit": "status", "message": situation.message, "fix": situation.fix})
                if situation.phase in FINAL:
                    break
                stuck_since = (stuck_since or time.monotonic()) if situation.needs_help else None
                if stuck_since and time.monotonic() - stuck_since > self.site.images.patience_seconds:
                    self.jobs.delete(following.job)
                    return InputError(f"step {spec.step}", "a pod that starts", situation.message, situation.fix)
        following.last_look()
        for line in following.last_lines(DRAIN_SECONDS):
            said.line(line)
        situation = assess(following.job, following.pods)
        return None if situation.phase is Phase.COMPLETE else _error(spec, situation, said, following.pods)

    def _artifact(self, spec: StepSpec) -> Artifact:
        found = self._find(spec)
        if found is None:
            raise StepFailed(
                f"step {spec.step}: Job {job_name(spec)} ended well but its artifact is not in store {spec.store}"
            )
        return found

    def _find(self, spec: StepSpec) -> Artifact | None:
        return ArtifactStore(open_store(spec.store)).find(spec.step, spec.digest)


def _error(spec: StepSpec, situation: Situation, said: Said, pods: list[Pod]) -> OrbitError:
    failure, tail = said.failure, list(said.tail)
    if not failure and not tail:  # the log is lost, with its node perhaps: what the pod itself remembers
        events = [(line, parsed(line)) for line in last_words(pods).splitlines()]
        failure = next((event for _, event in reversed(events) if event and event["orbit"] == "error"), {})
        tail = [line for line, event in events if event is None]
    if situation.exit_code == ExitCode.REFUSED:
        return error_of(spec, ExitCode.REFUSED, failure, tail)
    parts = [f"step {spec.step}: {situation.message}"]
    parts += [str(failure["message"])] if failure.get("message") else []
    parts += [f"what to do: {situation.fix}"] if situation.fix else []
    return GaveUp("\n  ".join([*parts, *tail]))


def _check_ours(job: Job, spec: StepSpec) -> None:
    digest, store = (job.annotations.get(name, "none") for name in (DIGEST_ANNOTATION, STORE_ANNOTATION))
    if (digest, store) != (spec.digest, spec.store):
        raise InputError(
            f"Job {job.name} in namespace {job.namespace}",
            f"a Job of Orbit for step {spec.step}, digest {spec.digest[:16]}, store {spec.store}",
            f"one for digest {digest[:16]}, store {store}",
            "delete or rename it: somebody else made it under this name",
        )


def _about(job: Job, adopted: bool) -> str:
    how = "Adopted: it was there already." if adopted else "Created by this run."
    return (
        f"### Job `{job.name}`\n\nNamespace `{job.namespace}`. {how}\n\n```\n"
        f"kubectl -n {job.namespace} describe job {job.name}\n"
        f"kubectl -n {job.namespace} logs -f job/{job.name} --all-containers\n```\n"
    )
