"""`orbit k8s doctor`, asked with the orchestrator's own rights on a real control plane and a real Prefect server.

It finds nothing wrong where a run would start, and names each thing that would stop one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.running import Cluster

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from prefect_world import PrefectServer, Worker  # noqa: E402
from world import World, moto_bucket, new_world, until  # noqa: E402

from k8s.doctor.cluster import RIGHTS, examine_cluster  # noqa: E402
from k8s.doctor.storage import examine_store  # noqa: E402
from k8s.site import Site  # noqa: E402

Findings = dict[str, tuple[str, str]]  # what was looked at -> (level, what was found and what to do)


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, dict[str, str]]]:
    with moto_bucket() as made:
        yield made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with PrefectServer(tmp_path_factory.mktemp("prefect")) as running:
        yield running


@pytest.fixture
def world(cluster: Cluster, bucket: tuple[str, dict[str, str]], tmp_path: Path) -> Iterator[World]:
    with new_world(cluster, *bucket, tmp_path) as made:
        made.site_changes["package"] = "orbit_core.steps"
        yield made


@dataclass
class Doctor:
    world: World
    server: PrefectServer

    def orbit(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
        everything = {**self.world.process_environment(), **self.server.environment, **environment}
        return subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=180)

    def look(self, *arguments: str, site: dict[str, Any] | None = None, **environment: str) -> Findings:
        """What is looked at -> (level, found and what to do); checks the exit code against the levels."""
        file = self.world.folder / "site.yaml"
        content = {**self.world.site().model_dump(mode="json"), "store": self.world.store, **(site or {})}
        file.write_text(yaml.safe_dump(content))
        done = self.orbit("k8s", "doctor", "--site", str(file), *arguments, **environment)
        found: Findings = {}
        last = ""
        for line in done.stdout.splitlines():
            level, what, text = line[:7].strip(), line[7:29].strip(), line[29:]
            if level:
                last = what if what not in found else f"{what} again"
                found[last] = (level, text)
            else:
                found[last] = (found[last][0], f"{found[last][1]} | {text}")
        wrong = any(level == "wrong" for level, _ in found.values())
        assert done.returncode == (42 if wrong else 0), done.stdout + done.stderr
        return found

    def look_at_cluster(self, site: dict[str, Any] | None = None, user: str = "orchestrator") -> Findings:
        """The same for cluster and store alone, in this process, as `user`."""
        content = {**self.world.site().model_dump(mode="json"), "store": self.world.store, **(site or {})}
        cluster = Site.model_validate(content)
        found: Findings = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KUBECONFIG", str(self.world.cluster.plane.kubeconfig(user)))
            for each in (*examine_store(cluster.store, cluster), *examine_cluster(cluster, cluster.store)):
                name = each.what if each.what not in found else f"{each.what} again"
                found[name] = (each.level, f"{each.found} | {each.fix}")
        return found


@pytest.fixture
def doctor(world: World, server: PrefectServer) -> Doctor:
    return Doctor(world, server)


@pytest.fixture(scope="module")
def prepared(server: PrefectServer) -> None:
    """Pools, automation and deployments, made by the commands that the documents name."""
    environment = {**os.environ, **server.environment}
    for command in (["-c", "from flows.cli import main; main()", "k8s", "setup"], ["-m", "prefect", "deploy", "--all"]):
        more = ["--prefect-file", "k8s/prefect.yaml"] if "deploy" in command else []
        done = subprocess.run(
            [sys.executable, *command, *more], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_where_nothing_is_set_up_every_gap_is_named_with_what_to_do(doctor: Doctor) -> None:
    """Before anything was prepared on the Prefect server; the cluster is as the overlays make it."""
    found = doctor.look()
    assert found["work pool"][0] == "wrong" and "orbit k8s setup" in found["work pool"][1]
    assert found["deployments"][0] == "wrong" and "prefect deploy --all" in found["deployments"][1]
    assert found["zombie automation"][0] == "wrong" and "orbit k8s setup" in found["zombie automation"][1]
    assert {found[what][0] for what in ("Prefect API", "Kubernetes API", "rights", "store", "Job admission")} == {"ok"}
    assert "worker" not in found, "one thing at a time"


def test_where_a_run_would_start_nothing_is_wrong_and_a_probe_proves_it(doctor: Doctor, prepared: None) -> None:
    worker = Worker(doctor.server, doctor.world, pool="orbit")
    try:
        until(lambda: doctor.look()["worker"][0] == "ok", "the worker", 120)
        found = doctor.look("--probe")
    finally:
        worker.process.terminate()
        worker.process.wait()
    assert {level for level, _ in found.values()} <= {"ok", "note"}, found
    assert found["rights"][1].startswith("all 10 that the executor needs")
    assert "orbit:test: Orbit 0.1.0" in found["image"][1]
    assert "conditions honoured" in found["inside a pod"][1]
    assert "orbit-store" in found["names in the site"][1]
    for name in ("post-train/cluster", "evaluate/cluster", "retrain/nightly"):
        assert name in found["deployments"][1]
    assert found["concurrency leases"] == ("ok", "filesystem")
    from orbit_core.store import open_store

    assert open_store(doctor.world.store).list() == [], "the probe left nothing in the store"
    jobs = f"/apis/batch/v1/namespaces/{doctor.world.namespace}/jobs"
    until(lambda: not doctor.world.cluster.plane.api().get(jobs)["items"], "the probe's Job to be gone")


def test_a_probe_that_fails_says_why(doctor: Doctor, prepared: None) -> None:
    doctor.world.cluster.plane.kubectl("-n", doctor.world.namespace, "delete", "secret", "orbit-store")
    found = doctor.look("--probe", site={"images": {"cpu": "orbit:test", "gpu": "orbit:test", "patience_seconds": 3}})
    assert found["Job admission"][0] == "ok" and found["probe"][0] == "wrong"
    assert "orbit-store" in found["probe"][1], found["probe"]


def test_the_rights_asked_for_are_those_of_the_role(cluster: Cluster) -> None:
    documents = yaml.safe_load_all((ROOT / "k8s" / "overlays" / "base" / "access.yaml").read_text())
    (role,) = [each for each in documents if each["kind"] == "Role"]
    granted = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    asked = {(group, f"{kind}/{sub}" if sub else kind, verb) for group, kind, sub, verbs in RIGHTS for verb in verbs}
    assert asked == granted


def test_a_right_that_is_missing_and_rights_that_are_too_many_are_named(doctor: Doctor) -> None:
    plane, namespace = doctor.world.cluster.plane, doctor.world.namespace
    patch = '[{"op": "replace", "path": "/rules/0/verbs", "value": ["get", "list", "watch"]}]'
    plane.kubectl("-n", namespace, "patch", "role", "orbit-orchestrator", "--type=json", "-p", patch)
    level, text = doctor.look_at_cluster()["rights"]
    assert level == "wrong" and "create jobs, delete jobs" in text and "access.yaml" in text
    found = doctor.look_at_cluster(user="admin")
    assert found["rights"][0] == "ok"
    assert found["rights again"][0] == "note" and "cluster-admin" in found["rights again"][1]
    assert found["namespace"][0] == "ok"


def test_a_namespace_that_is_not_there(doctor: Doctor) -> None:
    found = doctor.look_at_cluster(site={"namespace": "nowhere"}, user="admin")
    assert found["namespace"][0] == "wrong" and found["Job admission"][0] == "wrong"
    assert "nowhere does not exist" in found["Job admission"][1]
    assert doctor.look_at_cluster(site={"namespace": "nowhere"})["namespace"][0] == "note", (
        "an orchestrator cannot see it"
    )


QUEUES = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "localqueues.kueue.x-k8s.io", "annotations": {"api-approved.kubernetes.io": "unapproved"}},
    "spec": {
        "group": "kueue.x-k8s.io",
        "scope": "Namespaced",
        "names": {"kind": "LocalQueue", "plural": "localqueues", "singular": "localqueue"},
        "versions": [
            {
                "name": "v1beta1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                },
            }
        ],
    },
}


def test_the_queue_of_the_site_must_exist(doctor: Doctor) -> None:
    """Kueue's part is its CRD; what the doctor asks is what a real Kueue would be asked."""
    plane, namespace = doctor.world.cluster.plane, doctor.world.namespace
    level, text = doctor.look_at_cluster(site={"queue": "training"}, user="admin")["LocalQueue"]
    assert level == "wrong" and "has no Kueue" in text
    plane.kubectl("apply", "-f", "-", input=yaml.safe_dump(QUEUES))
    try:
        plane.kubectl("wait", "--for=condition=Established", "crd/localqueues.kueue.x-k8s.io", "--timeout=30s")
        level, text = doctor.look_at_cluster(site={"queue": "training"}, user="admin")["LocalQueue"]
        assert level == "wrong" and "suspended for ever" in text
        queue = {
            "apiVersion": "kueue.x-k8s.io/v1beta1",
            "kind": "LocalQueue",
            "metadata": {"name": "training", "namespace": namespace},
            "spec": {"clusterQueue": "gpus"},
        }
        plane.kubectl("apply", "-f", "-", input=yaml.safe_dump(queue))
        assert doctor.look_at_cluster(site={"queue": "training"}, user="admin")["LocalQueue"][0] == "ok"
        assert doctor.look_at_cluster(site={"queue": "training"})["LocalQueue"][0] == "note", (
            "not to be seen with least rights"
        )
    finally:
        plane.kubectl("delete", "crd", "localqueues.kueue.x-k8s.io")


