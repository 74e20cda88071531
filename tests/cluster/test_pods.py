"""A pod of the test cluster runs as one of a real node does."""

from __future__ import annotations

import json
import os
import time

import pytest
from cluster.api import ApiError
from cluster.asking import Asking, end_of, job, pod, python, until, waits_for
from cluster.processes import CONTAINER_MARK, marked

SAYS_WHAT_IT_IS_GIVEN = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
STOPS_WHEN_ASKED = """
import signal, sys, time
def stop(number, frame):
    print("asked to stop")
    time.sleep(float(sys.argv[1]))
    print("stopped")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("ready")
time.sleep(60)
"""


def test_job_succeeds_after_its_init_containers_in_order(ask: Asking) -> None:
    add = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
    mounts = [{"name": "scratch", "mountPath": "/scratch"}]
    init = [
        {"name": n, "image": "x", "command": [*python(add), "/scratch/file", n], "volumeMounts": mounts}
        for n in ("one", "two")
    ]
    volumes = [{"name": "scratch", "emptyDir": {}}]
    main = python("print(open('$(FOLDER)/file').read())")
    environment = [{"name": "FOLDER", "value": "/scratch"}]
    name = ask.start_job(job("a", main, env=environment, initContainers=init, volumes=volumes, volumeMounts=mounts))
    ask.completed(name)
    ran = ask.pod_of(name)
    assert ran is not None and ran["spec"]["nodeName"] == "gpu-0"
    assert ask.log(ran["metadata"]["name"]) == "onetwo\n"


def test_exit_code_and_last_words_are_in_the_status(ask: Asking) -> None:
    failing = python("import sys; print('all is lost'); sys.exit(42)")
    name = ask.start_job(job("a", failing, terminationMessagePolicy="FallbackToLogsOnError"))
    until(lambda: ask.condition(f"{ask.jobs}/{name}", "Failed"), "the job has failed")
    ran = ask.pod_of(name)
    assert ran is not None and ran["status"]["phase"] == "Failed"
    assert (end_of(ran)["exitCode"], end_of(ran)["reason"], end_of(ran)["message"]) == (42, "Error", "all is lost\n")


def test_failed_init_container_keeps_the_others_from_starting(ask: Asking) -> None:
    init = [{"name": "stage", "image": "x", "command": python("raise SystemExit(3)")}]
    ended = ask.ended(ask.start(pod("a", python("print('ran')"), initContainers=init)))
    assert ended["status"]["phase"] == "Failed"
    assert ended["status"]["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 3
    assert "waiting" in ended["status"]["containerStatuses"][0]["state"]


def test_process_is_given_what_the_pod_says_and_nothing_of_ours(ask: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "ours")
    monkeypatch.setenv("KUBECONFIG", "/ours")
    base = f"/api/v1/namespaces/{ask.namespace}"
    ask.api.post(f"{base}/secrets", {"metadata": {"name": "keys"}, "stringData": {"TOKEN": "s3cret"}})
    ask.api.post(f"{base}/configmaps", {"metadata": {"name": "settings"}, "data": {"REGION": "here", "file": "text"}})
    environment = [
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "TOKEN"}}},
        {"name": "BOTH", "value": "$(NAME) $(REGION) $$(NAME) $(UNKNOWN)"},
    ]
    sources = [{"configMapRef": {"name": "settings"}}, {"secretRef": {"name": "keys"}}]
    volumes = [{"name": "settings", "configMap": {"name": "settings"}}]
    mounts = [{"name": "settings", "mountPath": "/etc/settings"}]
    name = ask.start(
        pod(
            "a",
            [*python(SAYS_WHAT_IT_IS_GIVEN), "--name=$(NAME)", "/etc/settings/file", "/etc/settings2"],
            env=environment,
            envFrom=sources,
            volumes=volumes,
            volumeMounts=mounts,
        )
    )
    ask.ended(name)
    arguments, given = json.loads(ask.log(name))
    assert arguments[0] == "--name=a" and arguments[2] == "/etc/settings2"
    with open(arguments[1]) as file:
        assert file.read() == "text"
    assert (given["NAME"], given["NODE"], given["KEY"], given["REGION"]) == ("a", "gpu-0", "s3cret", "here")
    assert given["BOTH"] == "a here $(NAME) $(UNKNOWN)"
    assert not {"AWS_SECRET_ACCESS_KEY", "KUBECONFIG"} & set(given) and given["HOME"] != os.environ["HOME"]


def test_pod_has_a_service_account_token_unless_it_asks_for_none(ask: Asking) -> None:
    lists = python("print('token' in open('$(TOKENS)/namespace').name or __import__('os').listdir('$(TOKENS)'))")
    mount = "/var/run/secrets/kubernetes.io/serviceaccount"
    environment = [{"name": "TOKENS", "value": mount}]
    name = ask.start(pod("with", lists, env=environment, automountServiceAccountToken=True))
    ask.ended(name)
    assert "token" in ask.log(name)
    without = ask.ended(ask.start(pod("without", python(""))))
    assert "volumeMounts" not in without["spec"]["containers"][0]


