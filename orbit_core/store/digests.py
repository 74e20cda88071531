"""Content digests of files and directories: what something is, wherever it lies.

    file       sha256(bytes)
    directory  sha256 over "name NUL sha256(file) LF" of every file in it, sorted by name

Names are relative with forward slashes; names that begin with a dot (download caches, .git) are not content. Digests of
large files are remembered in the user's cache directory by (path, size, mtime, inode), because a base model of a
terabyte is named on every start of a run.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from orbit_core.errors import InputError

REMEMBER_FROM_BYTES = 1 << 20
_SETTLED_NS = 2_000_000_000  # a file changed this recently may change again within one tick of its mtime


def sha256_file(path: str | Path) -> str:
    """sha256 hex of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(chunks: Iterable[bytes]) -> str:
    """sha256 hex of the bytes that come in `chunks`."""
    total = hashlib.sha256()
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()


def digest_path(path: str | Path) -> str:
    """Content digest (hex) of a file or directory; raises InputError if there is nothing, or an empty directory."""
    path = Path(path).expanduser()
    if path.is_file():
        return remembered_sha256(path)
    if not path.is_dir():
        raise InputError(f"{path}", "a file or a directory", "nothing there", "check the path")
    total = hashlib.sha256()
    for name in (names := sorted(content_names(path))):
        total.update(f"{name}\0{remembered_sha256(path / name)}\n".encode())
    if not names:
        raise InputError(f"{path}", "a directory with files", "an empty directory", "check the path")
    return total.hexdigest()


def content_names(directory: Path) -> Iterator[str]:
    """Relative names of the files under `directory`, in no order; links are followed, dot names left out."""
    for folder, folders, files in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(folder).relative_to(directory)
        yield from ((relative / name).as_posix() for name in files if not name.startswith("."))


def cache_directory() -> Path:
    """Orbit's folder in the user's cache (XDG_CACHE_HOME or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orbit"


def remembered_sha256(file: Path) -> str:
    """sha256 hex of a file's bytes; of a large one from memory while its path, size, mtime and inode are the same."""
    before = file.stat()
    if before.st_size < REMEMBER_FROM_BYTES:
        return sha256_file(file)
    identity = f"{file.resolve()}\0{before.st_size}\0{before.st_mtime_ns}\0{before.st_ino}"
    note = cache_directory() / "digests" / hashlib.sha256(identity.encode()).hexdigest()
    try:
        text = note.read_text()
        if len(text) == 64:
            return text
    except (FileNotFoundError, NotADirectoryError):
        pass
    digest = sha256_file(file)
    after = file.stat()
    unchanged = (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
    if unchanged and time.time_ns() - after.st_mtime_ns > _SETTLED_NS:
        _remember(note, digest)
    return digest


def _remember(note: Path, digest: str) -> None:
    """The cache is a convenience: a read-only home must not stop a run."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{os.getpid()}")
        partial.write_text(digest)
        os.replace(partial, note)
    except OSError:
        return
