"""Two pods of one Job: `--holder` lets one of them work, and who has lost its turn leaves no trace.

Every pod has a scratch of its own, as on two nodes, so that no file lock helps.
"""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from running import finish, start, wait_for
from samples import PACKAGE, spec_of

from orbit_core.errors import Interrupted
from orbit_core.steps.contract import StepSpec
from orbit_core.steps.runner import Holder, run_step
from orbit_core.store import open_store
from orbit_core.store.artifacts import ArtifactStore
from orbit_core.store.lease import LeaseLost

SECONDS = 3.0


def pod(spec: StepSpec, folder: Path, name: str, seconds: float = SECONDS) -> subprocess.Popen[str]:
    (folder / name).mkdir()
    lease = ("--holder", name, "--lease-seconds", str(seconds))
    return start(spec, folder / name, "--scratch", str(folder / name / "scratch"), *lease)


def committed_by(spec: StepSpec) -> list[int]:
    """Process ids in the order of the commits."""
    store = open_store(spec.store)
    return [int(store.read(path)) for path in store.list(f"runs/{spec.digest[:16]}/commit-")]


def worked(spec: StepSpec) -> list[tuple[int, int]]:
    """(process, number) for every piece of work that was done, committed or not."""
    names = open_store(spec.store).list(f"runs/{spec.digest[:16]}/worked-")
    return [(int(pid), int(number)) for pid, number in (name.split("worked-")[1].split("-") for name in names)]


def published(spec: StepSpec) -> int:
    artifact = ArtifactStore(open_store(spec.store)).find(spec.step, spec.digest)
    assert artifact is not None
    return int(artifact.facts["pid"])


def test_a_race_of_two_pods_gives_one_run(s3_url: str, tmp_path: Path) -> None:
    spec = spec_of(s3_url, "commits", to=12, pause=0.1)
    pods = [pod(spec, tmp_path, name, seconds=4.0) for name in ("pod-a", "pod-b")]
    ends = [finish(each) for each in pods]
    assert [code for code, _, _ in ends] == [0, 0]
    winner = published(spec)
    assert committed_by(spec) == [winner] * 12
    assert sorted(worked(spec)) == [(winner, number) for number in range(12)], "no number was worked on twice"
    first, second = (events for _, events, _ in sorted(ends, key=lambda end: end[1][-1]["orbit"]))
    assert first[-1]["orbit"] == "done" and second[-1]["orbit"] == "reused"
    waits = [event["message"] for event in second if "waiting" in event.get("message", "")]
    name = "pod-a" if pods[0].pid == winner else "pod-b"
    assert waits == [f"waiting: {name} holds this step"]
    assert open_store(s3_url).list("leases/") == []


def test_a_holder_killed_is_followed_after_the_lease_and_its_commits_stand(s3_url: str, tmp_path: Path) -> None:
    spec = spec_of(s3_url, "commits", to=40, pause=0.15)
    first = pod(spec, tmp_path, "pod-a")
    wait_for(first, "progress", "committing")
    second = pod(spec, tmp_path, "pod-b")
    wait_for(second, "progress", "waiting: pod-a")
    first.kill()
    died = time.monotonic()
    finish(first)
    wait_for(second, "progress", "committing")
    assert SECONDS / 2 < time.monotonic() - died < 10 * SECONDS
    assert finish(second)[0] == 0
    pids = committed_by(spec)
    assert len(pids) == 40 and pids == sorted(pids, key=[first.pid, second.pid].index) and first.pid in pids


