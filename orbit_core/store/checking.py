"""Whether a store keeps the promise that everything rests on: of several writers of one path exactly one wins.

An S3 server that ignores `If-None-Match` answers every put with "written", and nobody would notice before two runs had
overwritten each other. So it is tried, not asked: before the first step that has work to do, and by `orbit k8s doctor`.
Listings are not tried: nothing relies on them (see base.Store.list).
"""

from __future__ import annotations

import contextlib
import uuid

from orbit_core.errors import InputError, OrbitError
from orbit_core.store import open_store
from orbit_core.store.base import Store

_fit: set[str] = set()


def ensure_fit(url: str) -> None:
    """`check_conditional_writes` for the store at `url`, once in a process."""
    if url not in _fit:
        check_conditional_writes(open_store(url))
        _fit.add(url)


def check_conditional_writes(store: Store) -> None:
    """Put one path twice, read it, delete it. InputError if the store does not behave; errors of its own (no
    network, wrong credentials) pass through."""
    path = f"checks/{uuid.uuid4().hex}"
    what, fix = f"store {store.url}", "use a store that honours If-None-Match: AWS S3 and recent S3 servers do"
    try:
        if not store.put_if_absent(path, b"first"):
            raise InputError(what, "a new path to be written", "it was refused as present", fix)
        if store.put_if_absent(path, b"second"):
            raise InputError(
                what, "a second writer of one path to be refused", "both were told that they wrote it", fix
            )
        if (found := store.read(path)) != b"first":
            raise InputError(what, "the first writer's bytes", f"{found!r}", fix)
    finally:
        with contextlib.suppress(OSError, OrbitError):
            store.delete(path)
