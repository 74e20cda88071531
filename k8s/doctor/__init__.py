"""`orbit k8s doctor`: whether a run could start here, said before it starts. One line for each thing looked at.

Looked at with the rights and the environment of whoever asks: run it in the orchestrator's pod to know what the
orchestrator may do. What these rights do not let one see is said as such; a probe, which is a real step in a real Job,
answers the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

from k8s.doctor.finding import Finding
from k8s.site import Site

__all__ = ["Finding", "examine"]


def examine(site: Site, store: str | None, probe: bool = False, gpus: int = 0) -> Iterator[Finding]:
    """Findings as they are made. `store`: URL, else the site's; `gpus`: of the probe's Job, 0 for the CPU image."""
    from k8s.doctor.cluster import examine_cluster
    from k8s.doctor.probing import run_probe
    from k8s.doctor.server import examine_server
    from k8s.doctor.storage import examine_store

    url = store or site.store
    yield from examine_server()
    trouble = False
    for finding in [*examine_store(url, site), *examine_cluster(site, url)]:
        trouble |= finding.level == "wrong"
        yield finding
    if probe and url and not trouble:
        yield from run_probe(site, url, gpus)
    elif probe:
        yield Finding("wrong", "probe", "not run: it needs what is wrong above", "put that right, then ask again")
