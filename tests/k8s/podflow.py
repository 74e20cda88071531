"""One step as a deployed flow: the tasks, the executor and the dashboard of a real run around a step of seconds."""

from __future__ import annotations

from typing import Any

from prefect import flow

from k8s.executor import KubernetesExecutor
from k8s.site import Site
from orbit_core.recipe import Resources
from orbit_core.steps.contract import StepSpec
from tasks import steps
from tasks.executors import called_off


@flow(name="tally")
def tally(spec: StepSpec, site: dict[str, Any], resources: Resources) -> dict[str, Any]:
    executor = KubernetesExecutor(Site.parse(site), {spec.step: resources}, called_off)
    return steps.data(spec, executor).artifact.facts
