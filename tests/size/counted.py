"""A store that counts what is asked of it and how much goes through: counts, unlike seconds, are the same anywhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from orbit_core.store.base import Store
from orbit_core.store.requests import PatientS3
from orbit_core.store.s3 import S3Store

COUNTED = ("read", "read_end", "exists", "names", "list", "put_if_absent", "put", "delete", "download")


class CountedStore:
    """`counts`: calls by name; `listed`: names and paths that were given back; `read_bytes`: of whole and end reads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in COUNTED:
            return method

        def counted(*arguments: Any, **options: Any) -> Any:
            self.counts[name] += 1
            result = method(*arguments, **options)
            if name in ("names", "list"):
                self.counts["listed"] += len(result)
            if name in ("read", "read_end"):
                self.counts["read_bytes"] += len(result)
            return result

        return counted

    def taken(self) -> dict[str, int]:
        """The counts since the last call."""
        counts, self.counts = self.counts, Counter()
        return dict(sorted(counts.items()))


def count_requests(store: S3Store) -> Counter[str]:
    """From now on the requests that the store sends to S3, by their names in S3's protocol."""
    requests: Counter[str] = Counter()
    filesystem = store._s3 = PatientS3(store._s3.patience)  # not the one that it shares with other stores
    send, get = filesystem._call_s3, filesystem.get_bytes

    async def counted(method: str, *arguments: Any, **options: Any) -> Any:
        requests[method] += 1
        return await send(method, *arguments, **options)

    async def counted_get(*arguments: Any, **options: Any) -> Any:
        requests["get_object"] += 1
        return await get(*arguments, **options)

    filesystem._call_s3, filesystem.get_bytes = counted, counted_get  # type: ignore[method-assign]
    return requests


def folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
