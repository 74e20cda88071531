"""The Kubernetes API as Orbit uses it: few calls, patient with a server that is away, plain about one that says no.

A call that cannot reach the server is repeated, because the Job goes on without us; an answer that a repetition would
not change (forbidden, invalid, no such namespace) becomes an InputError in the server's own words.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from orbit_core.errors import InputError, OrbitError

T = TypeVar("T")
TIMEOUT = (5.0, 30.0)  # seconds: to connect, between two bytes of an answer
PATIENCE_SECONDS = 600.0
LONGEST_PAUSE = 10.0
PASSING = {408, 429, 500, 502, 503, 504}
DENIED = {401, 403}
DENIAL_SECONDS = 20.0  # an API server that has just started denies everything until it has read the roles
WHAT_TO_DO = {
    401: "the token was refused: check KUBECONFIG, or the service account of the orchestrator",
    403: "give this right to the orchestrator (k8s/overlays/base/access.yaml); `orbit k8s doctor` checks them all",
    404: "check the namespace of the site file",
    422: "the API server does not take this manifest: `orbit k8s render` shows it",
}

logger = logging.getLogger(__name__)


class Api:
    """Clients of one cluster. `connect()` makes it; every method of the clients may be called from any thread."""

    def __init__(self, api_client: client.ApiClient) -> None:
        self.batch = client.BatchV1Api(api_client)
        self.core = client.CoreV1Api(api_client)
        self.client = api_client


def connect() -> Api:
    """The cluster of KUBECONFIG (or ~/.kube/config), else the one whose pod we are. InputError if there is neither."""
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # says each refused connection three times
    settings = client.Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
            config.load_incluster_config(client_configuration=settings)
        else:
            config.load_kube_config(config_file=os.environ.get("KUBECONFIG"), client_configuration=settings)
    except config.ConfigException as error:
        raise InputError(
            "Kubernetes", "a kubeconfig, or a pod with a service account", str(error), "set KUBECONFIG to a kubeconfig"
        ) from None
    return Api(client.ApiClient(settings))


def patient(
    what: str,
    call: Callable[[], T],
    on_wait: Callable[[str], None] = logger.warning,
    patience: float = PATIENCE_SECONDS,
) -> T:
    """`call()`, repeated while the server cannot be reached or is overloaded; `on_wait` is told once.

    404 and 409 are left to the caller as ApiException. Raises InputError for what repeating cannot help, OrbitError
    when `patience` seconds have passed.
    """
    started, pause, told = time.monotonic(), 0.25, False
    while True:
        try:
            return call()
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            if not passing(error) and not is_denial(error, started):
                raise refusal(what, error) from None
            trouble = error
        if time.monotonic() - started > patience:
            raise OrbitError(f"{what}: the Kubernetes API server did not answer for {patience:.0f} s: {trouble}")
        if not told and time.monotonic() - started > 5:
            on_wait(f"{what}: the Kubernetes API server does not answer; trying again ({short(trouble)})")
            told = True
        time.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE)


def passing(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, ApiException):
        return error.status in PASSING or error.status in (0, None)
    return isinstance(error, urllib3.exceptions.HTTPError | OSError)


def is_denial(error: Exception, since: float | None = None) -> bool:
    """Whether the server denies it, and has done so for less than DENIAL_SECONDS `since` (monotonic)."""
    recent = since is None or time.monotonic() - since < DENIAL_SECONDS
    return isinstance(error, ApiException) and error.status in DENIED and recent


def refusal(what: str, error: Exception) -> Exception:
    """What the caller raises: ApiException for 404 and 409, which callers decide on; InputError otherwise."""
    if not isinstance(error, ApiException) or error.status in (404, 409):
        return error
    return InputError(what, "to be allowed", short(error), WHAT_TO_DO.get(error.status or 0, ""))


def short(error: Exception) -> str:
    """The server's own sentence, without headers and JSON around it."""
    if isinstance(error, ApiException):
        try:
            return str(json.loads(error.body or "")["message"])
        except (ValueError, KeyError, TypeError):
            return f"{error.status} {error.reason}"
    return str(error).partition("(Caused by")[2].rstrip(")") or str(error)
