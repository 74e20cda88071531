"""evaluate: the held-out prompts, answered before and after by the model as it will be deployed.

One engine holds the quantised base; "before" is the adapter off, "after" the trained adapter on. Same prompts, same
random numbers, same judge.

    evaluation.json   accuracy, pass@k, intervals, what was gained and lost
    samples.parquet   one row per prompt: both greedy answers, and how many sampled ones are right
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter

from orbit_core.adapters.peft_io import load_adapter
from orbit_core.data.encode import encode_prompt, load_tokenizer
from orbit_core.data.prompts import prompt_text, read_prompts
from orbit_core.evaluation.answers import Answers, Examination
from orbit_core.evaluation.summary import compare, summarise
from orbit_core.recipe import Adapter, Engines, Evaluation, Reward, Sampling, Section
from orbit_core.rl.rewards import Judge
from orbit_core.rl.types import Prompt
from orbit_core.rollout import load_rollout_engine
from orbit_core.rollout.base import RolloutEngine
from orbit_core.steps.contract import StepContext


class Params(Section):
    adapter: Adapter
    engines: Engines
    seed: int = Field(ge=0)
    evaluation: Evaluation
    reward: Reward
    sampling: Sampling


def run(context: StepContext) -> dict[str, Any]:
    params = TypeAdapter(Params).validate_python(context.spec.params)
    tensors = load_adapter(context.inputs["train"] / "adapter", params.adapter)
    examination = _examination(context.inputs, params)
    prompts = examination.prompts
    engine = load_rollout_engine(params.engines, context.inputs["quantized"], params.adapter)

    context.progress(0, 2, f"{len(prompts)} held-out prompts, adapter off")
    before = examination.ask(engine)
    context.progress(1, 2, f"before: {sum(before.right)} of {len(prompts)} right; adapter on")
    digest = engine.stage_adapter(1, tensors)
    engine.activate_adapter(1)
    after = examination.ask(engine)
    context.progress(2, 2, f"after: {sum(after.right)} of {len(prompts)} right")

    evaluation = {
        "prompts": len(prompts),
        "samples": params.evaluation.samples,
        "temperature": params.evaluation.temperature,
        "confidence": 0.95,
        "adapter_digest": digest,
        "before": summarise(before, params.evaluation),
        "after": {**summarise(after, params.evaluation), "kl_to_base": _kl_to_base(engine, examination, after)},
        "gains": compare(before, after),
    }
    text = json.dumps(evaluation, indent=2, sort_keys=True)
    (context.output / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    _write_samples(context.output / "samples.parquet", prompts, before, after)
    context.emit("report", name="evaluation", content=evaluation_table(evaluation))
    return _facts(evaluation)


def evaluation_table(evaluation: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = [("greedy accuracy", *(evaluation[side]["greedy"] for side in ("before", "after")))]
    for k in evaluation["before"]["pass_at_k"]:
        rows.append((f"pass@{k}", *(evaluation[side]["pass_at_k"][k] for side in ("before", "after"))))
    lines = [f"### {evaluation['prompts']} held-out prompts", "", "| | before | after |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {_cell(before)} | {_cell(after)} |" for name, before, after in rows])


def _cell(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure.get('accuracy', figure.get('value')):.1%} ({low:.1%} to {high:.1%})"


def _examination(inputs: dict[str, Path], params: Params) -> Examination:
    prompts = read_prompts(inputs["data"] / "heldout.parquet")[: params.evaluation.prompts]
    tokenizer = load_tokenizer(inputs["quantized"])
    return Examination(
        prompts,
        [tuple(encode_prompt(prompt, tokenizer)) for prompt in prompts],
        params.evaluation,
        params.sampling,
        params.seed,
        tokenizer.decode,
        Judge(params.reward),
    )


def _kl_to_base(engine: RolloutEngine, examination: Examination, answers: Answers) -> float:
    """Nats per token from the base, estimated on the adapter's own answers: mean of log p - log p_base (k1)."""
    sequences = examination.sequences(answers)
    temperature = examination.evaluation.temperature
    ours, base = (engine.score(sequences, temperature, adapter=adapter) for adapter in (True, False))
    total = sum(float((p - q).double().sum()) for p, q in zip(ours, base, strict=True))
    return total / max(1, sum(len(logprobs) for logprobs in ours))


def _write_samples(path: Path, prompts: Sequence[Prompt], before: Answers, after: Answers) -> None:
    columns: dict[str, Any] = {
        "id": [prompt.id for prompt in prompts],
        "prompt": [prompt_text(prompt) for prompt in prompts],
        "label": [p.label if isinstance(p.label, str) else json.dumps(p.label, ensure_ascii=False) for p in prompts],
    }
    for name, answers in (("before", before), ("after", after)):
        columns[name] = answers.texts
        columns[f"{name}_right"] = answers.right
        columns[f"{name}_tokens"] = [len(completion.token_ids) for completion in answers.greedy]
        columns[f"{name}_sampled_right"] = answers.sampled_right or [None] * len(prompts)
    pq.write_table(pa.table(columns), path)


def _facts(evaluation: dict[str, Any]) -> dict[str, Any]:
    before, after, gains = evaluation["before"], evaluation["after"], evaluation["gains"]["greedy"]
    facts = {
        "prompts": evaluation["prompts"],
        "accuracy_before": before["greedy"]["accuracy"],
        "accuracy_after": after["greedy"]["accuracy"],
        "interval_before": before["greedy"]["interval"],
        "interval_after": after["greedy"]["interval"],
        "gained": gains["gained"],
        "lost": gains["lost"],
        "adapter_digest": evaluation["adapter_digest"],
    }
    for k in before["pass_at_k"]:
        facts |= {f"pass_at_{k}_{name}": evaluation[name]["pass_at_k"][k]["value"] for name in ("before", "after")}
    return facts
