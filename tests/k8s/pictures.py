"""The picture of k8s/operations.md: a run of the demo whose flow was killed while it trained, and retried.

    python tests/k8s/pictures.py k8s/pictures/retried-run.png

Needs chromium on the path. Takes about six minutes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import UUID

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "kernels")]

from cluster.running import running_cluster  # noqa: E402
from prefect_world import FlowRun, PrefectServer, prefect  # noqa: E402
from whole_runs import deployed_demo  # noqa: E402
from world import World, moto_bucket, new_world, until  # noqa: E402

from orbit_core.pipeline import plan  # noqa: E402
from orbit_core.recipe import Recipe  # noqa: E402

SIZE = "1500,1250"


def main(picture: Path) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        running_cluster() as cluster,
        moto_bucket() as (url, environment),
        PrefectServer(Path(folder)) as server,
        new_world(cluster, url, environment, Path(folder)) as world,
    ):
        run = _killed_and_retried(world, server)
        _photograph(f"http://127.0.0.1:{server.port}/runs/flow-run/{run}", picture)


def _killed_and_retried(world: World, server: PrefectServer) -> UUID:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    recipe, worker = deployed_demo(world, server)
    given = json.dumps({"recipe": recipe, "store": world.store})
    said = prefect(server, "deployment", "run", "post-train/cluster", "--params", given)
    id = UUID(re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}", said)[0])
    with temporary_settings({PREFECT_API_URL: server.url}), get_client(sync_client=True) as api:
        run = FlowRun(api, id, worker)
        train = plan(Recipe.parse(recipe), world.store)["train"]
        until(lambda: world.has_job(train), "the Job that trains", 600)
        world.running_pod(train)
        os.kill(worker.flow_process(), signal.SIGKILL)
        run.wait_for_state("Crashed")
        time.sleep(10)  # the worker says it once more, seconds later, and would take the second try's place away
        run.retry()
        run.wait_for_state("Completed", patience=600)
        print("\n".join(run.log()))
    return id


def _photograph(address: str, picture: Path) -> None:
    """The page as it is after its scripts have had 20 s."""
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={SIZE}", "--virtual-time-budget=20000", f"--screenshot={picture}", address]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
