"""What a store can do; see the package for the promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol


class Store(Protocol):
    """Paths are relative, with forward slashes. A missing path raises FileNotFoundError where bytes are asked for."""

    url: str  # as given to open_store; holds no credentials

    def read(self, path: str) -> bytes:
        """All bytes of one file."""

    def read_end(self, path: str, size: int) -> bytes:
        """The last `size` bytes of one file, or all of a shorter one."""

    def open(self, path: str) -> BinaryIO:
        """One file, of which only what is asked for is fetched. To be used with `with`."""

    def chunks(self, path: str) -> Iterator[bytes]:
        """All bytes of one file, piece by piece, of one version of it."""

    def exists(self, path: str) -> bool:
        """Whether the file is there. Prefixes ("directories") do not exist."""

    def names(self, folder: str) -> list[str]:
        """Sorted names of what lies directly in `folder`, files and folders; what lies deeper costs nothing."""

    def list(self, prefix: str = "") -> list[str]:
        """Sorted paths of all files, at any depth, whose path begins with `prefix`.

        A server may show it as it was some time ago. No result may depend on it: what must be known is asked for by its
        own path.
        """

    def modified(self, prefix: str = "") -> dict[str, float]:
        """Those paths and when each was last written: seconds since the epoch, by the clock of who keeps the store."""

    def put_if_absent(self, path: str, source: bytes | Path, *, move: bool = False) -> bool:
        """Write bytes, or a copy of a local file, at `path` unless something is there: True if this call wrote it.

        Atomic and durable when it returns. Of many callers at once exactly one gets True, also where an answer was
        lost and the request repeated. An error leaves it open whether the bytes have arrived.
        `move=True` consumes the local file, which costs no copy in a folder on the same filesystem.
        """

    def put(self, path: str, source: bytes | Path) -> None:
        """Write or replace `path`, atomically: a reader sees the old bytes or the new ones."""

    def delete(self, path: str) -> None:
        """Remove `path`; nothing happens if it is not there."""

    def download(self, path: str, target: Path) -> None:
        """Write the bytes of `path` to the local file `target` without holding them all in memory."""

    def local_path(self, path: str) -> Path | None:
        """Where `path` lies on this machine, or None for a remote store. Read-only for callers."""

    def patient(self, seconds: float) -> Store:
        """This store, with requests that wait for `seconds` while the server is away."""

    def unfinished(self) -> dict[str, float]:
        """What writes have left that never ended, by a name for people, and when each was begun (as `modified`)."""

    def remove_unfinished(self, name: str) -> None:
        """Remove one of `unfinished`."""

    def url_of(self, path: str) -> str:
        """Absolute path or URL that people and libraries (datasets, DuckDB, pyarrow) can open."""


def check_path(path: str) -> str:
    """`path` itself if it is a well-formed store path; ValueError otherwise."""
    parts = path.split("/")
    if not path or path != str(PurePosixPath(path)) or path.startswith((".", "/")) or ".." in parts or "\0" in path:
        raise ValueError(f"{path!r} is not a store path: relative, forward slashes, no '..', no leading dot")
    return path
