"""Where a try of a step works: one folder per spec, held by one process at a time.

    <base>/<step>-<digest16>/lock         flock of who works here; the kernel frees it when that process dies
    <base>/<step>-<digest16>/output/      what is being made; emptied by the next holder
    <base>/<step>-<digest16>/unfinished/  what output is made of; kept between tries, for steps that resume
    <base>/<step>-<digest16>/scratch/     the same for what does not become output, and on this machine only

For a folder store the base is inside the store, so that publishing moves files instead of copying them. A second try of
the same spec on this machine waits for the first and then adopts its artifact; across machines `put_if_absent` decides.
Under a lease the output is `output-<term>`: on a shared filesystem whose locks end at the machine, a process that has
lost the lease and does not know it yet works in a folder of its own, never in its successor's. What is unfinished goes
from holder to holder, and out of the hands of the one before (store/growing.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from orbit_core.errors import InputError
from orbit_core.steps.contract import StepSpec
from orbit_core.store.base import Store
from orbit_core.store.digests import cache_directory
from orbit_core.store.folder import FolderStore
from orbit_core.store.growing import hand_down
from orbit_core.store.locks import acquire


class Workspace:
    """`term`: that of the lease under which the step runs; 0: none."""

    def __init__(self, spec: StepSpec, store: Store, scratch: Path | None = None, term: int = 0) -> None:
        name = f"{spec.step}-{spec.digest[:16]}"
        local = store.root / ".work" if isinstance(store, FolderStore) else None
        kept = (scratch or local or cache_directory() / "work").absolute()
        self.term = term
        self.cache = kept  # fetched artifacts: shared by all steps
        self.root = (local or kept) / name
        self.output = self.root / (f"output-{term}" if term else "output")
        self.unfinished = self.root / (f"unfinished-{term}" if term else "unfinished")
        self.scratch = kept / name / "scratch"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where a try writes on this machine."""
        return (self.root,) if self.scratch.is_relative_to(self.root) else (self.root, self.scratch)

    @contextlib.contextmanager
    def held(self, on_wait: Callable[[str], None], ready: Callable[[], bool]) -> Iterator[bool]:
        """Yields True holding the workspace, with an empty `output`; or False, as soon as `ready()` says that another
        process has finished the work. `on_wait(holder)` is called once if another process holds it."""
        lock = acquire(self.root / "lock", on_wait, ready)
        done = False
        try:
            if ready():  # finished by another process before the lock was ours
                done = lock is not None
                yield False
                return
            self._sweep()
            self.output.mkdir()
            self._take_over()
            self.scratch.mkdir(parents=True, exist_ok=True)
            yield True
            done = True
        except InputError:  # no use going on with it, and a refusal leaves nothing behind
            shutil.rmtree(self.unfinished, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(self.output, ignore_errors=True)
            if done:
                shutil.rmtree(self.scratch.parent, ignore_errors=True)
                shutil.rmtree(self.root, ignore_errors=True)
            if lock is not None:
                os.close(lock)

    def _sweep(self) -> None:
        """Remove what earlier tries have left; a later one's folder means that we are the past ourselves."""
        for left in self.root.glob("output*"):
            if _term_of(left) <= self.term:
                shutil.rmtree(left, ignore_errors=True)

    def _take_over(self) -> None:
        """Make what the last holder has left unfinished ours, if there is anything; what those before left goes."""
        lefts = sorted((left for left in self.root.glob("unfinished*") if _term_of(left) <= self.term), key=_term_of)
        for left in lefts[:-1]:
            shutil.rmtree(left, ignore_errors=True)
        if lefts and lefts[-1] != self.unfinished:
            hand_down(lefts[-1], self.unfinished)
        self.unfinished.mkdir(exist_ok=True)


def _term_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2] or 0)
