"""`orbit rollouts` reads what it shows: no row for a line per step, no log-prob for the samples of a group."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from counted import CountedStore, count_requests
from long_run import no_fsync
from plain_steps import commit_step
from rich.console import Console

from flows.rollouts import GROUP_COLUMNS, compact_run, show_group, show_steps
from orbit_core.errors import InputError
from orbit_core.store import Store, open_store
from orbit_core.store import commits as layout
from orbit_core.store.commits import rollouts_path
from orbit_core.store.rollouts import RolloutReader

RUN, STEPS = "abc123", 34


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CountedStore:
    """A run of 34 steps whose first 30 are in compacted blocks of 10."""
    monkeypatch.setattr(layout, "BLOCK", 10)
    with no_fsync():
        for step in range(STEPS):
            commit_step(open_store(tmp_path), RUN, step, rows=4)
        shown(compact_run, RolloutReader(open_store(tmp_path), RUN))
    return CountedStore(open_store(tmp_path))


def shown(view, *arguments: object) -> list[str]:
    output = io.StringIO()
    view(*arguments, Console(file=output, width=400))
    return output.getvalue().splitlines()


def test_the_last_steps_cost_no_look_at_the_others(store: CountedStore) -> None:
    lines = shown(show_steps, RolloutReader(store, RUN), 6)
    assert [line.split()[:2] for line in lines[1:7]] == [[str(step), "4"] for step in range(28, 34)]
    assert "the last 6 of 34 steps; --last 0 shows all" in lines
    taken = store.taken()
    assert (taken["read"], taken["read_end"]) == (2, 4), "one block, one that is not there, four footers"


def test_all_steps_are_shown_on_request(store: CountedStore) -> None:
    lines = shown(show_steps, RolloutReader(store, RUN), 0)
    assert [line.split()[0] for line in lines[1 : STEPS + 1]] == [str(step) for step in range(STEPS)]
    assert not any("--last" in line for line in lines)


def test_compacting_says_what_is_done_and_what_waits(store: CountedStore) -> None:
    lines = shown(compact_run, RolloutReader(store, RUN))
    assert lines[0] == "0 blocks compacted; 30 of 34 steps are, the rest when their block is full"
    assert lines[1].endswith("/compacted/run=abc123/*.parquet")


def test_log_probs_are_not_read_for_the_samples_of_a_group(store: CountedStore, tmp_path: Path) -> None:
    file = tmp_path / rollouts_path(RUN, 7)
    footer, content = pq.read_metadata(file), bytearray(file.read_bytes())
    for number in range(footer.num_columns):
        chunk = footer.row_group(0).column(number)
        if chunk.path_in_schema.split(".")[0] not in (*GROUP_COLUMNS, "group_index"):
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    file.write_bytes(content)
    with pytest.raises(InputError, match="a whole Parquet file"):
        RolloutReader(store, RUN).rows(7)
    lines = shown(show_group, RolloutReader(store, RUN), 7, 1)
    assert [line.split()[:2] for line in lines[-2:]] == [["0", "7.250"], ["1", "7.375"]]


def test_on_s3_parts_of_a_step_are_fetched_in_parts(s3_url: str) -> None:
    store: Store = open_store(s3_url)
    commit_step(store, RUN, 0, rows=4)
    reader = RolloutReader(store, RUN)
    whole = reader.rows(0)
    part = reader.rows(0, ["sample_index", "reward"], group=1)
    assert part.to_pydict() == whole.select(["sample_index", "reward"]).slice(2).to_pydict()
    requests = count_requests(store)
    reader.commit(0)
    assert dict(requests) == {"get_object": 1}, "a footer is one request"
