"""Processes forked from one that has imported everything and never runs any of it: each is there at once."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

PATIENCE_SECONDS = 300.0


class Process:
    """A forked process, leader of its group."""

    def __init__(self, main: Callable[[], int], log: Path) -> None:
        self.log, self.started, self.seconds, self._status = log, time.monotonic(), 0.0, None
        self.pid = os.fork()
        if self.pid == 0:
            _become(main, log)

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status, self.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self.started
        return self._status

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int | None:
        """Exit code, or None if it still runs after so many seconds."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        return self._status

    def signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.killpg(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()


def _become(main: Callable[[], int], log: Path) -> NoReturn:
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_fork(function: Callable[[], Any], folder: Path) -> Any:
    """What `function` returns, as JSON; run in a fork, so that the threads that it starts are not ours."""
    answer, log = folder / "answer.json", folder / "fork.log"

    def main() -> int:
        answer.write_text(json.dumps(function()))
        return 0

    code = Process(main, log).wait()
    assert code == 0, log.read_text(errors="replace")
    return json.loads(answer.read_text())
