"""Artifacts: the output directory of a step, visible whole or not at all.

    artifacts/<step>/<digest16>/<attempt>/...   the files of one try
    artifacts/<step>/<digest16>.json            the manifest, put last and only if absent

A reader knows an artifact only through its manifest, which names one attempt and the sha256 of each of its files. A try
that died before its manifest left files that nothing names; of two tries that finish together one manifest wins, and
the loser removes its own files and returns the winner's artifact.
"""

from __future__ import annotations

import importlib.metadata
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

import orbit_core
from orbit_core.errors import InputError, OrbitError
from orbit_core.steps.contract import StepSpec, canonical_json
from orbit_core.store.base import Store
from orbit_core.store.digests import content_names, sha256_file
from orbit_core.store.fetching import made_once

SCHEMA = 1


class FileEntry(BaseModel):
    model_config = ConfigDict(frozen=True)
    sha256: str
    size: int


class Manifest(BaseModel):
    """What is known of an artifact. Holds neither secrets nor paths of the machine that made it."""

    model_config = ConfigDict(frozen=True)
    schema_version: int
    step: str
    digest: str
    version: int
    params: dict[str, Any]
    inputs: dict[str, dict[str, str | None]]  # name -> {"digest", "step"}
    attempt: str
    files: dict[str, FileEntry]
    facts: dict[str, Any]
    code_version: str


class Artifact:
    """A published output. `manifest.facts` are what the step returned."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest

    @property
    def facts(self) -> dict[str, Any]:
        return self.manifest.facts

    @property
    def prefix(self) -> str:
        return f"artifacts/{self.manifest.step}/{self.manifest.digest[:16]}/{self.manifest.attempt}"

    @property
    def url(self) -> str:
        """Path or URL of the directory, for people and libraries."""
        return self.store.url_of(self.prefix)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(entry.size for entry in self.manifest.files.values())

    def fetch(
        self,
        scratch: Path,
        on_file: Callable[[int], None] = lambda size: None,
        on_wait: Callable[[str], None] = lambda holder: None,
    ) -> Path:
        """The artifact as a local read-only directory.

        In a folder store that is the artifact itself; from S3 it is downloaded once into
        `scratch/artifacts/<digest16>-<attempt>`, each file checked against its sha256; a download that was killed is
        gone on with. `on_file(bytes)` is called for each file, `on_wait(holder)` if another process is at it.
        """

        def download(partial: Path) -> None:
            for name, entry in self.manifest.files.items():
                file = partial / name
                if not file.is_file() or sha256_file(file) != entry.sha256:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    self.store.download(f"{self.prefix}/{name}", file)
                    try:
                        self._check(partial, name)
                    except OrbitError:
                        file.unlink()
                        raise
                    _make_durable(file)
                on_file(entry.size)
            for left in (path for path in partial.rglob(".*") if path.is_file()):  # of a download that was killed
                left.unlink()

        return self.store.local_path(self.prefix) or made_once(self._place(scratch), download, on_wait)

    def is_fetched(self, scratch: Path) -> bool:
        """Whether `fetch` has nothing to do."""
        return self.store.local_path(self.prefix) is not None or self._place(scratch).is_dir()

    def verify(self, scratch: Path) -> None:
        """Raises OrbitError if a file is missing or its bytes are not those that were published."""
        directory = self.fetch(scratch)
        for name in self.manifest.files:
            self._check(directory, name)

    def _place(self, scratch: Path) -> Path:
        return scratch / "artifacts" / f"{self.manifest.digest[:16]}-{self.manifest.attempt}"

    def _check(self, directory: Path, name: str) -> None:
        expected, file = self.manifest.files[name].sha256, directory / name
        found = sha256_file(file) if file.is_file() else "no such file"
        if found != expected:
            raise OrbitError(
                f"artifact {self.prefix}/{name}\n  expected: sha256 {expected}\n  found: {found}\n"
                f"  what to do: delete {_manifest_path(self.manifest.step, self.manifest.digest)} and run again"
            )


class ArtifactStore:
    def __init__(self, store: Store) -> None:
        self.store = store

    def find(self, step: str, digest: str) -> Artifact | None:
        """The artifact of `step` with this digest of its inputs (full hex), or None."""
        try:
            manifest = Manifest.model_validate_json(self.store.read(_manifest_path(step, digest)))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            where, found = self.store.url_of(_manifest_path(step, digest)), str(error)[:300]
            raise InputError(where, "the manifest of an artifact", found, "remove it and run the step again") from None
        if manifest.digest != digest:
            raise OrbitError(f"{_manifest_path(step, digest)}: expected digest {digest}, found {manifest.digest}")
        if manifest.schema_version > SCHEMA:
            raise InputError(
                f"artifact {step}/{digest[:16]}",
                f"schema version {SCHEMA} or lower, which this Orbit reads",
                f"schema version {manifest.schema_version}",
                "run with the Orbit that wrote it, or use another store",
            )
        return Artifact(self.store, manifest)

    def publish(
        self, spec: StepSpec, directory: Path, facts: dict[str, Any], fence: Callable[[], None] = lambda: None
    ) -> Artifact:
        """Move the files under `directory` into the store as the artifact of `spec`; returns what readers now see.

        `fence` is called before the upload and before the manifest, and raises if another process may do the same.
        """
        fence()
        attempt = uuid.uuid4().hex[:12]
        prefix = f"artifacts/{spec.step}/{spec.digest[:16]}/{attempt}"
        files = {}
        for name in sorted(content_names(directory)):
            file = directory / name
            files[name] = FileEntry(sha256=sha256_file(file), size=file.stat().st_size)
            self.store.put_if_absent(f"{prefix}/{name}", file, move=True)
        manifest = Manifest(
            schema_version=SCHEMA,
            step=spec.step,
            digest=spec.digest,
            version=spec.version,
            params=spec.params,
            inputs={name: {"digest": ref.digest, "step": ref.step} for name, ref in spec.inputs.items()},
            attempt=attempt,
            files=files,
            facts=facts,
            code_version=code_version(),
        )
        path = _manifest_path(spec.step, spec.digest)
        fence()
        won = self.store.put_if_absent(path, canonical_json(manifest.model_dump(mode="json")))
        artifact = Artifact(self.store, manifest) if won else self.find(spec.step, spec.digest)
        if artifact is None:
            raise OrbitError(f"store {self.store.url}: {path} was refused as present and is not there")
        self._sweep(artifact, attempt)
        return artifact

    def _sweep(self, artifact: Artifact, attempt: str) -> None:
        """Remove what no manifest names: a loser its own files, the winner those of all other tries, dead or late.

        Decided by the manifest and not by who was told True: a repeated S3 request is refused by its own first try.
        """
        step, digest = artifact.manifest.step, artifact.manifest.digest
        won = artifact.manifest.attempt == attempt
        folder = f"artifacts/{step}/{digest[:16]}/"
        for path in self.store.list(folder if won else f"{folder}{attempt}/"):
            if not path.startswith(f"{artifact.prefix}/"):
                self.store.delete(path)


def code_version() -> str:
    """Version of the installed package, or of the source tree when it is not installed."""
    try:
        return importlib.metadata.version("orbit-rl")
    except importlib.metadata.PackageNotFoundError:
        return orbit_core.__version__


def _make_durable(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def _manifest_path(step: str, digest: str) -> str:
    return f"artifacts/{step}/{digest[:16]}.json"
