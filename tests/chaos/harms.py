"""What can happen to a training run. A harm starts the run, does its harm, and says what it did; the run is finished
and looked at afterwards, by chaos.py.

A harm is a function of a Trial, a source of chance and the seconds that an undisturbed run takes.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from boundaries import Boundaries, around
from cluster.processes import descendants
from trials import Trial

from orbit_core.errors import ExitCode

Harm = Callable[[Trial, random.Random, float], str]
HARMS: dict[str, Harm] = {}


def harm(function: Harm) -> Harm:
    HARMS[function.__name__] = function
    return function


@harm
def killed(trial: Trial, chance: random.Random, seconds: float) -> str:
    """SIGKILL at random instants, up to three times."""
    instants = [chance.uniform(0, seconds) for _ in range(chance.randint(1, 3))]
    for instant in instants:
        process = trial.start()
        process.wait(instant)
        process.kill()
    return f"after {_listed(instants)}"


@harm
def asked_and_killed(trial: Trial, chance: random.Random, seconds: float) -> str:
    """SIGTERM, and SIGKILL before the step in flight can have ended: a grace period that is too short."""
    instant, grace = chance.uniform(0, seconds), chance.uniform(0, 0.3)
    process = trial.start()
    process.wait(instant)
    process.signal(signal.SIGTERM)
    process.wait(grace)
    process.kill()
    return f"after {instant:.2f} s, grace {grace:.2f} s"


@harm
def frozen_and_replaced(trial: Trial, chance: random.Random, seconds: float) -> str:
    """SIGSTOP; another runner takes the lease over; the first wakes in the middle of the second's work, or after it."""
    instant, woken = chance.uniform(0, seconds), chance.uniform(0, 1.5 * seconds)
    first = trial.start(holder="first")
    first.wait(instant)
    first.signal(signal.SIGSTOP)
    second = trial.start(holder="second")
    second.wait(2 * trial.place.lease_seconds + woken)
    first.signal(signal.SIGCONT)
    ended = [first.wait(), second.wait()]
    _one_is_done(trial, *ended)
    return f"after {instant:.2f} s, woken {woken:.2f} s after its lease had passed; exit codes {ended}"


@harm
def two_at_once(trial: Trial, chance: random.Random, seconds: float) -> str:
    """Two runners started within a moment, with leases or without; one of them is killed somewhere on the way."""
    leased, apart = chance.random() < 0.5, chance.uniform(0, 0.3)
    names = ("first", "second") if leased else ("", "")
    first = trial.start(holder=names[0])
    time.sleep(apart)
    second = trial.start(holder=names[1])
    victim, other = (first, second) if chance.random() < 0.5 else (second, first)
    instant = chance.uniform(0, seconds)
    victim.wait(instant)
    victim.kill()
    _one_is_done(trial, other.wait())
    return f"{apart:.2f} s apart, {'with' if leased else 'without'} leases, one killed after {instant:.2f} s"


@harm
def clock_jumps(trial: Trial, chance: random.Random, seconds: float) -> str:
    """The wall clock jumps by up to a day, forwards and backwards, while two runners with leases compete."""
    seeds = [chance.getrandbits(32) for _ in range(2)]
    runners = [trial.start(_jumping_clock(seed), holder=f"runner-{number}") for number, seed in enumerate(seeds)]
    instant = chance.uniform(0, seconds)
    runners[0].wait(instant)
    runners[0].kill()
    _one_is_done(trial, runners[1].wait())
    return f"one of two killed after {instant:.2f} s"


def _one_is_done(trial: Trial, *ended: int | None) -> None:
    """Of the runners that nobody killed. Or they ask to be started again: a machine too crowded to write a beat within
    a second takes the lease from whoever holds it."""
    late = "no beat could be written" in trial.log.read_text(errors="replace")
    again = late and set(ended) == {ExitCode.RESUMABLE}
    assert 0 in ended or again, f"exit codes {ended} of those left alone\n{trial.tail()}"


def _jumping_clock(seed: int) -> Callable[[], None]:
    def jump() -> None:
        chance, real = random.Random(seed), time.time
        shift = [0.0]

        def jumping() -> float:
            if chance.random() < 0.2:
                shift[0] = chance.uniform(-86_400, 86_400)
            return real() + shift[0]

        time.time = jumping
        time.time_ns = lambda: int(jumping() * 1e9)

    return jump


@harm
def no_room(trial: Trial, chance: random.Random, seconds: float) -> str:
    """Files may not grow past a size that the run needs: a full disk, from some point of the run on."""
    limit = chance.randint(1, 40) * 1024

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = trial.start(full).wait()
    assert code not in (None, 42), f"exit code {code}: a full disk is worth another try\n{trial.tail()}"
    return f"no file above {limit // 1024} KiB; exit code {code}"


@harm
def flow_killed(trial: Trial, chance: random.Random, seconds: float) -> str:
    """`orbit run`: its process alone is killed, whose step must die with it, or its whole group."""
    file = trial.log.with_name("recipe.yaml")
    file.write_text(yaml.safe_dump(trial.recipe.model_dump(mode="json")))
    command = [sys.executable, "-m", "flows.cli", "run", str(file), "--store", trial.store]
    environment = {**os.environ, "PREFECT_HOME": str(trial.log.with_name("prefect"))}
    with trial.log.open("ab") as log:
        flow = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    instant, group = 5 + chance.uniform(0, 10 + seconds), chance.random() < 0.5
    with contextlib.suppress(subprocess.TimeoutExpired):
        flow.wait(instant)
    children = list(descendants(flow.pid))
    if group:
        for pid in (flow.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    flow.kill()
    flow.wait()
    _wait_until_gone(children)
    return f"{'all of it' if group else 'its own process'} after {instant:.1f} s"


def _wait_until_gone(processes: list[int], patience: float = 60.0) -> None:
    end = time.monotonic() + patience
    while left := [pid for pid in processes if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, f"processes {left} outlived the flow"
        time.sleep(0.05)


def at_boundary(number: int) -> Callable[[], None]:
    """Kills the new process when it passes its boundary `number`: before and after each call by which the store writes
    or deletes, and each naming and syncing of a file inside them."""
    return lambda: _around_writes(Boundaries(number).tick)


def counting(file: Path) -> Callable[[], None]:
    """Writes how many boundaries the new process passes into `file`, a byte for each."""

    def install() -> None:
        counter = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        _around_writes(lambda name: os.write(counter, b"."))

    return install


def _around_writes(tick: Callable[[str], object]) -> None:
    from orbit_core.store.folder import FolderStore

    for name in ("put_if_absent", "put", "delete"):
        around(FolderStore, name, tick)
    for name in ("link", "replace", "fsync"):
        around(os, name, tick)


def _listed(instants: list[float]) -> str:
    return ", ".join(f"{instant:.2f} s" for instant in instants)
