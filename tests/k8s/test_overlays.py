"""Overlays, and the Jobs of every recipe, as a real API server sees them.

Each overlay is built by kustomize; what is of Kubernetes' own kinds goes through the server's validation and admission
as a dry run. Pods are admitted in a namespace held to the pod security standard `restricted`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.running import Cluster
from kubernetes.client import AuthorizationV1Api, V1SelfSubjectRulesReview, V1SelfSubjectRulesReviewSpec
from kubernetes.config import new_client_from_config

from flows.options import RECIPES, load_recipe
from k8s.manifests import job, to_yaml
from k8s.render import render, render_spec
from k8s.site import Site
from orbit_core.recipe import Resources
from orbit_core.steps.contract import StepSpec

OVERLAYS = Path(__file__).parents[2] / "k8s" / "overlays"
SITES = ("s3", "pvc-only", "kueue")  # complete sites, with a store
BUILT = ("base", *SITES, "kuberay")
COMPONENTS = ("prefect-server", "quota")
# Kinds of Kueue and KubeRay, whose definitions this API server does not have: they are only built, not validated.
FOREIGN = ("kueue.x-k8s.io/v1beta2", "ray.io/v1")
RECIPE_NAMES = sorted(file.stem for file in RECIPES.glob("*.yaml"))
Object = dict[str, Any]


@dataclass(frozen=True)
class Home:
    """A namespace of the test cluster with the base overlay applied, and the overlays as files to build."""

    cluster: Cluster
    namespace: str
    overlays: Path

    def kubectl(self, *arguments: str, documents: list[Object] | str | None = None) -> str:
        text = documents if isinstance(documents, str) or documents is None else yaml.safe_dump_all(documents)
        return self.cluster.plane.kubectl(*arguments, input=text)

    def build(self, overlay: str) -> list[Object]:
        """The overlay's objects, in this namespace: what an overlay of a site's own would say."""
        own = self.overlays / f"own-{uuid.uuid4().hex[:8]}"
        own.mkdir()
        content = {"resources": [f"../{overlay}"], "namespace": self.namespace}
        (own / "kustomization.yaml").write_text(yaml.safe_dump(content))
        return list(yaml.safe_load_all(self.kubectl("kustomize", str(own))))

    def site(self, overlay: str) -> Site:
        file = self.overlays / overlay / "site.yaml"
        return Site.parse(yaml.safe_load(file.read_text()) | {"namespace": self.namespace})

    def dry_run(self, documents: list[Object] | str) -> list[Object]:
        """What the API server would have stored. RuntimeError with its reasons if it refuses."""
        options = ("--dry-run=server", "--validate=strict", "-o", "json", "-f", "-")
        made = json.loads(self.kubectl("apply", *options, documents=documents))
        return list(made["items"]) if made["kind"] == "List" else [made]

    def admit(self, template: Object) -> Object:
        """The pod that a controller would make of a template, as admission leaves it."""
        metadata = {**template.get("metadata", {}), "name": f"pod-{uuid.uuid4().hex[:8]}", "namespace": self.namespace}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        [made] = self.dry_run([pod])
        return made


@pytest.fixture(scope="module")
def home(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    overlays = tmp_path_factory.mktemp("site") / "overlays"
    shutil.copytree(OVERLAYS, overlays, ignore=shutil.ignore_patterns("*.env", "spec.json"))
    shutil.copy(overlays / "s3" / "s3.env.example", overlays / "s3" / "s3.env")
    site = Site.parse(yaml.safe_load((overlays / "s3" / "site.yaml").read_text()))
    (overlays / "kuberay" / "spec.json").write_text(render_spec(load_recipe("demo"), site, "train"))
    home = Home(cluster, cluster.plane.new_namespace(), overlays)
    documents = [each for each in home.build("base") if each["kind"] != "Deployment"]
    home.kubectl("apply", "-f", "-", documents=documents)
    yield home
    cluster.plane.delete_namespace(home.namespace)


def of_kind(documents: list[Object], kind: str) -> dict[str, Object]:
    return {each["metadata"]["name"]: each for each in documents if each["kind"] == kind}


# Jobs


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_the_jobs_of_every_recipe_are_accepted_and_their_pods_admitted_as_restricted(
    home: Home, recipe: str, site: str
) -> None:
    made = home.dry_run("".join(render(load_recipe(recipe), home.site(site))))
    assert {each["kind"] for each in made} == {"Job"} and len(made) == 9
    for each in made[:1]:  # one template admitted stands for its siblings, which differ in annotations and numbers
        assert home.admit(each["spec"]["template"])["status"]["qosClass"] == "Guaranteed"


def test_the_training_pod_is_guaranteed_its_eight_gpus(home: Home) -> None:
    recipe = load_recipe("demo", ["engines={trainer: megatron, rollout: sglang, device: cuda}"])
    made = home.dry_run("".join(render(recipe, home.site("kueue"))))
    [train] = [each for each in made if each["metadata"]["labels"]["orbit/step"] == "train"]
    pod = home.admit(train["spec"]["template"])
    assert pod["status"]["qosClass"] == "Guaranteed"
    assert pod["spec"]["containers"][0]["resources"]["requests"]["nvidia.com/gpu"] == "8"
    mounted = [mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]]
    assert "/var/run/secrets/kubernetes.io/serviceaccount" not in mounted  # admission adds it unless told not to


@pytest.mark.parametrize(
    "scratch", [{"kind": "ephemeral", "storage_class": "nvme"}, {"kind": "empty_dir"}], ids=lambda each: each["kind"]
)
def test_scratch_is_admitted_as_restricted(home: Home, scratch: dict[str, str]) -> None:
    assert home.admit(_template(home, scratch))


def test_a_path_of_the_node_is_not_admitted_as_restricted(home: Home) -> None:
    """Which is what the site file says of it; the refusal shows that the others were admitted for a reason."""
    with pytest.raises(RuntimeError, match="violates PodSecurity"):
        home.admit(_template(home, {"kind": "host_path", "path": "/mnt/nvme"}))


def _template(home: Home, scratch: dict[str, str]) -> Object:
    spec = StepSpec(step="train", version=1, params={}, inputs={}, store="s3://bucket/prefix")
    site = home.site("s3").model_copy(update={"scratch": Site.parse({"images": _IMAGES, "scratch": scratch}).scratch})
    template: Object = yaml.safe_load(to_yaml(job(spec, Resources(gpus=8), site)))["spec"]["template"]
    return template


_IMAGES = {"cpu": "orbit-cpu", "gpu": "orbit-node"}


# Overlays


def test_every_folder_is_built_or_part_of_one_that_is() -> None:
    assert {path.name for path in OVERLAYS.iterdir() if path.is_dir()} == {*BUILT, *COMPONENTS}


@pytest.mark.parametrize("overlay", BUILT)
def test_every_overlay_builds_and_is_accepted(home: Home, overlay: str) -> None:
    documents = home.build(overlay)
    own = [each for each in documents if each["apiVersion"] not in FOREIGN]
    assert len(home.dry_run(own)) == len(own)
    namespaces = {each["metadata"].get("namespace") for each in documents} - {None}
    assert namespaces == {home.namespace}  # one line moves a site, rights and accounts included
    foreign = {each["apiVersion"] for each in documents} & set(FOREIGN)
    assert foreign == {"kueue": {FOREIGN[0]}, "kuberay": {FOREIGN[1]}}.get(overlay, set())


@pytest.mark.parametrize("overlay", BUILT)
def test_every_pod_of_an_overlay_is_admitted_as_restricted(home: Home, overlay: str) -> None:
    documents = home.build(overlay)
    templates = [each["spec"]["template"] for each in of_kind(documents, "Deployment").values()]
    for each in of_kind(documents, "RayJob").values():
        cluster = each["spec"]["rayClusterSpec"]
        templates += [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    assert len(templates) == {"base": 1, "kuberay": 2}.get(overlay, 2)
    assert all(home.admit(template) for template in templates)


def test_kueues_cluster_wide_kinds_have_no_namespace(home: Home) -> None:
    """kustomize knows neither of them and would give them one."""
    documents = yaml.safe_load_all(home.kubectl("kustomize", str(home.overlays / "kueue")))
    own = [each for each in documents if each["apiVersion"] == FOREIGN[0]]
    namespaces = {each["kind"]: each["metadata"].get("namespace") for each in own}
    assert namespaces.pop("LocalQueue") == "orbit"
    assert set(namespaces) == {"Topology", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass"}
    assert set(namespaces.values()) == {None}


def test_components_that_no_overlay_uses_are_accepted_too(home: Home) -> None:
    own = home.overlays / "with-quota"
    own.mkdir()
    content = {"resources": ["../base"], "components": ["../quota"], "namespace": home.namespace}
    (own / "kustomization.yaml").write_text(yaml.safe_dump(content))
    documents = list(yaml.safe_load_all(home.kubectl("kustomize", str(own))))
    assert of_kind(home.dry_run(documents), "ResourceQuota")


@pytest.mark.parametrize("overlay", SITES)
def test_what_a_site_file_names_is_in_its_overlay(home: Home, overlay: str) -> None:
    site, documents = home.site(overlay), home.build(overlay)
    [orchestrator] = of_kind(documents, "Deployment")["orbit-orchestrator"]["spec"]["template"]["spec"]["containers"]
    versions = {image.rpartition(":")[2] for image in (orchestrator["image"], site.images.cpu, site.images.gpu)}
    assert len(versions) == 1  # of Orbit: a pod refuses a step of another
    assert site.service_account in of_kind(documents, "ServiceAccount")
    assert {mount.claim for mount in site.mounts} <= set(of_kind(documents, "PersistentVolumeClaim"))
    assert {site.environment_secret} - {None} <= set(of_kind(documents, "Secret"))
    assert {site.environment_config} - {None} <= set(of_kind(documents, "ConfigMap"))
    assert {site.queue} - {None} <= set(of_kind(documents, "LocalQueue"))
    assert {site.queue_priority} - {None} <= set(of_kind(documents, "WorkloadPriorityClass"))
    sources = {next(iter(each.values()))["name"] for each in orchestrator["envFrom"]}
    assert {site.environment_secret, site.environment_config} - {None} <= sources  # it reads the same store
    mounts = {each["mountPath"] for each in orchestrator["volumeMounts"]}
    assert {mount.path for mount in site.mounts} <= mounts  # at the same path


@pytest.mark.parametrize("overlay", BUILT[:-1])
def test_the_orchestrator_reads_the_site_file_of_its_overlay(home: Home, overlay: str) -> None:
    documents = home.build(overlay)
    pod = of_kind(documents, "Deployment")["orbit-orchestrator"]["spec"]["template"]["spec"]
    [volume] = [each for each in pod["volumes"] if each["name"] == "site"]
    content = of_kind(documents, "ConfigMap")[volume["configMap"]["name"]]["data"]["site.yaml"]
    assert content == (OVERLAYS / overlay / "site.yaml").read_text()
    assert {"name": "site", "mountPath": "/etc/orbit", "readOnly": True} in pod["containers"][0]["volumeMounts"]


def test_kueue_covers_every_resource_that_a_step_asks_for(home: Home) -> None:
    """Else it would never admit the Job."""
    template = _template(home, {"kind": "empty_dir"})
    asked = set(template["spec"]["containers"][0]["resources"]["requests"])
    [queue] = of_kind(home.build("kueue"), "ClusterQueue").values()
    [group] = queue["spec"]["resourceGroups"]
    assert asked == set(group["coveredResources"])
    assert all({each["name"] for each in flavor["resources"]} == asked for flavor in group["flavors"])


def test_a_rayjob_runs_the_command_of_the_step_with_its_spec(home: Home) -> None:
    documents = home.build("kuberay")
    [ray] = of_kind(documents, "RayJob").values()
    [template] = {json.dumps(g["template"]) for g in ray["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    pod = json.loads(template)["spec"]
    volume = next(each for each in pod["volumes"] if each["name"] == "spec")
    spec = of_kind(documents, "ConfigMap")[volume["configMap"]["name"]]["data"]["spec.json"]
    assert StepSpec.model_validate_json(spec).step == "train"
    step = yaml.safe_load(to_yaml(job(StepSpec.model_validate_json(spec), Resources(), home.site("s3"))))
    [container] = step["spec"]["template"]["spec"]["containers"]
    expected = " ".join(container["command"]).replace("$(POD_NAME)", "$HOSTNAME")
    assert ray["spec"]["entrypoint"] == expected


# Rights


def rules_of(home: Home, account: str) -> set[tuple[str, str, str]]:
    """(group, resource, verb) that the account may use in its namespace."""
    config = home.cluster.plane.service_account_kubeconfig(home.namespace, account)
    api = AuthorizationV1Api(new_client_from_config(str(config)))
    spec = V1SelfSubjectRulesReviewSpec(namespace=home.namespace)
    answer = api.create_self_subject_rules_review(V1SelfSubjectRulesReview(spec=spec))
    return {
        (group, resource, verb)
        for rule in answer.status.resource_rules
        for group in rule.api_groups or []
        for resource in rule.resources or []
        for verb in rule.verbs
    }


def test_the_orchestrator_may_make_and_follow_jobs_and_nothing_else(home: Home) -> None:
    assert rules_of(home, "orbit-orchestrator") - rules_of(home, "default") == {
        *(("batch", "jobs", verb) for verb in ("create", "get", "list", "watch", "delete")),
        *(("", "pods", verb) for verb in ("get", "list", "watch")),
        ("", "pods/log", "get"),
        ("", "events", "list"),
    }


def test_a_step_may_nothing_that_not_every_account_may(home: Home) -> None:
    assert rules_of(home, "orbit-step") == rules_of(home, "default")


# Secrets


def test_no_credential_is_in_the_repository_and_none_can_be_added_by_mistake() -> None:
    example = (OVERLAYS / "s3" / "s3.env.example").read_text().split()
    assert all(line.endswith("=replace-me") for line in example)
    for file in ("s3/s3.env", "kuberay/spec.json"):
        ignored = subprocess.run(["git", "check-ignore", "-q", str(OVERLAYS / file)], cwd=OVERLAYS, check=False)
        assert ignored.returncode == 0, file
