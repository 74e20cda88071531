"""Rollouts as other people's tools see them: no code of ours, no options beyond what their manuals show."""

from __future__ import annotations

import sys
from pathlib import Path

import duckdb
import pandas
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit_core.errors import InputError
from orbit_core.store import open_store
from orbit_core.store.commits import states_prefix
from orbit_core.store.rollouts import (
    COMMIT_KEY,
    SCHEMA,
    Commit,
    RolloutReader,
    StateFile,
    encode_step,
    list_runs,
    rollouts_path,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "rl"))
from bandit import ALGORITHM, bandit_loop

RUNS = ("0a1b2c3d4e5f6071", "0000000000000012")  # the second looks like a number, which readers like to convert
ROWS = ALGORITHM.steps * ALGORITHM.prompts_per_step * ALGORITHM.samples_per_prompt


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = open_store(tmp_path_factory.mktemp("store"))
    for run in RUNS:
        bandit_loop(made, run).run()
    return made


@pytest.fixture(scope="module")
def folder(store):
    return store.url_of("rollouts")


def is_whole(frame: pandas.DataFrame) -> bool:
    """All rows once, tokens and log-probs in step, and the run's id as it was written."""
    keys = frame[["run_id", "step_index", "group_index", "sample_index"]].drop_duplicates()
    aligned = (frame["response_token_ids"].map(len) == frame["rollout_logprobs"].map(len)).all()
    return len(frame) == len(keys) == 2 * ROWS and set(frame["run_id"]) == set(RUNS) and bool(aligned)


def test_pyarrow_reads_the_folder_with_and_without_partitions(folder):
    for table in (
        pq.read_table(folder),
        pq.read_table(folder, partitioning=None),
        pyarrow.dataset.dataset(folder, partitioning="hive").to_table(),
        pyarrow.dataset.dataset(folder).to_table(),
    ):
        assert is_whole(table.to_pandas())
        assert [name for name in table.column_names if name in SCHEMA.names] == SCHEMA.names


def test_pyarrow_prunes_by_the_path(folder):
    dataset = pyarrow.dataset.dataset(folder, partitioning="hive")
    one = dataset.to_table(filter=pyarrow.dataset.field("step") == 1)
    assert set(one["step_index"].to_pylist()) == {1}
    assert one.num_rows == 2 * ROWS // ALGORITHM.steps


def test_pandas_reads_the_folder(folder):
    assert is_whole(pandas.read_parquet(folder))


@pytest.mark.parametrize("options", ["", ", hive_partitioning = true", ", hive_partitioning = false"])
def test_duckdb_reads_the_glob(folder, options):
    source = f"read_parquet('{folder}/*/*/*.parquet'{options})"
    assert is_whole(duckdb.sql(f"select * from {source}").df())
    rewards = duckdb.sql(f"select step_index, avg(reward) from {source} group by step_index order by 1").fetchall()
    assert [step for step, _ in rewards] == list(range(ALGORITHM.steps))


def test_duckdb_reads_parts_of_the_reward_as_a_map(folder):
    query = f"select map_from_entries(reward_parts)['score'] from read_parquet('{folder}/*/*/*.parquet')"
    assert all(0 <= score <= 1 for (score,) in duckdb.sql(query).fetchall())


