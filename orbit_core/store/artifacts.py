"""Artifacts: the output directory of a step, visible whole or not at all.

    artifacts/<step>/<digest16>/<attempt>/...   the files of one try
    artifacts/<step>/<digest16>.json            the manifest, put last and only if absent

A reader knows an artifact only through its manifest, which names one attempt and the sha256 of each of its files. A try
that died before its manifest left files that nothing names; of two tries that finish together one manifest wins, and
the loser removes its own files and returns the winner's artifact.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

import orbit_core
from orbit_core.errors import OrbitError
from orbit_core.steps.contract import StepSpec, canonical_json
from orbit_core.store.base import Store
from orbit_core.store.digests import content_names, sha256_file

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

    def fetch(self, scratch: Path) -> Path:
        """The artifact as a local read-only directory.

        In a folder store that is the artifact itself; from S3 it is downloaded once into
        `scratch/artifacts/<digest16>-<attempt>`, each file checked against its sha256.
        """
        lies = self.store.local_path(self.prefix)
        if lies is not None:
            return lies
        target = scratch / "artifacts" / f"{self.manifest.digest[:16]}-{self.manifest.attempt}"
        if target.is_dir():
            return target
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            for name in self.manifest.files:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                self.store.download(f"{self.prefix}/{name}", partial / name)
            self._check(partial)
            with contextlib.suppress(OSError):  # another process has fetched it meanwhile
                os.rename(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def verify(self, scratch: Path) -> None:
        """Raises OrbitError if a file is missing or its bytes are not those that were published."""
        self._check(self.fetch(scratch))

    def _check(self, directory: Path) -> None:
        for name, entry in self.manifest.files.items():
            file = directory / name
            found = sha256_file(file) if file.is_file() else "no such file"
            if found != entry.sha256:
                raise OrbitError(
                    f"artifact {self.prefix}/{name}\n  expected: sha256 {entry.sha256}\n  found: {found}\n"
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
        if manifest.digest != digest:
            raise OrbitError(f"{_manifest_path(step, digest)}: expected digest {digest}, found {manifest.digest}")
        if manifest.schema_version > SCHEMA:
            raise OrbitError(
                f"artifact {step}/{digest[:16]}: schema version {manifest.schema_version}, this Orbit reads {SCHEMA}"
            )
        return Artifact(self.store, manifest)

    def publish(self, spec: StepSpec, directory: Path, facts: dict[str, Any]) -> Artifact:
        """Move the files under `directory` into the store as the artifact of `spec`; returns what readers now see."""
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


def _manifest_path(step: str, digest: str) -> str:
    return f"artifacts/{step}/{digest[:16]}.json"
