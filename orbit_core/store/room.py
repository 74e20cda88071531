"""Disks that are full or read-only, said so that a person can act.

A full disk may have room again, so the error may be retried; one that must not be written to is refused (exit code 42).
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orbit_core.errors import InputError, OrbitError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ROOM_IN_WORDS = ("No space left on device", "Disk quota exceeded", "os error 28")  # of libraries without errno
_READ_ONLY = {errno.EROFS, errno.EACCES}


@contextmanager
def room_explained(what: str, *folders: Path) -> Iterator[None]:
    """`what` needs to write to `folders`: OrbitError if there is no room, InputError if it may not."""
    try:
        yield
    except OrbitError:
        raise
    except Exception as error:
        causes = list(_causes(error))
        if any(_says_no_room(cause) for cause in causes):
            raise OrbitError(
                f"{what}\n  expected: room on the disk\n  found: {error}; {_free(folders)}\n"
                "  what to do: free some (orbit gc --dry-run shows what dead tries have left) and run again: it goes on"
            ) from error
        if any(_says_read_only(cause, folders) for cause in causes):
            fix = "make it writable for this user, or name another folder"
            raise InputError(what, "a folder that can be written to", str(error), fix) from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _says_no_room(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return True
    return any(words in str(error) for words in _NO_ROOM_IN_WORDS)


def _says_read_only(error: BaseException, folders: tuple[Path, ...]) -> bool:
    """Only of our own folders: a person's file that cannot be read is another story."""
    if not isinstance(error, OSError) or error.errno not in _READ_ONLY or error.filename is None:
        return False
    path = Path(str(error.filename))
    return any(path.is_relative_to(folder) or folder.is_relative_to(path) for folder in folders)


def _free(folders: tuple[Path, ...]) -> str:
    there = [next(each for each in (folder, *folder.parents) if each.exists()) for folder in folders]
    return ", ".join(f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free in {folder}" for folder in there)
