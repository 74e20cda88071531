"""What goes wrong in the test cluster goes wrong as in a real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cluster.api import ApiError, Object
from cluster.asking import KEEP, Asking, end_of, job, pod, python, until
from cluster.processes import CLUSTER_MARK, marked

COUNTS = "import time\nfor number in range(10_000):\n    print(number)\n    time.sleep(0.1)"
SLEEPS = ["sleep", "60"]


def test_killed_and_out_of_memory_are_told_apart(ask: Asking) -> None:
    for name, reason in (("killed", "Error"), ("oom", "OOMKilled")):
        ask.running(ask.start(pod(name, SLEEPS)))
        node = ask.cluster.node
        (node.oom if name == "oom" else node.kill)(ask.namespace, name)
        ended = ask.ended(name)
        assert (ended["status"]["phase"], end_of(ended)["exitCode"], end_of(ended)["reason"]) == ("Failed", 137, reason)


def test_eviction_marks_the_pod_as_disrupted(ask: Asking) -> None:
    name = ask.start(pod("a", SLEEPS, terminationGracePeriodSeconds=1))
    ask.running(name)
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    ask.api.post(f"{ask.pods}/{name}/eviction", eviction)
    ended = ask.ended(name)
    condition = ask.condition(f"{ask.pods}/{name}", "DisruptionTarget")
    assert condition is not None and condition["reason"] == "EvictionByEvictionAPI"
    assert end_of(ended)["exitCode"] == 137


def test_kubelet_evicts_at_once(ask: Asking) -> None:
    name = ask.start(pod("a", SLEEPS))
    ask.running(name)
    ask.cluster.node.evict(ask.namespace, name)
    ended = ask.ended(name)
    condition = ask.condition(f"{ask.pods}/{name}", "DisruptionTarget")
    assert condition is not None and condition["reason"] == "TerminationByKubelet"
    assert (ended["status"]["reason"], end_of(ended)["exitCode"]) == ("Evicted", 137)


def test_second_pod_that_wants_all_gpus_waits_for_the_first(ask: Asking) -> None:
    ask.running(ask.start(pod("first", SLEEPS, gpus=8)))
    ask.start(pod("second", python("print('mine now')"), gpus=8))

    def unschedulable() -> bool:
        conditions = ask.pod("second")["status"].get("conditions", [])
        return any("Insufficient nvidia.com/gpu" in condition.get("message", "") for condition in conditions)

    until(unschedulable, "the second pod is unschedulable")
    ask.cluster.node.kill(ask.namespace, "first")
    assert ask.ended("second")["status"]["phase"] == "Succeeded"


def test_urgent_pod_preempts(ask: Asking) -> None:
    name = f"urgent-{ask.namespace}"
    ask.api.post("/apis/scheduling.k8s.io/v1/priorityclasses", {"metadata": {"name": name}, "value": 1000})
    ask.running(ask.start(pod("first", SLEEPS, gpus=8, terminationGracePeriodSeconds=1)))
    ask.start(pod("second", python(""), gpus=8, priorityClassName=name))
    assert end_of(ask.ended("first"))["exitCode"] == 137
    condition = ask.condition(f"{ask.pods}/first", "DisruptionTarget")
    assert condition is not None and condition["reason"] == "PreemptionByScheduler"
    assert ask.ended("second")["status"]["phase"] == "Succeeded"


@pytest.mark.parametrize("fault", ["killed", "paused"])
def test_api_server_away_does_not_touch_what_runs(ask: Asking, fault: str) -> None:
    plane = ask.cluster.plane
    name = ask.start_job(job("a", python("import time; time.sleep(1); print('done')")))
    until(lambda: ask.pod_of(name) is not None, "the job has a pod")
    ask.running(_name(ask.pod_of(name)))
    if fault == "killed":
        plane.kill_api()
        time.sleep(1.5)
        plane.start_api()
    else:
        plane.pause_api()
        time.sleep(1.5)
        plane.resume_api()
    ask.completed(name)
    ran = ask.pod_of(name)
    assert ran is not None and end_of(ran)["exitCode"] == 0
    assert ask.log(_name(ran)) == "done\n"


def test_expired_watch_is_told_so(ask: Asking) -> None:
    version = ask.api.get(ask.pods)["metadata"]["resourceVersion"]
    ask.cluster.plane.expire_watches()
    try:
        first = next(iter(ask.api.watch(ask.pods, resourceVersion=version)))
    except ApiError as error:
        assert error.status == 410
    else:
        assert (first["type"], first["object"]["code"]) == ("ERROR", 410)
    listed = ask.api.get(ask.pods)["metadata"]["resourceVersion"]
    seen: list[Object] = []
    watching = threading.Thread(target=lambda: seen.append(next(iter(ask.api.watch(ask.pods, resourceVersion=listed)))))
    watching.start()
    ask.start(pod("a", python("")))
    watching.join(timeout=10)
    assert seen and seen[0]["type"] == "ADDED"


def test_silent_node_is_lost_and_its_pods_are_disrupted(ask: Asking) -> None:
    """They stay until their node is back and says what became of them; then the job makes another."""
    node = ask.cluster.node
    name = ask.start_job(job("a", SLEEPS))
    until(lambda: ask.pod_of(name) is not None, "the job has a pod")
    first = _name(ask.pod_of(name))
    ask.api.patch(f"{ask.pods}/{first}", {"metadata": {"finalizers": [KEEP]}})
    ask.running(first)
    node.die()
    try:
        until(lambda: ask.condition(f"{ask.pods}/{first}", "DisruptionTarget"), "the pod is disrupted")
        until(lambda: "deletionTimestamp" in ask.pod(first)["metadata"], "the pod is being deleted")  # a request later
        assert ask.pod(first)["status"]["phase"] == "Running"
    finally:
        node.start()
    ended = ask.ended(first)
    assert (ended["status"]["phase"], end_of(ended)["reason"]) == ("Failed", "ContainerStatusUnknown")


def test_orchestrator_may_do_what_a_role_grants_and_nothing_else(ask: Asking) -> None:
    plane, rules = ask.cluster.plane, f"/apis/rbac.authorization.k8s.io/v1/namespaces/{ask.namespace}"
    theirs = plane.api("orchestrator")
    with pytest.raises(ApiError) as refusal:
        theirs.get(ask.jobs)
    assert refusal.value.status == 403
    role = {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["list"]}
    ask.api.post(f"{rules}/roles", {"metadata": {"name": "reads"}, "rules": [role]})
    subject = {"kind": "User", "name": "orchestrator", "apiGroup": "rbac.authorization.k8s.io"}
    reference = {"kind": "Role", "name": "reads", "apiGroup": "rbac.authorization.k8s.io"}
    ask.api.post(f"{rules}/rolebindings", {"metadata": {"name": "reads"}, "roleRef": reference, "subjects": [subject]})
    until(lambda: _allowed(lambda: theirs.get(ask.jobs)), "the role is in force")
    with pytest.raises(ApiError):
        theirs.get(ask.pods)


def test_cluster_of_killed_tests_is_gone(tmp_path: Path) -> None:
    script = tmp_path / "hold.py"
    script.write_text(
        "import time\nfrom cluster.control_plane import ControlPlane\n"
        "with ControlPlane() as plane:\n    print(plane.id, plane.folder, flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        identity, folder = holder.stdout.readline().split()
        until(lambda: len(marked(CLUSTER_MARK, identity)) == 4, "four programs")
        holder.send_signal(signal.SIGKILL)
    until(lambda: not marked(CLUSTER_MARK, identity) and not Path(folder).exists(), "the cluster is gone")


def _allowed(action: object) -> bool:
    assert callable(action)
    try:
        action()
    except ApiError as error:
        assert error.status == 403
        return False
    return True


def _name(pod: Object | None) -> str:
    assert pod is not None
    return str(pod["metadata"]["name"])