def test_a_holder_that_stops_in_good_order_is_followed_at_once(s3_url: str, tmp_path: Path) -> None:
    spec = spec_of(s3_url, "commits", to=60, pause=0.05)
    first = pod(spec, tmp_path, "pod-a", seconds=120)
    wait_for(first, "progress", "committing")
    second = pod(spec, tmp_path, "pod-b", seconds=120)
    wait_for(second, "progress", "waiting: pod-a")
    first.send_signal(signal.SIGTERM)
    assert finish(first)[0] == 75
    began = time.monotonic()
    wait_for(second, "progress", "committing")
    assert time.monotonic() - began < 60
    second.kill()
    finish(second)


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_stopped_holder_that_wakes_commits_nothing(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """SIGSTOP: what a paused machine or a cut-off node looks like from outside."""
    url = str(tmp_path / "store") if kind == "folder" else request.getfixturevalue("s3_url")
    spec = spec_of(url, "commits", to=30, pause=0.1)
    first = pod(spec, tmp_path, "pod-a")
    wait_for(first, "progress", "committing")
    first.send_signal(signal.SIGSTOP)
    time.sleep(0.3)  # what it has asked of the store lands
    stopped = len(committed_by(spec))
    open_locks(tmp_path / "store")
    second = pod(spec, tmp_path, "pod-b")
    wait_for(second, "progress", "committing")
    first.send_signal(signal.SIGCONT)
    code, events, _ = finish(first)
    assert code == 75 and events[-1]["kind"] == "LeaseLost"
    assert finish(second)[0] == 0
    assert published(spec) == second.pid
    pids = committed_by(spec)
    assert set(pids[:stopped]) == {first.pid} and set(pids[stopped:]) == {second.pid}


def open_locks(store: Path) -> None:
    """A shared filesystem whose locks do not reach from machine to machine: the second pod sees another lock file."""
    for lock in store.glob(".work/*/lock"):
        lock.unlink()


def test_a_lost_lease_ends_a_step_that_never_asks(s3_url: str, tmp_path: Path) -> None:
    """Its result could never be published: the GPUs are given back at once."""
    spec = spec_of(s3_url, "linger", seconds=60)
    process = pod(spec, tmp_path, "pod-a", seconds=6.0)
    wait_for(process, "progress", "lingering")
    store = open_store(s3_url)
    store.put(f"leases/linger-{spec.digest[:16]}/000002.json", b'{"holder": "pod-b", "seconds": 600}')
    code, events, _ = finish(process)
    assert code == 75 and "pod-b holds it, term 2" in events[-1]["message"]
    assert store.list("artifacts/") == []


def test_who_lost_the_lease_publishes_nothing(s3_url: str, tmp_path: Path) -> None:
    """`count` knows of no fence: the runner asks before it publishes."""
    spec = spec_of(s3_url, "count", to=1, pause=1.5)
    process = pod(spec, tmp_path, "pod-a", seconds=600)
    store = open_store(s3_url)
    while not store.exists(f"leases/count-{spec.digest[:16]}/000001.beat"):
        time.sleep(0.01)
    time.sleep(0.3)  # the beat has found no other claim; the next is far away
    store.put(f"leases/count-{spec.digest[:16]}/000002.json", b'{"holder": "pod-b", "seconds": 600}')
    code, events, _ = finish(process)
    assert code == 75 and events[-1]["kind"] == "LeaseLost"
    assert store.list("artifacts/") == []


def test_a_step_that_stops_for_a_lost_lease_says_so_and_not_that_it_was_asked_to(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "store", "count", to=1000, pause=0.02)
    store = open_store(spec.store)

    def overtaken(event: str, /, **values: object) -> None:
        store.put(f"leases/count-{spec.digest[:16]}/000002.json", b'{"holder": "pod-b", "seconds": 600}')

    with pytest.raises(LeaseLost, match="pod-b holds it, term 2") as error:
        run_step(spec, overtaken, package=PACKAGE, holder=Holder("pod-a", lease_seconds=1.0))
    assert "counted to" in str(error.value.__cause__)
    with pytest.raises(Interrupted, match="counted to 0 of 1000"):
        run_step(spec_of(tmp_path / "other", "count", to=1000), overtaken, lambda: True, package=PACKAGE)


def test_without_a_holder_the_store_sees_no_lease(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "store", "commits", to=3, pause=0.1)
    process = start(spec, tmp_path)
    wait_for(process, "progress", "committing")
    assert open_store(spec.store).list("leases/") == []
    assert finish(process)[0] == 0


def test_lease_seconds_must_be_positive(tmp_path: Path) -> None:
    code, events, _ = finish(pod(spec_of(tmp_path / "store", "count", to=1), tmp_path, "pod-a", seconds=0))
    assert code == 42 and "seconds above 0" in events[-1]["message"]
