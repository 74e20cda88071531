"""The same run on S3: commits, resumption and readers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from orbit_core.errors import Interrupted
from orbit_core.store import open_store
from orbit_core.store.rollouts import RolloutReader, list_runs

sys.path.insert(0, str(Path(__file__).parents[1] / "rl"))
from bandit import ALGORITHM, bandit_loop


def test_a_run_on_s3_is_the_run_in_a_folder(s3_url, tmp_path):
    """Stopped after every step and started again by a runner that knows only the store's URL."""
    whole = bandit_loop(open_store(tmp_path)).run()
    for done in range(1, ALGORITHM.steps):
        stops = iter([False, True])
        with pytest.raises(Interrupted, match=f"{done} of"):
            bandit_loop(open_store(s3_url)).run(should_stop=lambda stops=stops: next(stops))
    last = bandit_loop(open_store(s3_url)).run()
    assert (last.state, last.adapter_digest) == (whole.state, whole.adapter_digest)

    store = open_store(s3_url)
    reader = RolloutReader(store, "bandit")
    assert list_runs(store) == ["bandit"]
    assert [row["step"] for row in reader.metrics()] == list(range(ALGORITHM.steps))
    assert reader.rows(2).num_rows == ALGORITHM.prompts_per_step * ALGORITHM.samples_per_prompt
    assert len(store.list("runs/bandit/state/")) == 2


def test_pyarrow_reads_the_dataset_on_s3(s3_url):
    import pyarrow.dataset
    import s3fs

    bandit_loop(open_store(s3_url)).run()
    path = open_store(s3_url).url_of("rollouts").removeprefix("s3://")
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    dataset = pyarrow.dataset.dataset(path, filesystem=filesystem, partitioning="hive")
    steps = dataset.to_table(columns=["step_index", "step"]).to_pydict()
    assert steps["step_index"] == steps["step"]
    assert set(steps["step"]) == set(range(ALGORITHM.steps))
