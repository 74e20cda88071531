"""What the next retraining of a name is, decided by content digests before anything runs.

A round trains the recipe from the adapter that serves. It is due unless the very same training (same data, base,
recipe and start) has already led to an entry of the history, also one that was rolled back since: what people took
out of service does not come back by itself. Warm starts and comparisons want one base and one kind of adapter; another
base must be asked for, another kind of adapter cannot be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from orbit_core.errors import InputError
from orbit_core.pipeline import plan
from orbit_core.publication.promotions import Promotion, Promotions
from orbit_core.recipe import Recipe
from orbit_core.steps.contract import InputRef, StepSpec
from orbit_core.store import open_store
from orbit_core.store.artifacts import ArtifactStore


@dataclass(frozen=True)
class Round:
    """One retraining: the steps to run and the entry whose adapter is to be replaced, if it is not better."""

    recipe: Recipe
    store: str
    steps: dict[str, StepSpec]
    promoted: Promotion | None
    notes: tuple[str, ...] = ()

    @property
    def rival(self) -> StepSpec | None:
        """The evaluation of the promoted adapter on this round's base and held-out prompts."""
        return evaluation_of(self.steps["evaluate"], self.promoted.train) if self.promoted else None


@dataclass(frozen=True)
class NothingNew:
    """The same training has been done and judged."""

    entry: Promotion  # that it led to
    newest: Promotion

    @property
    def line(self) -> str:
        made = f"nothing new: data, base and recipe are those of promotion {self.entry.number} of {self.entry.name}"
        serving = self.newest.restores or self.newest.number
        return made if serving == self.entry.number else f"{made}, which was replaced; {serving} serves"


def next_round(recipe: Recipe, store: str, new_base: bool = False) -> Round | NothingNew:
    """What to do now. Raises InputError when the promoted adapter is of another kind, or of another base without
    `new_base`."""
    history = Promotions(open_store(store), recipe.name).entries()
    newest = history[-1] if history else None
    seen: dict[str | None, str] = {}  # start -> digest of the training from there
    for entry in reversed(history):
        if entry.warm_start not in seen:
            seen[entry.warm_start] = plan(recipe, store, entry.warm_start_ref)["train"].digest
        if newest and seen[entry.warm_start] == entry.train:
            return NothingNew(entry, newest)
    if newest is None:
        return Round(recipe, store, plan(recipe, store), None)
    steps = plan(recipe, store, InputRef(step="train", digest=newest.train))
    return Round(recipe, store, steps, newest, _check_start(recipe, store, steps, newest, new_base))


def evaluation_of(evaluate: StepSpec, train: str) -> StepSpec:
    """`evaluate` with the adapter of another train artifact: same base, prompts, sampling and judge."""
    return evaluate.model_copy(update={"inputs": {**evaluate.inputs, "train": InputRef(step="train", digest=train)}})


def _check_start(
    recipe: Recipe, store: str, steps: dict[str, StepSpec], newest: Promotion, new_base: bool
) -> tuple[str, ...]:
    """Whether the promoted adapter can be started from and compared with; returns what is to be said about it."""
    what = f"retraining {recipe.name} from promotion {newest.number}"
    trained = ArtifactStore(open_store(store)).find("train", newest.train)
    if trained is None:
        raise InputError(what, f"artifact train/{newest.train[:16]} in store {store}", "it is gone")
    ours, theirs = _kind(recipe.adapter.model_dump(mode="json")), _kind(trained.manifest.params["adapter"])
    if ours != theirs:
        raise InputError(
            f"{what}: adapter", f"{theirs}, as promoted", f"{ours} in the recipe", "give the recipe another name"
        )
    base = steps["quantize"].digest
    if base == newest.base_digest:
        return ()
    if not new_base:
        raise InputError(
            f"{what}: base",
            f"{newest.base_digest[:16]}, which its adapter was trained on",
            f"{base[:16]}",
            "set new_base: true to carry the adapter over to another base or precision",
        )
    return (f"new base {base[:16]}: the adapter of promotion {newest.number} is carried over and judged on it",)


def _kind(adapter: dict[str, object]) -> dict[str, object]:
    targets = adapter["targets"]
    return {**adapter, "targets": sorted(targets) if isinstance(targets, list | tuple) else targets}
