"""Whatever the test cluster starts, however deep, ends with it: also when the tests are killed.

Every process carries a mark in its environment, which its children inherit, also those in sessions of their own. To
end them all is to look for the mark: the guard (this file run as a program) does so when its standard input closes,
which is when the process that started it is gone. Linux only: it reads /proc.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CLUSTER_MARK = "ORBIT_TEST_CLUSTER"
CONTAINER_MARK = "ORBIT_TEST_CONTAINER"


def marked(name: str, value: str) -> list[int]:
    """Process ids whose environment has `name=value`."""
    entry, found = f"{name}={value}".encode(), []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
            if process.name.isdigit() and entry in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def descendants(parent: int) -> Iterator[int]:
    """Process ids of all children of a process, and of theirs."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(stat[1]) == parent:
                    yield int(entry.name)
                    yield from descendants(int(entry.name))


def kill_marked(name: str, value: str, patience_seconds: float = 10.0) -> None:
    """SIGKILL to all with the mark, again until none is left: a process may fork while we look."""
    until = time.monotonic() + patience_seconds
    while (left := marked(name, value)) and time.monotonic() < until:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for the signal. As first process of a container it would ignore it otherwise."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    except OSError:
        pass
    return False


class Guard:
    """Ends everything marked with `mark`, and removes `folders`, as soon as we are gone or `release` is called."""

    def __init__(self, mark: str, *folders: Path) -> None:
        command = [sys.executable, __file__, mark, *map(str, folders)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def release(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    sys.stdin.buffer.read()
    kill_marked(CLUSTER_MARK, sys.argv[1])
    for folder in sys.argv[2:]:
        shutil.rmtree(folder, ignore_errors=True)
