"""The cluster, as the one who asks may use it: rights, queue, priorities, and whether a Job would be let in.

Rights are asked by SelfSubjectAccessReview, so nothing is tried that would leave a trace; the Job is created with
dry run: admission and validation answer, nothing is stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import urllib3
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from k8s.api import TIMEOUT, Api, connect, short
from k8s.doctor.finding import Finding
from k8s.manifests import job as manifest_of
from k8s.site import Site
from orbit_core.errors import InputError
from orbit_core.pipeline import VERSIONS
from orbit_core.recipe import Resources
from orbit_core.steps.contract import StepSpec

# What KubernetesExecutor does: (group, resource, subresource, verbs). The Role of k8s/overlays/base grants just this.
RIGHTS = (
    ("batch", "jobs", "", ("create", "get", "list", "watch", "delete")),
    ("", "pods", "", ("get", "list", "watch")),
    ("", "pods", "log", ("get",)),
    ("", "events", "", ("list",)),
)
ROLE = "kubectl apply -k k8s/overlays/<yours>: access.yaml grants them"
KUEUE_VERSIONS = ("v1beta2", "v1beta1")


def examine_cluster(site: Site, store: str | None) -> Iterator[Finding]:
    try:
        api = connect()
        version = client.VersionApi(api.client).get_code(_request_timeout=TIMEOUT)
    except InputError as error:
        yield Finding("wrong", "Kubernetes API", f"{error.what}: {error.found}", error.fix)
        return
    except (ApiException, urllib3.exceptions.HTTPError) as error:
        yield Finding("wrong", "Kubernetes API", short(error), "check KUBECONFIG and that the API server is reachable")
        return
    yield Finding("ok", "Kubernetes API", f"{version.git_version} at {api.client.configuration.host}")
    for look in (_namespace, _rights, _too_many_rights, _queue, _priority):
        finding = _asked(look, api, site)
        if finding is not None:
            yield finding
    if store:
        yield from _admission(api, site, store)


def _asked(look: Callable[[Api, Site], Finding | None], api: Api, site: Site) -> Finding | None:
    try:
        return look(api, site)
    except (ApiException, urllib3.exceptions.HTTPError) as error:
        return Finding("wrong", look.__name__.strip("_").replace("_", " "), short(error))


def _namespace(api: Api, site: Site) -> Finding:
    name = site.namespace
    try:
        found = api.core.read_namespace(name, _request_timeout=TIMEOUT)
    except ApiException as error:
        if error.status == 403:
            return Finding("note", "namespace", f"{name}: these rights do not show it; the Job below tells")
        if error.status == 404:
            return Finding("wrong", "namespace", f"{name}: no such namespace", "kubectl apply -k k8s/overlays/<yours>")
        raise
    if found.status and found.status.phase == "Terminating":
        return Finding("wrong", "namespace", f"{name} is being deleted", "wait, then apply the overlay again")
    return Finding("ok", "namespace", name)


def _rights(api: Api, site: Site) -> Finding:
    wanted = [(group, kind, sub, verb) for group, kind, sub, verbs in RIGHTS for verb in verbs]
    missing = [
        f"{verb} {kind}{'/' + sub if sub else ''}"
        for group, kind, sub, verb in wanted
        if not may(api, site.namespace, verb, kind, group, sub)
    ]
    if missing:
        return Finding("wrong", "rights", f"missing in namespace {site.namespace}: {', '.join(missing)}", ROLE)
    return Finding("ok", "rights", f"all {len(wanted)} that the executor needs in namespace {site.namespace}")


def _too_many_rights(api: Api, site: Site) -> Finding | None:
    if may(api, "", "*", "*", "*"):
        found = "everything everywhere (cluster-admin): fine for a person, too much for the orchestrator"
    elif may(api, site.namespace, "get", "secrets", "", ""):
        found = f"Secrets of namespace {site.namespace} can be read; the orchestrator does not need that"
    else:
        return None
    return Finding("note", "rights", found, "let the orchestrator use its own account: k8s/overlays/base/access.yaml")


def may(api: Api, namespace: str, verb: str, resource: str, group: str, subresource: str = "") -> bool:
    """Whether we are allowed; an empty namespace means all of them."""
    attributes = client.V1ResourceAttributes(
        namespace=namespace or None, verb=verb, resource=resource, group=group, subresource=subresource or None
    )
    review = client.V1SelfSubjectAccessReview(
        api_version="authorization.k8s.io/v1",
        kind="SelfSubjectAccessReview",
        spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes),
    )
    calls = client.AuthorizationV1Api(api.client)
    answer = calls.create_self_subject_access_review(review, _request_timeout=TIMEOUT)
    return bool(answer.status and answer.status.allowed)


def _queue(api: Api, site: Site) -> Finding | None:
    if site.queue is None:
        return None
    what, calls = "LocalQueue", client.CustomObjectsApi(api.client)
    for version in KUEUE_VERSIONS:
        try:
            found = calls.get_namespaced_custom_object(
                "kueue.x-k8s.io", version, site.namespace, "localqueues", site.queue, _request_timeout=TIMEOUT
            )
        except ApiException as error:
            if error.status == 403:
                hidden = f"{site.queue}: these rights do not show it; if it is missing, Jobs stay suspended"
                return Finding("note", what, hidden)
            if error.status != 404:
                raise
            if _names_an_object(error):
                missing = f"{site.queue} is not in namespace {site.namespace}: Jobs would stay suspended for ever"
                return Finding(
                    "wrong", what, missing, "make it (k8s/overlays/kueue), or correct `queue` in the site file"
                )
            continue
        return _queue_state(site.queue, found)
    absent = f"this cluster has no Kueue, and the site file names the queue {site.queue}"
    return Finding("wrong", what, absent, "install Kueue, or remove `queue` from the site file")


def _queue_state(name: str, found: Any) -> Finding:
    conditions = found.get("status", {}).get("conditions", []) if isinstance(found, dict) else []
    for condition in conditions:
        if condition.get("type") == "Active" and condition.get("status") != "True":
            said = condition.get("message", "no reason given")
            return Finding("wrong", "LocalQueue", f"{name} is not active: {said}", "see after its ClusterQueue")
    return Finding("ok", "LocalQueue", name)


def _names_an_object(error: ApiException) -> bool:
    """A 404 for one object names it; one for a kind that the server does not know is plain text or names nothing."""
    try:
        return bool(json.loads(error.body or "").get("details", {}).get("name"))
    except ValueError:
        return False


def _priority(api: Api, site: Site) -> Finding | None:
    if site.priority_class is None:
        return None
    what, name = "PriorityClass", site.priority_class
    try:
        found = client.SchedulingV1Api(api.client).read_priority_class(name, _request_timeout=TIMEOUT)
    except ApiException as error:
        if error.status == 403:
            return Finding("note", what, f"{name}: these rights do not show it; without it pods are refused")
        if error.status == 404:
            fix = "make it, or correct `priority_class` in the site file"
            return Finding("wrong", what, f"no {name}: pods would be refused", fix)
        raise
    return Finding("ok", what, f"{name}, value {found.value}")


def probe_spec(store: str, nonce: str) -> StepSpec:
    return StepSpec(step="probe", version=VERSIONS["probe"], params={"nonce": nonce}, inputs={}, store=store)


def _admission(api: Api, site: Site, store: str) -> Iterator[Finding]:
    """A Job as the executor makes it, with dry run. What its pods would meet (quota, names of Secrets, images) is for
    the probe to say."""
    what = "Job admission"
    try:
        manifest = manifest_of(probe_spec(store, "dry-run"), Resources(), site)
        create = api.batch.create_namespaced_job_with_http_info
        _, _, headers = create(
            site.namespace, manifest, dry_run="All", field_validation="Strict", _request_timeout=TIMEOUT
        )
    except InputError as error:
        yield Finding("wrong", what, f"{error.what}: {error.found}", error.fix)
        return
    except ApiException as error:
        missing = f"namespace {site.namespace} does not exist" if error.status == 404 else short(error)
        yield Finding("wrong", what, missing, "kubectl apply -k k8s/overlays/<yours>, or correct the site file")
        return
    except urllib3.exceptions.HTTPError as error:
        yield Finding("wrong", what, short(error))
        return
    warned = _warnings(headers)
    if warned:
        yield Finding("wrong", what, f"accepted, but its pods would be refused: {warned}", "correct the site file")
    else:
        yield Finding("ok", what, "a Job like the executor's is accepted")
    names = [name for name in (site.environment_secret, site.images.pull_secret) if name]
    names += [site.environment_config] if site.environment_config else []
    names += [mount.claim for mount in site.mounts]
    if names:
        yield Finding(
            "note", "names in the site", f"{', '.join(names)}: not to be read with these rights; --probe tells"
        )


def _warnings(headers: Any) -> str:
    """Of the Warning headers, what pod security admission says that it would refuse in a pod."""
    texts = [str(value) for name, value in dict(headers or {}).items() if name.lower() == "warning"]
    return "; ".join(text.partition('"')[2].rpartition('"')[0] for text in texts if "would violate" in text)
