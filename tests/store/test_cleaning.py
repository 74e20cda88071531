"""`orbit gc`: what nothing names goes, what a running step may need stays, whatever the clocks say."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from simulated_time import World

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("rl", "steps")]
from bandit import ALGORITHM, bandit_loop
from samples import spec_of

from orbit_core.errors import InputError, OrbitError
from orbit_core.store import Store, artifacts, open_store
from orbit_core.store.artifacts import ArtifactStore
from orbit_core.store.cleaning import DAY, Cleaning, clock_of
from orbit_core.store.folder import FolderStore
from orbit_core.store.lease import Lease
from orbit_core.store.locks import try_acquire
from orbit_core.store.rollouts import RolloutReader, rollouts_path
from orbit_core.store.verifying import damages_of, place_of

DIGEST = "0123456789abcdef"


def cleaning(store: Store, later: float = 8.0) -> Cleaning:
    """A look at the store `later` days from now, as its own clock counts them."""
    return Cleaning(store, now=clock_of(store) + later * DAY)


def found(store: Store, later: float = 8.0) -> set[str]:
    return {leftover.what for leftover in cleaning(store, later).leftovers()}


def remove_all(store: Store, later: float = 8.0) -> None:
    for leftover in cleaning(store, later).leftovers():
        assert leftover.remove()


def output(folder: Path) -> Path:
    folder.mkdir()
    (folder / "file").write_text("content")
    return folder


def test_a_store_of_finished_work_is_left_alone(store: Store, tmp_path: Path) -> None:
    """Artifacts, rollouts, the last two states, promotions, refusals: ten years later all are there."""
    ArtifactStore(store).publish(spec_of(store.url, "sample"), output(tmp_path / "out"), {})
    bandit_loop(store).run()
    store.put("promotions/demo/000001.json", b"{}")
    store.put(f"refused/preflight/{DIGEST}/report.json", b"{}")
    store.put("somebody/elses", b"")
    before = store.list()
    assert found(store, later=3650) == set()
    assert store.list() == before


def test_what_dead_tries_have_left_goes_and_nothing_else(store: Store, tmp_path: Path) -> None:
    spec = spec_of(store.url, "sample")
    artifact = ArtifactStore(store).publish(spec, output(tmp_path / "out"), {})
    last = bandit_loop(store).run()
    named = set(store.list())
    garbage = {
        f"artifacts/sample/{spec.digest[:16]}/aaaaaaaaaaaa/": ["top", "deep/er"],  # lost against the manifest
        f"artifacts/train/{DIGEST}/bbbbbbbbbbbb/": ["half"],  # no manifest at all
        "runs/bandit/state/": [f"step-{last.step + 1:06d}-0000000000000000.safetensors"],
        "runs/never/state/": ["step-000000-1111111111111111.safetensors"],
        f"leases/train-{DIGEST}/": ["000001.json", "000001.beat", "000002.json"],
        "checks/": ["0123"],
    }
    for folder, names in garbage.items():
        for name in names:
            store.put(f"{folder}{name}", b"")
    assert found(store, later=6.9) == set(), "too young"
    assert len(found(store)) == len(garbage)
    remove_all(store)
    assert set(store.list()) == named and found(store) == set()
    artifact.verify()
    assert list(damages_of(place_of(store.url))) == []


def test_a_dry_look_changes_nothing_and_makes_nothing_younger(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    (tmp_path / "store" / ".work" / f"train-{DIGEST}" / "scratch").mkdir(parents=True)
    (tmp_path / "store" / ".work" / f"train-{DIGEST}" / "lock").write_text("process 1 on somewhere")
    store.put(f"artifacts/train/{DIGEST}/try/half", b"")
    now = clock_of(store) + 8 * DAY
    first, second = ([(each.what, each.seconds) for each in Cleaning(store, now=now).leftovers()] for _ in range(2))
    assert first == second and len(first) == 2


def test_what_a_lease_protects_stays(store: Store) -> None:
    """The try is old, its holder beats: 8 days of training are no reason."""
    store.put(f"artifacts/train/{DIGEST}/try/half", b"")
    store.put(f"runs/{DIGEST}/state/step-000000-0.safetensors", b"")
    look = cleaning(store)
    store.modified, before = (
        lambda prefix="": {  # type: ignore[method-assign]  # the lease moved on the last day
            path: look.now - 60 if path.startswith("leases/") else when for path, when in before(prefix).items()
        },
        store.modified,
    )
    assert Lease(store, f"train-{DIGEST}", "pod", 600)._take(1)
    assert list(Cleaning(store, now=look.now).leftovers()) == []
    assert not any(leftover.remove() for leftover in look.leftovers())
    assert store.exists(f"artifacts/train/{DIGEST}/try/half")


def test_a_manifest_that_comes_between_the_look_and_the_removal_protects_its_files(
    store: Store, tmp_path: Path
) -> None:
    spec = spec_of(store.url, "sample")
    look = cleaning(store)
    real = store.put_if_absent

    def slow(path: str, source: bytes | Path, *, move: bool = False) -> bool:
        if path.endswith(".json"):
            late = Cleaning(store, now=look.now)
            (leftover,) = late.leftovers()
            assert real(path, source)
            assert not leftover.remove()
            return False
        return real(path, source, move=move)

    store.put_if_absent = slow  # type: ignore[method-assign]
    artifact = ArtifactStore(store).publish(spec, output(tmp_path / "out"), {})
    artifact.verify()


def test_a_publication_that_slept_for_a_day_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspended between its files and its manifest, while gc took the files for a dead try's."""
    store = open_store(tmp_path / "store")
    world, spec = World(0), spec_of(store.url, "sample")
    monkeypatch.setattr(artifacts, "boottime", world.clock)

    def sleep() -> None:
        if store.list("artifacts/"):
            world.now += 2 * DAY
            remove_all(store)

    with pytest.raises(OrbitError, match="run it again") as error:
        ArtifactStore(store).publish(spec, output(tmp_path / "out"), {}, fence=sleep)
    assert error.value.exit_code == 1
    assert ArtifactStore(store).find(spec.step, spec.digest) is None


