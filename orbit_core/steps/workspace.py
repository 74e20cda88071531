"""Where a try of a step works: one folder per spec, held by one process at a time.

    <base>/<step>-<digest16>/lock      flock of the process that works here; the kernel frees it when that process dies
    <base>/<step>-<digest16>/output/   what is being made; emptied by the next holder
    <base>/<step>-<digest16>/scratch/  kept between tries, for steps that resume

For a folder store the base is inside the store, so that publishing moves files instead of copying them. A second try of
the same spec on this machine waits for the first and then adopts its artifact; across machines `put_if_absent` decides.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from orbit_core.steps.contract import StepSpec
from orbit_core.store.base import Store
from orbit_core.store.digests import cache_directory
from orbit_core.store.folder import FolderStore

POLL_SECONDS = 0.2


class Workspace:
    def __init__(self, spec: StepSpec, store: Store, scratch: Path | None = None) -> None:
        name = f"{spec.step}-{spec.digest[:16]}"
        local = store.root / ".work" if isinstance(store, FolderStore) else None
        kept = (scratch or local or cache_directory() / "work").absolute()
        self.cache = kept  # fetched artifacts: shared by all steps
        self.root = (local or kept) / name
        self.output = self.root / "output"
        self.scratch = kept / name / "scratch"

    @contextlib.contextmanager
    def held(self, on_wait: Callable[[str], None], ready: Callable[[], bool]) -> Iterator[bool]:
        """Yields True holding the workspace, with an empty `output`; or False, as soon as `ready()` says that another
        process has finished the work. `on_wait(holder)` is called once if another process holds it."""
        lock = self._acquire(on_wait, ready)
        done = False
        try:
            if ready():  # finished by another process before the lock was ours
                done = lock is not None
                yield False
                return
            shutil.rmtree(self.output, ignore_errors=True)
            self.output.mkdir()
            self.scratch.mkdir(parents=True, exist_ok=True)
            yield True
            done = True
        finally:
            shutil.rmtree(self.output, ignore_errors=True)
            if done:
                shutil.rmtree(self.scratch.parent, ignore_errors=True)
                shutil.rmtree(self.root, ignore_errors=True)
            if lock is not None:
                os.close(lock)

    def _acquire(self, on_wait: Callable[[str], None], ready: Callable[[], bool]) -> int | None:
        waiting = False
        while not ready():
            self.root.mkdir(parents=True, exist_ok=True)
            path = self.root / "lock"
            with contextlib.suppress(FileNotFoundError):  # the last holder is removing the folder
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                if _locked(lock, path):
                    os.ftruncate(lock, 0)
                    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                    return lock
                holder = os.pread(lock, 300, 0).decode(errors="replace") or "another process"
                os.close(lock)
                if not waiting:
                    on_wait(holder)
                waiting = True
                time.sleep(POLL_SECONDS)
        return None


def _locked(lock: int, path: Path) -> bool:
    """Whether `lock` is now held and is still the file that others would open."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        return os.stat(path).st_ino == os.fstat(lock).st_ino
    except FileNotFoundError:
        return False
