"""What can happen to a step in a cluster, each with what Orbit promises then.

A scenario is a function of a World that raises AssertionError where the promise is broken. test_scenarios.py runs each
once, soak.py as often as it is told; the first line of a docstring is the promise in the table of k8s/README.md.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster.running import new_node
from podsteps import spec_of
from podsteps.tally import expected, pods_of
from training import adapter_in, undisturbed
from world import SHORT_LEASE, Orchestrator, World, until

from orbit_core.steps.contract import StepSpec
from orbit_core.steps.runner import PACKAGE
from orbit_core.store import open_store

Scenario = Callable[[World], None]
SCENARIOS: dict[str, Scenario] = {}
TICKS, PAUSE = 12, 0.25
API_DOWN_SECONDS = 30.0


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def tally(world: World, to: int = TICKS, pause: float = PAUSE, **params: Any) -> StepSpec:
    return spec_of(world.store, to=to, pause=pause, **params)


def check_whole(world: World, spec: StepSpec, pods: int = 1) -> None:
    """The artifact is that of an undisturbed run, made by that many pods, one after the other."""
    artifact = world.artifact(spec)
    assert artifact is not None, "no artifact"
    assert artifact.facts["state"] == expected(spec.params["to"]), artifact.facts
    worked = pods_of(open_store(spec.store), spec.digest)
    assert len(worked) == spec.params["to"], worked
    in_turn = [pod for before, pod in zip([None, *worked], worked, strict=False) if pod != before]
    assert len(in_turn) == len(set(in_turn)) == pods, f"expected {pods} pods one after the other, found {in_turn}"


def ends_well(run: Orchestrator) -> None:
    end = run.end()
    assert end["error"] is None, f"{end['error']}: {end['message']}\n{run.describe()}"


@scenario
def done(world: World) -> None:
    """A step runs as one Job with one pod, without a token; its progress and its log are seen as they come."""
    spec = tally(world)
    run = world.orchestrate(spec)
    pod = world.running_pod(spec)
    run.wait_for_tick(1)
    assert not world.artifact(spec), "progress came only at the end"
    ends_well(run)
    check_whole(world, spec)
    (found,) = world.pods(spec)
    assert found["spec"]["automountServiceAccountToken"] is False
    mounts = [mount["mountPath"] for c in found["spec"]["containers"] for mount in c["volumeMounts"]]
    assert not any("serviceaccount" in path for path in mounts)
    ticks = [event["done"] for event in run.events if event["orbit"] == "progress" and event["total"] == TICKS]
    assert ticks == list(range(1, TICKS + 1)), ticks
    assert any(event["orbit"] == "log" and f"{pod} begins" in event["message"] for event in run.events)


@scenario
def refused(world: World) -> None:
    """A step that ends with 42 is not tried again; its own words arrive."""
    spec = tally(world, refuse="an empty list")
    end = world.orchestrate(spec, retries=3).end()
    assert (end["error"], end["exit_code"]) == ("InputError", 42), end
    assert "something to count" in end["message"] and "an empty list" in end["message"]
    assert len(world.pods(spec)) == 1


@scenario
def crashed(world: World) -> None:
    """A step that crashes is tried again by Kubernetes and goes on from its last commit."""
    world.site_changes = SHORT_LEASE
    spec = tally(world, faults={"5": "exit 1"})
    run = world.orchestrate(spec, retries=2)
    ends_well(run)
    check_whole(world, spec, pods=2)
    assert any("exit code 1" in sentence for sentence in run.told), run.told


@scenario
def used_up(world: World) -> None:
    """A step that crashes more often than it may is given up; asked again, it goes on from its last commit."""
    world.site_changes = SHORT_LEASE
    spec = tally(world, faults={"5": "exit 1"})
    end = world.orchestrate(spec, retries=0).end()
    assert end["error"] == "GaveUp" and "failed 1 times" in end["message"], end
    assert "fault at 5" in end["message"], "the last lines of the log are missing"
    again = world.orchestrate(spec, retries=0)
    assert again.end()["error"] is None
    assert any("is replaced" in sentence for sentence in again.told), again.told
    check_whole(world, spec, pods=2)


@scenario
def killed(world: World) -> None:
    """A pod killed with SIGKILL is replaced and loses at most the tick in flight."""
    world.site_changes = SHORT_LEASE
    spec = tally(world)
    run = world.orchestrate(spec, retries=1)
    run.wait_for_tick(4)
    world.cluster.node.kill(world.namespace, world.running_pod(spec))
    ends_well(run)
    check_whole(world, spec, pods=2)
    assert any("SIGKILL" in sentence for sentence in run.told), run.told


@scenario
def evicted(world: World) -> None:
    """An evicted pod finishes its tick and is replaced without costing a try."""
    spec = tally(world)
    run = world.orchestrate(spec, retries=0)
    run.wait_for_tick(4)
    world.evict(world.running_pod(spec))
    ends_well(run)
    check_whole(world, spec, pods=2)
    assert any("evicted" in sentence for sentence in run.told), run.told


@scenario
def training_killed(world: World) -> None:
    """The training step, its pod killed with SIGKILL: the adapter is that of an undisturbed run, byte for byte."""
    spec, run, pod = training(world, retries=1)
    world.cluster.node.kill(world.namespace, pod)
    same_adapter(world, spec, run, pod)


@scenario
def training_evicted(world: World) -> None:
    """The training step, its pod evicted: the adapter is that of an undisturbed run, byte for byte."""
    spec, run, pod = training(world, retries=0)
    world.evict(pod)
    same_adapter(world, spec, run, pod)


def training(world: World, retries: int) -> tuple[StepSpec, Orchestrator, str]:
    """The real step of a small run, in the middle of its training, and its pod."""
    world.site_changes = {"package": PACKAGE, **SHORT_LEASE}
    spec = undisturbed.spec(world.store)
    run = world.orchestrate(spec, retries=retries, memory_gib=2, grace_seconds=20)
    run.wait_for_tick(4)
    return spec, run, world.running_pod(spec)


def same_adapter(world: World, spec: StepSpec, run: Orchestrator, disturbed: str) -> None:
    ends_well(run)
    assert world.pods(spec)[-1]["metadata"]["name"] != disturbed, "it ended before it was disturbed"
    assert adapter_in(spec) == undisturbed.adapter()


@scenario
def preempted(world: World) -> None:
    """A pod that makes room for one of higher priority waits and goes on, without costing a try."""
    spec = tally(world)
    run = world.orchestrate(spec, retries=0, gpus=8)
    run.wait_for_tick(4)
    plane, name = world.cluster.plane, f"urgent-{world.namespace}"
    classes = "/apis/scheduling.k8s.io/v1/priorityclasses"
    plane.api().post(classes, {"metadata": {"name": name}, "value": 1000})
    try:
        plane.api().post(f"/api/v1/namespaces/{world.namespace}/pods", _urgent(name))
        run.wait_for_status("higher priority")
        run.wait_for_status("no node has room")
        plane.kubectl("delete", "pod", "urgent", "-n", world.namespace, "--grace-period=1")
        ends_well(run)
        check_whole(world, spec, pods=2)
    finally:
        plane.api().delete(f"{classes}/{name}")


@scenario
def node_deleted(world: World) -> None:
    """A node that dies and is taken out costs no try: the step goes on elsewhere from its last commit."""
    world.site_changes = SHORT_LEASE
    spec = tally(world)
    run = world.orchestrate(spec, retries=0)
    run.wait_for_tick(4)
    node = world.cluster.node
    try:
        node.die()
        world.cluster.plane.delete_node(node.name)
        run.wait_for_status("no node has room")
    finally:
        node.start()
    ends_well(run)
    check_whole(world, spec, pods=2)


@scenario
def out_of_memory(world: World) -> None:
    """A pod killed for its memory is said to be so, with the field to raise."""
    spec = tally(world)
    run = world.orchestrate(spec, retries=0)
    run.wait_for_tick(4)
    world.cluster.node.oom(world.namespace, world.running_pod(spec))
    end = run.end()
    assert end["error"] == "GaveUp" and "more than its 1Gi of memory" in end["message"], end
    assert "resources.<step>.memory_gib" in end["message"]


@scenario
def image_missing(world: World) -> None:
    """An image that cannot be pulled is named, and after the site's patience the Job is taken back."""
    world.site_changes = {"images": {"cpu": "orbit-missing:1", "gpu": "orbit-missing:1", "patience_seconds": 3}}
    spec = tally(world)
    run = world.orchestrate(spec)
    end = run.end()
    assert (end["error"], end["exit_code"]) == ("InputError", 42), end
    assert "orbit-missing:1" in end["message"] and "images in the site file" in end["message"]
    until(lambda: not world.has_job(spec), "the Job to be gone")


