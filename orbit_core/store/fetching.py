"""A folder of this machine's cache, made once, whole, by one process at a time.

    <cache>/<name>/            whole; appears by one rename
    <cache>/.<name>.partial/   what a try has so far, kept when it dies: the next try goes on from it
    <cache>/.<name>.lock       flock of who is making it

Several pods of a node may share the cache: the first makes the folder, the others wait and use it. What nobody has gone
on with for a day is removed when something else is made.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from orbit_core.store.locks import acquire, try_acquire

LEFTOVER_SECONDS = 24 * 3600


def made_once(target: Path, make: Callable[[Path], None], on_wait: Callable[[str], None] = lambda holder: None) -> Path:
    """`target`, made by `make(partial)` if it is not there; `make` finds in `partial` what an earlier try has left.

    Files that `make` writes should be durable when it returns: the cache may outlive a power cut.
    """
    if target.is_dir():
        return target
    partial, file = _partial(target), _lock(target)
    lock = acquire(file, on_wait, ready=target.is_dir)
    if lock is None:
        return target
    try:
        if not target.is_dir():
            _sweep(target.parent, keep=target)
            partial.mkdir(exist_ok=True)
            make(partial)
            os.rename(partial, target)
        file.unlink(missing_ok=True)
    finally:
        os.close(lock)
    return target


def put_aside(target: Path) -> None:
    """Take a folder that turned out to be damaged out of the cache; who has files of it open may go on reading."""
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        os.rename(target, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _sweep(cache: Path, keep: Path) -> None:
    """Remove tries that are older than a day and that nobody is working on."""
    for name in {entry.name[1:].removesuffix(".partial").removesuffix(".lock") for entry in cache.glob(".*")}:
        target = cache / name
        left = [_partial(target), _lock(target)]
        if target == keep or time.time() - max(map(_last_change, left)) < LEFTOVER_SECONDS:
            continue
        lock = try_acquire(_lock(target))
        if isinstance(lock, str):  # slow, but alive
            continue
        try:
            shutil.rmtree(_partial(target), ignore_errors=True)
            _lock(target).unlink(missing_ok=True)
        finally:
            os.close(lock)


def _last_change(path: Path) -> float:
    """Time of the last change anywhere in `path`; 0 if it is not there, now if it is just being removed."""
    if not path.exists():
        return 0.0
    with contextlib.suppress(FileNotFoundError):
        return max(each.stat().st_mtime for each in (path, *path.rglob("*")))
    return time.time()


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _lock(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")
