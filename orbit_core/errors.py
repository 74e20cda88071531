"""Errors that a person can act on, and the exit codes that executors act on.

0 done; 42 the input is wrong or a gate said no: retrying cannot help; 75 stopped on request, resumable;
anything else may be retried.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    DONE = 0
    REFUSED = 42
    RESUMABLE = 75


class OrbitError(Exception):
    """An error whose message names the object, what was expected, what was found and what to do next."""

    exit_code: int = 1


class InputError(OrbitError):
    """The input is wrong; running the step again cannot help."""

    exit_code = ExitCode.REFUSED

    def __init__(self, what: str, expected: str = "", found: str = "", fix: str = "") -> None:
        self.what, self.expected, self.found, self.fix = what, expected, found, fix
        parts = [what]
        if expected:
            parts.append(f"expected: {expected}")
        if found:
            parts.append(f"found: {found}")
        if fix:
            parts.append(f"what to do: {fix}")
        super().__init__("\n  ".join(parts))


class GateError(InputError):
    """A gate measured values and refused the run."""


class Interrupted(OrbitError):
    """Stopped on request after finishing the step in flight; starting again resumes."""

    exit_code = ExitCode.RESUMABLE


class Stopped(BaseException):
    """What a signal handler raises, wherever the code happens to be; means what Interrupted does.

    Not an Exception: raised in the middle of reading a file, it must not be taken for what is wrong with the file, and
    end with the exit code that forbids another try.
    """