def test_missing_secret_is_waited_for(ask: Asking) -> None:
    name = ask.start(
        pod("a", python("import os; print(os.environ['TOKEN'])"), envFrom=[{"secretRef": {"name": "keys"}}])
    )
    until(lambda: waits_for(ask.pod(name)) == "CreateContainerConfigError", "the pod waits for its secret")
    secret = {"metadata": {"name": "keys"}, "stringData": {"TOKEN": "s3cret"}}
    ask.api.post(f"/api/v1/namespaces/{ask.namespace}/secrets", secret)
    assert ask.ended(name)["status"]["phase"] == "Succeeded"


def test_claimed_volume_outlives_its_pod_and_an_ephemeral_one_does_not(ask: Asking) -> None:
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    claims = f"/api/v1/namespaces/{ask.namespace}/persistentvolumeclaims"
    ask.api.post(claims, {"metadata": {"name": "kept"}, "spec": claim})
    volumes = [
        {"name": "kept", "persistentVolumeClaim": {"claimName": "kept"}},
        {"name": "own", "ephemeral": {"volumeClaimTemplate": {"spec": claim}}},
    ]
    mounts = [{"name": "kept", "mountPath": "/kept"}, {"name": "own", "mountPath": "/own"}]
    writes = "import os, sys; print(*map(os.listdir, sys.argv[1:])); [open(p + '/file', 'w') for p in sys.argv[1:]]"
    for name, found in (("first", "[] []\n"), ("second", "['file'] []\n")):
        command = [*python(writes), "/kept", "/own"]
        assert ask.ended(ask.start(pod(name, command, volumes=volumes, volumeMounts=mounts)))
        assert ask.log(name) == found


def test_deletion_sends_sigterm_and_waits_for_the_process(ask: Asking) -> None:
    name = ask.start(pod("a", [*python(STOPS_WHEN_ASKED), "0.3"]))
    ask.says(name, "ready")
    ask.api.delete(f"{ask.pods}/{name}", {"gracePeriodSeconds": 10})
    assert end_of(ask.ended(name))["exitCode"] == 75
    assert ask.log(name).splitlines() == ["ready", "asked to stop", "stopped"]


def test_grace_period_ends_with_sigkill(ask: Asking) -> None:
    name = ask.start(pod("a", [*python(STOPS_WHEN_ASKED), "30"], terminationGracePeriodSeconds=1))
    ask.says(name, "ready")
    ask.api.delete(f"{ask.pods}/{name}")
    begin = time.monotonic()
    assert end_of(ask.ended(name))["exitCode"] == 137
    assert 0.5 < time.monotonic() - begin < 20


def test_sigterm_is_lost_on_a_first_process_without_a_handler(ask: Asking) -> None:
    """As in a container: nothing ends it before SIGKILL, and the exit code is 137, not 143."""
    name = ask.start(pod("a", ["sleep", "60"], terminationGracePeriodSeconds=1))
    ask.running(name)
    ask.api.delete(f"{ask.pods}/{name}")
    assert end_of(ask.ended(name))["exitCode"] == 137


def test_deleted_pod_leaves_nothing_behind(ask: Asking) -> None:
    """Neither its name nor a process, also not one that its process has sent into a session of its own."""
    forks = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True); print('ready'); input()"
    body = pod("a", ["sh", "-c", f'exec python -u -c "{forks}" < /dev/zero'], terminationGracePeriodSeconds=1)
    del body["metadata"]["finalizers"]
    name = ask.start(body)
    ask.says(name, "ready")
    identity = f"{ask.pod(name)['metadata']['uid']}/step"
    assert len(marked(CONTAINER_MARK, identity)) == 2
    ask.api.delete(f"{ask.pods}/{name}")
    until(lambda: _is_gone(ask, name), "the pod is gone")
    assert not marked(CONTAINER_MARK, identity)
    assert ask.start(body)


def test_missing_image_is_reported_and_tried_again(ask: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    name = ask.start(pod("a", python("print('here')"), image="registry/missing:1"))
    reasons: list[str] = []

    def look() -> bool:
        reasons.append(waits_for(ask.pod(name)))
        return reasons[-1] == "ImagePullBackOff"

    until(look, "the pull is backed off")
    assert "ErrImagePull" in reasons
    said = ask.api.get(f"/api/v1/namespaces/{ask.namespace}/events", fieldSelector=f"involvedObject.name={name}")
    assert any("Failed to pull image" in event["message"] for event in said["items"])
    monkeypatch.setattr(ask.cluster.node, "has_image", lambda image: True)
    assert ask.ended(name)["status"]["phase"] == "Succeeded"


def test_what_the_node_cannot_do_it_refuses(ask: Asking) -> None:
    ended = ask.ended(ask.start(pod("a", python(""), restartPolicy="OnFailure")))
    assert (ended["status"]["phase"], ended["status"]["reason"]) == ("Failed", "UnsupportedByTestNode")


def _is_gone(ask: Asking, name: str) -> bool:
    try:
        ask.pod(name)
    except ApiError as error:
        return error.status == 404
    return False