def test_datasets_loads_the_glob_and_the_folder(store, folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    glob = RolloutReader(store, RUNS[0]).glob
    one = datasets.load_dataset("parquet", data_files=glob, split="train", cache_dir=str(tmp_path))
    assert len(one) == ROWS and one.column_names == SCHEMA.names
    assert one["step_index"][:] == sorted(one["step_index"][:])
    assert is_whole(datasets.load_dataset(folder, split="train", cache_dir=str(tmp_path)).to_pandas())


def test_a_reader_of_the_run_finds_steps_metrics_and_rows(store):
    reader = RolloutReader(store, RUNS[0])
    assert list_runs(store) == sorted(RUNS)
    assert reader.steps() == range(ALGORITHM.steps)
    metrics = list(reader.metrics())
    assert [row["step"] for row in metrics] == [0, 1, 2]
    for row in metrics:
        rewards = reader.rows(int(row["step"]))["reward"].to_pylist()
        assert row["reward_mean"] == pytest.approx(sum(rewards) / len(rewards))


def test_a_step_that_is_not_committed_is_named(store):
    with pytest.raises(InputError, match=r"(?s)step 3 committed.*last committed step: 2"):
        RolloutReader(store, RUNS[0]).rows(3)
    assert RolloutReader(store, "nobody").last_step() is None
    assert RolloutReader(store, "nobody").steps() == range(0)


class Counting:
    """A store of committed steps and perhaps one saved state; counts how often it is asked whether a step is there."""

    def __init__(self, committed: int, state: int | None = None) -> None:
        self.paths = {rollouts_path("r", step) for step in range(committed)}
        self.states = [] if state is None else [f"{states_prefix('r')}{state:06d}-0a1b.safetensors"]
        self.asked = 0

    def list(self, prefix: str) -> list[str]:
        return [path for path in self.states if path.startswith(prefix)]

    def exists(self, path: str) -> bool:
        self.asked += 1
        return path in self.paths


@pytest.mark.parametrize("committed", [0, 1, 2, 3, 4, 5, 7, 8, 9, 1000, 10_000])
def test_the_last_step_is_found_by_search(committed):
    store = Counting(committed)
    assert RolloutReader(store, "r").last_step() == (committed - 1 if committed else None)
    assert store.asked <= 2 + 2 * max(1, committed).bit_length()


@pytest.mark.parametrize("committed", [1, 10, 10_000])
@pytest.mark.parametrize("ahead", [0, 1])  # 1: killed between the state of the next step and its commit
def test_saved_states_lead_to_the_last_step_at_once(committed, ahead):
    store = Counting(committed, state=committed - 1 + ahead)
    assert RolloutReader(store, "r").last_step() == committed - 1
    assert store.asked == 2


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_hint_that_misleads_costs_a_search_and_nothing_else(committed, state):
    store = Counting(committed, state)
    assert RolloutReader(store, "r").last_step() == (committed - 1 if committed else None)
    assert store.asked <= 3 + 2 * abs(committed - state).bit_length()


def commit(**fields) -> Commit:
    state = StateFile(path="s", sha256="0" * 64)
    given = {"run": "r", "step": 0, "rows": 0, "adapter_version": 1, "adapter_digest": "a", "metrics": {}, **fields}
    return Commit(state=state, previous=None, **given)


def empty_columns() -> dict[str, list]:
    return {name: [] for name in SCHEMA.names}


def test_a_step_is_written_once(tmp_path):
    store = open_store(tmp_path)
    first, second = (encode_step(empty_columns(), commit(metrics={"try": float(n)})) for n in (1, 2))
    assert store.put_if_absent(rollouts_path("r", 0), first)
    assert not store.put_if_absent(rollouts_path("r", 0), second)
    assert RolloutReader(store, "r").commit(0).metrics == {"try": 1.0}


def test_equal_steps_are_equal_bytes():
    assert encode_step(empty_columns(), commit()) == encode_step(empty_columns(), commit())


def test_a_commit_of_a_later_orbit_is_refused(tmp_path):
    store = open_store(tmp_path)
    store.put_if_absent(rollouts_path("r", 0), encode_step(empty_columns(), commit(schema_version=99)))
    with pytest.raises(Exception, match="schema version 99"):
        RolloutReader(store, "r").commit(0)


def test_the_schema_stands_as_published(store):
    """Version 1, for good: columns may be added at the end, under a higher version; nothing else may change."""
    published = {
        "run_id": "string", "step_index": "int32", "group_index": "int32", "sample_index": "int32",
        "prompt_id": "string", "prompt": "string", "label": "string", "prompt_token_ids": "list<element: int32>",
        "response": "string", "response_token_ids": "list<element: int32>",
        "rollout_logprobs": "list<element: float>", "trainer_logprobs": "list<element: float>",
        "reference_logprobs": "list<element: float>", "adapter_versions": "list<element: int32>",
        "reward": "double", "reward_parts": "list<element: struct<name: string, value: double>>",
        "advantage": "double", "trained": "bool", "finish_reason": "string", "base_digest": "string",
        "adapter_digest": "string", "seed": "int64", "rollout_seconds": "float", "reward_seconds": "float",
    }  # fmt: skip
    schema = pq.read_schema(store.local_path(rollouts_path(RUNS[0], 0)))
    assert {field.name: str(field.type) for field in schema} == published
    assert schema.metadata[b"orbit.schema"] == b"1" and COMMIT_KEY in schema.metadata
