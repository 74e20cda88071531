"""The lease: of many who want to do one thing, one does it, however they are stopped, killed or cut off."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_time import Process, SlowStore, World

from orbit_core.errors import ExitCode, InputError, Interrupted
from orbit_core.store import Store, open_store
from orbit_core.store.folder import FolderStore
from orbit_core.store.lease import Lease, LeaseLost

SECONDS = 8.0  # of virtual time


def lease_of(store: Store, holder: str = "pod-a", seconds: float = 1.0, **options) -> Lease:
    return Lease(store, "train-0123", holder, seconds, **options)


class SimulatedLease(Lease):
    """The lease itself; only its thread lives in the world's time."""

    world: World

    @contextmanager
    def _beating(self) -> Iterator[None]:
        ended = []

        def beat() -> None:
            while not ended and (pause := self._beat()):
                self.world.pause(pause)

        self.world.spawn(self.world.process, beat)
        try:
            yield
        finally:
            ended.append(True)


class Race:
    """Pods that each try, again and again, to bring one piece of work of `total` commits to its end."""

    def __init__(self, seed: int, store: Store, total: int = 6) -> None:
        self.world, self.store, self.total = World(seed), store, total
        self.began: list[int] = []  # terms in the order in which their work began
        self.may_write: dict[int, float] = {}  # when check() last let the term write; gone when it has stopped
        self.finished = False

    def pod(self, name: str, process: Process, delay) -> None:
        store = SlowStore(self.world, self.store, delay)
        while not self.finished:
            lease = SimulatedLease(store, "work", name, SECONDS, clock=self.world.clock, sleep=self.world.pause)
            lease.world = self.world
            try:
                with lease.held(ready=lambda: self.finished) as held:
                    if held:
                        try:
                            self.work(held, store)
                        finally:
                            self.may_write.pop(held.term, None)
            except (LeaseLost, OSError):
                self.world.pause(self.world.chance.uniform(0, SECONDS))

    def commits(self) -> list[int]:
        """The term that made each commit, in the order of the commits."""
        return [int(self.store.read(path)) for path in self.store.list("commits/")]

    def work(self, held: Lease, store: SlowStore | Store) -> None:
        assert held.term > max(self.began, default=0), "a term of the past began to work"
        for term, allowed in self.may_write.items():
            assert self.world.now - allowed > SECONDS / 4, f"term {held.term} began while {term} might write"
        self.began.append(held.term)
        for number in range(len(self.commits()), self.total):
            self.world.pause(self.world.chance.expovariate(1) * SECONDS / 8)
            held.check()
            assert self.began[-1] == held.term, f"term {held.term} may write though {self.began[-1]} has begun"
            self.may_write[held.term] = self.world.now
            store.put_if_absent(f"commits/{number:02d}", str(held.term).encode())
        self.finished = True


@settings(max_examples=120)
@given(seed=st.integers(0, 2**48), pods=st.integers(2, 5))
def test_never_two_work_at_once_whatever_is_slow_stopped_killed_or_cut_off(seed: int, pods: int) -> None:
    """Every store operation of every pod is interleaved at random; pods are stopped and killed, the store goes away."""
    with TemporaryDirectory() as folder, patch.object(os, "fsync"):
        race = Race(seed, FolderStore(Path(folder)))
        world, chance = race.world, race.world.chance

        def delay_of(process: Process):
            def delay() -> float:
                if chance.random() < 0.02:
                    process.stopped_until = world.now + chance.uniform(0, 3 * SECONDS)
                return chance.uniform(0, SECONDS) if chance.random() < 0.06 else chance.uniform(0, SECONDS / 50)

            return delay

        for at in (chance.uniform(0, 200) for _ in range(chance.randint(0, 3))):
            world.outages.append((at, at + chance.uniform(0, 2 * SECONDS)))
        for number in range(pods):
            process = Process()
            world.spawn(process, lambda n=number, p=process: race.pod(f"pod-{n}", p, delay_of(p)), chance.uniform(0, 9))
            if number and chance.random() < 0.5:  # pod 0 lives: somebody has to finish
                world.spawn(Process(), lambda p=process: setattr(p, "dead", True), chance.uniform(0, 100))
        world.run(until=100_000)
        assert len(race.commits()) == race.total
        assert race.commits() == sorted(race.commits()), "a term of the past committed after a later one"


@settings(max_examples=40)
@given(seed=st.integers(0, 2**48))
def test_short_pauses_and_short_outages_cost_nobody_the_lease(seed: int) -> None:
    with TemporaryDirectory() as folder, patch.object(os, "fsync"):
        race = Race(seed, FolderStore(Path(folder)), total=40)
        world, chance = race.world, race.world.chance
        world.outages = [(at, at + SECONDS / 3) for at in range(20, 2000, 20)]
        quick = lambda: chance.uniform(0, SECONDS / 100)  # noqa: E731
        work = race.work
        race.work = lambda held, store: work(held, race.store)  # type: ignore[method-assign]  # the lease is tried here
        for number in range(3):
            world.spawn(Process(), lambda n=number: race.pod(f"pod-{n}", Process(), quick))
        world.run(until=100_000)
        assert race.began == [1]


def test_claimants_on_a_real_store_take_turns(store: Store) -> None:
    inside, most, turns = 0, 0, []
    guard = threading.Lock()

    def claim(number: int) -> None:
        nonlocal inside, most
        with lease_of(store, f"pod-{number}", seconds=4.0).held() as held:
            assert held is not None
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.05 * (number % 3))
            held.check()
            turns.append(held.term)
            with guard:
                inside -= 1

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(claim, range(5)))
    assert most == 1 and turns == [1, 2, 3, 4, 5]