@scenario
def unschedulable(world: World) -> None:
    """A pod that no node has room for waits, in the scheduler's words; called off, it is gone."""
    spec = tally(world)
    run = world.orchestrate(spec, gpus=16)
    run.wait_for_status("Insufficient nvidia.com/gpu")
    run.stop()
    assert run.end()["error"] == "Interrupted"
    until(lambda: not world.has_job(spec), "the Job to be gone")


@scenario
def api_down(world: World) -> None:
    """The API server may be away for half a minute: the step goes on and its end is seen afterwards."""
    spec = tally(world)
    run = world.orchestrate(spec)
    run.wait_for_tick(2)
    world.cluster.plane.kill_api()
    try:
        time.sleep(API_DOWN_SECONDS)
        run.wait_for_status("the Job goes on without us", patience=1)
    finally:
        world.cluster.plane.start_api()
    ends_well(run)
    check_whole(world, spec)


@scenario
def watch_expired(world: World) -> None:
    """A watch whose place the server no longer knows (410) is begun again from a list."""
    spec = tally(world, to=24)
    run = world.orchestrate(spec)
    run.wait_for_tick(2)
    world.cluster.plane.expire_watches()
    ends_well(run)
    check_whole(world, spec)


@scenario
def log_lost(world: World) -> None:
    """Log connections that break are made again; no line is lost or seen twice."""
    spec = tally(world, to=24)
    run = world.orchestrate(spec)
    for tick in (3, 9, 15):
        run.wait_for_tick(tick)
        world.cluster.node.drop_log_connections()
    ends_well(run)
    ticks = [event["done"] for event in run.events if event["orbit"] == "progress" and event["total"] == 24]
    assert ticks == list(range(1, 25)), ticks


