"""Rollouts: a Parquet dataset with one file per step, and that file is the step's commit.

    rollouts/run=<run>/step=<000012>/rollouts.parquet

The file is put if absent, whole or not at all, so rows of a step appear together and never twice. Its footer holds,
under the key `orbit.commit`, the JSON of `Commit`: where the trainer's state after the step lies, the adapter's digest
and version, and the step's metrics. Commits of a run are contiguous from step 0.

Readers without our code: `datasets.load_dataset("parquet", data_files=glob)`, DuckDB's `read_parquet(glob)`, pyarrow's
`read_table(folder)` and `dataset(folder, partitioning="hive")`. Why the columns are called `run_id` and `step_index`:
the names `run` and `step` belong to the path, and readers disagree about the type of what they find there (pyarrow's
read_table: dictionary; pyarrow.dataset: string and int32; DuckDB: text, for the leading zeros), so that a column of the
same name in the file cannot please them all. Why `reward_parts` is a list of (name, value): `datasets` has no map type.

`SCHEMA` only grows: columns are added at the end, with a higher ROLLOUT_SCHEMA; none is renamed, retyped or removed.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from orbit_core.errors import InputError
from orbit_core.steps.contract import canonical_json
from orbit_core.store.base import Store
from orbit_core.store.parquet import damage_refused

ROLLOUT_SCHEMA = 1
COMMIT_KEY = b"orbit.commit"
_RESTORE = "restore the file; its bytes are not those that were committed"

_INT32, _FLOAT32 = pa.list_(pa.int32()), pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("step_index", pa.int32()),
        ("group_index", pa.int32()),
        ("sample_index", pa.int32()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),  # text as it is; chat messages as JSON
        ("label", pa.string()),  # JSON
        ("prompt_token_ids", _INT32),
        ("response", pa.string()),
        ("response_token_ids", _INT32),
        ("rollout_logprobs", _FLOAT32),  # as the engine sampled them; one per response token, like the three below
        ("trainer_logprobs", _FLOAT32),  # the trainer's own, before the step's first update
        ("reference_logprobs", _FLOAT32),  # adapter off; without a KL penalty only sample 0 of a group
        ("adapter_versions", _INT32),
        ("reward", pa.float64()),
        ("reward_parts", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))),
        ("advantage", pa.float64()),
        ("trained", pa.bool_()),  # False: filtered out
        ("finish_reason", pa.string()),
        ("base_digest", pa.string()),
        ("adapter_digest", pa.string()),  # of the adapter that sampled the row
        ("seed", pa.int64()),
        ("rollout_seconds", pa.float32()),  # of the batch that the row was generated in
        ("reward_seconds", pa.float32()),
    ],
    metadata={"orbit.schema": str(ROLLOUT_SCHEMA)},
)
# Wall-clock columns: the only ones in which two tries of a step may differ.
TIMING_COLUMNS = ("rollout_seconds", "reward_seconds")


class StateFile(BaseModel):
    model_config = ConfigDict(frozen=True)
    path: str
    sha256: str


class Commit(BaseModel):
    """What a committed step leaves behind for the next one, for reports and for a resumed run."""

    model_config = ConfigDict(frozen=True)
    schema_version: int = ROLLOUT_SCHEMA
    run: str
    step: int
    rows: int
    state: StateFile  # the trainer's state after the step
    adapter_version: int
    adapter_digest: str  # of the adapter after the step
    metrics: dict[str, float]
    previous: str | None  # digest of the previous step's commit

    @property
    def digest(self) -> str:
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()


def rollouts_path(run: str, step: int) -> str:
    return f"rollouts/run={run}/step={step:06d}/rollouts.parquet"


def encode_step(columns: dict[str, list[Any]], commit: Commit) -> bytes:
    """The Parquet file of a step: `columns` by SCHEMA's names, the commit in the footer."""
    metadata = {**(SCHEMA.metadata or {}), COMMIT_KEY: canonical_json(commit.model_dump(mode="json"))}
    table = pa.table(columns, schema=SCHEMA.with_metadata(metadata))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


class RolloutReader:
    """The committed steps of one run."""

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.run = store, run

    @property
    def glob(self) -> str:
        """Path or URL pattern of all files of the run, for `load_dataset` and DuckDB."""
        return self.store.url_of(f"rollouts/run={self.run}/step=*/rollouts.parquet")

    def last_step(self) -> int | None:
        """The last committed step, by a search over the contiguous steps: no listing, however long the run."""
        if not self._exists(0):
            return None
        above = 1
        while self._exists(above):
            above *= 2
        committed = above // 2
        while above - committed > 1:
            middle = (committed + above) // 2
            committed, above = (middle, above) if self._exists(middle) else (committed, middle)
        return committed

    def steps(self) -> range:
        last = self.last_step()
        return range(0 if last is None else last + 1)

    def commit(self, step: int) -> Commit:
        """The commit of a step, read from the file's footer. Raises InputError when the step is not committed."""
        path = rollouts_path(self.run, step)
        try:
            with damage_refused(path, "a whole Parquet file", _RESTORE):
                metadata = _footer(self.store, path)
        except FileNotFoundError:
            found = f"last committed step: {self.last_step()}"
            raise InputError(f"run {self.run}", f"step {step} committed", found, "name an earlier step") from None
        return _commit_in(metadata, path)

    def commits(self) -> Iterator[Commit]:
        """All commits in order; only footers are read."""
        steps = self.steps()
        with ThreadPoolExecutor(max_workers=8) as pool:
            yield from pool.map(self.commit, steps)

    def metrics(self) -> Iterator[dict[str, float]]:
        """One mapping per step: `step` and its metrics."""
        for commit in self.commits():
            yield {"step": commit.step, **commit.metrics}

    def rows(self, step: int) -> pa.Table:
        """All rows of a step, group by group. Raises InputError when the step is not committed."""
        self.commit(step)
        path = rollouts_path(self.run, step)
        with damage_refused(path, "a whole Parquet file", _RESTORE):
            return pq.read_table(io.BytesIO(self.store.read(path)))

    def _exists(self, step: int) -> bool:
        return self.store.exists(rollouts_path(self.run, step))


def _commit_in(metadata: dict[bytes, bytes], path: str) -> Commit:
    fix = f"this Orbit reads schema versions up to {ROLLOUT_SCHEMA}: read it with the one that wrote it"
    try:
        content = json.loads(metadata[COMMIT_KEY])
        version = content["schema_version"]
        if version not in range(1, ROLLOUT_SCHEMA + 1):
            raise InputError(path, f"schema version {ROLLOUT_SCHEMA}", f"schema version {version}"[:80], fix)
        return Commit.model_validate(content)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"[:300]
        raise InputError(path, f"a commit in the footer, under {COMMIT_KEY.decode()}", found, _RESTORE) from None


def list_runs(store: Store) -> list[str]:
    """Ids of all runs with a committed step, sorted."""
    found = (re.match(r"rollouts/run=([^/]+)/", path) for path in store.list("rollouts/"))
    return sorted({match[1] for match in found if match})


def _footer(store: Store, path: str) -> dict[bytes, bytes]:
    local = store.local_path(path)
    if local is not None:
        return pq.read_metadata(local).metadata or {}
    from fsspec.core import url_to_fs

    filesystem, key = url_to_fs(store.url_of(path), use_listings_cache=False)
    with filesystem.open(key, "rb", cache_type="readahead") as file:  # only the end of the file is fetched
        return pq.read_metadata(file).metadata or {}
