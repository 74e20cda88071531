"""Compaction: the rows of many steps once more, in files as large as readers of a whole run like them.

    compacted/run=<run>/000000-000099.parquet    the rows of a block of steps; each step is a row group of its own

For whoever scans millions of rows: a hundred times fewer files to open, and of each step's row group the statistics of
`step_index` say whether it is wanted. What readers are promised, at every instant, also while a compactor works or
after it was killed anywhere:
- A reader of `rollouts/` sees every committed row exactly once. Compaction only reads there.
- A reader of `compacted/` sees every row of the steps named by the files it finds exactly once: the ranges are fixed,
  never overlap, and a file is put whole, only if absent, and never replaced or removed.
- `RolloutReader.files()` names files that together hold every committed row exactly once, the compacted ones where
  there are any. As no file ever goes away, such a list stays good.
No pattern over one of the two folders reaches into the other, so a row is seen twice only by who asks for both.

The price: the rows are stored twice. The steps' files stay because they are the commits, and because no store can make
one file appear and a hundred disappear at one instant: in between, a reader with a pattern (DuckDB, datasets, pyarrow)
would see rows twice or not at all.

A step is held in memory at a time, never a block. Two compactors may race: the first file stands, and the second's
holds the same rows.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from orbit_core.errors import OrbitError
from orbit_core.store.base import Store
from orbit_core.store.commits import Commit, block_path, blocks_over, compacted_path, encode_block, last_whole_block
from orbit_core.store.rollouts import SCHEMA, RolloutReader

COMPACTED_KEY = b"orbit.compacted"


def compact(store: Store, run: str, on_block: Callable[[range, bool], None] = lambda block, made: None) -> int:
    """Compact all whole blocks of the run that are not; returns how many were. The last steps stay as they are until
    their block is full. Blocks of commits that are missing (of a run recorded by an earlier Orbit) are written, too.

    `on_block(block, made)` is called for each block, `made` False for one that is there already. Raises OrbitError when
    a step's rows are not as many as its commit says; what is wrong is not compacted.
    """
    reader = RolloutReader(store, run)
    whole = last_whole_block(len(reader.steps()))
    there, made = set(reader.compacted_blocks()), 0
    for block in blocks_over(range(whole.stop)) if whole else []:
        if not store.exists(block_path(run, block)):
            store.put_if_absent(block_path(run, block), encode_block(list(reader.commits(block))))
        if block not in there:
            _compact_block(reader, block)
            made += 1
        on_block(block, block not in there)
    return made


def _compact_block(reader: RolloutReader, block: range) -> None:
    about = json.dumps({"run": reader.run, "first_step": block.start, "last_step": block.stop - 1}).encode()
    schema = SCHEMA.with_metadata({**(SCHEMA.metadata or {}), COMPACTED_KEY: about})
    with tempfile.TemporaryDirectory(prefix="orbit-compact-") as folder:
        file = Path(folder) / "block.parquet"
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for commit in reader.commits(block):
                writer.write_table(_rows(reader, commit).cast(schema))
        reader.store.put_if_absent(compacted_path(reader.run, block), file, move=True)


def _rows(reader: RolloutReader, commit: Commit) -> pa.Table:
    """The rows of a step in today's schema: columns that came later are null."""
    rows = reader.rows(commit.step)
    if rows.num_rows != commit.rows:
        raise OrbitError(
            f"run {reader.run}, step {commit.step}\n  expected: {commit.rows} rows, as its commit says\n"
            f"  found: {rows.num_rows}\n  what to do: restore the step's file; it has changed since it was committed"
        )
    for field in SCHEMA:
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    return rows.select(SCHEMA.names)
