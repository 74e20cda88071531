"""Judging in a process of its own, which can be killed where nothing else stops it.

Rewards run other people's code over whatever a model wrote. A library may compute inside C, where no signal handler of
Python is heard, or crash and take its process along. Here that costs one answer; the step goes on with a new process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
import weakref
from contextlib import suppress
from typing import Any

from orbit_core.errors import InputError, OrbitError
from orbit_core.other_process import python_command
from orbit_core.recipe import Reward
from orbit_core.rl.judge_main import SHOW_THE_LINE
from orbit_core.rl.types import Prompt

GRACE = 10.0  # seconds beyond the limit after which a judge that no signal interrupted is killed
START = 600.0  # seconds that a judge may take to import what it needs
_PROGRAM = "from orbit_core.rl.judge_main import main; main(int(sys.argv[2]))"
LAST_WORDS = 0.5  # seconds that a process has to end by itself, or to show where it hangs


class NoVerdict(Exception):
    """Why there is no score for an answer."""


class JudgeProcess:
    """Scores answers in another process, started now and again whenever it was lost.

    Raises InputError when the judge cannot be made, OrbitError when its process ends before it is ready.
    """

    def __init__(self, settings: Reward) -> None:
        self._settings = settings
        self._number = 0
        self._start()

    def score(self, prompt: Prompt, answer: str) -> dict[str, float]:
        """{"score": ..., further parts}. Raises NoVerdict: the judge raised, overran its limit or took its process
        along. The last is tried twice, since a process may also be ended from outside."""
        limit = self._settings.timeout_seconds
        self._number += 1
        question = {"number": self._number, "prompt": prompt.__dict__, "answer": answer}
        for _ in range(2):
            if self._process.poll() is not None:
                self._start()
            reply = self._ask(question, limit + GRACE)
            if reply is None and self._process.poll() is None:
                self._process.send_signal(SHOW_THE_LINE)
                self._end()
                raise NoVerdict(f"took longer than {limit:g} s and had to be killed")
            if reply is not None and "failure" in reply:
                raise NoVerdict(reply["failure"])
            if reply is not None:
                parts: dict[str, float] = reply["parts"]
                return parts
        raise NoVerdict(f"took its process along, twice: {_ending(self._process)}")

    def _start(self) -> None:
        self._process = subprocess.Popen(
            python_command(_PROGRAM, str(os.getpid())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # what it starts is killed with it; what the run's group is told is not for it
        )
        self._unread = b""
        self._end = weakref.finalize(self, _end, self._process)  # once: by us, or when nobody needs it any more
        reply = self._ask(self._settings.model_dump(mode="json"), START)
        if reply is None:
            self._end()
            raise OrbitError(f"the process that judges answers did not start: {_ending(self._process)}; see above")
        if "refused" in reply:
            self._end()
            what, expected, found, fix = reply["refused"]
            raise InputError(what, expected, found, fix)

    def _ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply to `question`; None when none came in time or the process ended, which has been waited for then."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._end()
            return None
        until = time.monotonic() + seconds
        while (line := self._line(until)) is not None:
            reply: dict[str, Any] = json.loads(line)
            if reply.get("number") == question.get("number"):  # else to a question whose asker was interrupted
                return reply
        return None

    def _line(self, until: float) -> bytes | None:
        assert self._process.stdout is not None
        out = self._process.stdout.fileno()
        ready = select.poll()
        ready.register(out, select.POLLIN)
        while b"\n" not in self._unread:
            if not ready.poll(max(0.0, until - time.monotonic()) * 1000):
                return None
            more = os.read(out, 1 << 16)
            if not more:
                self._end()
                return None
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and what it started. One that waits for a question goes by itself, for none can come."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    if process.returncode is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()


def _ending(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
