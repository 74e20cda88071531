"""Run scenarios side by side: most share one cluster, those that break a cluster or a server have one of their own.

Most of a scenario is waiting (Kubernetes replaces a failed pod after 10 s at the earliest), so lanes save minutes.
"""

from __future__ import annotations

import contextlib
import queue
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.running import Cluster, running_cluster
from prefect_scenarios import PREFECT_SCENARIOS, DeployedWorld
from prefect_world import PrefectServer, flow_runs
from scenarios import SCENARIOS
from whole_runs import WHOLE_RUNS
from world import moto_bucket, new_world

# These take a node of the cluster or its API server away: they have a cluster of their own, one after the other.
ALONE = ("node_deleted", "cut_off", "frozen", "api_down", "watch_expired")
LAST = "server_restarted"  # takes the Prefect server away, so it waits for the others
DEPLOYED = {**PREFECT_SCENARIOS, **WHOLE_RUNS}
ALL = (*SCENARIOS, *DEPLOYED)
THREADS = 2  # of the scenarios that share a cluster; on two cores more of them only slow each other down


@dataclass(frozen=True)
class Outcome:
    """`broken`: how the promise was broken, empty if it was kept."""

    name: str
    seconds: float
    broken: str


def outcomes(names: Iterable[str], times: int = 1, brief: bool = False) -> Iterator[Outcome]:
    """Each of `names` so many times, as they end; `brief`: see World."""
    wanted = list(names)
    ended: queue.Queue[Outcome | None] = queue.Queue()
    with moto_bucket() as (url, environment), tempfile.TemporaryDirectory() as folder:
        stage = _Stage(url, environment, Path(folder), ended.put, brief)
        whole = [name for name in wanted if name in WHOLE_RUNS]  # the longest, so they begin
        shared = [*whole, *(name for name in wanted if name not in {*ALONE, *DEPLOYED})]
        alone = [name for name in wanted if name in ALONE]
        deployed = [name for name in wanted if name in PREFECT_SCENARIOS and name != LAST]
        last = [name for name in wanted if name == LAST]
        lanes = [
            (stage.together, (shared * times, deployed * times, last * times)),
            (stage.alone, (alone * times,)),
        ]
        threads = [
            threading.Thread(target=_watched, args=(lane, names, ended.put)) for lane, names in lanes if any(names)
        ]
        for thread in threads:
            thread.start()
        for _ in range(len(wanted) * times):
            outcome = ended.get()
            if outcome is None:
                break
            yield outcome
        for thread in threads:
            thread.join()


def _watched(lane: Callable[..., None], names: tuple[list[str], ...], put: Callable[[Outcome | None], None]) -> None:
    try:
        lane(*names)
    except BaseException:  # a lane whose cluster does not even start ends the whole run
        traceback.print_exc()
        put(None)


class _Stage:
    """Clusters and servers, and scenarios played on them."""

    def __init__(
        self, url: str, environment: dict[str, str], folder: Path, put: Callable[[Outcome], None], brief: bool
    ) -> None:
        self.url, self.environment, self.folder, self.put, self.brief = url, environment, folder, put, brief

    def alone(self, names: list[str]) -> None:
        with running_cluster() as cluster:
            self._play_all(names, 1, partial(self._play, cluster))

    def together(self, shared: list[str], deployed: list[str], last: list[str]) -> None:
        with running_cluster() as cluster, contextlib.ExitStack() as closing:
            server = PrefectServer(self._new_folder())
            if any(name in DEPLOYED for name in (*shared, *deployed, *last)):
                closing.enter_context(server)
            play = partial(self._play, cluster, server=server)
            lane = threading.Thread(target=self._play_all, args=(shared, THREADS, play))
            lane.start()
            self._play_all(deployed, 1, play)
            lane.join()
            self._play_all(last, 1, play)

    def _play(self, cluster: Cluster, name: str, folder: Path, server: PrefectServer | None = None) -> None:
        with new_world(cluster, self.url, self.environment, folder, self.brief) as world:
            if name in SCENARIOS:
                SCENARIOS[name](world)
            elif server is None:
                raise ValueError(f"{name} needs a Prefect server")
            elif name in WHOLE_RUNS:
                WHOLE_RUNS[name](world, server)
            else:
                with flow_runs(server, world) as start:
                    PREFECT_SCENARIOS[name](DeployedWorld(world, server, start))

    def _play_all(self, names: list[str], threads: int, play: Callable[[str, Path], None]) -> None:
        def take(name: str) -> None:
            started, broken = time.monotonic(), ""
            try:
                play(name, self._new_folder())
            except BaseException:  # whatever it is, it is the scenario's outcome
                broken = traceback.format_exc()
            self.put(Outcome(name, time.monotonic() - started, broken))

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(take, names))

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))