def test_a_priority_class_that_is_not_there(doctor: Doctor) -> None:
    level, text = doctor.look_at_cluster(site={"priority_class": "night"}, user="admin")["PriorityClass"]
    assert level == "wrong" and "pods would be refused" in text
    value = doctor.look_at_cluster(site={"priority_class": "system-node-critical"}, user="admin")["PriorityClass"]
    assert value[0] == "ok" and "2000001000" in value[1]


def test_a_site_that_pod_security_would_refuse_is_said_before_a_pod_is(doctor: Doctor) -> None:
    plane, namespace = doctor.world.cluster.plane, doctor.world.namespace
    labels = [f"pod-security.kubernetes.io/{mode}=restricted" for mode in ("warn", "enforce")]
    plane.kubectl("label", "namespace", namespace, *labels)
    assert doctor.look_at_cluster()["Job admission"][0] == "ok"
    refused = doctor.look_at_cluster(site={"scratch": {"kind": "host_path", "path": "/data"}})["Job admission"]
    assert refused[0] == "wrong" and "hostPath" in refused[1]


@pytest.mark.parametrize(
    ("store", "words"),
    [("s3://no-such-bucket/x", "no-such-bucket"), ("/tmp/folder", "pods do not see"), (None, "none is named")],
)
def test_a_store_that_will_not_do(doctor: Doctor, store: str | None, words: str) -> None:
    level, text = doctor.look_at_cluster(site={"store": store})["store"]
    assert level == "wrong" and words in text


def test_nobody_answers(doctor: Doctor, tmp_path: Path) -> None:
    found = doctor.look(PREFECT_API_URL="http://127.0.0.1:9/api", KUBECONFIG=str(tmp_path / "none.yaml"))
    assert found["Prefect API"][0] == "wrong" and "start the server" in found["Prefect API"][1]
    assert found["Kubernetes API"][0] == "wrong" and "KUBECONFIG" in found["Kubernetes API"][1]


def test_leases_in_memory_are_named(doctor: Doctor, tmp_path: Path) -> None:
    """Asked of a server that was started without the setting."""
    plain = PrefectServer(tmp_path)
    del plain.environment["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"]
    with plain:
        found = Doctor(doctor.world, plain).look()
    assert found["concurrency leases"][0] == "wrong" and "lease_storage.filesystem" in found["concurrency leases"][1]


def test_a_dry_run_leaves_no_job(doctor: Doctor) -> None:
    assert doctor.look_at_cluster()["Job admission"][0] == "ok"
    api, namespace = doctor.world.cluster.plane.api(), doctor.world.namespace
    assert api.get(f"/apis/batch/v1/namespaces/{namespace}/jobs")["items"] == []
