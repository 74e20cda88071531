"""Compaction: larger files for whoever scans a run, and no instant at which a reader sees a row twice or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from long_run import no_fsync
from plain_steps import commit_step, keys

from orbit_core.errors import OrbitError
from orbit_core.store import commits as layout
from orbit_core.store import open_store
from orbit_core.store.commits import block_path, compacted_path, rollouts_path
from orbit_core.store.compaction import compact
from orbit_core.store.rollouts import SCHEMA, RolloutReader, encode_step

RUN = "0a1b2c3d"
SMALL = 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(layout, "BLOCK", SMALL)
    with no_fsync():
        yield


def store_of(folder: Path, steps: int):
    store = open_store(folder)
    for step in range(steps):
        commit_step(store, RUN, step)
    return store


def keys_in(table) -> list[tuple]:
    names = ("run_id", "step_index", "group_index", "sample_index")
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def read(paths) -> list[tuple]:
    """The keys in the files, one after the other."""
    columns = ["run_id", "step_index", "group_index", "sample_index"]
    return [key for path in paths for key in keys_in(pq.ParquetFile(path).read(columns=columns))]


def read_by_duckdb(paths: str | list[str]) -> list[tuple]:
    names = "run_id, step_index, group_index, sample_index"
    return duckdb.connect().sql(f"select {names} from read_parquet({paths!r}) order by all").fetchall()


def test_whole_blocks_are_compacted_once_and_the_rest_waits(tmp_path: Path) -> None:
    store = store_of(tmp_path, 10)
    assert compact(store, RUN) == 2
    assert store.list("compacted/") == [
        f"compacted/run={RUN}/{name}.parquet" for name in ("000000-000003", "000004-000007")
    ]
    assert compact(store, RUN) == 0
    for step in (10, 11):
        commit_step(store, RUN, step)
    assert compact(store, RUN) == 1
    assert compact(store, "nobody") == 0


def test_a_compacted_file_holds_the_steps_rows_value_for_value(tmp_path: Path) -> None:
    store = store_of(tmp_path, SMALL)
    compact(store, RUN)
    compacted = pq.read_table(store.url_of(compacted_path(RUN, range(SMALL))), partitioning=None)
    steps = [RolloutReader(store, RUN).rows(step) for step in range(SMALL)]
    assert compacted.column_names == SCHEMA.names
    assert compacted.to_pylist() == [row for rows in steps for row in rows.to_pylist()]


def test_each_step_is_a_row_group_whose_statistics_name_it(tmp_path: Path) -> None:
    store = store_of(tmp_path, SMALL)
    compact(store, RUN)
    footer = pq.read_metadata(store.url_of(compacted_path(RUN, range(SMALL))))
    column = SCHEMA.names.index("step_index")
    ranges = [footer.row_group(n).column(column).statistics for n in range(footer.num_row_groups)]
    assert [(each.min, each.max) for each in ranges] == [(step, step) for step in range(SMALL)]


def test_plain_readers_of_either_folder_see_every_row_once(tmp_path: Path) -> None:
    store = store_of(tmp_path, 10)
    compact(store, RUN)
    everything = keys(RUN, range(10))
    for folder, expected in (("rollouts", everything), ("compacted", everything[:16])):
        assert keys_in(pyarrow.dataset.dataset(tmp_path / folder, partitioning="hive").to_table()) == expected
        assert read_by_duckdb(f"{tmp_path}/{folder}/**/*.parquet") == expected
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(tmp_path / "compacted"), split="train", cache_dir=str(tmp_path / "cache"))
    assert keys_in(loaded.data.table) == everything[:16]


def test_files_are_few_and_hold_every_row_of_the_steps_once(tmp_path: Path) -> None:
    store = store_of(tmp_path, 10)
    compact(store, RUN)
    reader = RolloutReader(store, RUN)
    assert len(reader.files()) == 2 + 2
    assert read_by_duckdb(reader.files()) == keys(RUN, range(10))
    assert len(reader.files(range(2, 10))) == 2 + 1 + 2
    assert read_by_duckdb(reader.files(range(2, 7))) == keys(RUN, range(2, 7))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(st.one_of(st.integers(1, 6), st.sampled_from(["compact", "lose a block"])), max_size=8))
def test_whatever_the_history_readers_see_every_row_once(history: list[int | str]) -> None:
    """Numbers commit as many steps; a lost block is one that a killed compactor had not come to."""
    with tempfile.TemporaryDirectory() as folder:
        store, steps = open_store(folder), 0
        reader = RolloutReader(store, RUN)
        for event in history:
            if isinstance(event, int):
                for step in range(steps, steps + event):
                    commit_step(store, RUN, step)
                steps += event
            elif event == "compact":
                compact(store, RUN)
                assert len(reader.compacted_blocks()) == steps // SMALL
            elif blocks := reader.compacted_blocks():
                store.delete(compacted_path(RUN, blocks[len(blocks) // 2]))
            if steps:
                assert read(reader.files()) == keys(RUN, range(steps))
                assert read(sorted(Path(folder).glob("rollouts/**/*.parquet"))) == keys(RUN, range(steps))
        assert [commit.step for commit in reader.commits()] == list(range(steps))


def test_a_reader_beside_two_compactors_and_a_growing_run_sees_each_row_once(tmp_path: Path) -> None:
    store = store_of(tmp_path, 8)
    reader, wrong = RolloutReader(store, RUN), []
    committed, stop = [8], threading.Event()

    def grow() -> None:
        for step in range(8, 48):
            commit_step(open_store(tmp_path), RUN, step)
            committed[0] = step + 1

    def keep_compacting() -> None:
        while not stop.is_set():
            compact(open_store(tmp_path), RUN)

    threads = [threading.Thread(target=grow), *(threading.Thread(target=keep_compacting) for _ in range(2))]
    for thread in threads:
        thread.start()
    looks = 0
    while threads[0].is_alive() or looks < 5:
        steps = range(committed[0])
        if read(reader.files(steps)) != keys(RUN, steps):
            wrong.append(steps)
        found = read(tmp_path.glob("compacted/**/*.parquet"))
        if len(found) != len(set(found)) or len(found) % (2 * SMALL):
            wrong.append(found)
        looks += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert compact(store, RUN) == 0 or len(reader.compacted_blocks()) == 12


def test_a_compactor_killed_at_any_write_changes_nothing_that_a_reader_sees(tmp_path: Path) -> None:
    store_of(tmp_path / "store", 2 * SMALL + 1)
    (tmp_path / "work").mkdir()
    host = Path(__file__).parent / "kill_compactor.py"
    arguments = [str(tmp_path / "store"), RUN, str(SMALL), str(tmp_path / "work")]
    answer = subprocess.run([sys.executable, str(host), *arguments], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result["wrong"] == []
    assert result["kinds"] == ["link", "mkdir", "put_if_absent", "rename"]
    assert result["boundaries"] >= 30


def test_commits_of_a_run_of_an_earlier_orbit_get_their_blocks_too(tmp_path: Path) -> None:
    store = store_of(tmp_path, 9)
    compact(store, RUN)
    assert [store.exists(block_path(RUN, block)) for block in (range(4), range(4, 8))] == [True, True]
    assert [commit.metrics["reward_mean"] for commit in RolloutReader(store, RUN).commits()] == list(
        map(float, range(9))
    )


def test_rows_of_an_earlier_schema_are_filled_up_with_nulls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, SMALL)
    grown = SCHEMA.append(pyarrow.field("came_later", pyarrow.float32()))
    monkeypatch.setattr("orbit_core.store.compaction.SCHEMA", grown)
    compact(store, RUN)
    table = pq.read_table(store.url_of(compacted_path(RUN, range(SMALL))), partitioning=None)
    assert table["came_later"].null_count == table.num_rows == 2 * SMALL


def test_a_step_that_lost_rows_is_named_and_not_compacted(tmp_path: Path) -> None:
    store = store_of(tmp_path, SMALL)
    commit = RolloutReader(store, RUN).commit(2)
    store.put(rollouts_path(RUN, 2), encode_step({name: [] for name in SCHEMA.names}, commit))
    with pytest.raises(OrbitError, match=r"step 2[\s\S]*2 rows, as its commit says[\s\S]*found: 0"):
        compact(store, RUN)
    assert store.list("compacted/") == []


def test_on_s3_compaction_gives_the_same_files(s3_url: str, tmp_path: Path) -> None:
    local, remote = store_of(tmp_path, SMALL + 1), open_store(s3_url)
    for step in range(SMALL + 1):
        commit_step(remote, RUN, step)
    compact(local, RUN)
    compact(remote, RUN)
    assert remote.list("compacted/") == local.list("compacted/")
    path = compacted_path(RUN, range(SMALL))
    assert remote.read(path) == local.read(path)
