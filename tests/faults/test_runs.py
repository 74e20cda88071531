"""Runs, artifacts, leases and promotions on a store that fails, forgets and tells old news."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from bandit import ALGORITHM, bandit_loop
from proxy import BAD, Faults, Proxy
from samples import spec_of

from orbit_core.errors import Interrupted
from orbit_core.publication.promotions import Overtaken, Promotions, Published
from orbit_core.store import open_store
from orbit_core.store.artifacts import ArtifactStore
from orbit_core.store.lease import Lease
from orbit_core.store.rollouts import RolloutReader
from orbit_core.store.s3 import S3Store


def output(folder: Path, content: str) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "top.txt").write_text(content)
    (folder / "deep" / "er.txt").write_text(content * 2)
    return folder


def test_a_run_on_a_bad_store_is_the_run_in_a_folder(proxy: Proxy, store: S3Store, tmp_path: Path) -> None:
    """Stopped after every step and started again; an outage falls into it. Rows once, states two, bits the same."""
    whole = bandit_loop(open_store(tmp_path)).run()
    proxy.faults = BAD
    for done in range(1, ALGORITHM.steps):
        stops = iter([False, True])
        proxy.outage(0.5)
        with pytest.raises(Interrupted, match=f"{done} of"):
            bandit_loop(store).run(should_stop=lambda stops=stops: next(stops))
    last = bandit_loop(store).run()
    proxy.faults = Faults()
    assert (last.state, last.adapter_digest) == (whole.state, whole.adapter_digest)
    reader = RolloutReader(store, "bandit")
    assert [commit.step for commit in reader.commits()] == list(range(ALGORITHM.steps))
    assert all(reader.rows(step).num_rows == commit.rows for step, commit in enumerate(reader.commits()))
    kept = {reader.commit(step).state.path for step in reader.steps()[-2:]}
    assert kept <= set(store.list("runs/bandit/state/"))
    assert len(proxy.hit) > 5, proxy.seen


def test_an_artifact_on_a_bad_store_is_whole_or_absent(proxy: Proxy, store: S3Store, tmp_path: Path) -> None:
    proxy.faults = BAD
    artifacts, spec = ArtifactStore(store), spec_of(store.url, "sample")
    for turn in range(4):
        published = artifacts.publish(spec, output(tmp_path / f"out{turn}", "x" * 100), {"turn": turn})
        assert published.facts == {"turn": 0}, "the first to be published stays"
        found = artifacts.find(spec.step, spec.digest)
        assert found is not None and found.manifest == published.manifest
        found.verify()
    proxy.faults = Faults()
    named = {f"{published.prefix}/{name}" for name in published.manifest.files}
    assert named <= set(store.list("artifacts/"))


def test_of_two_that_publish_at_once_one_wins_though_every_answer_is_lost(
    proxy: Proxy, store: S3Store, tmp_path: Path
) -> None:
    spec = spec_of(store.url, "sample")
    proxy.aim("lost", "PUT", f"{spec.digest[:16]}.json", times=2)
    made = []

    def publish(turn: int) -> None:
        artifacts = ArtifactStore(store.patient(10))
        made.append(artifacts.publish(spec, output(tmp_path / str(turn), str(turn)), {"turn": turn}))

    threads = [threading.Thread(target=publish, args=(turn,)) for turn in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0].manifest == made[1].manifest
    made[0].verify()


def test_a_late_listing_makes_no_second_holder(proxy: Proxy, store: S3Store) -> None:
    """The listing shows neither the claims nor the beats of the last hour."""
    proxy.faults = Faults(stale=3600.0)
    with Lease(store, "work", "first", 600).held() as first:
        assert first is not None and first.term == 1
        told: list[str] = []
        waiting = Lease(store, "work", "second", 600, sleep=lambda seconds: time.sleep(0.01))
        done = threading.Event()
        threading.Timer(0.5, done.set).start()
        with waiting.held(on_wait=told.append, ready=done.is_set) as second:
            assert second is None and told == ["first"]
    with Lease(store, "work", "third", 600).held() as third:
        assert third is not None and third.term == 2, "the release is seen at once"
        assert Lease(store, "work", "fourth", 600)._take(3)
        assert third._compare() == [] and third.lost, "and so is a higher claim"


def test_a_late_listing_shows_neither_an_old_adapter_nor_a_free_number(proxy: Proxy, store: S3Store) -> None:
    adapters = [
        Published(
            publish=f"{n}" * 64,
            train="b" * 64,
            warm_start=None,
            base_digest="c" * 64,
            adapter_digest="d" * 64,
            adapter=f"artifacts/publish/{n}",
            accuracy=0.5,
            prompts=1,
        )
        for n in range(3)
    ]
    history = Promotions(store, "demo")
    first = history.promote(adapters[0], None, "first")
    proxy.faults = Faults(stale=3600.0)
    proxy.aim("lost", "PUT", "000002.json")
    second = history.promote(adapters[1], history.newest(), "second")
    assert second.number == 2 and history.newest() == second
    assert [entry.publish for entry in history.entries()] == [first.publish, second.publish]
    with pytest.raises(Overtaken):
        history.promote(adapters[2], first, "against an entry that has been replaced")


def test_a_lease_survives_a_store_that_fails_now_and_then(proxy: Proxy, store: S3Store) -> None:
    proxy.faults = Faults(errors=0.15, lost=0.15)
    with Lease(store.patient(1), "work", "holder", 6.0).held() as held:
        assert held is not None
        for _ in range(8):
            time.sleep(0.4)
            held.check()


def test_every_step_survives_a_slow_server(proxy: Proxy, store: S3Store, tmp_path: Path) -> None:
    proxy.faults = Faults(latency=0.2)
    spec = spec_of(store.url, "sample")
    artifact = ArtifactStore(store).publish(spec, output(tmp_path / "out", "slow"), {})
    artifact.verify()
