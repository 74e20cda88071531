"""The loop: what a step promises, and that a run stopped anywhere goes on as if it had not been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orbit_core.adapters.digest import tensors_digest
from orbit_core.errors import InputError, Interrupted, OrbitError
from orbit_core.rl.publication import Publisher
from orbit_core.store import open_store
from orbit_core.store.rollouts import TIMING_COLUMNS, rollouts_path

sys.path.insert(0, str(Path(__file__).parent))
from bandit import ALGORITHM, PROMPTS, BanditEngine, BanditTrainer, bandit_loop


def judged_mean(rows):
    """Mean of the judge's own scores, before any control or penalty."""
    scores = [{part["name"]: part["value"] for part in parts}["score"] for parts in rows["reward_parts"].to_pylist()]
    return sum(scores) / len(scores)


def table_of(loop, step):
    return loop.recorder.reader.rows(step).drop_columns(list(TIMING_COLUMNS))


def test_the_loop_learns(tmp_path):
    loop = bandit_loop(open_store(tmp_path), algorithm=ALGORITHM.model_copy(update={"steps": 20}))
    loop.run()
    rewards = [metrics["reward_mean"] for metrics in loop.recorder.reader.metrics()]
    assert rewards[0] < 0.3 and max(rewards[-5:]) > 0.6


def test_shuffled_rewards_teach_nothing(tmp_path):
    algorithm = ALGORITHM.model_copy(update={"steps": 20})
    loop = bandit_loop(open_store(tmp_path), algorithm=algorithm, shuffle=True)
    loop.run()
    commits = list(loop.recorder.reader.commits())
    honest = [judged_mean(loop.recorder.reader.rows(commit.step)) for commit in commits]
    assert honest[-1] < 0.4
    for commit, judged in zip(commits, honest, strict=True):  # permuted, not replaced
        assert commit.metrics["reward_mean"] == pytest.approx(judged)


def test_a_repeated_run_is_the_same_bit_for_bit(tmp_path):
    loops = [bandit_loop(open_store(tmp_path / name)) for name in "ab"]
    one, other = (loop.run() for loop in loops)
    assert one.state.sha256 == other.state.sha256
    assert one.adapter_digest == other.adapter_digest
    for step in range(ALGORITHM.steps):
        assert table_of(loops[0], step).equals(table_of(loops[1], step))


def test_samples_do_not_depend_on_how_many_engines_there_are(tmp_path):
    one, three = (
        bandit_loop(open_store(tmp_path / "1")),
        bandit_loop(open_store(tmp_path / "3"), engines=[BanditEngine() for _ in range(3)]),
    )
    assert one.run().state.sha256 == three.run().state.sha256


def test_on_policy_ratio_is_one_and_the_gap_is_what_the_engines_differ_by(tmp_path):
    loop = bandit_loop(open_store(tmp_path))
    loop.run()
    for metrics in loop.recorder.reader.metrics():
        assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
        assert metrics["clip_fraction"] == 0.0
        assert metrics["staleness_max"] == 0.0
    # The trainer computes with float32, the engine with what was published: BF16.
    assert 0 < metrics["logprob_gap_mean"] < 1e-2


def test_stop_request_commits_the_step_in_flight_and_resumes_to_the_same_end(tmp_path):
    whole = bandit_loop(open_store(tmp_path / "whole")).run()
    store, asked = open_store(tmp_path / "stopped"), []
    with pytest.raises(Interrupted, match="1 of 3"):
        bandit_loop(store).run(should_stop=lambda: bool(asked), progress=asked.append)
    resumed = bandit_loop(store).run()
    assert resumed.state.sha256 == whole.state.sha256
    assert resumed.adapter_digest == whole.adapter_digest


def test_a_finished_run_returns_its_last_commit_without_sampling(tmp_path):
    store = open_store(tmp_path)
    done = bandit_loop(store).run()
    engine = BanditEngine()
    engine.generate = None  # would raise TypeError
    again = bandit_loop(store, engines=[engine]).run()
    assert again == done


