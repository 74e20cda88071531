"""What lies in a store against what was published: every byte is read, every damage named with what to do about it.

    artifacts    each manifest against its seal and the digest of its inputs, each file against its sha256
    runs         the chain of commits without a gap, every page of every Parquet file, the states of the last two steps
    promotions   entries without a gap, each naming an artifact that is there

Reads only. What may be removed is another question: cleaning.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from orbit_core.errors import InputError, OrbitError
from orbit_core.steps.contract import InputRef, StepSpec
from orbit_core.store import open_store, split_url
from orbit_core.store.artifacts import Artifact
from orbit_core.store.base import Store
from orbit_core.store.commits import KEEP_STATES, Commit, rollouts_path
from orbit_core.store.digests import sha256_of
from orbit_core.store.folder import FolderStore
from orbit_core.store.manifests import Manifest, manifest_path, read_manifest, redo_command
from orbit_core.store.rollouts import RolloutReader


@dataclass(frozen=True)
class Place:
    """Something in a store: `path` is "" for the whole of it."""

    store: Store
    path: str

    @property
    def manifest(self) -> str | None:
        """The path of the manifest if the place is an artifact, or something in one."""
        match = re.match(r"artifacts/(\w+)/([0-9a-f]{16})(/|\.json$|$)", self.path)
        return manifest_path(match[1], match[2]) if match else None

    @property
    def run(self) -> str | None:
        match = re.match(r"rollouts/run=([^/]+)", self.path)
        return match[1] if match else None


def place_of(text: str) -> Place:
    """What a person means by a folder or URL: a store, an artifact in one, or a run. InputError if there is nothing."""
    parts = split_url(text)
    url = text if parts is not None else str(Path(text).expanduser().absolute())
    inside = r"(.*)/(artifacts/\w+/[0-9a-f]{16}(?:[/.].*)?|rollouts/run=[^/]+(?:/.*)?)"
    match = re.fullmatch(inside, url.rstrip("/"))
    place = Place(open_store(match[1]), match[2]) if match else Place(open_store(url), "")
    if isinstance(place.store, FolderStore) and not place.store.root.is_dir():
        raise InputError(text, "a store, or an artifact or a run in one", "no such folder", "check the path")
    return place


def damages_of(place: Place, on_read: Callable[[str], None] = lambda what: None) -> Iterator[InputError]:
    """`on_read(what)` is called before each artifact and run that is read."""
    if place.manifest is not None:
        yield from artifact_damages(place.store, place.manifest, on_read)
        return
    if place.run is not None:
        yield from run_damages(place.store, place.run, on_read)
        return
    paths = place.store.list()
    for path in paths:
        if re.fullmatch(r"artifacts/[^/]+/[^/]+\.json", path):
            yield from artifact_damages(place.store, path, on_read)
    for run in sorted({match[1] for path in paths if (match := re.match(r"rollouts/run=([^/]+)/", path))}):
        yield from run_damages(place.store, run, on_read)
    for path in paths:
        if path.startswith("promotions/"):
            yield from _promotion_damages(place.store, path)


def artifact_damages(store: Store, path: str, on_read: Callable[[str], None]) -> Iterator[InputError]:
    """Of the artifact whose manifest is at `path`."""
    try:
        manifest = read_manifest(store, path)
    except FileNotFoundError:
        what = f"{path} in store {store.url}"
        yield InputError(what, "the manifest of an artifact", "no such file", "orbit run RECIPE makes what is missing")
        return
    except InputError as damage:
        yield damage
        return
    on_read(f"{manifest.step}/{manifest.digest[:16]}")
    found = spec_of(manifest, store.url).digest
    if found != manifest.digest or path != manifest_path(manifest.step, manifest.digest):
        where = redo_command(store.url_of(path))
        yield InputError(f"manifest {path} in store {store.url}", f"that of {found[:16]}", manifest.digest[:16], where)
    yield from Artifact(store, manifest).damages()


def spec_of(manifest: Manifest, store: str, own: dict[str, str] | None = None) -> StepSpec:
    """The spec that an artifact was made from; `own`: where a person's own inputs lie, which no manifest says."""
    inputs = {
        name: InputRef(digest=str(ref["digest"]), step=ref["step"], path=(own or {}).get(name))
        for name, ref in manifest.inputs.items()
    }
    return StepSpec(step=manifest.step, version=manifest.version, params=manifest.params, inputs=inputs, store=store)


def run_damages(store: Store, run: str, on_read: Callable[[str], None]) -> Iterator[InputError]:
    """Of the commits and rows of a run."""
    on_read(f"run {run}")
    reader = RolloutReader(store, run)
    steps, previous = reader.steps(), None
    listed = store.list(f"rollouts/run={run}/")
    if beyond := [path for path in listed if path > rollouts_path(run, len(steps))]:
        gap = rollouts_path(run, len(steps))
        yield _lost(store, gap, "a commit, as later steps have one", f"none, and {beyond[0]}")
    for step in steps:
        path = rollouts_path(run, step)
        try:
            commit: Commit = reader.commit(step)
            rows = pq.read_table(
                pa.BufferReader(store.read(path)), page_checksum_verification=True, use_threads=False
            ).num_rows
        except (OSError, OrbitError, ValidationError, ValueError) as error:
            yield _lost(store, path, "the Parquet file that was committed", f"{type(error).__name__}: {error}")
            previous = None
            continue
        if rows != commit.rows or (commit.run, commit.step) != (run, step):
            yield _lost(store, path, f"{commit.rows} rows of run {run}, step {step}", f"{rows} rows of {commit.run}")
        if previous is not None and commit.previous != previous.digest:
            yield _lost(store, rollouts_path(run, step - 1), f"the commit {commit.previous}", previous.digest)
        if step >= len(steps) - KEEP_STATES:
            yield from _state_damages(store, commit)
        previous = commit


def _state_damages(store: Store, commit: Commit) -> Iterator[InputError]:
    try:
        found = sha256_of(store.chunks(commit.state.path))
    except FileNotFoundError:
        found = "no such file"
    if found != commit.state.sha256:
        yield _lost(store, commit.state.path, f"sha256 {commit.state.sha256}", found)


def _promotion_damages(store: Store, path: str) -> Iterator[InputError]:
    try:
        entry = json.loads(store.read(path))
        number, publish = int(entry["number"]), str(entry["publish"])
    except (ValueError, KeyError, TypeError) as error:
        yield _lost(store, path, "an entry of the history of promotions", f"{type(error).__name__}: {error}")
        return
    before = re.sub(r"\d+\.json$", f"{number - 1:06d}.json", path)
    if number > 1 and not store.exists(before):
        yield _lost(store, before, "an entry, as a later one follows it", "no such file")
    if not store.exists(manifest_path("publish", publish)):
        yield _lost(store, path, f"its artifact publish/{publish[:16]}", "no such artifact")


def _lost(store: Store, path: str, expected: str, found: str) -> InputError:
    fix = "restore the file from a copy; what was sampled cannot be made again by another run"
    return InputError(f"{path} in store {store.url}", expected, found, fix)
