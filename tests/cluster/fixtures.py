"""`cluster`, one for the session, and `namespace`, one for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cluster.running import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real control plane and a node with 8 GPUs whose pods are local processes."""
    from cluster.binaries import why_not
    from cluster.running import running_cluster

    reason = why_not()
    if reason and os.environ.get("CI"):
        pytest.fail(f"{reason}; CI must have one", pytrace=False)
    if reason:
        pytest.skip(reason)
    with running_cluster() as running:
        yield running


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own; what runs in it ends with the test."""
    name = cluster.plane.new_namespace()
    yield name
    cluster.plane.delete_namespace(name)