def test_kill_at_every_boundary_gives_the_same_end(tmp_path):
    """SIGKILL at every call of engine, trainer and store, and inside the store's writes; then start again."""
    host = Path(__file__).parent / "kill_host.py"
    result = subprocess.run([sys.executable, host, tmp_path], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["boundaries"] > 60
    assert {"generate", "update", "stage_adapter", "activate_adapter", "link", "fsync"} <= set(outcome["kinds"])
    assert outcome["different"] == []


def test_two_runners_of_one_run_end_as_one(tmp_path):
    """The second finds the first's commit, sees that it reached the same state and goes on from it."""
    store = open_store(tmp_path)
    slow, fast = bandit_loop(store), bandit_loop(store)
    slow._resume()
    done = fast.run()
    first = slow._step(0, None)
    assert first == fast.recorder.reader.commit(0)
    assert bandit_loop(store).run() == done


def test_two_runners_that_disagree_are_told_so(tmp_path):
    store = open_store(tmp_path)
    other = bandit_loop(store)
    other.trainer.theta.data[1] = 0.5
    other._resume()
    bandit_loop(store).run()
    with pytest.raises(
        OrbitError, match=r"already committed with another result(.|\n)*step-000000-(.|\n)*step-000000-"
    ):
        other._step(0, None)


def test_only_the_last_two_states_are_kept(tmp_path):
    store = open_store(tmp_path)
    store.put_if_absent("runs/bandit/state/step-000000-0000000000000000.safetensors", b"left by a killed try")
    last = bandit_loop(store).run()
    kept = store.list("runs/bandit/state/")
    assert [path.split("-")[1] for path in kept] == ["000001", "000002"]
    assert last.state.path in kept


def test_a_changed_state_file_is_refused(tmp_path):
    store = open_store(tmp_path)
    last = bandit_loop(store).run()
    file = store.local_path(last.state.path)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(OrbitError, match=f"(?s){last.state.sha256}.*restore the file"):
        bandit_loop(store, algorithm=ALGORITHM.model_copy(update={"steps": 4})).run()


def test_a_run_does_not_go_on_from_nan(tmp_path):
    store = open_store(tmp_path)
    trainer = BanditTrainer()
    real = trainer.update
    trainer.update = lambda *args: {**real(*args), "loss": float("nan")}
    with pytest.raises(InputError, match="learning_rate"):
        bandit_loop(store, trainer=trainer).run()
    assert not store.exists(rollouts_path("bandit", 0))


def test_groups_without_variance_are_recorded_but_not_trained(tmp_path):
    algorithm = ALGORITHM.model_copy(update={"steps": 1, "oversample": 1.25, "prompts_per_step": 2})
    loop = bandit_loop(open_store(tmp_path), algorithm=algorithm)
    loop.run()
    rows = loop.recorder.reader.rows(0).to_pylist()
    assert len(rows) == 3 * ALGORITHM.samples_per_prompt  # ceil(2 * 1.25) groups
    by_group = {g: [row for row in rows if row["group_index"] == g] for g in range(3)}
    varied = [g for g, group in by_group.items() if len({row["reward"] for row in group}) > 1]
    assert [g for g, group in by_group.items() if group[0]["trained"]] == varied[:2]


def test_a_step_whose_groups_all_agree_updates_nothing(tmp_path):
    loop = bandit_loop(open_store(tmp_path), kind="exact_match", function=None, answer_after="never said")
    before = tensors_digest(loop.trainer.export_adapter())
    last = loop.run()
    assert last.metrics["updates"] == 0 and last.adapter_digest == before
    assert last.adapter_version == ALGORITHM.steps


class Refusing(BanditEngine):
    """Takes versions below `limit` only; fails in `phase`."""

    def __init__(self, phase, limit=1):
        super().__init__()
        self.phase, self.limit = phase, limit

    def stage_adapter(self, version, tensors):
        if version >= self.limit and self.phase == "stage":
            raise ConnectionError("gone")
        if version >= self.limit and self.phase == "digest":
            tensors = {name: tensor + 1 for name, tensor in tensors.items()}
        return super().stage_adapter(version, tensors)

    def activate_adapter(self, version):
        if version >= self.limit and self.phase == "activate":
            raise ConnectionError("gone")
        super().activate_adapter(version)


@pytest.mark.parametrize("phase", ["stage", "digest", "activate"])
def test_failed_publication_leaves_every_engine_on_the_old_version(phase):
    engines = [BanditEngine(), BanditEngine(), Refusing(phase), BanditEngine()]
    publisher = Publisher(engines)
    old, new = ({"theta": torch.full((8, 8), value)} for value in (0.0, 1.0))
    publisher.publish(0, old)
    with pytest.raises(OrbitError, match=rf"engine 2 of 4 could not {'stage' if phase == 'digest' else phase}"):
        publisher.publish(1, new)
    assert [engine.adapter_version for engine in engines] == [0, 0, 0, 0]
    for engine in engines:
        assert torch.equal(engine.theta, old["theta"])  # and generating with it


def test_a_failed_publication_commits_nothing(tmp_path):
    store = open_store(tmp_path)
    with pytest.raises(OrbitError, match="engine 1 of 2"):
        bandit_loop(store, engines=[BanditEngine(), Refusing("activate")]).run()
    assert store.list("rollouts/") == []
    assert bandit_loop(store).run().step == ALGORITHM.steps - 1


def test_every_row_says_where_it_comes_from(tmp_path):
    loop = bandit_loop(open_store(tmp_path))
    loop.run()
    commits = list(loop.recorder.reader.commits())
    for commit in commits:
        for row in loop.recorder.reader.rows(commit.step).to_pylist():
            assert (row["run_id"], row["step_index"], row["seed"], row["base_digest"]) == (
                "bandit",
                commit.step,
                7,
                "base",
            )
            lengths = {len(row[name]) for name in row if name.endswith("logprobs") or name == "adapter_versions"}
            assert lengths == {len(row["response_token_ids"])}
            assert set(row["adapter_versions"]) == {commit.step}
            assert row["prompt"] in {prompt.messages for prompt in PROMPTS}
        if commit.step:
            assert set(loop.recorder.reader.rows(commit.step)["adapter_digest"].to_pylist()) == {
                commits[commit.step - 1].adapter_digest
            }
            assert commit.previous == commits[commit.step - 1].digest
