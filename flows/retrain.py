"""The flow of a schedule: new data or a new base becomes a new adapter, which serves only if it is not worse.

Content digests decide what is new, the promoted adapter is where training starts, and the history of promotions
(orbit_core/publication/promotions.py) is where the outcome stands. Run it as often as you like: with nothing new it
does nothing, killed it resumes, and of two at once one promotes.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.states import Completed, State

from flows.outcome import outcome
from orbit_core.publication.retraining import NothingNew, next_round
from orbit_core.recipe import Recipe
from tasks.executors import executor_for
from tasks.promotions import evaluate_promoted, promote_if_not_worse, run_all


@flow(name="retrain")
def retrain(
    recipe: Recipe, store: str = ".orbit", tolerance: float = 0.0, new_base: bool = False
) -> State[dict[str, Any]]:
    """Train from the promoted adapter, and promote the result if held-out accuracy did not fall.

    Args:
        recipe: the run; its name is that of the history of promotions.
        store: folder or s3://bucket/prefix where artifacts, rollouts and promotions are kept.
        tolerance: how far held-out accuracy may fall (0.01: one prompt in a hundred) and still be promoted.
        new_base: whether the adapter may be carried over to another base or precision than it was trained on.
    """
    executor = executor_for(recipe)
    due = next_round(recipe, store, new_base)
    if isinstance(due, NothingNew):
        return _say(due.line, {"promoted": False, "promotion": due.newest.model_dump()})
    for note in due.notes:
        get_run_logger().warning(note)
    done = run_all(due.steps, executor)
    rival = evaluate_promoted(due, executor)
    decision = promote_if_not_worse(due, done["publish"], done["evaluate"], rival, tolerance)
    entry = decision.promotion.model_dump() if decision.promotion else None
    return _say(decision.line, {**outcome(done), "promoted": decision.promoted, "promotion": entry})


def _say(line: str, result: dict[str, Any]) -> State[dict[str, Any]]:
    """The outcome in one line: in the log, and beside the run on the dashboard. The state keeps its own name, which
    automations look for."""
    get_run_logger().info("%s", line)
    return Completed(message=line, data={**result, "line": line})
