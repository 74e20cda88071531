"""Whether a store keeps the promise that everything rests on: of several writers of one path exactly one wins.

An S3 server that ignores `If-None-Match` answers every put with "written", and nobody would notice before two runs had
overwritten each other. So it is tried, not asked.
"""

from __future__ import annotations

import contextlib
import uuid

from orbit_core.errors import InputError
from orbit_core.store.base import Store


def check_conditional_writes(store: Store) -> None:
    """Put one path twice, read it, list it, delete it. InputError if the store does not behave; errors of its own (no
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
        if store.list("checks/").count(path) != 1:
            raise InputError(what, "a listing that shows every finished write", "one that does not", fix)
    finally:
        with contextlib.suppress(OSError):
            store.delete(path)
