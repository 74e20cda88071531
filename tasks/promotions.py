"""The last task of a retraining: judge the candidate, and promote it if held-out accuracy did not fall."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from orbit_core.executors.base import Executor
from orbit_core.publication.judging import Verdict, judge
from orbit_core.publication.promotions import Overtaken, Promotion, Promotions, Published
from orbit_core.publication.retraining import Round
from orbit_core.steps.contract import StepSpec
from tasks import steps
from tasks.steps import StepResult

IN_ORDER = {
    "data": steps.data,
    "pretrain": steps.pretrain,
    "quantize": steps.quantize,
    "convert": steps.convert,
    "preflight": steps.preflight,
    "train": steps.train,
    "evaluate": steps.evaluate,
    "publish": steps.publish,
    "report": steps.report,
}


@dataclass(frozen=True)
class Decision:
    """What became of a candidate. `promotion` is the entry that serves now; it is the candidate's if `promoted`."""

    promoted: bool
    promotion: Promotion | None
    verdict: Verdict
    line: str


def run_all(specs: dict[str, StepSpec], executor: Executor) -> dict[str, StepResult]:
    """The steps of a plan, one after the other."""
    return {name: IN_ORDER[name](spec, executor) for name, spec in specs.items()}


def evaluate_promoted(due: Round, executor: Executor) -> StepResult | None:
    """The adapter that serves, on this round's base and held-out prompts; None when nothing serves yet."""
    if due.rival is None:
        return None
    again = steps.evaluate.with_options(task_run_name="evaluate the promoted adapter")
    return again(due.rival, executor)


@task(name="promote", task_run_name="promote if not worse", cache_policy=NO_CACHE, persist_result=False)
def promote_if_not_worse(
    due: Round, candidate: StepResult, evaluated: StepResult, rival: StepResult | None, tolerance: float
) -> Decision:
    """Judge the candidate and write the history's next entry; nothing is written if it is worse or somebody was faster.

    `candidate` and `evaluated` are its publish and evaluate steps, `rival` the evaluation of the promoted adapter.
    """
    verdict = judge(evaluated.artifact, rival.artifact if rival else None, tolerance)
    promotions = Promotions(candidate.artifact.store, due.recipe.name)
    decision = _decide(due, promotions, Published.of(candidate.artifact), verdict)
    get_run_logger().info("%s", decision.line)
    create_markdown_artifact(_card(due, decision), key=f"orbit-promotion-{due.recipe.name}")
    return decision


def _decide(due: Round, promotions: Promotions, adapter: Published, verdict: Verdict) -> Decision:
    newest = promotions.newest()
    if newest is not None and newest.publish == adapter.publish:  # a retried task, or a twin of this run
        return Decision(True, newest, verdict, f"promoted as number {newest.number} of {newest.name}")
    if not verdict.promote:
        stays = f"promotion {newest.number} stays" if newest else "nothing is promoted"
        return Decision(False, newest, verdict, f"not promoted, {stays}: {verdict.sentence}")
    adapter = adapter.model_copy(update={"accuracy": verdict.candidate, "prompts": verdict.prompts})
    try:
        entry = promotions.promote(adapter, due.promoted, verdict.sentence)
    except Overtaken:
        newest = promotions.newest()
        if newest is not None and newest.publish == adapter.publish:
            return Decision(True, newest, verdict, f"promoted as number {newest.number} by a twin of this run")
        number = newest.number if newest else 1
        line = f"not promoted: number {number} was written meanwhile; the next run starts from it"
        return Decision(False, newest, verdict, line)
    return Decision(True, entry, verdict, f"promoted as number {entry.number} of {entry.name}: {verdict.sentence}")


def _card(due: Round, decision: Decision) -> str:
    verdict = decision.verdict
    was = (
        ""
        if verdict.promoted is None
        else f"| promotion {due.promoted and due.promoted.number} | {verdict.promoted:.1%} |\n"
    )
    notes = [*due.notes]
    if verdict.left_out:
        notes.append(f"{verdict.left_out} held-out questions are left out: an earlier adapter was trained on them")
    if verdict.unknown:
        notes.append(f"what {verdict.unknown} earlier adapters were trained on is not in the store any more")
    return (
        f"### {due.recipe.name}: {decision.line}\n\n| adapter | held-out accuracy |\n|---|---|\n"
        f"| none | {verdict.base:.1%} |\n{was}| candidate | {verdict.candidate:.1%} |\n\n"
        + "".join(f"- {note}\n" for note in notes)
    )
