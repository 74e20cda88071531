"""The probe: one real step through the executor that runs all others, so that what it finds is what a run will find."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from k8s.doctor.cluster import probe_spec
from k8s.doctor.finding import Finding
from k8s.executor import KubernetesExecutor
from k8s.naming import job_name
from k8s.site import Site
from orbit_core.errors import InputError, OrbitError
from orbit_core.executors.base import Event
from orbit_core.recipe import Resources
from orbit_core.steps.contract import StepSpec
from orbit_core.store import open_store
from orbit_core.store.artifacts import code_version

SMALL = Resources(cpus=1, memory_gib=2, shm_gib=1, scratch_gib=1, hours=0.5, retries=0, grace_seconds=5)


def run_probe(site: Site, store: str, gpus: int) -> Iterator[Finding]:
    """What the probe found. A Job whose pod failed stays, to be looked at; otherwise nothing does."""
    resources = SMALL.model_copy(update={"gpus": gpus, "memory_gib": 8 if gpus else SMALL.memory_gib})
    executor = KubernetesExecutor(site, {"probe": resources})
    spec = probe_spec(store, uuid.uuid4().hex)
    image = site.images.gpu if gpus else site.images.cpu
    where, said = f"Job {job_name(spec)} with {image}", list[str]()

    def listen(event: Event) -> None:
        if event["orbit"] == "status":
            said.append(str(event["message"]))

    try:
        facts = executor.run(spec, listen).facts
    except InputError as error:
        yield Finding("wrong", "probe", f"{where}: {error.found or error.what}", error.fix)
        return
    except OrbitError as error:
        first, *rest = str(error).splitlines()
        fix = "; ".join(line.strip() for line in rest[:3]) or (said[-1] if said else "")
        yield Finding("wrong", "probe", f"{where}: {first}", fix)
        return
    finally:
        _clean(spec)
    _remove_job(executor, spec)
    yield from _judge(facts, image, gpus)


def _judge(facts: dict[str, Any], image: str, gpus: int) -> Iterator[Finding]:
    version, ours = facts["orbit"], code_version()
    if version != ours:
        fix = "give orchestrator and steps images of one version: a pod refuses a step of another"
        yield Finding("wrong", "image", f"{image} holds Orbit {version}, and here is {ours}", fix)
    else:
        yield Finding("ok", "image", f"{image}: Orbit {version}, Python {facts['python']}, torch {facts['torch']}")
    if len(facts["gpus"]) != gpus:
        fix = "see after the device plugin and that the image holds torch for CUDA"
        yield Finding("wrong", "GPUs", f"{len(facts['gpus'])} seen by torch, {gpus} asked for", fix)
    else:
        yield Finding("ok", "GPUs", ", ".join(facts["gpus"]) or "none asked for; --gpus N asks with the GPU image")
    room = f"/dev/shm {facts['shm_gib']} GiB, scratch {facts['scratch_gib']} GiB"
    yield Finding("ok", "inside a pod", f"store written with conditions honoured, user {facts['user']}, {room}")


def _clean(spec: StepSpec) -> None:
    """A probe leaves nothing in the store."""
    store = open_store(spec.store)
    for prefix in (f"artifacts/probe/{spec.digest[:16]}", f"leases/probe-{spec.digest[:16]}"):
        for path in store.list(prefix):
            store.delete(path)


def _remove_job(executor: KubernetesExecutor, spec: StepSpec) -> None:
    job = executor.jobs.read(job_name(spec), lambda message: None)
    if job is not None:
        executor.jobs.delete(job)
