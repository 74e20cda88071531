"""One step as one Job.

What the Job promises: one pod at a time (a new one only after the old one is gone); exit code 42 ends it at once; lost
nodes, evictions and stops on request cost no try, anything else costs one; it ends by its deadline. What the pod
promises: it runs as a user without rights, with no token, no capability and a read-only image; it writes to its scratch
and to what the site mounts. Credentials are named, never held: they come from a Secret through `envFrom`.

`suspend` is left alone: Kueue's webhook sets it on Jobs that carry its queue label, and a value of ours would either
start the pod before its quota or leave it suspended where no Kueue is.
"""

from __future__ import annotations

from typing import Any

import yaml
from kubernetes.client import (
    V1Container,
    V1Job,
    V1JobSpec,
    V1LocalObjectReference,
    V1ObjectMeta,
    V1PodFailurePolicy,
    V1PodFailurePolicyOnExitCodesRequirement,
    V1PodFailurePolicyOnPodConditionsPattern,
    V1PodFailurePolicyRule,
    V1PodSpec,
    V1PodTemplateSpec,
    V1ResourceRequirements,
    V1Toleration,
)

from k8s.naming import (
    CONTAINER,
    QUEUE_LABEL,
    SPEC_ANNOTATION,
    STAGE_CONTAINER,
    annotations_of,
    job_name,
    labels_of,
)
from k8s.pod import TMP_GIB, container_security, environment, pod_security, sources, volume_mounts, volumes
from k8s.reachable import check_reachable
from k8s.site import SCRATCH, SPEC_FILE, Site
from k8s.sizing import check_gpus, device_of
from orbit_core.errors import ExitCode, InputError
from orbit_core.recipe import Resources
from orbit_core.steps.contract import StepSpec
from orbit_core.steps.runner import PACKAGE

QUEUE_PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
TOPOLOGY_ANNOTATION = "kueue.x-k8s.io/podset-preferred-topology"
# An autoscaler that packs nodes tighter would undo hours of work to save minutes; a drain still moves the pod.
STAY_ANNOTATIONS = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
ANNOTATION_BYTES = 240 * 1024  # Kubernetes allows 256 KiB an object; the rest is for what others add, Kueue above all
LOGS_GIB = 2  # of node-local storage, for the containers' logs


def job(spec: StepSpec, resources: Resources, site: Site) -> V1Job:
    """The Job of one step. The same arguments give the same Job.

    Raises InputError where the pod could not work: a store or input out of its reach, fewer GPUs than its engines name,
    a spec too large to travel with the Job.
    """
    check_reachable(spec, site)
    check_gpus(spec.step, device_of(spec.params), resources)
    labels = labels_of(spec)
    queue = {QUEUE_LABEL: site.queue, QUEUE_PRIORITY_LABEL: site.queue_priority if site.queue else None}
    return V1Job(
        api_version="batch/v1",
        kind="Job",
        metadata=V1ObjectMeta(
            name=job_name(spec),
            namespace=site.namespace,
            labels={**labels, **{label: value for label, value in queue.items() if value}},
            annotations={name: text for name, text in annotations_of(spec).items() if name != SPEC_ANNOTATION},
        ),
        spec=V1JobSpec(
            completions=1,
            parallelism=1,
            backoff_limit=resources.retries,
            active_deadline_seconds=max(1, round(resources.hours * 3600)),
            ttl_seconds_after_finished=site.ttl_seconds,
            pod_replacement_policy="Failed",  # never two pods on one step
            pod_failure_policy=_failure_policy(),
            template=V1PodTemplateSpec(
                metadata=V1ObjectMeta(labels=labels, annotations=_pod_annotations(spec, site)),
                spec=_pod(spec, resources, site),
            ),
        ),
    )


def to_dict(job: V1Job) -> dict[str, Any]:
    """Plain values under the API's own names, without what is not set."""
    plain: dict[str, Any] = job.model_dump(by_alias=True, exclude_none=True)
    return plain


def to_yaml(job: V1Job) -> str:
    """As `kubectl apply` reads it; the spec stays on one line, in ASCII: of a line break of Unicode's own (U+0085) the
    library would write one that it reads as another."""
    return yaml.safe_dump(to_dict(job), sort_keys=False, width=float("inf"))


