"""Artifacts: the output directory of a step, visible whole or not at all.

    artifacts/<step>/<digest16>/<attempt>/...   the files of one try
    artifacts/<step>/<digest16>.json            the manifest, put last and only if absent

A reader knows an artifact only through its manifest, which names one attempt and the sha256 of each of its files. A try
that died before its manifest left files that nothing names; of two tries that finish together one manifest wins, and
the loser removes its own files and returns the winner's artifact.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orbit_core
from orbit_core.errors import InputError, OrbitError
from orbit_core.steps.contract import StepSpec
from orbit_core.store.base import Store
from orbit_core.store.digests import content_names, remembered_sha256, sha256_file, sha256_of
from orbit_core.store.fetching import made_once, put_aside
from orbit_core.store.lease import boottime
from orbit_core.store.manifests import SCHEMA, FileEntry, Manifest, manifest_path, read_manifest, redo_command

__all__ = ["Artifact", "ArtifactStore", "Manifest", "code_version"]

# Between the last file and the manifest; gc leaves what is younger than a day (cleaning.LEAST_DAYS).
UNPUBLISHED_SECONDS = 12 * 3600
_log = logging.getLogger(__name__)


class Artifact:
    """A published output. `manifest.facts` are what the step returned."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest

    @property
    def facts(self) -> dict[str, Any]:
        return self.manifest.facts

    @property
    def prefix(self) -> str:
        return self.manifest.prefix

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
        """The artifact as a local read-only directory whose files are those that were published.

        In a folder store that is the artifact itself; from S3 it is downloaded once into
        `scratch/artifacts/<digest16>-<attempt>`, each file checked against its sha256; a download that was killed is
        gone on with. What lies here already is checked too, large files only once while size and times stay the same
        (`digests`); a damaged download is fetched again, a damaged artifact raises InputError. `on_file(bytes)` is
        called for each file, `on_wait(holder)` if another process is at it.
        """
        local = self.store.local_path(self.prefix)
        if local is not None:
            for name in self.manifest.files:
                self._check(name, remembered_sha256, local)
            return local
        place = self._place(scratch)
        if place.is_dir():
            try:
                for name in self.manifest.files:
                    self._check(name, remembered_sha256, place)
            except InputError as damage:
                _log.warning("fetching again: %s", damage)
                put_aside(place)

        def download(partial: Path) -> None:
            for name, entry in self.manifest.files.items():
                file = partial / name
                if not file.is_file() or sha256_file(file) != entry.sha256:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    self._download(name, partial)
                    make_durable(file)
                on_file(entry.size)
            for left in (path for path in partial.rglob(".*") if path.is_file()):  # of a download that was killed
                left.unlink()

        return made_once(place, download, on_wait)

    def _download(self, name: str, directory: Path) -> None:
        """A file that came damaged is asked for once more: the wire may be to blame, and not the store."""
        for last in (False, True):
            self.store.download(f"{self.prefix}/{name}", directory / name)
            try:
                return self._check(name, sha256_file, directory)
            except InputError:
                (directory / name).unlink()
                if last:
                    raise

    def is_fetched(self, scratch: Path) -> bool:
        """Whether `fetch` has nothing to do."""
        return self.store.local_path(self.prefix) is not None or self._place(scratch).is_dir()

    def damages(self) -> Iterator[InputError]:
        """Reads every byte as it lies in the store; yields what is missing or not what was published."""
        for name in self.manifest.files:
            try:
                self._check(name, lambda path: sha256_of(self.store.chunks(path)), None)
            except InputError as damage:
                yield damage

    def verify(self) -> None:
        """Raises the first of `damages`."""
        for damage in self.damages():
            raise damage

    def _place(self, scratch: Path) -> Path:
        return scratch / "artifacts" / f"{self.manifest.digest[:16]}-{self.manifest.attempt}"

    def _check(self, name: str, digest: Callable[[Any], str], directory: Path | None) -> None:
        """InputError if `name`, in `directory` or else in the store, is not the file that was published."""
        path = f"{self.prefix}/{name}"
        try:
            found = f"sha256 {digest(path if directory is None else directory / name)}"
        except FileNotFoundError:
            found = "no such file"
        if found != f"sha256 {self.manifest.files[name].sha256}":
            raise InputError(
                f"artifact {path} in store {self.store.url}",
                f"sha256 {self.manifest.files[name].sha256}",
                found,
                redo_command(self.url, self.manifest.inputs),
            )


class ArtifactStore:
    def __init__(self, store: Store) -> None:
        self.store = store

    def find(self, step: str, digest: str) -> Artifact | None:
        """The artifact of `step` with this digest of its inputs (full hex), or None."""
        try:
            manifest = read_manifest(self.store, manifest_path(step, digest))
        except FileNotFoundError:
            return None
        if manifest.digest != digest:
            raise OrbitError(f"{manifest_path(step, digest)}: expected digest {digest}, found {manifest.digest}")
        return Artifact(self.store, manifest)

    def publish(
        self,
        spec: StepSpec,
        directory: Path,
        facts: dict[str, Any],
        fence: Callable[[], None] = lambda: None,
        digests: Mapping[str, str] = MappingProxyType({}),
    ) -> Artifact:
        """Move the files under `directory` into the store as the artifact of `spec`; returns what readers now see.

        `fence` is called before the upload and before the manifest, and raises if another process may do the same.
        `digests`: sha256 of files that need not be read for it once more.
        """
        fence()
        attempt = uuid.uuid4().hex[:12]
        prefix = f"artifacts/{spec.step}/{spec.digest[:16]}/{attempt}"
        files, begun = {}, boottime()
        with self._taken_back(prefix):
            for name in sorted(content_names(directory)):
                file = directory / name
                files[name] = FileEntry(sha256=digests.get(name) or sha256_file(file), size=file.stat().st_size)
                begun = boottime()
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
        path = manifest_path(spec.step, spec.digest)
        fence()
        if boottime() - begun > UNPUBLISHED_SECONDS:
            raise OrbitError(f"{prefix}: we slept for hours before the manifest, and gc may have come; run it again")
        won = self.store.put_if_absent(path, manifest.sealed())
        artifact = Artifact(self.store, manifest) if won else self.find(spec.step, spec.digest)
        if artifact is None:
            raise OrbitError(f"store {self.store.url}: {path} was refused as present and is not there")
        self._sweep(artifact, attempt)
        return artifact

    @contextmanager
    def _taken_back(self, prefix: str) -> Iterator[None]:
        """If the files cannot all be put, those that were must not fill the disk until gc comes."""
        try:
            yield
        except (OrbitError, OSError):
            with suppress(OrbitError, OSError):
                hasty = self.store.patient(1.0)
                for path in hasty.list(f"{prefix}/"):
                    hasty.delete(path)
            raise

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


def make_durable(file: Path) -> None:
    """Its bytes are on the disk when this returns."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
