from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster.asking import Asking
from cluster.running import Cluster


@pytest.fixture
def ask(cluster: Cluster, namespace: str) -> Iterator[Asking]:
    asking = Asking(cluster, namespace)
    yield asking
    asking.let_go()
