"""Rollouts: a Parquet dataset with one file per step, and that file is the step's commit.

    rollouts/run=<run>/step=<000012>/rollouts.parquet

The file is put if absent, whole or not at all, so rows of a step appear together and never twice. Its footer holds,
under the key `orbit.commit`, the JSON of `Commit`: where the trainer's state after the step lies, the adapter's digest
and version, and the step's metrics. Commits of a run are contiguous from step 0.

A whole run is read faster from `compacted/`, which repeats the rows in larger files: see store.compaction.

Readers without our code: `datasets.load_dataset("parquet", data_files=glob)`, DuckDB's `read_parquet(glob)`, pyarrow's
`read_table(folder)` and `dataset(folder, partitioning="hive")`. Why the columns are called `run_id` and `step_index`:
the names `run` and `step` belong to the path, and readers disagree about the type of what they find there (pyarrow's
read_table: dictionary; pyarrow.dataset: string and int32; DuckDB: text, for the leading zeros), so that a column of the
same name in the file cannot please them all. Why `reward_parts` is a list of (name, value): `datasets` has no map type.

`SCHEMA` only grows: columns are added at the end, with a higher ROLLOUT_SCHEMA; none is renamed, retyped or removed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orbit_core.errors import InputError
from orbit_core.steps.contract import canonical_json
from orbit_core.store.base import Store
from orbit_core.store.commits import (
    ROLLOUT_SCHEMA,
    Commit,
    StateFile,
    block_of_name,
    block_path,
    blocks_over,
    compacted_path,
    decode_block,
    rollouts_path,
    states_prefix,
    step_of_state,
)
from orbit_core.store.parquet import damage_refused

__all__ = [
    "COMMIT_KEY",
    "ROLLOUT_SCHEMA",
    "SCHEMA",
    "TIMING_COLUMNS",
    "Commit",
    "RolloutReader",
    "StateFile",
    "encode_step",
    "list_runs",
    "rollouts_path",
]
COMMIT_KEY = b"orbit.commit"
FOOTER_BYTES = 64 * 1024  # fetched at first: holds the footer of nearly every step
READS_AT_ONCE = 8
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


def encode_step(columns: dict[str, list[Any]], commit: Commit) -> bytes:
    """The Parquet file of a step: `columns` by SCHEMA's names, the commit in the footer."""
    metadata = {**(SCHEMA.metadata or {}), COMMIT_KEY: canonical_json(commit.model_dump(mode="json"))}
    table = pa.table(columns, schema=SCHEMA.with_metadata(metadata))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


class RolloutReader:
    """The committed steps of one run."""

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.run = store, run

    @property
    def glob(self) -> str:
        """Path or URL pattern of all files of the run, for `load_dataset` and DuckDB."""
        return self.store.url_of(f"rollouts/run={self.run}/step=*/rollouts.parquet")

    def compacted_blocks(self) -> list[range]:
        """The blocks of steps whose rows also lie in one file, in order; see store.compaction."""
        found = map(block_of_name, self.store.names(f"compacted/run={self.run}"))
        return sorted((block for block in found if block is not None), key=lambda block: block.start)

    def files(self, steps: range | None = None) -> list[str]:
        """Paths or URLs of Parquet files that together hold every row of `steps` (default: all committed) exactly
        once, in order: compacted ones where they lie inside `steps`, else those of the steps.
        """
        steps = self.steps() if steps is None else steps
        compacted = {block.start: block for block in self.compacted_blocks() if block.stop <= steps.stop}
        paths, step = [], steps.start
        while step < steps.stop:
            block = compacted.get(step)
            paths.append(compacted_path(self.run, block) if block else rollouts_path(self.run, step))
            step = block.stop if block else step + 1
        return [self.store.url_of(path) for path in paths]

    def last_step(self) -> int | None:
        """The last committed step, for the same few requests however long the run.

        Commits are contiguous, so two looks prove it: one is there and the next is not. Where to look first is a hint
        from the saved states, of which only the last ones are kept; a hint that misleads costs a search, no more.
        """
        states = map(step_of_state, self.store.list(states_prefix(self.run)))
        return self._search(near=max((step for step in states if step is not None), default=0))

    def _search(self, near: int) -> int | None:
        """From `near` in steps of 1, 2, 4, ... to a committed and an uncommitted step, then between the two."""
        committed, above, stride = -1, near, 1
        if self._exists(near):
            committed, above = near, near + 1
            while self._exists(above):
                committed, stride = above, stride * 2
                above += stride
        else:
            while above - stride >= 0 and not self._exists(above - stride):
                above, stride = above - stride, stride * 2
            committed = max(-1, above - stride)
        while above - committed > 1:
            middle = (committed + above) // 2
            committed, above = (middle, above) if self._exists(middle) else (committed, middle)
        return None if committed < 0 else committed

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

    def commits(self, steps: range | None = None) -> Iterator[Commit]:
        """The commits of `steps` (all committed; default: every one) in order, without touching rows: a block at a
        time where a block was written, footers elsewhere.
        """
        steps = self.steps() if steps is None else steps
        blocks = blocks_over(steps)
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            for first in range(0, len(blocks), READS_AT_ONCE):  # not all at once: memory does not grow with the run
                window = blocks[first : first + READS_AT_ONCE]
                for block, written in zip(window, pool.map(self._block, window), strict=True):
                    wanted = range(max(block.start, steps.start), min(block.stop, steps.stop))
                    if written is None:
                        yield from pool.map(self.commit, wanted)
                    else:
                        yield from (commit for commit in written if commit.step in wanted)

    def _block(self, block: range) -> list[Commit] | None:
        try:
            content = self.store.read(block_path(self.run, block))
        except FileNotFoundError:
            return None
        return decode_block(content, self.run, block)

    def metrics(self) -> Iterator[dict[str, float]]:
        """One mapping per step: `step` and its metrics."""
        for commit in self.commits():
            yield {"step": commit.step, **commit.metrics}

    def rows(self, step: int, columns: Sequence[str] | None = None, group: int | None = None) -> pa.Table:
        """Rows of a step, group by group; of `columns` and one `group` only, if given, and then no more is read.

        Raises InputError when the step is not committed.
        """
        self.commit(step)
        path = rollouts_path(self.run, step)
        wanted = None if group is None else pc.field("group_index") == group
        with damage_refused(path, "a whole Parquet file", _RESTORE):
            if columns is None and wanted is None:
                return pq.read_table(io.BytesIO(self.store.read(path)))
            with self.store.open(path) as file:
                return pq.read_table(file, columns=None if columns is None else list(columns), filters=wanted)

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
    """Ids of all runs with a committed step, sorted; costs by the number of runs, not of their steps."""
    runs = [name.removeprefix("run=") for name in store.names("rollouts") if name.startswith("run=")]
    return [run for run in runs if store.exists(rollouts_path(run, 0))]


def _footer(store: Store, path: str) -> dict[bytes, bytes]:
    """The metadata in the footer of a Parquet file; only the end of the file is fetched."""
    content = store.read_end(path, FOOTER_BYTES)
    length = int.from_bytes(content[-8:-4], "little") + 8
    if length > len(content) == FOOTER_BYTES:
        content = store.read_end(path, length)
    return pq.read_metadata(io.BytesIO(content)).metadata or {}
