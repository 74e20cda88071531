"""What can happen to a deployed run: its orchestrator, its worker, the Prefect server, the person at the dashboard.

Like scenarios.py, with a real Prefect server and worker; a scenario is a function of a DeployedWorld.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from prefect_world import LOOK_SECONDS, FlowRun, PrefectServer, Worker
from scenarios import check_whole, tally
from world import World, until

from orbit_core.steps.contract import StepSpec

TO = 40  # ticks: time enough for a Prefect process to die and another to start


@dataclass
class DeployedWorld:
    world: World
    server: PrefectServer
    start: Callable[..., FlowRun]

    def new_worker(self, run: FlowRun, name: str) -> None:
        run.worker = Worker(self.server, self.world, name)
        self.world.closing.callback(run.worker.kill)

    def started(self, to: int = TO, **resources: object) -> tuple[StepSpec, FlowRun, str]:
        """A run whose pod has committed some ticks, and the uid of its Job."""
        spec = tally(self.world, to=to)
        run = self.start(spec, **resources)
        until(lambda: len(self.world.committed(spec)) > 3, "the first ticks")
        return spec, run, str(self.world.job(spec)["metadata"]["uid"])


PREFECT_SCENARIOS: dict[str, Callable[[DeployedWorld], None]] = {}


def scenario(function: Callable[[DeployedWorld], None]) -> Callable[[DeployedWorld], None]:
    PREFECT_SCENARIOS[function.__name__] = function
    return function


@scenario
def flow_killed(deployed: DeployedWorld) -> None:
    """The flow's process is killed; Retry on the dashboard adopts the Job that went on without it."""
    spec, run, uid = deployed.started()
    os.kill(run.worker.flow_process(), signal.SIGKILL)
    run.wait_for_state("Crashed")
    run.retry()
    run.wait_for_state("Completed")
    assert deployed.world.job(spec)["metadata"]["uid"] == uid
    check_whole(deployed.world, spec)


@scenario
def worker_moved(deployed: DeployedWorld) -> None:
    """The orchestrator's pod ends while a run is on: the Job stays, and Retry on another worker adopts it."""
    spec, run, uid = deployed.started(to=100)
    run.worker.stop()
    run.worker.kill()  # as the container's end does with what is left in it
    assert deployed.world.has_job(spec), "the Job was deleted although nobody cancelled the run"
    run.lose()
    deployed.new_worker(run, "two")
    run.retry()
    run.wait_for_state("Completed")
    assert deployed.world.job(spec)["metadata"]["uid"] == uid
    check_whole(deployed.world, spec)


@scenario
def cancelled(deployed: DeployedWorld) -> None:
    """Cancel on the dashboard deletes the Job; its pod finishes its tick."""
    spec, run, _ = deployed.started(to=200)
    run.cancel()
    run.wait_for_state("Cancelled")
    until(lambda: not deployed.world.has_job(spec), "the Job to be gone")
    assert deployed.world.artifact(spec) is None


@scenario
def retried_while_running(deployed: DeployedWorld) -> None:
    """Retry sent to a run that is running starts a second flow process, which adopts the Job: no second pod."""
    spec, run, uid = deployed.started(to=100)
    run.retry()
    until(lambda: run.api.read_flow_run(run.id).run_count > 1, "the second flow process", pause=LOOK_SECONDS)
    until(lambda: deployed.world.artifact(spec), "the artifact")
    run.wait_for_state("Completed")
    assert deployed.world.job(spec)["metadata"]["uid"] == uid
    assert len(deployed.world.pods(spec)) == 1
    check_whole(deployed.world, spec)


@scenario
def server_restarted(deployed: DeployedWorld) -> None:
    """The Prefect server is killed and comes back: the run goes on and completes."""
    spec, run, _ = deployed.started()
    deployed.server.kill()
    until(lambda: deployed.world.artifact(spec), "the artifact, made while the server is away")
    deployed.server.start()
    run.wait_for_state("Completed")
    check_whole(deployed.world, spec)


@scenario
def wrong_input(deployed: DeployedWorld) -> None:
    """A step that ends with 42 fails the run, in its own words, without another try."""
    spec = tally(deployed.world, refuse="an empty list")
    run = deployed.start(spec)
    state = run.wait_for_state("Failed")
    assert "something to count" in str(state.message), state
    assert len(deployed.world.pods(spec)) == 1
