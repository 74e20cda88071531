"""data: the prompt tables of a run, train.parquet and heldout.parquet. No held-out question is in train.parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter

from orbit_core.data.files import read_rows
from orbit_core.data.generated import draw
from orbit_core.data.prompts import write_prompts
from orbit_core.data.split import split, without_questions
from orbit_core.errors import InputError
from orbit_core.recipe import Data, PromptFile, Section
from orbit_core.rl.types import Prompt
from orbit_core.steps.contract import StepContext


class Params(Section):
    data: Data
    seed: int = Field(ge=0)


def run(context: StepContext) -> dict[str, Any]:
    params = TypeAdapter(Params).validate_python(context.spec.params)
    source = params.data
    if isinstance(source, PromptFile):
        train, heldout = _from_files(source, context.inputs, params.seed)
    else:
        prompts = draw(source, params.seed, lambda done, total: context.progress(done, total, "drawing questions"))
        train, heldout = split(prompts, source.heldout, params.seed)
    write_prompts(context.output / "train.parquet", train)
    write_prompts(context.output / "heldout.parquet", heldout)
    context.progress(1, 1, f"{len(train)} prompts for training, {len(heldout)} held out")
    return {"train": len(train), "heldout": len(heldout)}


def _from_files(source: PromptFile, inputs: dict[str, Path], seed: int) -> tuple[list[Prompt], list[Prompt]]:
    rows = read_rows(inputs["rows"], source.path)
    if source.heldout_path is None:
        return split(rows, source.heldout, seed)
    heldout = read_rows(inputs["heldout"], source.heldout_path)
    train = without_questions(rows, heldout)
    if not train:
        raise InputError(
            f"{source.path}", f"questions that {source.heldout_path} does not have", "none", "give separate files"
        )
    return train, heldout
