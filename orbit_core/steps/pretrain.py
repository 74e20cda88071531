"""pretrain: the demo's base model, a small Qwen3 that does its sums in writing and forgets most carries.

The number of CPU threads is fixed, so the same recipe gives the same bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from orbit_core.data.prompts import read_prompts
from orbit_core.homework.pretraining import pretrain, save_model
from orbit_core.recipe import Data, PretrainedModel, Section
from orbit_core.steps.contract import StepContext

THREADS = 1  # a model this small gains nothing from more, and loses on a busy machine


class Params(Section):
    model: PretrainedModel
    data: Data
    seed: int = Field(ge=0)


def run(context: StepContext) -> dict[str, Any]:
    params = Params.model_validate(context.spec.params)
    prompts = read_prompts(context.inputs["data"] / "train.parquet")
    torch.set_num_threads(THREADS)
    losses: list[float] = []

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 20 == 0 or step == params.model.steps:
            context.progress(step, params.model.steps, "learning the homework", loss=loss)

    model, tokenizer = pretrain(params.model, prompts, params.seed, report)
    save_model(model, tokenizer, context.output)
    tail = losses[-20:]
    return {"parameters": model.num_parameters(), "prompts": len(prompts), "loss": sum(tail) / len(tail)}
