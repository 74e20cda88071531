"""What may be removed from a store: what no manifest and no commit names, and nothing that a running step may need.

    artifacts/<step>/<digest16>/<attempt>/   of a try that died or lost        unless the step is under way
    runs/<run>/state/                        of steps that were not committed  unless the run is under way
    leases/<name>/                           in which nothing has moved
    checks/, unfinished writes               of probes and uploads that were killed
    .work/<step>-<digest16>/                 of tries on this machine, unless somebody holds its lock; of an object
                                             store in work/ of the user's cache

Three things protect the living. Age: only what has not changed for `days` is looked at, by the clock of the store
itself, so that no clock of ours has to be right; a publication that has slept for longer than half a day gives up by
itself (artifacts.py), and a state is written anew before each commit (recorder.py). Leases: a step whose lease moves is
under way. And what a manifest names is read by its own path, not from a listing, which may be late, right before the
removal. Manifests, commits, the states that the last two name, promotions and what gates refused are never removed.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orbit_core.errors import InputError, OrbitError
from orbit_core.store.base import Store
from orbit_core.store.commits import KEEP_STATES
from orbit_core.store.digests import cache_directory
from orbit_core.store.folder import FolderStore
from orbit_core.store.locks import is_locked, try_acquire
from orbit_core.store.manifests import manifest_path, read_manifest
from orbit_core.store.rollouts import RolloutReader

DAYS, LEAST_DAYS = 7.0, 1.0
DAY = 24 * 3600.0


@dataclass(frozen=True)
class Leftover:
    """Something that may go: for people, and how."""

    what: str
    why: str
    seconds: float  # since it last changed
    remove: Callable[[], bool]  # False: somebody needs it after all


class Cleaning:
    """One look at a store. `now`: of the store's clock; asked of the store if not given."""

    def __init__(self, store: Store, days: float = DAYS, now: float | None = None) -> None:
        if not days >= LEAST_DAYS:
            raise InputError(
                f"--older-than {days:g}", f"{LEAST_DAYS:g} day or more", f"{days:g}", "steps may take hours"
            )
        self.store, self.days = store, days
        self.now = clock_of(store) if now is None else now
        self.changed = store.modified()
        self.work = store.root / ".work" if isinstance(store, FolderStore) else cache_directory() / "work"

    def leftovers(self) -> Iterator[Leftover]:
        yield from self._attempts()
        yield from self._states()
        for name in sorted({path.split("/")[1] for path in self.changed if path.startswith("leases/")}):
            yield from self._old(f"leases/{name}/", "nobody has held it since", lambda: True)
        yield from self._old("checks/", "of a check that was killed", lambda: True)
        for name, begun in self.store.unfinished().items():
            if self._is_old(begun):
                yield Leftover(
                    name, "a write that never ended", self.now - begun, partial(self._remove_unfinished, name)
                )
        yield from work_leftovers(self.work, self.now, self.days, self._is_leased)

    def _attempts(self) -> Iterator[Leftover]:
        folders = {match[0] for path in self.changed if (match := re.match(r"artifacts/[^/]+/[^/]+/[^/]+/", path))}
        for folder in sorted(folders):
            yield from self._old(folder, "no manifest names it", partial(self._is_free, *folder.split("/")[1:4]))

    def _is_free(self, step: str, digest: str, attempt: str) -> bool:
        """Whether no manifest names the attempt, and none is about to. One that cannot be read names everything."""
        if self._is_held(f"{step}-{digest}"):
            return False
        try:
            return read_manifest(self.store, manifest_path(step, digest)).attempt != attempt
        except FileNotFoundError:
            return True
        except InputError:
            return False

    def _states(self) -> Iterator[Leftover]:
        runs = {match[1] for path in self.changed if (match := re.match(r"runs/([^/]+)/state/", path))}
        for run in sorted(runs):
            for path in sorted(path for path in self.changed if path.startswith(f"runs/{run}/state/")):
                yield from self._old(path, "no commit names it", partial(self._is_uncommitted, run, path))

    def _is_uncommitted(self, run: str, path: str) -> bool:
        if self._is_held(f"train-{run}"):
            return False
        reader = RolloutReader(self.store, run)
        try:
            named = {reader.commit(step).state.path for step in reader.steps()[-KEEP_STATES:]}
        except (OSError, ValueError, OrbitError):  # a damaged commit may name it
            return False
        return path not in named

    def _is_held(self, name: str) -> bool:
        """Whether a step is under way, as far as its lease and the lock of its work folder say."""
        return self._is_leased(name) or is_locked(self.work / name / "lock")

    def _is_leased(self, name: str) -> bool:
        return any(not self._is_old(when) for when in self.store.modified(f"leases/{name}/").values())

    def _old(self, prefix: str, why: str, may_go: Callable[[], bool]) -> Iterator[Leftover]:
        """One leftover for all paths of `prefix`, if none of them has changed for long and `may_go()`."""
        times = {path: when for path, when in self.changed.items() if path.startswith(prefix)}
        if not times or not self._is_old(max(times.values())) or not may_go():
            return

        def remove() -> bool:
            now = self.store.modified(prefix)
            if any(not self._is_old(when) for when in now.values()) or not may_go():
                return False
            for path in sorted(now):
                self.store.delete(path)
            return True

        yield Leftover(prefix, why, self.now - max(times.values()), remove)

    def _remove_unfinished(self, name: str) -> bool:
        self.store.remove_unfinished(name)
        return True

    def _is_old(self, when: float) -> bool:
        return self.now - when > self.days * DAY


def clock_of(store: Store) -> float:
    """What time it is for who keeps the store: that of a file written now."""
    path = f"checks/{uuid.uuid4().hex}"
    store.put(path, b"")
    try:
        return store.modified(path)[path]
    finally:
        store.delete(path)


def work_leftovers(work: Path, now: float, days: float, is_leased: Callable[[str], bool]) -> Iterator[Leftover]:
    """Work folders of tries on this machine in which nothing has changed for `days` and that nobody holds."""
    for folder in sorted(work.glob("*-*")) if work.is_dir() else ():
        age = now - _last_change(folder)
        named = re.fullmatch(r"\w+-[0-9a-f]{16}", folder.name)
        if named and age > days * DAY and not is_leased(folder.name) and not is_locked(folder / "lock"):
            remove = partial(_remove_work, folder, now - days * DAY, is_leased)
            yield Leftover(f"{work.name}/{folder.name}/", "of a try that died", age, remove)


def _remove_work(folder: Path, before: float, is_leased: Callable[[str], bool]) -> bool:
    """Under the lock that a try would work under, which may have come and gone since we looked."""
    try:
        lock = try_acquire(folder / "lock")
    except FileNotFoundError:
        return False
    if isinstance(lock, str):
        return False
    try:
        if is_leased(folder.name) or _last_change(folder) > before:
            return False
        shutil.rmtree(folder)
        return True
    finally:
        os.close(lock)


def _last_change(folder: Path) -> float:
    """Of what is in the folder, the lock apart, which a look at it may write to."""
    times = [0.0]
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            times.append(path.lstat().st_ctime if path != folder / "lock" else 0.0)
    return max(times)
