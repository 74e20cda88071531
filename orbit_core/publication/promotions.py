"""Which adapter serves: a numbered history in the store, written entry by entry and never changed.

    promotions/<name>/000001.json, 000002.json, ...      the newest entry is the adapter in use

An entry is put only if its number is free, so of two that follow the same entry exactly one is written and the other
raises Overtaken. Going back is a new entry that points at an older artifact: nothing is copied, nothing is lost, and
the change is one atomic write. A consumer lists the folder, reads the last entry and finds under `adapter` a directory
of the store whose bytes never change.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from orbit_core.errors import InputError, OrbitError
from orbit_core.steps.contract import InputRef, canonical_json
from orbit_core.store.artifacts import Artifact, ArtifactStore
from orbit_core.store.base import Store
from orbit_core.store.manifests import read_manifest

SCHEMA = 1
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")
_NUMBER = re.compile(r"/(\d{6,})\.json$")


class Overtaken(OrbitError):
    """Somebody else wrote the next entry first; what was decided was decided against an entry that is no longer the
    newest."""


class Published(BaseModel):
    """A published adapter as the registry names it. All digests are hex."""

    model_config = ConfigDict(frozen=True)
    publish: str  # digest of the publish artifact
    train: str  # digest of the train artifact: what a warm start starts from
    warm_start: str | None  # digest of the train artifact that this one started from
    base_digest: str  # digest of the quantised base that it was trained and evaluated on
    adapter_digest: str  # of the tensors: equal wherever they lie
    adapter: str  # PEFT directory, relative to the store
    accuracy: float  # greedy, on held-out prompts
    prompts: int  # how many of them

    @classmethod
    def of(cls, artifact: Artifact) -> Published:
        """From the publish artifact and the train and evaluate artifacts that it was made of."""
        store, inputs = ArtifactStore(artifact.store), artifact.manifest.inputs
        trained, evaluated = (_input(store, artifact, step) for step in ("train", "evaluate"))
        start = trained.manifest.inputs.get("warm_start", {})
        return cls(
            publish=artifact.manifest.digest,
            train=trained.manifest.digest,
            warm_start=start.get("digest") if start.get("step") == "train" else None,
            base_digest=str(inputs["quantized"]["digest"]),
            adapter_digest=artifact.facts["adapter_digest"],
            adapter=f"{artifact.prefix}/adapter",
            accuracy=evaluated.facts["accuracy_after"],
            prompts=evaluated.facts["prompts"],
        )


class Promotion(Published):
    """One entry of the history."""

    schema_version: int = SCHEMA
    id: str  # of the writer: whose entry it is, where a store cannot say
    name: str
    number: int
    replaced: int | None  # the entry that was the newest
    restores: int | None = None  # a rollback: the entry whose adapter serves again
    when: str  # UTC, ISO 8601
    why: str

    @property
    def warm_start_ref(self) -> InputRef | None:
        return InputRef(step="train", digest=self.warm_start) if self.warm_start else None


class Promotions:
    """The history of one name."""

    def __init__(self, store: Store, name: str) -> None:
        if not NAME.fullmatch(name):
            raise InputError(f"name {name!r}", "a recipe's name: lower-case letters, digits, -", name)
        self.store, self.name = store, name

    def entries(self) -> list[Promotion]:
        """All entries, oldest first."""
        return [self._read(self._path(number)) for number in range(1, self._last() + 1)]

    def newest(self) -> Promotion | None:
        last = self._last()
        return self._read(self._path(last)) if last else None

    def promote(self, adapter: Published, after: Promotion | None, why: str) -> Promotion:
        """Write `adapter` as the entry that follows `after`; Overtaken if another one does already."""
        return self._append(adapter, after, why)

    def roll_back(self, to: int | None = None, why: str = "") -> Promotion:
        """Put an earlier adapter back to use: that of entry `to`, else the one that the present one replaced.

        Going back twice goes back two adapters. Raises InputError when there is nothing to go back to or its files are
        not what was published.
        """
        entries = {entry.number: entry for entry in self.entries()}
        if not entries:
            raise InputError(f"promotions of {self.name}", "at least one", f"none in store {self.store.url}")
        newest = entries[max(entries)]
        target = self._target(entries, newest, to)
        self._check_files(target)
        why = why or f"back from {newest.number} to {target.number}"
        return self._append(Published.model_validate(target.model_dump()), newest, why, restores=target.number)

    def _target(self, entries: dict[int, Promotion], newest: Promotion, to: int | None) -> Promotion:
        serving = entries[newest.restores or newest.number]
        if to is None and serving.replaced is not None:
            earlier = entries[serving.replaced]
            return entries[earlier.restores or earlier.number]
        if to is None:
            raise InputError(
                f"rollback of {self.name}",
                "an adapter before the present one",
                f"entry {serving.number} serves, the first",
                f"name one: orbit rollback {self.name} --to N",
            )
        if to not in entries:
            raise InputError(f"rollback of {self.name} to {to}", f"one of 1 to {max(entries)}", f"no entry {to}")
        target = entries[entries[to].restores or to]
        if target.publish == newest.publish:
            raise InputError(f"rollback of {self.name} to {to}", "another adapter than the present one", "the same")
        return target

    def _append(self, adapter: Published, after: Promotion | None, why: str, restores: int | None = None) -> Promotion:
        entry = Promotion(
            **adapter.model_dump(include=set(Published.model_fields)),
            id=uuid.uuid4().hex,
            name=self.name,
            number=1 + (after.number if after else 0),
            replaced=after.number if after else None,
            restores=restores,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            why=why,
        )
        path = self._path(entry.number)
        if self.store.put_if_absent(path, canonical_json(entry.model_dump(mode="json"))):
            return entry
        written = self._read(path)
        if written.id != entry.id:  # else it is ours: the answer to a first try was lost
            raise Overtaken(
                f"promotions of {self.name}: number {entry.number} was written meanwhile\n"
                f"  found: {written.when}, {written.why}\n"
                f"  what to do: look at it (orbit promotions {self.name}) and decide again"
            )
        return written

    def _check_files(self, entry: Promotion) -> None:
        """An adapter that is put back to use must be, byte for byte, what was published."""
        artifact = ArtifactStore(self.store).find("publish", entry.publish)
        if artifact is None:
            raise InputError(
                f"entry {entry.number} of {self.name}", f"artifact publish/{entry.publish[:16]}", "it is gone"
            )
        for name, file in artifact.manifest.files.items():
            if name.startswith("adapter/"):
                found = hashlib.sha256(self.store.read(f"{artifact.prefix}/{name}")).hexdigest()
                if found != file.sha256:
                    raise InputError(f"{artifact.prefix}/{name}", f"sha256 {file.sha256}", found)

    def _read(self, path: str) -> Promotion:
        entry = Promotion.model_validate_json(self.store.read(path))
        if entry.schema_version > SCHEMA:
            raise OrbitError(f"{path}: schema version {entry.schema_version}, this Orbit reads {SCHEMA}")
        return entry

    def _last(self) -> int:
        """Number of the newest entry; 0: none. They have no gaps, and a listing only says where to begin: it may be
        late, and an adapter that has been replaced must not be taken for the one that serves."""
        listed = self.store.list(f"promotions/{self.name}/")
        last = max((int(found[1]) for path in listed if (found := _NUMBER.search(path))), default=0)
        while self.store.exists(self._path(last + 1)):
            last += 1
        return last

    def _path(self, number: int) -> str:
        return f"promotions/{self.name}/{number:06d}.json"


def find_published(store: Store, digest: str) -> Artifact:
    """The published artifact whose digest begins with `digest` (8 hex digits or more)."""
    if not re.fullmatch(r"[0-9a-f]{8,64}", digest):
        raise InputError(f"published adapter {digest!r}", "8 to 64 hex digits of its digest", digest)
    whole = f"artifacts/publish/{digest[:16]}.json"
    if len(digest) >= 16:  # no listing, which may be late
        paths = [whole] if store.exists(whole) else []
    else:
        paths = [path for path in store.list(f"artifacts/publish/{digest}") if path.count("/") == 2]
    manifests = [read_manifest(store, path) for path in paths]
    found = [manifest for manifest in manifests if manifest.digest.startswith(digest)]
    if len(found) != 1:
        fix = "give more digits" if found else "run the recipe first (orbit run), or name another store"
        raise InputError(f"published adapter {digest}", f"one in store {store.url}", str(len(found) or "none"), fix)
    return Artifact(store, found[0])


def trained_as(store: Store, name: str, adapter: str) -> str:
    """Digest of the train artifact behind `promoted`, the number of a promotion, or a published adapter's digest."""
    promotions = Promotions(store, name)
    if adapter != "promoted" and not re.fullmatch(r"[0-9]{1,6}", adapter):
        return Published.of(find_published(store, adapter)).train
    entries = promotions.entries()
    chosen = entries[-1:] if adapter == "promoted" else [each for each in entries if each.number == int(adapter)]
    if not chosen:
        raise InputError(
            f"adapter {adapter!r} of {name}",
            "a promotion" if not entries else f"one of 1 to {len(entries)}",
            "none" if not entries else adapter,
            f"orbit promotions {name} shows them; orbit promote {name} DIGEST makes one",
        )
    return chosen[0].train


def _input(store: ArtifactStore, artifact: Artifact, step: str) -> Artifact:
    digest = str(artifact.manifest.inputs[step]["digest"])
    found = store.find(step, digest)
    if found is None:
        raise InputError(
            f"artifact publish/{artifact.manifest.digest[:16]}", f"{step}/{digest[:16]} beside it", "it is gone"
        )
    return found
