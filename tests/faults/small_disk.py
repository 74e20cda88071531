"""A disk of a few megabytes that can be filled, emptied and made read-only. As a program: `small_disk.py DIR`.

Where the machine lets us, it is a tmpfs in a mount namespace of our own, which goes when we go. Elsewhere (a container
without user namespaces) files may not grow beyond what is left (RLIMIT_FSIZE), and read-only is a folder without the
right to write, seen by a user who is not root.

Prints one JSON object: what happened, for test_disk.py to judge.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path += [str(HERE.parent), *(str(HERE.parent / folder) for folder in ("rl", "steps"))]

KILOBYTE = 1024
SIZE = 4096 * KILOBYTE
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def has_namespaces(folder: Path) -> bool:
    """Whether this user may mount a tmpfs that nobody else sees."""
    probe = [*NAMESPACE, "mount", "-t", "tmpfs", "none", str(folder)]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


class Disk:
    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder, self.mounted = folder, mounted
        if mounted:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)], check=True)

    @contextlib.contextmanager
    def room(self, amount: int) -> Iterator[None]:
        """Only `amount` bytes are left (without a mount: no file may be larger)."""
        if not self.mounted:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (amount, limits[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            return
        ballast = self.folder / "ballast"
        ballast.write_bytes(b"\1" * (shutil.disk_usage(self.folder).free - amount))
        try:
            yield
        finally:
            ballast.unlink()

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        if self.mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True)
            yield
            subprocess.run(["mount", "-o", "remount,rw", str(self.folder)], check=True)
            return
        user = os.geteuid()
        self.folder.chmod(0o555)
        os.seteuid(user or 65534)  # root may write anywhere
        try:
            yield
        finally:
            os.seteuid(user)
            self.folder.chmod(0o755)


def visible(store_url: str) -> dict[str, Any]:
    """What a reader finds: artifacts, committed steps, and damages to them."""
    from orbit_core.store import open_store
    from orbit_core.store.rollouts import RolloutReader
    from orbit_core.store.verifying import Place, damages_of

    store = open_store(store_url)
    manifests = [path for path in store.list("artifacts/") if path.count("/") == 2]
    damages = [str(damage) for damage in damages_of(Place(store, ""))]
    return {"manifests": len(manifests), "steps": len(RolloutReader(store, "bandit").steps()), "damages": damages}


def train(disk: Disk) -> list[dict[str, Any]]:
    """The run on a disk with less and less room, each time gone on with once there is room again."""
    from bandit import bandit_loop

    from orbit_core.errors import OrbitError
    from orbit_core.store import open_store

    expected = bandit_loop(open_store(disk.folder / "whole")).run()
    happened = []
    for amount in range(0, 72 * KILOBYTE, 12 * KILOBYTE):
        url, error, code = str(disk.folder / f"train-{amount}"), "", 0
        with disk.room(amount):
            try:
                bandit_loop(open_store(url)).run()
            except OrbitError as failure:
                error, code = str(failure), failure.exit_code
            seen = visible(url)
        again = bandit_loop(open_store(url)).run()
        same = (again.state, again.adapter_digest) == (expected.state, expected.adapter_digest)
        happened.append({"room": amount, "error": error, "code": code, "seen": seen, "same": same})
    return happened


def step(disk: Disk, block: Any, name: str) -> dict[str, Any]:
    """A step of 24 files while `block` holds, and once more afterwards."""
    from samples import PACKAGE, spec_of

    from orbit_core.errors import OrbitError
    from orbit_core.steps.runner import run_step
    from orbit_core.store.artifacts import ArtifactStore

    spec = spec_of(disk.folder / name, "count", to=24)
    error, code, kind = "", 0, ""
    with block:
        try:
            run_step(spec, lambda event, **values: None, package=PACKAGE)
        except OrbitError as failure:
            error, code, kind = str(failure), failure.exit_code, type(failure).__name__
        seen = visible(spec.store)
    left = sum(path.is_file() for path in Path(spec.store).rglob("*")) if Path(spec.store).exists() else 0
    artifact = run_step(spec, lambda event, **values: None, package=PACKAGE)
    artifact.verify()
    found = ArtifactStore(artifact.store).find(spec.step, spec.digest) is not None
    return {"error": error, "code": code, "kind": kind, "seen": seen, "left": left, "again": found, **artifact.facts}


def main() -> None:
    folder = Path(sys.argv[1])
    if "--inside" not in sys.argv and has_namespaces(folder):
        os.execvp(NAMESPACE[0], [*NAMESPACE, sys.executable, *sys.argv, "--inside"])
    disk = Disk(folder, mounted="--inside" in sys.argv)
    happened = {
        "mounted": disk.mounted,
        "train": train(disk),
        "full": step(disk, disk.room(20 * KILOBYTE if disk.mounted else 200), "full"),
        "read_only": step(disk, disk.read_only(), "read-only"),
    }
    print(json.dumps(happened))


if __name__ == "__main__":
    main()
