"""The whole test cluster: a control plane, a node with 8 GPUs, and the rest of the cluster.

"The rest" is a node that takes no pods. It is there because where every node is lost at once, Kubernetes believes that
its own network has failed, and evicts nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.api import Object
from cluster.control_plane import ControlPlane
from cluster.node import Node
from cluster.processes import CLUSTER_MARK
from cluster.storage import Provisioner

TESTS = Path(__file__).parents[1]
NOT_FOR_PODS: Object = {"key": "tests/not-for-pods", "effect": "NoSchedule"}


@dataclass(frozen=True)
class Cluster:
    plane: ControlPlane
    node: Node
    rest: Node


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Ready when it is entered; nothing of it is left afterwards."""
    with ControlPlane() as plane, new_node(plane, "gpu-0") as node, new_node(plane, "rest", 0, (NOT_FOR_PODS,)) as rest:
        storage = Provisioner(plane.api())
        storage.start()
        try:
            yield Cluster(plane, node, rest)
        finally:
            storage.stop()


def new_node(plane: ControlPlane, name: str, gpus: int = 8, taints: tuple[Object, ...] = ()) -> Node:
    """To be started with `with`. `name` is one of control_plane.NODES."""
    # A pod finds the sample steps as `samples` and `podsteps`.
    importable = (TESTS.parent, TESTS.parent / "kernels", TESTS, TESTS / "steps", TESTS / "k8s")  # steps of the tests
    environment = {"PYTHONPATH": os.pathsep.join(map(str, importable)), CLUSTER_MARK: plane.id}
    certificates = plane.folder / "certificates"
    return Node(plane.api(name), name, plane.folder / "nodes", certificates, gpus, taints, environment)
