"""Scheduled retraining: what is new is decided by content, what serves by held-out accuracy, and once for all runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from small_world import InThisProcess, parsed, recipe_of, write_base, write_prompts

from orbit_core.errors import InputError
from orbit_core.pipeline import plan
from orbit_core.publication.promotions import Promotion, Promotions
from orbit_core.store import open_store
from orbit_core.store.artifacts import ArtifactStore

Outcome = dict[str, Any]
WORSE = {"learning_rate": 0.1, "warmup_steps": 0}  # rotates the model into nonsense


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "rows.jsonl", range(60))


@pytest.fixture
def executor(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> InThisProcess:
    import flows.evaluate
    import flows.retrain

    executor = InThisProcess()
    monkeypatch.setattr(flows.retrain, "executor_for", lambda recipe: executor)
    monkeypatch.setattr(flows.evaluate, "executor_for", lambda recipe: executor)
    return executor


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def retrain(executor: InThisProcess, base: Path, prompts: Path, store: str) -> Iterator[Callable[..., Outcome]]:
    def run(tolerance: float = 0.0, new_base: bool = False, **changes: Any) -> Outcome:
        from flows.retrain import retrain

        executor.ran.clear()
        outcome: Any = retrain(parsed(recipe_of(base, prompts, **changes)), store, tolerance, new_base)
        return dict(outcome)

    yield run


def history(store: str) -> list[Promotion]:
    return Promotions(open_store(store), "small").entries()


def test_the_first_round_starts_cold_and_promotes_what_beats_the_bare_base(
    retrain: Callable[..., Outcome], store: str
) -> None:
    first = retrain()
    (entry,) = history(store)
    assert first["promoted"] and first["line"].startswith("promoted as number 1 of small: held-out accuracy")
    assert (entry.number, entry.replaced, entry.warm_start) == (1, None, None)
    assert entry.adapter_digest == first["adapter_digest"]
    assert entry.accuracy == first["accuracy_after"] >= first["accuracy_before"]
    assert open_store(store).exists(f"{entry.adapter}/adapter_model.safetensors")


def test_with_nothing_new_nothing_happens(
    retrain: Callable[..., Outcome], executor: InThisProcess, store: str, prompts: Path, tmp_path: Path
) -> None:
    retrain()
    files = open_store(store).list()
    prompts.touch()  # another time, the same content
    again = retrain()
    assert again["line"] == "nothing new: data, base and recipe are those of promotion 1 of small"
    assert executor.ran == [] and open_store(store).list() == files


def test_new_data_starts_from_the_promoted_adapter(
    retrain: Callable[..., Outcome], executor: InThisProcess, store: str, prompts: Path
) -> None:
    first = retrain()
    write_prompts(prompts, range(80))
    second = retrain(tolerance=0.5)
    assert "quantize" not in executor.ran and executor.ran.count("evaluate") == 2  # candidate and promoted adapter
    one, two = history(store)
    assert (two.number, two.replaced, two.warm_start) == (2, 1, one.train)
    assert two.base_digest == one.base_digest and second["adapter_digest"] != first["adapter_digest"]
    assert retrain(tolerance=0.5)["line"].startswith("nothing new")
    write_prompts(prompts, range(60))
    assert retrain()["line"] == (
        "nothing new: data, base and recipe are those of promotion 1 of small, which was replaced; 2 serves"
    )


def test_a_warm_start_begins_where_the_promoted_adapter_ended(
    retrain: Callable[..., Outcome], store: str, prompts: Path
) -> None:
    """With a learning rate of almost nothing the second adapter is the first one, not the identity."""
    first = retrain()
    write_prompts(prompts, range(80))
    still = {"learning_rate": 1e-12, "warmup_steps": 0}
    second = retrain(algorithm={**recipe_of(Path(), Path())["algorithm"], "optimizer": still})
    assert second["adapter_digest"] == first["adapter_digest"]


def test_an_adapter_that_is_worse_is_not_promoted_and_judging_it_again_costs_nothing(
    retrain: Callable[..., Outcome], executor: InThisProcess, store: str, prompts: Path
) -> None:
    retrain()
    write_prompts(prompts, range(80))
    algorithm = {**recipe_of(Path(), Path())["algorithm"], "optimizer": WORSE}
    refused = retrain(algorithm=algorithm)
    assert not refused["promoted"] and len(history(store)) == 1
    assert refused["line"].startswith("not promoted, promotion 1 stays: held-out accuracy")
    assert refused["promotion"]["number"] == 1
    again = retrain(algorithm=algorithm)
    assert executor.ran == [] and again["line"] == refused["line"]
    assert retrain(algorithm=algorithm, tolerance=1.0)["promoted"], "a tolerance of everything lets everything pass"


def test_what_was_rolled_back_does_not_come_back_by_itself(
    retrain: Callable[..., Outcome], executor: InThisProcess, store: str, prompts: Path
) -> None:
    retrain()
    write_prompts(prompts, range(80))
    retrain(tolerance=1.0)
    Promotions(open_store(store), "small").roll_back(why="complaints")
    again = retrain(tolerance=1.0)
    assert executor.ran == [] and len(history(store)) == 3
    assert again["line"].endswith("promotion 2 of small, which was replaced; 1 serves")
    write_prompts(prompts, range(100))
    assert retrain(tolerance=1.0)["promoted"]
    assert history(store)[3].warm_start == history(store)[0].train, "from the adapter that serves again"


def test_another_base_must_be_asked_for_and_is_said(
    retrain: Callable[..., Outcome], executor: InThisProcess, store: str, base: Path, tmp_path: Path
) -> None:
    retrain()
    other = {"model": {"kind": "local", "path": str(write_base(tmp_path / "other", seed=1))}}
    with pytest.raises(InputError, match="new_base: true"):
        retrain(**other)
    assert executor.ran == []
    carried = retrain(new_base=True, tolerance=1.0, **other)
    one, two = history(store)
    assert carried["promoted"] and two.warm_start == one.train and two.base_digest != one.base_digest
    rival = [step for step in executor.ran if step == "evaluate"]
    assert len(rival) == 2, "the old adapter is judged on the new base"


@pytest.mark.parametrize("adapter", [{"kind": "oft", "block_size": 8}, {"kind": "lora", "rank": 4}])
def test_another_kind_of_adapter_is_refused_before_anything_runs(
    retrain: Callable[..., Outcome], executor: InThisProcess, adapter: dict[str, Any]
) -> None:
    retrain()
    with pytest.raises(InputError, match="give the recipe another name"):
        retrain(adapter=adapter, new_base=True)
    assert executor.ran == []


def test_a_new_base_of_another_shape_is_refused_by_the_step_that_sees_it(
    retrain: Callable[..., Outcome], store: str, tmp_path: Path
) -> None:
    retrain()
    wider = write_base(tmp_path / "wider", hidden=64)
    with pytest.raises(InputError, match="shape"):
        retrain(new_base=True, model={"kind": "local", "path": str(wider)})
    assert len(history(store)) == 1


def test_of_two_runs_at_once_one_promotes_and_the_other_finds_its_twin(
    retrain: Callable[..., Outcome], executor: InThisProcess, store: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have judged against entry 1 when the first of them writes entry 2."""
    import tasks.promotions

    retrain()
    write_prompts(prompts, range(80))
    both_judged, judge = threading.Barrier(2, timeout=30), tasks.promotions.judge

    def judge_together(*arguments: Any) -> Any:
        verdict = judge(*arguments)
        both_judged.wait()
        return verdict

    monkeypatch.setattr(tasks.promotions, "judge", judge_together)
    outcomes: list[Outcome] = []
    run_once = lambda: outcomes.append(retrain(tolerance=1.0))  # noqa: E731
    runs = [threading.Thread(target=copy_context().run, args=(run_once,)) for _ in range(2)]  # the API's URL is in it
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [entry.number for entry in history(store)] == [1, 2]
    assert [outcome["promotion"]["number"] for outcome in outcomes] == [2, 2]


