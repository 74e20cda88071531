"""Run one step: find its artifact, or make it and publish it.

Light on purpose: imports neither torch nor the step before it is known that there is work to do.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orbit_core.errors import GateError, InputError, Interrupted, OrbitError
from orbit_core.steps.contract import InputRef, StepContext, StepFunction, StepSpec
from orbit_core.steps.workspace import Workspace
from orbit_core.store import open_store
from orbit_core.store.artifacts import Artifact, ArtifactStore
from orbit_core.store.base import Store
from orbit_core.store.digests import digest_path
from orbit_core.store.lease import Lease, NoLease
from orbit_core.store.room import room_explained

PACKAGE = "orbit_core.steps"


@dataclass(frozen=True)
class Holder:
    """Who runs the step where more than one machine may try: a name for those who wait, and the lease that keeps them
    apart. `on_lost(reason)` is called in another thread when the lease is lost in the middle of the work."""

    name: str
    lease_seconds: float
    on_lost: Callable[[str], None] = lambda reason: None


def run_step(
    spec: StepSpec,
    emit: Callable[..., None],
    should_stop: Callable[[], bool] = lambda: False,
    scratch: Path | None = None,
    package: str = PACKAGE,
    holder: Holder | None = None,
) -> Artifact:
    """The artifact of `spec`, made by `package`.<step>.run if the store does not have it.

    Emits "reused" or "done" at the end. `should_stop()` becomes true after SIGTERM; the step then raises Interrupted.
    With a `holder` the work is done under the lease `<step>-<digest16>` in the store, else under a local lock alone.
    """
    store = open_store(spec.store)
    artifacts = ArtifactStore(store)
    found = artifacts.find(spec.step, spec.digest)
    if found is None:
        function = load_step(spec, package)
        started = time.monotonic()
        folders = Workspace(spec, store, scratch).folders
        with (
            room_explained(f"step {spec.step}", *folders),
            _alone(spec, artifacts, scratch, emit, should_stop, holder) as turn,
        ):
            if turn:
                artifact = _make(spec, function, artifacts, turn, emit)
                emit("done", step=spec.step, digest=spec.digest, seconds=round(time.monotonic() - started, 3))
                return artifact
        found = artifacts.find(spec.step, spec.digest)
    if found is None:
        raise OrbitError(f"step {spec.step}: the artifact {spec.digest[:16]} was there and is gone; run it again")
    emit("reused", step=spec.step, digest=spec.digest)
    return found


@dataclass(frozen=True)
class _Turn:
    """Leave to work: where, until when, and whom to ask before others may see it."""

    workspace: Workspace
    should_stop: Callable[[], bool]
    fence: Callable[[], None]


@contextmanager
def _alone(
    spec: StepSpec,
    artifacts: ArtifactStore,
    scratch: Path | None,
    emit: Callable[..., None],
    should_stop: Callable[[], bool],
    holder: Holder | None,
) -> Iterator[_Turn | None]:
    """Yields our turn at the step, or None when another process has finished it meanwhile.

    The lease comes before the lock: a workspace on a shared filesystem may be emptied only by who holds the lease.
    """

    def ready() -> bool:
        return artifacts.find(spec.step, spec.digest) is not None

    def waiting(other: str, verb: str) -> None:
        emit("progress", done=0, total=0, message=f"waiting: {other} {verb} this step")

    name = f"{spec.step}-{spec.digest[:16]}"
    lease: AbstractContextManager[Lease | NoLease | None] = nullcontext(NoLease())
    if holder is not None:
        # A beat that waits for the store for longer than this is one that comes too late.
        asked = artifacts.store.patient(holder.lease_seconds / 4)
        wish = Lease(asked, name, holder.name, holder.lease_seconds, holder.on_lost)
        lease = wish.held(on_wait=lambda other: waiting(other, "holds"), ready=ready)
    with lease as held:
        if held is None:
            yield None
            return
        workspace = Workspace(spec, artifacts.store, scratch, held.term)
        with workspace.held(on_wait=lambda other: waiting(other, "runs"), ready=ready) as mine:
            try:
                yield _Turn(workspace, lambda: should_stop() or held.lost, held.check) if mine else None
            except Interrupted as error:  # by the step, which does not know what made it stop
                if isinstance(held, Lease) and held.lost and not should_stop():
                    raise held.loss() from error
                raise


def load_step(spec: StepSpec, package: str = PACKAGE) -> StepFunction:
    """The step's function, imported; InputError if this Orbit has no such step or another version of it."""
    if package == PACKAGE:
        _check_version(spec)
    os.environ["OMP_NUM_THREADS"] = str(threads_of(spec))  # read once by torch, when the step imports it
    # Threads that spin while they wait slow a busy machine down several times; the results are the same bits.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    name = f"{package}.{spec.step}"
    if not spec.step.isidentifier() or importlib.util.find_spec(name) is None:
        raise InputError(f"step {spec.step!r}", f"a module {name}", "none", "check the step's name and --package")
    function: StepFunction = importlib.import_module(name).run
    return function


