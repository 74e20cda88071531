"""preflight: the gate before training. Are trainer and rollout engine the same model, in bytes and in log-probs?

Both engines are loaded as the run will load them, with a random adapter away from the identity, and examined (see
parity/). The verdict is written to report.json and shown, whether it is good or bad; a bad one stops the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import Field, TypeAdapter
from torch import Tensor

from orbit_core.adapters.layout import random_adapter
from orbit_core.checkpoints.files import read_json
from orbit_core.checkpoints.hf import HFCheckpoint
from orbit_core.data.context import context_of, encode_all
from orbit_core.data.encode import load_tokenizer
from orbit_core.data.prompts import read_prompts
from orbit_core.errors import GateError, InputError
from orbit_core.parity.report import Thresholds, examine
from orbit_core.recipe import Adapter, Engines, Preflight, Sampling, Section
from orbit_core.rollout import load_rollout_engine
from orbit_core.steps.contract import StepContext
from orbit_core.trainers import load_trainer

REPORT = "report.json"


class Params(Section):
    adapter: Adapter
    engines: Engines
    preflight: Preflight
    sampling: Sampling
    seed: int = Field(ge=0)
    context_length: int | None = None


def run(context: StepContext) -> dict[str, Any]:
    """Facts: ok, mean_gap, max_gap, tokens, tensors. Raises GateError, after the report is out, when it is not ok."""
    params = TypeAdapter(Params).validate_python(context.spec.params)
    quantized, converted = context.inputs["quantized"], context.inputs["converted"]
    prompts = _prompts(context, params)
    context.progress(0, 3, "loading trainer and rollout engine")
    trainer = load_trainer(params.engines, converted, quantized, params.adapter, params.seed)
    rollout = load_rollout_engine(params.engines, quantized, params.adapter)
    context.progress(1, 3, f"comparing bytes, and log-probs of {len(prompts)} prompts")
    report = examine(
        trainer,
        rollout,
        lambda: _tensors(HFCheckpoint(quantized)),
        random_adapter(trainer.export_adapter(), params.seed),
        prompts,
        params.sampling,
        params.engines,
        Thresholds.of(params.preflight, params.engines.compute_dtype),
        params.seed,
    )
    report["digests"] = {name: ref.digest for name, ref in context.spec.inputs.items()}
    text = json.dumps(report, indent=2, sort_keys=True, allow_nan=False)
    (context.output / REPORT).write_text(text + "\n", encoding="utf-8")
    context.emit("report", name="preflight", content=report)
    context.progress(3, 3, report["verdict"])
    if not report["ok"]:
        raise GateError(
            "preflight: trainer and rollout engine are not the same model",
            "equal bytes, and log-prob gaps of at most "
            f"{report['thresholds']['mean_gap']:g} (mean) and {report['thresholds']['token_gap']:g} (one token)",
            "\n    ".join(report["reasons"]),
            "remove the artifact that differs (trainer: convert, rollout: quantize) from the store and run again; "
            "if it is refused again, the first drifting layer is where to look",
        )
    logprobs = report["logprobs"]
    return {
        "ok": True,
        "mean_gap": logprobs["mean_gap"],
        "max_gap": logprobs["max_gap"],
        "tokens": logprobs["tokens"],
        "tensors": report["bytes"]["tensors"],
    }


def _prompts(context: StepContext, params: Params) -> list[list[int]]:
    """The training prompts to compare on, as token ids. All prompts of both tables must leave room for an answer."""
    quantized = context.inputs["quantized"]
    tokenizer = load_tokenizer(quantized)
    limit = context_of(read_json(quantized, "config.json"), params.context_length)
    encoded = {
        table: encode_all(
            read_prompts(context.inputs["data"] / table),
            tokenizer,
            limit,
            params.sampling.max_new_tokens,
            table,
            lambda done, total: context.progress(done, total, "measuring prompts"),
        )
        for table in ("heldout.parquet", "train.parquet")
    }
    if not encoded["train.parquet"]:
        raise InputError("prompt table train.parquet", "at least one prompt", "none", "run the data step again")
    return spread(encoded["train.parquet"], params.preflight.prompts)


def spread(rows: list[list[int]], count: int) -> list[list[int]]:
    """`count` rows taken at equal distances over the table (all, where it is shorter)."""
    return [rows[index * len(rows) // count] for index in range(count)] if len(rows) > count else rows


def _tensors(checkpoint: HFCheckpoint) -> Iterator[tuple[str, Tensor]]:
    return ((name, checkpoint.tensor(name)) for name in checkpoint.metas)