def test_a_rollback_during_a_round_stands(
    retrain: Callable[..., Outcome], store: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tasks.promotions

    retrain()
    write_prompts(prompts, range(80))
    retrain(tolerance=1.0)
    write_prompts(prompts, range(100))
    judge = tasks.promotions.judge

    def judge_slowly(*arguments: Any) -> Any:
        Promotions(open_store(store), "small").roll_back(why="complaints")
        return judge(*arguments)

    monkeypatch.setattr(tasks.promotions, "judge", judge_slowly)
    overtaken = retrain(tolerance=1.0)
    assert not overtaken["promoted"] and overtaken["promotion"]["restores"] == 1
    assert overtaken["line"] == "not promoted: number 3 was written meanwhile; the next run starts from it"
    assert [entry.number for entry in history(store)] == [1, 2, 3]


def test_the_verdict_stands_beside_the_run_on_the_dashboard(
    executor: InThisProcess, base: Path, prompts: Path, store: str
) -> None:
    from flows.retrain import retrain

    recipe = parsed(recipe_of(base, prompts))
    first = retrain(recipe, store, return_state=True)
    second = retrain(recipe, store, return_state=True)
    assert (first.name, second.name) == ("Completed", "Completed"), "names that automations know"
    assert str(first.message).startswith("promoted as number 1") and str(second.message).startswith("nothing new")


def test_any_published_adapter_can_be_examined(
    retrain: Callable[..., Outcome], executor: InThisProcess, base: Path, prompts: Path, store: str
) -> None:
    from flows.evaluate import evaluate

    recipe = parsed(recipe_of(base, prompts))
    with pytest.raises(InputError, match="orbit promote small DIGEST"):
        evaluate(recipe, store)
    first = retrain()
    (entry,) = history(store)
    executor.ran.clear()
    for adapter in ("promoted", "1", entry.publish[:12]):
        examined = evaluate(recipe, store, adapter)
        assert examined["adapter_digest"] == first["adapter_digest"]
        assert examined["accuracy_after"] == first["accuracy_after"]
    assert executor.ran == [], "the same examination as the round's own"
    wider = parsed(recipe_of(base, prompts, evaluation={"prompts": 8, "samples": 0}))
    assert evaluate(wider, store)["prompts"] == 8 and executor.ran == ["evaluate"]
    with pytest.raises(InputError, match="one of 1 to 1"):
        evaluate(recipe, store, "7")


def test_a_warm_start_by_reference_is_told_from_its_place_in_the_plan(base: Path, prompts: Path, store: str) -> None:
    """Without one, digests are what they always were; with one, only what follows training has others."""
    from orbit_core.steps.contract import InputRef

    recipe = parsed(recipe_of(base, prompts))
    cold, warm = plan(recipe, store), plan(recipe, store, InputRef(step="train", digest="ab" * 32))
    changed = [step for step in cold if cold[step].digest != warm[step].digest]
    assert changed == ["train", "evaluate", "publish", "report"]
    assert warm["train"].inputs["warm_start"].digest == "ab" * 32 and "warm_start" not in cold["train"].inputs
    assert warm["publish"].params["recipe"]["warm_start"] == f"train/{'ab' * 8}"
    assert ArtifactStore(open_store(store)).find("train", "ab" * 32) is None
