"""Which executor a recipe's word means, and when a cancelled run means that nobody wants its step any more."""

from __future__ import annotations

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException, TerminationSignal

from orbit_core.executors.base import Executor
from orbit_core.executors.local import LocalExecutor
from orbit_core.pipeline import VERSIONS
from orbit_core.recipe import Recipe


def executor_for(recipe: Recipe) -> Executor:
    """The executor that the recipe names; InputError if this machine lacks what it needs (a site file, a cluster)."""
    if recipe.executor == "local":
        return LocalExecutor()
    from k8s.executor import KubernetesExecutor
    from k8s.site import Site
    from k8s.sizing import resources_of

    resources = {step: resources_of(recipe, step) for step in VERSIONS}
    return KubernetesExecutor(Site.load(), resources, called_off)


def called_off(error: BaseException) -> bool:
    """Whether the run was cancelled, or only its process ended.

    The same SIGTERM comes when somebody presses Cancel and when the orchestrator's pod is moved to another node. In the
    first case Prefect has marked the run before; in the second the Job is worth keeping, and a Retry adopts it.
    """
    if not isinstance(error, TerminationSignal):
        return True  # Ctrl-C, or `orbit run` asked to stop
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return True
    try:
        with get_client(sync_client=True) as api:
            state = api.read_flow_run(context.flow_run.id).state
    except (httpx.HTTPError, PrefectException):
        return False  # when in doubt the work goes on
    return state is not None and (state.is_cancelling() or state.is_cancelled())
