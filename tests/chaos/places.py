"""Where the runs are that are harmed: folders, or a bucket behind a proxy that fails as networks do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from forks import in_fork

from orbit_core.store import open_store

SERVER = Path(__file__).with_name("bad_server.py")


class Folders:
    """`undisturbed`: what is set in the environment of whoever looks at a run, so that nothing disturbs him.
    `lease_seconds`: short, for trials wait until a lease has passed."""

    undisturbed: Mapping[str, str] = MappingProxyType({})
    imports: tuple[str, ...] = ()
    lease_seconds = 1.0
    listings_late = False

    def new(self, folder: Path, prepared: Path) -> str:
        """A store with the prepared artifacts. Nothing that is in a store is ever changed, so links will do."""
        store = folder / "store"
        shutil.copytree(prepared / "artifacts", store / "artifacts", copy_function=os.link)
        return str(store)


class BadBucket:
    """The bucket of bad_server.py. Runs reach it through the proxy, which this process's environment names."""

    imports = ("orbit_core.store.s3",)
    listings_late = True  # so a sweep leaves what it does not see to a later one

    def __init__(self, server: str, bucket: str, outage: float) -> None:
        self.undisturbed, self._bucket, self._stores = {"AWS_ENDPOINT_URL": server}, bucket, 0
        self.lease_seconds = 4 * outage  # one shorter than a third of it costs nobody the lease

    def new(self, folder: Path, prepared: Path) -> str:
        self._stores += 1
        store = f"s3://{self._bucket}/{self._stores}"
        in_fork(lambda: self._copy(prepared, store), folder)
        return store

    def _copy(self, prepared: Path, url: str) -> None:
        os.environ.update(self.undisturbed)
        store = open_store(url)
        for file in sorted(path for path in (prepared / "artifacts").rglob("*") if path.is_file()):
            store.put(str(file.relative_to(prepared)), file)


@contextmanager
def bad_bucket(folder: Path, seed: int, outage: float) -> Iterator[BadBucket]:
    """The server in a process of its own: this one must stay with a single thread to be forked."""
    command = [sys.executable, str(SERVER), str(seed), str(outage)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        about = json.loads(process.stdout.readline())
        os.environ.update(about["environment"])
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        try:
            yield BadBucket(about["server"], about["bucket"], outage)
        finally:
            process.stdin.close()