def _failure_policy() -> V1PodFailurePolicy:
    """The first rule that matches decides; a failure that none matches counts against `backoffLimit`.

    A refusal comes first: it would be said again, also when the pod was being evicted as it spoke.
    """
    refused, stopped = int(ExitCode.REFUSED), int(ExitCode.RESUMABLE)
    disrupted = V1PodFailurePolicyOnPodConditionsPattern(type="DisruptionTarget", status="True")
    return V1PodFailurePolicy(
        rules=[
            *(_on_exit("FailJob", refused, container) for container in (CONTAINER, STAGE_CONTAINER)),
            V1PodFailurePolicyRule(action="Ignore", on_pod_conditions=[disrupted]),
            _on_exit("Ignore", stopped),
        ]
    )


def _on_exit(action: str, code: int, container: str | None = None) -> V1PodFailurePolicyRule:
    requirement = V1PodFailurePolicyOnExitCodesRequirement(container_name=container, operator="In", values=[code])
    return V1PodFailurePolicyRule(action=action, on_exit_codes=requirement)


def _pod_annotations(spec: StepSpec, site: Site) -> dict[str, str]:
    annotations = {**annotations_of(spec), **STAY_ANNOTATIONS}
    if site.topology:
        annotations[TOPOLOGY_ANNOTATION] = site.topology
    size = sum(len(text.encode()) for item in annotations.items() for text in item)
    if size > ANNOTATION_BYTES:
        largest = max(spec.params, key=lambda name: len(str(spec.params[name])), default="")
        raise InputError(
            f"step {spec.step}: its spec, which travels in an annotation of the Job",
            f"at most {ANNOTATION_BYTES} bytes",
            f"{size} bytes, most of them in {largest}",
            "move long lists of the recipe into a file that it names",
        )
    return annotations


def _pod(spec: StepSpec, resources: Resources, site: Site) -> V1PodSpec:
    gpus = resources.gpus > 0
    return V1PodSpec(
        restart_policy="Never",  # the Job replaces pods; pod failure policies require it
        service_account_name=site.service_account,
        automount_service_account_token=False,
        enable_service_links=False,
        share_process_namespace=True,  # as process 1 Python loses a SIGTERM before its handler, and reaps no orphans
        termination_grace_period_seconds=resources.grace_seconds,
        priority_class_name=site.priority_class,
        image_pull_secrets=[V1LocalObjectReference(name=site.images.pull_secret)] if site.images.pull_secret else None,
        node_selector=(site.node_selector or None) if gpus else None,
        tolerations=[V1Toleration(**each.model_dump()) for each in site.tolerations] if gpus else None,
        security_context=pod_security(site),
        init_containers=[_container(STAGE_CONTAINER, _stage_command(), spec, resources, site)],
        containers=[_container(CONTAINER, _step_command(spec, site), spec, resources, site)],
        volumes=volumes(resources, site),
    )


def _stage_command() -> list[str]:
    return ["python", "-m", "orbit_core", "stage", "--spec", SPEC_FILE, "--scratch", SCRATCH]


def _step_command(spec: StepSpec, site: Site) -> list[str]:
    command = ["python", "-m", "orbit_core", "step", spec.step, "--spec", SPEC_FILE, "--scratch", SCRATCH]
    command += ["--holder", "$(POD_NAME)", "--lease-seconds", f"{site.lease_seconds:g}"]
    return command + (["--package", site.package] if site.package != PACKAGE else [])


def _container(name: str, command: list[str], spec: StepSpec, resources: Resources, site: Site) -> V1Container:
    """Both containers have the step's CPUs and memory: staging runs before the step, so that costs nothing."""
    gpus = resources.gpus if name == CONTAINER else 0
    amounts = {
        "cpu": str(resources.cpus),
        "memory": f"{resources.memory_gib}Gi",
        "ephemeral-storage": f"{_local_gib(resources, site)}Gi",
        **({"nvidia.com/gpu": str(gpus)} if gpus else {}),  # a string: the API's quantities are
    }
    return V1Container(
        name=name,
        image=site.images.gpu if resources.gpus else site.images.cpu,
        image_pull_policy=site.images.pull_policy,
        command=command,
        env=environment(site, gpus),
        env_from=sources(site) or None,
        resources=V1ResourceRequirements(requests=amounts, limits=dict(amounts)),  # equal: QoS Guaranteed
        security_context=container_security(),
        termination_message_policy="FallbackToLogsOnError",
        volume_mounts=volume_mounts(resources, site),
    )


def _local_gib(resources: Resources, site: Site) -> int:
    """Room on the node's own disk: a scratch of another kind is not on it, or is not counted."""
    return TMP_GIB + LOGS_GIB + (resources.scratch_gib if site.scratch.kind == "empty_dir" else 0)