def test_a_state_of_a_step_made_again_is_young_again(tmp_path: Path) -> None:
    """Killed between state and commit; resumed weeks later, with gc between the two writes of the same step."""
    store, again = open_store(tmp_path / "store"), open_store(tmp_path / "store")
    loop = bandit_loop(store)
    real = store.put_if_absent
    store.put_if_absent = lambda *given, **how: pytest.fail("killed")  # type: ignore[method-assign]
    with pytest.raises(BaseException, match="killed"):
        loop.run()
    (state,) = again.list("runs/bandit/state/")
    long_ago = time.time() - 30 * DAY
    aged, modified = {state: long_ago}, again.modified

    def put(path: str, source: bytes | Path) -> None:
        aged.pop(path, None)
        type(again).put(again, path, source)

    def commit(path: str, source: bytes | Path) -> bool:
        again.modified = lambda prefix="": {
            **modified(prefix),
            **{p: t for p, t in aged.items() if p.startswith(prefix)},
        }
        for leftover in Cleaning(again).leftovers():
            leftover.remove()
        return bool(real(path, source))

    again.put, again.put_if_absent = put, commit  # type: ignore[method-assign]
    last = bandit_loop(again).run()
    assert last.step == ALGORITHM.steps - 1 and list(damages_of(place_of(str(tmp_path / "store")))) == []


def test_work_folders_of_dead_tries_go_and_those_of_the_living_stay(store: Store, tmp_path: Path) -> None:
    work = store.root / ".work" if isinstance(store, FolderStore) else tmp_path / "cache" / "orbit" / "work"
    for name in (f"train-{DIGEST}", f"quantize-{DIGEST}", "artifacts", "notes-of-mine"):
        (work / name / "scratch").mkdir(parents=True)
        (work / name / "scratch" / "half").write_text("half")
    lock = try_acquire(work / f"train-{DIGEST}" / "lock")
    assert isinstance(lock, int)
    store.put(f"artifacts/train/{DIGEST}/try/half", b"")
    assert found(store) == {f"{work.name}/quantize-{DIGEST}/"}
    remove_all(store)
    assert sorted(folder.name for folder in work.iterdir()) == ["artifacts", "notes-of-mine", f"train-{DIGEST}"]
    look = cleaning(store)
    os.close(lock)
    leftovers = {leftover.what: leftover for leftover in look.leftovers()}
    lock = try_acquire(work / f"train-{DIGEST}" / "lock")
    assert isinstance(lock, int)
    assert not leftovers[f"{work.name}/train-{DIGEST}/"].remove(), "somebody came between the look and the removal"
    os.close(lock)


def test_writes_that_never_ended_go(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    store.put("a", b"1")
    (tmp_path / "store" / ".tmp" / "dead").write_text("half a file")
    assert found(store) == {".tmp/dead"}
    remove_all(store)
    assert store.list() == ["a"] and list((tmp_path / "store" / ".tmp").iterdir()) == []


def test_a_damaged_manifest_or_commit_protects_what_it_may_name(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    spec = spec_of(store.url, "sample")
    artifact = ArtifactStore(store).publish(spec, output(tmp_path / "out"), {})
    bandit_loop(store).run()
    store.put(f"artifacts/sample/{spec.digest[:16]}.json", b"{")
    store.put(rollouts_path("bandit", ALGORITHM.steps - 1), b"PAR1")
    assert found(store) == set()
    assert store.exists(f"{artifact.prefix}/file") and len(RolloutReader(store, "bandit").steps()) == ALGORITHM.steps


def test_less_than_a_day_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    for days in (0.5, 0, -1, float("nan")):
        with pytest.raises(InputError, match="1 day or more"):
            Cleaning(store, days)