@scenario
def orchestrator_killed(world: World) -> None:
    """The Job outlives an orchestrator that is killed; the next one adopts it."""
    spec = tally(world, to=24)
    first = world.orchestrate(spec)
    first.wait_for_tick(2)
    uid = world.job(spec)["metadata"]["uid"]
    first.kill()
    second = world.orchestrate(spec)
    second.wait_for("its report", lambda event: "Adopted" in str(event.get("content")))
    assert second.end()["error"] is None
    assert world.job(spec)["metadata"]["uid"] == uid
    check_whole(world, spec)


@scenario
def asked_while_running(world: World) -> None:
    """A Retry pressed while the step runs adopts its Job: no second pod."""
    spec = tally(world, to=24)
    first = world.orchestrate(spec)
    first.wait_for_tick(2)
    second = world.orchestrate(spec)
    assert (first.end()["error"], second.end()["error"]) == (None, None)
    assert len(world.pods(spec)) == 1
    check_whole(world, spec)


@scenario
def two_at_once(world: World) -> None:
    """Two runs that want the same step at the same moment share one Job."""
    spec = tally(world)
    runs = [world.orchestrate(spec), world.orchestrate(spec)]
    assert [run.end()["error"] for run in runs] == [None, None]
    assert len(world.pods(spec)) == 1
    check_whole(world, spec)


@scenario
def called_off(world: World) -> None:
    """A cancelled run deletes its Job; the pod finishes its tick, and the next run goes on from there."""
    spec = tally(world)
    run = world.orchestrate(spec)
    run.wait_for_tick(4)
    run.stop()
    assert run.end()["error"] == "Interrupted"
    again = world.orchestrate(spec)  # at once, while the first pod may still be ending
    assert again.end()["error"] is None
    artifact = world.artifact(spec)
    assert artifact is not None and artifact.facts["resumed_from"] >= 4, artifact
    check_whole(world, spec, pods=2)


@scenario
def deadline(world: World) -> None:
    """A Job past its deadline is stopped and not tried again; asked again, it goes on from its last commit."""
    spec = tally(world, to=70)
    end = world.orchestrate(spec, hours=15 / 3600).end()
    assert end["error"] == "GaveUp" and "deadline" in end["message"], end
    until(lambda: not [pod for pod in world.pods(spec) if pod["status"]["phase"] == "Running"], "no pod to run")
    assert world.orchestrate(spec).end()["error"] is None
    artifact = world.artifact(spec)
    assert artifact is not None and artifact.facts["resumed_from"] > 0
    check_whole(world, spec, pods=2)


