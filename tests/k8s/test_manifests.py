"""Manifests: what a Job promises, for any legal step, resources and site; what is refused at the door."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kubernetes.client import V1Job

from k8s.manifests import job, to_dict, to_yaml
from k8s.naming import SPEC_ANNOTATION
from k8s.site import Site
from orbit_core.errors import InputError
from orbit_core.recipe import Resources
from orbit_core.steps.contract import InputRef, StepSpec

IMAGES = {"cpu": "orbit-cpu:1", "gpu": "orbit-node:1"}
SHARED = [{"claim": "shared", "path": "/shared"}, {"claim": "models", "path": "/models", "read_only": True}]
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")

any_job = settings(max_examples=50)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
specs = st.builds(
    StepSpec,
    step=st.from_regex(r"[a-z]([a-z0-9_]{0,33}[a-z0-9])?", fullmatch=True),
    version=st.integers(1, 9),
    params=st.dictionaries(st.text(max_size=8).filter(lambda name: name != "engines"), json_values, max_size=3),
    inputs=st.dictionaries(st.text(max_size=8), st.builds(InputRef, digest=st.text(max_size=64)), max_size=2),
    store=st.sampled_from(["s3://bucket", "s3://bucket/some/prefix", "/shared/store", "file:///shared/store"]),
)
resources = st.builds(
    Resources,
    gpus=st.integers(0, 16),
    cpus=st.integers(1, 256),
    memory_gib=st.integers(64, 2048),
    shm_gib=st.integers(0, 63),
    scratch_gib=st.integers(1, 8192),
    hours=st.floats(0.0001, 1000),
    retries=st.integers(0, 50),
    grace_seconds=st.integers(1, 3600),
)
sites = st.builds(
    lambda **fields: Site.parse({"images": IMAGES, "mounts": SHARED, **fields}),
    queue=st.none() | st.just("orbit"),
    queue_priority=st.none() | st.just("orbit-interactive"),
    priority_class=st.none() | st.just("training"),
    topology=st.none() | st.just("cloud/rack"),
    scratch=st.sampled_from(
        [
            {"kind": "empty_dir"},
            {"kind": "ephemeral", "storage_class": "nvme"},
            {"kind": "host_path", "path": "/mnt/nvme"},
        ]
    ),
    environment_secret=st.none() | st.just("orbit-s3"),
)


def spec_of(step: str = "train", **fields: Any) -> StepSpec:
    return StepSpec(**{"step": step, "version": 1, "params": {}, "inputs": {}, "store": "s3://b/p", **fields})


def site_of(**fields: Any) -> Site:
    return Site.parse({"images": IMAGES, **fields})


def pod_of(made: V1Job) -> dict[str, Any]:
    pod: dict[str, Any] = to_dict(made)["spec"]["template"]["spec"]
    return pod


def containers_of(made: V1Job) -> list[dict[str, Any]]:
    return pod_of(made)["initContainers"] + pod_of(made)["containers"]


# For any legal step, resources and site


@any_job
@given(specs, resources, sites)
def test_names_and_labels_are_legal_and_the_same_for_every_caller(spec: StepSpec, needs: Resources, site: Site) -> None:
    made = to_dict(job(spec, needs, site))
    assert DNS_LABEL.fullmatch(made["metadata"]["name"])  # pods carry it in a label
    labels = made["metadata"]["labels"] | made["spec"]["template"]["metadata"]["labels"]
    assert all(LABEL_VALUE.fullmatch(value) for value in labels.values())
    assert made == to_dict(job(spec.model_copy(), needs, site))


@any_job
@given(specs, resources, sites)
@example(spec_of(params={"text": "a line\x85and another"}), Resources(), site_of())
def test_the_client_reads_the_yaml_strictly_and_finds_the_same_job(
    spec: StepSpec, needs: Resources, site: Site
) -> None:
    made = job(spec, needs, site)
    assert V1Job.model_validate(yaml.safe_load(to_yaml(made))) == made


@any_job
@given(specs, resources, sites)
def test_the_pod_reads_the_spec_that_was_asked_for(spec: StepSpec, needs: Resources, site: Site) -> None:
    made = job(spec, needs, site)
    annotations = to_dict(made)["spec"]["template"]["metadata"]["annotations"]
    read = StepSpec.model_validate_json(annotations[SPEC_ANNOTATION])
    assert read == spec and read.digest == spec.digest
    [volume] = [each for each in pod_of(made)["volumes"] if each["name"] == "spec"]
    assert volume["downwardAPI"]["items"] == [
        {"path": "spec.json", "fieldRef": {"fieldPath": f"metadata.annotations['{SPEC_ANNOTATION}']"}}
    ]
    for container in containers_of(made):
        assert container["command"][container["command"].index("--spec") + 1] == "/orbit/spec/spec.json"
        assert {"name": "spec", "mountPath": "/orbit/spec", "readOnly": True} in container["volumeMounts"]


@any_job
@given(specs, resources, sites)
def test_requests_are_limits_and_every_quantity_is_a_string(spec: StepSpec, needs: Resources, site: Site) -> None:
    stage, step = containers_of(job(spec, needs, site))
    for container in (stage, step):
        amounts = container["resources"]
        assert amounts["requests"] == amounts["limits"]
        assert all(isinstance(amount, str) for amount in amounts["requests"].values())
        assert amounts["requests"]["memory"] == f"{needs.memory_gib}Gi"
    assert step["resources"]["limits"].get("nvidia.com/gpu") == (str(needs.gpus) if needs.gpus else None)
    assert "nvidia.com/gpu" not in stage["resources"]["limits"]


@any_job
@given(specs, resources, sites)
def test_pods_are_confined_and_have_no_token(spec: StepSpec, needs: Resources, site: Site) -> None:
    made = job(spec, needs, site)
    pod = pod_of(made)
    assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] >= 1
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert pod["shareProcessNamespace"] is True  # process 1, which ignores signals it has no handler for, is not Python
    for container in containers_of(made):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@any_job
@given(specs, resources, sites)
def test_home_and_temporary_files_are_on_a_volume_that_can_be_written(
    spec: StepSpec, needs: Resources, site: Site
) -> None:
    for container in containers_of(job(spec, needs, site)):
        writable = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
        values = {each["name"]: each.get("value") for each in container["env"]}
        assert {values["HOME"], values["TMPDIR"]} <= writable
        assert {"/scratch", "/tmp"} <= writable


@any_job
@given(specs, resources, sites)
def test_one_pod_at_a_time_within_the_limits_of_the_recipe(spec: StepSpec, needs: Resources, site: Site) -> None:
    made = to_dict(job(spec, needs, site))["spec"]
    assert (made["parallelism"], made["completions"], made["podReplacementPolicy"]) == (1, 1, "Failed")
    assert made["backoffLimit"] == needs.retries
    assert abs(made["activeDeadlineSeconds"] - needs.hours * 3600) <= 1 and made["activeDeadlineSeconds"] >= 1
    assert made["template"]["spec"]["terminationGracePeriodSeconds"] == needs.grace_seconds
    assert made["template"]["spec"]["restartPolicy"] == "Never"
    assert "suspend" not in made  # Kueue's webhook decides


# What a failure costs


def verdict(exit_codes: dict[str, int], disrupted: bool) -> str:
    """What Kubernetes does with a failed pod: the first rule that matches, else the failure counts."""
    made = to_dict(job(spec_of(), Resources(), site_of()))
    for rule in made["spec"]["podFailurePolicy"]["rules"]:
        if "onPodConditions" in rule:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            if disrupted:
                return str(rule["action"])
            continue
        requirement = rule["onExitCodes"]
        assert requirement["operator"] == "In"
        codes = {name: code for name, code in exit_codes.items() if requirement.get("containerName", name) == name}
        if any(code in requirement["values"] for code in codes.values()):
            return str(rule["action"])
    return "Count"


@pytest.mark.parametrize("disrupted", [False, True])
@pytest.mark.parametrize("container", ["stage", "step"])
def test_exit_code_42_fails_the_job_at_once(container: str, disrupted: bool) -> None:
    assert verdict({container: 42}, disrupted) == "FailJob"


@pytest.mark.parametrize("code", [1, 75, 137, 143])
def test_a_lost_node_or_an_eviction_costs_no_try(code: int) -> None:
    assert verdict({"step": code}, disrupted=True) == "Ignore"


def test_a_stop_on_request_costs_no_try() -> None:
    assert verdict({"step": 75}, disrupted=False) == "Ignore"


@pytest.mark.parametrize("code", [1, 2, 128, 137, 139, 143])
def test_any_other_failure_costs_one_try(code: int) -> None:
    assert verdict({"step": code}, disrupted=False) == "Count"


# What the site decides


def test_only_steps_with_gpus_go_to_gpu_nodes() -> None:
    site = site_of(node_selector={"pool": "gpu"}, scratch={"kind": "empty_dir"})
    small, large = (job(spec_of(), Resources(gpus=gpus), site) for gpus in (0, 8))
    assert not {"nodeSelector", "tolerations"} & set(pod_of(small))
    assert pod_of(large)["nodeSelector"] == {"pool": "gpu"}
    assert pod_of(large)["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    images = [{container["image"] for container in containers_of(made)} for made in (small, large)]
    assert images == [{IMAGES["cpu"]}, {IMAGES["gpu"]}]


def test_a_container_without_gpus_asks_for_none() -> None:
    """CUDA images name all GPUs of the node in their environment; the device plugin wins where it gives some."""
    stage, step = containers_of(job(spec_of(), Resources(gpus=8), site_of()))
    hidden = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}
    assert hidden in stage["env"] and hidden not in step["env"]


def test_kueue_is_told_by_labels_and_an_annotation_and_only_where_there_is_a_queue() -> None:
    site = site_of(queue="orbit", queue_priority="orbit-interactive", topology="cloud/rack", priority_class="training")
    made = to_dict(job(spec_of(), Resources(), site))
    labels, template = made["metadata"]["labels"], made["spec"]["template"]
    assert labels["kueue.x-k8s.io/queue-name"] == "orbit"
    assert labels["kueue.x-k8s.io/priority-class"] == "orbit-interactive"
    assert template["metadata"]["annotations"]["kueue.x-k8s.io/podset-preferred-topology"] == "cloud/rack"
    assert template["spec"]["priorityClassName"] == "training"
    assert "kueue" not in to_yaml(job(spec_of(), Resources(), site_of()))


def test_scratch_is_where_the_site_has_room() -> None:
    needs = Resources(scratch_gib=4096)
    kinds = {
        "empty_dir": {"kind": "empty_dir"},
        "ephemeral": {"kind": "ephemeral", "storage_class": "nvme"},
        "host_path": {"kind": "host_path", "path": "/mnt/nvme"},
    }
    made = {kind: job(spec_of(), needs, site_of(scratch=scratch)) for kind, scratch in kinds.items()}
    volume = {kind: next(v for v in pod_of(made[kind])["volumes"] if v["name"] == "scratch") for kind in kinds}
    claim = volume["ephemeral"]["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert volume["empty_dir"]["emptyDir"] == {"sizeLimit": "4096Gi"}
    assert (claim["storageClassName"], claim["resources"]["requests"]) == ("nvme", {"storage": "4096Gi"})
    assert volume["host_path"]["hostPath"] == {"path": "/mnt/nvme", "type": "Directory"}
    asked = {kind: containers_of(made[kind])[0]["resources"]["requests"]["ephemeral-storage"] for kind in kinds}
    assert asked == {"empty_dir": "4106Gi", "ephemeral": "10Gi", "host_path": "10Gi"}  # only the first is the kubelet's


def test_shared_memory_is_memory_of_its_size_or_absent() -> None:
    with_it, without = (pod_of(job(spec_of(), Resources(shm_gib=gib), site_of())) for gib in (3, 0))
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "3Gi"}} in with_it["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in with_it["containers"][0]["volumeMounts"]
    assert "shm" not in str(without)


def test_every_container_sees_the_mounts_of_the_site() -> None:
    made = job(spec_of(store="/shared/store"), Resources(), site_of(mounts=SHARED))
    claims = [v["persistentVolumeClaim"] for v in pod_of(made)["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [{"claimName": "shared"}, {"claimName": "models", "readOnly": True}]
    for container in containers_of(made):
        mounts = {each["mountPath"]: each.get("readOnly", False) for each in container["volumeMounts"]}
        assert mounts["/shared"] is False and mounts["/models"] is True


def test_the_steps_command_is_what_the_executor_and_the_lease_count_on() -> None:
    site = site_of(lease_seconds=7.5, package="samples")
    stage, step = containers_of(job(spec_of("train"), Resources(), site))
    common = ["--spec", "/orbit/spec/spec.json", "--scratch", "/scratch"]
    assert stage["command"] == ["python", "-m", "orbit_core", "stage", *common]
    holder = ["--holder", "$(POD_NAME)", "--lease-seconds", "7.5", "--package", "samples"]
    assert step["command"] == ["python", "-m", "orbit_core", "step", "train", *common, *holder]
    assert {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}} in step["env"]


# Secrets


def test_credentials_are_named_and_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "AWS_ACCESS_KEY_ID": "AKIA-of-the-test",
        "AWS_SECRET_ACCESS_KEY": "very-secret-value",
        "PREFECT_API_KEY": "pnu_secret",
        "HF_TOKEN": "hf_secret",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    made = job(spec_of(), Resources(), site_of(environment_secret="orbit-s3", environment_config="orbit-store"))
    text = to_yaml(made)
    assert not [value for value in secrets.values() if value in text]
    for container in containers_of(made):
        assert container["envFrom"] == [
            {"configMapRef": {"name": "orbit-store"}},
            {"secretRef": {"name": "orbit-s3"}},
        ]


def test_a_store_url_with_credentials_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError) as caught:
        job(spec_of(store="s3://key:hunter2@bucket/prefix"), Resources(), site_of())
    assert "hunter2" not in str(caught.value) and "AWS_SECRET_ACCESS_KEY" in caught.value.fix
