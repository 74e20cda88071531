"""The manifest of an artifact: what it is, what it was made of, and the sha256 of each of its files.

Since schema 2 a manifest is sealed: canonical JSON whose field `seal` is the sha256 of the rest, so that a flipped bit
in the manifest itself is found like one in a file.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from orbit_core.errors import InputError
from orbit_core.steps.contract import canonical_json, json_digest
from orbit_core.store.base import Store

SCHEMA = 2


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

    @property
    def prefix(self) -> str:
        """Where the files lie in the store."""
        return f"artifacts/{self.step}/{self.digest[:16]}/{self.attempt}"

    def sealed(self) -> bytes:
        fields = self.model_dump(mode="json")
        return canonical_json({**fields, "seal": json_digest(fields)})


def manifest_path(step: str, digest: str) -> str:
    return f"artifacts/{step}/{digest[:16]}.json"


def read_manifest(store: Store, path: str) -> Manifest:
    """The manifest at `path` of the store. Raises FileNotFoundError, and InputError for one that is damaged."""
    content = store.read(path)
    try:
        fields = json.loads(content)
        version = int(fields["schema_version"])
        if version == SCHEMA:
            seal = fields.pop("seal")
            if content != canonical_json({**fields, "seal": seal}):
                raise ValueError("not the canonical JSON that was written")
            if seal != json_digest(fields):
                raise ValueError("its seal does not fit its fields")
        manifest = Manifest.model_validate(fields) if 1 <= version <= SCHEMA else None
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise InputError(
            f"manifest {path} in store {store.url}",
            "the bytes that were published",
            f"{type(error).__name__}: {error}",
            redo_command(store.url_of(path)),
        ) from None
    if manifest is None:
        raise InputError(
            f"manifest {path} in store {store.url}",
            f"schema version 1 to {SCHEMA}, which this Orbit reads",
            f"{version}",
            f"use the Orbit that wrote it; if there is none, {redo_command(store.url_of(path))}",
        )
    return manifest


def redo_command(url: str, inputs: dict[str, dict[str, str | None]] | None = None) -> str:
    """What makes an artifact again: steps find their inputs in the store, a person's own files have to be named."""
    own = [name for name, ref in (inputs or {}).items() if ref["step"] is None]
    return f"orbit redo {url}" + "".join(f" --input {name}=PATH" for name in own)