def threads_of(spec: StepSpec) -> int:
    """CPU threads of the step: those of the recipe where its result depends on them, else all there are."""
    engines = spec.params.get("engines")
    if isinstance(engines, dict) and "threads" in engines:
        return int(engines["threads"])
    return cpus_here()


def cpus_here(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPUs this process may use at once. A container sees all those of its node and is throttled beyond its quota,
    which the kernel gives as "<microseconds> <per microseconds>" or "max <...>" (cgroup v2)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    amount, _, period = quota.read_text().partition(" ") if quota.is_file() else ("max", "", "")
    return cpus if amount == "max" else max(1, min(cpus, int(amount) // int(period)))


def _check_version(spec: StepSpec) -> None:
    from orbit_core.pipeline import VERSIONS

    if spec.step not in VERSIONS:
        raise InputError(f"step {spec.step!r}", f"one of {', '.join(VERSIONS)}", spec.step, "check the step's name")
    if spec.version != VERSIONS[spec.step]:
        raise InputError(
            f"step {spec.step}",
            f"version {VERSIONS[spec.step]}, which this Orbit has",
            f"version {spec.version} in the spec",
            "plan and run with the same version of Orbit (in a cluster: the same image)",
        )


def _make(
    spec: StepSpec,
    function: StepFunction,
    artifacts: ArtifactStore,
    turn: _Turn,
    emit: Callable[..., None],
) -> Artifact:
    workspace = turn.workspace
    inputs = {name: _resolve(spec, name, ref, artifacts, workspace.cache) for name, ref in spec.inputs.items()}
    context = StepContext(
        spec, inputs, workspace.output, workspace.scratch, emit, turn.should_stop, turn.fence, workspace.unfinished
    )
    try:
        facts = function(context)
    except GateError as error:
        lies_at = _keep_refusal(spec, artifacts.store, workspace.output)
        raise GateError(
            error.what, error.expected, error.found, f"{error.fix}; what was measured: {lies_at}"
        ) from error
    turn.should_stop()  # from here on a request to stop waits for the publication
    return artifacts.publish(spec, workspace.output, _plain(spec, facts), turn.fence, context.digests)


def _keep_refusal(spec: StepSpec, store: Store, output: Path) -> str:
    """Put what a gate wrote where no reader takes it for an artifact; returns where."""
    folder = f"refused/{spec.step}/{spec.digest[:16]}"
    for file in sorted(path for path in output.rglob("*") if path.is_file()):
        store.put(f"{folder}/{file.relative_to(output).as_posix()}", file)
    return store.url_of(folder)


def input_artifact(spec: StepSpec, name: str, ref: InputRef, artifacts: ArtifactStore) -> Artifact:
    """The artifact that the spec names as its input `name`; InputError if it has not been made."""
    artifact = artifacts.find(ref.step or "", ref.digest)
    if artifact is None:
        raise InputError(
            f"step {spec.step}: input {name}",
            f"artifact {ref.step}/{ref.digest[:16]} in store {artifacts.store.url}",
            "nothing",
            f"run step {ref.step} of the same recipe first",
        )
    return artifact


def _resolve(spec: StepSpec, name: str, ref: InputRef, artifacts: ArtifactStore, cache: Path) -> Path:
    """An input as a local path whose content is what the spec names."""
    if ref.step is not None:
        return input_artifact(spec, name, ref, artifacts).fetch(cache)
    if ref.path is None:
        raise InputError(
            f"step {spec.step}: input {name}", "a step or a path", "neither", "plan again with this version of Orbit"
        )
    found = digest_path(ref.path)
    if found != ref.digest:
        raise InputError(
            f"step {spec.step}: input {name} at {ref.path}",
            f"content digest {ref.digest[:16]}, as planned",
            found[:16],
            "it changed after the run was planned; start the run again",
        )
    return Path(ref.path).expanduser().absolute()


def _plain(spec: StepSpec, facts: Any) -> dict[str, Any]:
    """Facts as they will be read back; a step that returns something else than finite JSON is a bug, said at once."""
    try:
        plain = json.loads(json.dumps(facts, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise OrbitError(f"step {spec.step}: its facts are not JSON with finite numbers: {error}") from error
    if not isinstance(plain, dict):
        raise OrbitError(f"step {spec.step}: expected a dict of facts, found {type(facts).__name__}")
    return plain
