"""File locks between processes of one machine: the kernel frees them when the holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.2


def acquire(path: Path, on_wait: Callable[[str], None], ready: Callable[[], bool]) -> int | None:
    """The lock at `path`, as a descriptor whose closing frees it; or None, as soon as `ready()`.

    The folder is made. The holder may remove the file, or its folder, before it closes the descriptor.
    `on_wait(holder)` is called once if another process holds the lock.
    """
    waiting = False
    while not ready():
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the last holder is removing the folder
            found = try_acquire(path)
            if isinstance(found, int):
                return found
            if not waiting:
                on_wait(found)
            waiting = True
            time.sleep(POLL_SECONDS)
    return None


def try_acquire(path: Path) -> int | str:
    """A descriptor that holds the lock, or a word on who holds it. Raises FileNotFoundError without a folder."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if _locked(lock, path):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return lock
    holder = os.pread(lock, 300, 0).decode(errors="replace") or "another process"
    os.close(lock)
    return holder


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock at `path`. Changes nothing; who asks for the lock meanwhile asks once more."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


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