@scenario
def queued(world: World) -> None:
    """A Job that Kueue holds back waits in its queue, starts when it is let go, and goes on after it was preempted."""
    world.site_changes = {"queue": "gpus"}
    for manifest in _kueue(world.namespace):
        world.cluster.plane.kubectl("apply", "-f", "-", input=json.dumps(manifest))
    try:
        spec = tally(world)
        run = world.orchestrate(spec, retries=0)
        run.wait_for_status("waiting in queue gpus")
        assert not world.pods(spec)
        node = {"kubernetes.io/hostname": world.cluster.node.name}
        world.patch_job(spec, suspend=False, template={"spec": {"nodeSelector": node}})
        run.wait_for_tick(4)
        world.patch_job(spec, suspend=True)
        run.wait_for_status("stopped for others and waiting in queue gpus")
        until(lambda: not world.pods(spec), "its pod to be gone")
        world.patch_job(spec, suspend=False)
        ends_well(run)
        check_whole(world, spec, pods=2)
    finally:
        for kind in ("mutatingadmissionpolicybinding", "mutatingadmissionpolicy"):
            world.cluster.plane.kubectl("delete", kind, f"kueue-{world.namespace}")


@scenario
def cut_off(world: World) -> None:
    """A pod on a node that the control plane has lost finishes its work; its replacement waits for it in the store."""
    spec, node = tally(world, to=180), world.cluster.node
    run = world.orchestrate(spec, retries=0)
    run.wait_for_tick(2)
    pod = world.running_pod(spec)
    with second_node(world):
        node.cut_off()
        try:
            run.wait_for_status("is ending")
            world.give_up_node(node.name)
            run.wait_for("the second pod to wait", lambda event: f"waiting: {pod} holds" in event.get("message", ""))
            ends_well(run)
        finally:
            world.give_up_node(node.name, given_up=False)
            node.reconnect()
        check_whole(world, spec)


@scenario
def frozen(world: World) -> None:
    """A pod that was frozen, given up and replaced commits nothing when it wakes."""
    world.site_changes = SHORT_LEASE
    spec, node = tally(world, to=60), world.cluster.node
    run = world.orchestrate(spec, retries=0)
    run.wait_for_tick(2)
    pod = world.running_pod(spec)
    with second_node(world):
        node.freeze(world.namespace, pod)
        node.cut_off()
        try:
            run.wait_for_status("is ending")
            world.give_up_node(node.name)
            until(lambda: set(world.committed(spec)) - {pod}, "a commit of the second pod")
            node.thaw(world.namespace, pod)
            ends_well(run)
        finally:
            world.give_up_node(node.name, given_up=False)
            node.reconnect()
        check_whole(world, spec, pods=2)


@contextlib.contextmanager
def second_node(world: World) -> Iterator[None]:
    """Started when the first pod runs, so that it can only have the second."""
    plane = world.cluster.plane
    with new_node(plane, "gpu-1"):
        yield
    plane.delete_node("gpu-1")


def _urgent(priority_class: str) -> dict[str, Any]:
    gpus = {"nvidia.com/gpu": "8"}
    sleeper = {
        "name": "main",
        "image": "busy:1",
        "command": ["python", "-c", "import time; time.sleep(600)"],
        "resources": {"limits": gpus, "requests": gpus},
    }
    return {
        "metadata": {"name": "urgent"},
        "spec": {"priorityClassName": priority_class, "restartPolicy": "Never", "containers": [sleeper]},
    }


def _kueue(namespace: str) -> list[dict[str, Any]]:
    """What Kueue's webhook does to a Job that names a queue: it creates it suspended."""
    name, group = f"kueue-{namespace}", "admissionregistration.k8s.io"
    rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    here = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    labelled = "has(object.metadata.labels) && 'kueue.x-k8s.io/queue-name' in object.metadata.labels"
    return [
        {
            "apiVersion": f"{group}/v1",
            "kind": "MutatingAdmissionPolicy",
            "metadata": {"name": name},
            "spec": {
                "matchConstraints": {"namespaceSelector": here, "resourceRules": [rule]},
                "matchConditions": [{"name": "queue", "expression": labelled}],
                "reinvocationPolicy": "Never",
                "failurePolicy": "Fail",
                "mutations": [
                    {
                        "patchType": "ApplyConfiguration",
                        "applyConfiguration": {"expression": "Object{spec: Object.spec{suspend: true}}"},
                    }
                ],
            },
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "MutatingAdmissionPolicyBinding",
            "metadata": {"name": name},
            "spec": {"policyName": name},
        },
    ]