def test_after_a_release_the_next_need_not_wait(store: Store) -> None:
    with lease_of(store, seconds=600).held():
        pass
    began = time.monotonic()
    with lease_of(store, "pod-b", seconds=600).held() as held:
        assert held is not None and held.term == 2
    assert time.monotonic() - began < 60


def test_a_failure_releases_too(store: Store) -> None:
    with pytest.raises(RuntimeError, match="lost the GPU"), lease_of(store, seconds=600).held():
        raise RuntimeError("lost the GPU")
    with lease_of(store, "pod-b", seconds=600).held() as held:
        assert held is not None


def test_who_waits_is_told_once_for_whom(store: Store) -> None:
    told: list[str] = []
    release = threading.Event()

    def hold() -> None:
        with lease_of(store, "pod-a", seconds=1.0).held():
            release.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    while not store.list("leases/"):
        time.sleep(0.01)
    threading.Timer(1.5, release.set).start()  # longer than `seconds`: beats keep it
    with lease_of(store, "pod-b", seconds=1.0).held(on_wait=told.append) as held:
        assert held is not None and release.is_set()
    holder.join()
    assert told == ["pod-a"]


def test_who_waits_is_let_go_when_the_work_is_done_elsewhere(store: Store) -> None:
    done = threading.Event()
    with lease_of(store, seconds=600).held():
        threading.Timer(0.3, done.set).start()
        with lease_of(store, "pod-b", seconds=600).held(ready=done.is_set) as held:
            assert held is None
    assert done.is_set()


def test_finished_work_leaves_nothing_of_its_lease(store: Store) -> None:
    with lease_of(store, "pod-a", seconds=600).held():
        pass
    done = threading.Event()
    with lease_of(store, "pod-b", seconds=600).held(ready=done.is_set) as held:
        assert held is not None
        done.set()
    assert store.list("leases/") == []


def test_a_waiter_that_slept_over_the_end_does_not_work(store: Store) -> None:
    """It had seen term 3 released; meanwhile the work was finished and every claim removed."""
    done = threading.Event()
    late = lease_of(store, "pod-late", seconds=600)
    done.set()
    assert late._take(4)
    late._leave(done.is_set)
    assert store.list("leases/") == []
    with late.held(ready=done.is_set) as held:
        assert held is None
    assert store.list("leases/") == []


def test_a_number_of_the_past_is_no_claim(store: Store) -> None:
    for holder in ("pod-a", "pod-b", "pod-c"):
        with lease_of(store, holder, seconds=600).held() as held:
            assert held is not None
            held._renew()
    assert not any(path.endswith("000001.beat") for path in store.list("leases/")), "swept by the winners"
    assert not lease_of(store, "pod-late", seconds=600)._take(1)
    store.delete("leases/train-0123/000001.json")  # as if the whole of it had been cleaned by hand, and not all
    assert not lease_of(store, "pod-late", seconds=600)._take(1)
    assert [path for path in store.list("leases/") if path.endswith(".json")] == [
        f"leases/train-0123/00000{term}.json" for term in (2, 3)
    ]


def test_a_holder_that_slept_is_out_for_good_even_if_nobody_came(store: Store) -> None:
    now = [0.0]
    lost: list[str] = []
    lease = lease_of(store, seconds=100, clock=lambda: now[0], on_lost=lost.append)
    assert lease._take(1)
    now[0] = 74
    lease.check()
    now[0] = 76
    assert lease._beat() == 0.0 and lease.lost, "the beat was written, but too late"
    now[0] = 77
    with pytest.raises(LeaseLost, match=r"term 1 of pod-a(.|\n)*no beat(.|\n)*run again"):
        lease.check()
    assert len(lost) == 1


def test_a_newer_term_is_named(store: Store) -> None:
    stopped = [0.0]
    old = lease_of(store, "pod-old", seconds=600, clock=lambda: stopped[0])
    assert old._take(1)
    assert lease_of(store, "pod-new", seconds=600)._take(2)
    with pytest.raises(LeaseLost, match="pod-new holds it, term 2") as error:
        old.check()
    assert isinstance(error.value, Interrupted) and error.value.exit_code == ExitCode.RESUMABLE
    old._leave(lambda: False)
    assert not store.exists("leases/train-0123/000001.released"), "it has nothing to release"


def test_a_claim_that_vanished_is_no_claim(store: Store) -> None:
    lease = lease_of(store, seconds=600)
    assert lease._take(1)
    store.delete("leases/train-0123/000001.json")
    with pytest.raises(LeaseLost, match="the claim is gone"):
        lease.check()


def test_an_outage_is_judged_by_the_clock_alone(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    lease = lease_of(open_store(s3_url), seconds=100, clock=lambda: now[0])
    assert lease._take(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody answers there
    lease.store = open_store(s3_url).patient(0.1)
    lease.check()
    assert lease._beat() == 100 / 16, "tried again sooner than a beat that worked"
    now[0] = 76
    with pytest.raises(LeaseLost, match="no beat could be written"):
        lease.check()


def test_a_patient_holder_is_not_overtaken_by_a_hasty_one(store: Store) -> None:
    """As after a change of the site's lease_seconds while a pod of the old ones still works."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def clock() -> float:
        return now[0]

    assert lease_of(store, "pod-old", seconds=100, clock=clock)._take(1)
    with lease_of(store, "pod-new", seconds=10, clock=clock, sleep=sleep).held() as held:
        assert held is not None and now[0] >= 100


def test_a_lease_of_no_time_is_refused(store: Store) -> None:
    with pytest.raises(InputError, match="seconds above 0"):
        lease_of(store, seconds=0)
