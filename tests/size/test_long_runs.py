"""What a step, a resumption and a look at the curves cost does not depend on the run's length. Counted, not timed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from counted import CountedStore, count_requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from long_run import RUN, make_run, no_fsync

from orbit_core.errors import OrbitError
from orbit_core.rl.recorder import Recorder
from orbit_core.store import open_store
from orbit_core.store.commits import BLOCK, block_path, blocks_over, rollouts_path
from orbit_core.store.rollouts import RolloutReader, list_runs

STEPS = 1_010


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def costs(folder: Path) -> list[dict[str, int]]:
    """What the store was asked for each step of a run, which it holds afterwards."""
    store, taken = CountedStore(open_store(folder)), []
    with no_fsync():
        make_run(store, STEPS, after=lambda step: taken.append(store.taken()))
    return taken


def resumption(folder: Path) -> dict[str, int]:
    """Everything that the loop asks of the store before it goes on."""
    store = CountedStore(open_store(folder))
    recorder = Recorder(store, RUN, base_digest="base")
    commit = recorder.last()
    recorder.load_state(commit)
    recorder.clean(commit.step)
    recorder.repeat_commits(commit.step)
    return store.taken()


def test_a_commit_costs_at_step_1000_what_it_costs_at_step_10(costs: list[dict[str, int]]) -> None:
    assert costs[10] == costs[1_000]
    assert costs[10] == {"delete": 1, "list": 1, "listed": 3, "put": 1, "put_if_absent": 1}
    for step in range(BLOCK + 2, STEPS):
        assert costs[step] == costs[step - BLOCK], step


def test_the_last_step_of_a_block_costs_one_small_file_more(costs: list[dict[str, int]]) -> None:
    assert costs[999] == {**costs[10], "exists": 1, "put_if_absent": 2}
    assert costs[999] == costs[99]


def test_resuming_costs_after_1010_steps_what_it_costs_after_10(
    folder: Path, costs: list[dict[str, int]], tmp_path: Path
) -> None:
    with no_fsync():
        make_run(open_store(tmp_path), 10)
    short, long = resumption(tmp_path), resumption(folder)
    assert long.pop("exists") == short.pop("exists") + 1  # whether the last block is written; there was none at step 10
    assert abs(long.pop("read_bytes") - short.pop("read_bytes")) < 100  # more digits
    assert long == short == {"list": 2, "listed": 4, "read": 1, "read_end": 1}


def test_all_commits_are_read_by_the_block(folder: Path, costs: list[dict[str, int]]) -> None:
    store = CountedStore(open_store(folder))
    commits = list(RolloutReader(store, RUN).commits())
    assert [commit.step for commit in commits] == list(range(STEPS))
    taken = store.taken()
    assert (taken["read"], taken["read_end"]) == (len(blocks_over(range(STEPS))), STEPS % BLOCK)


def test_some_commits_cost_no_more_than_their_blocks(folder: Path, costs: list[dict[str, int]]) -> None:
    store = CountedStore(open_store(folder))
    commits = list(RolloutReader(store, RUN).commits(range(950, 1_005)))
    assert [commit.step for commit in commits] == list(range(950, 1_005))
    taken = store.taken()
    assert (taken["read"], taken["read_end"]) == (2, 5)


def test_runs_are_found_without_a_look_into_their_steps(folder: Path, costs: list[dict[str, int]]) -> None:
    store = CountedStore(open_store(folder))
    assert list_runs(store) == [RUN]
    assert store.taken() == {"names": 1, "listed": 1, "exists": 1}


def test_a_run_whose_first_step_was_never_committed_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "rollouts" / "run=dead" / "step=000000").mkdir(parents=True)  # killed before it linked the file
    assert list_runs(open_store(tmp_path)) == []


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(missing=st.sets(st.integers(0, STEPS // BLOCK)), steps=st.tuples(st.integers(0, 320), st.integers(0, 320)))
def test_blocks_say_what_footers_say_and_may_be_missing(
    folder: Path, costs: list[dict[str, int]], tmp_path: Path, missing: set[int], steps: tuple[int, int]
) -> None:
    whole = RolloutReader(open_store(folder), RUN)
    partial = tmp_path / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    (partial / "rollouts").symlink_to(folder / "rollouts")
    store = open_store(partial)
    for number, block in enumerate(blocks_over(range(STEPS - STEPS % BLOCK))):
        if number not in missing:
            store.put(block_path(RUN, block), (folder / block_path(RUN, block)))
    wanted = range(min(steps), max(steps))
    found = list(RolloutReader(store, RUN).commits(wanted))
    assert found == [whole.commit(step) for step in wanted]


def test_a_block_that_was_not_written_is_written_by_who_resumes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with no_fsync():
        make_run(store, BLOCK + 3)
    (block,) = blocks_over(range(BLOCK))
    written = store.read(block_path(RUN, block))
    store.delete(block_path(RUN, block))
    resumption(tmp_path)
    assert store.read(block_path(RUN, block)) == written


def test_a_damaged_block_is_named_and_may_be_deleted(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with no_fsync():
        make_run(store, BLOCK)
    (block,) = blocks_over(range(BLOCK))
    path = block_path(RUN, block)
    lines = store.read(path).splitlines(keepends=True)
    for damaged in (lines[:-1], [*lines[:-1], b"{}\n"], [*lines[:-1], lines[0]]):
        store.put(path, b"".join(damaged))
        with pytest.raises(OrbitError, match=r"commits/000000-000099.jsonl[\s\S]*delete the file"):
            list(RolloutReader(store, RUN).commits())
    store.delete(path)
    assert len(list(RolloutReader(store, RUN).commits())) == BLOCK


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put(rollouts_path(RUN, 0), b"not a table")
    with pytest.raises(OrbitError, match=r"step=000000/rollouts.parquet[\s\S]*a whole Parquet file"):
        RolloutReader(store, RUN).commit(0)


def test_on_s3_steps_and_resumptions_send_as_many_requests_late_as_early(s3_url: str) -> None:
    store = open_store(s3_url)
    requests = count_requests(store)
    each: list[dict[str, int]] = []
    resumed: list[dict[str, int]] = []

    def after(step: int) -> None:
        each.append(dict(requests))
        requests.clear()

    for steps in (10, 40):
        make_run(store, steps, after=after)
        requests.clear()
        recorder = Recorder(open_store(s3_url), RUN, base_digest="base")
        looked = count_requests(recorder.store)
        recorder.load_state(recorder.last())
        resumed.append(dict(looked))
    assert each[5] == each[9] == each[35]
    assert each[35]["put_object"] == 2
    assert resumed[0] == resumed[1]
    assert sum(resumed[0].values()) <= 7, resumed
