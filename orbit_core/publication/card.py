"""The model card: what this adapter is, what it can do, how sure that is, how to load it, and what it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orbit_core.recipe import LocalModel, LoRA, PromptFile, Recipe

FORMATS = {"int4": "INT4", "fp8": "FP8 (128x128 blocks)", "nvfp4": "NVFP4", "mxfp4": "MXFP4", "bf16": "BF16"}


def base_name(recipe: Recipe) -> str:
    """What the adapter's files call the base: its directory's name, or the run's when it was pretrained for it."""
    return recipe.model.path if isinstance(recipe.model, LocalModel) else f"{recipe.name}-base"


def write_card(recipe: Recipe, manifest: Mapping[str, Any], merged: bool) -> str:
    """README.md of the published directory."""
    evaluation = manifest["evaluation"]
    sections = [
        _front_matter(recipe),
        f"# {recipe.name}",
        f"{_adapter(recipe)} for `{base_name(recipe)}`, trained by reinforcement learning "
        f"({recipe.algorithm.variant.replace('_', '-').upper()}, {manifest['training']['steps']} steps) on the base "
        f"frozen in {_precision(recipe)}, the precision it is deployed in.",
        "## Results",
        _results(evaluation),
        "## Use",
        _use(merged),
        "## Training",
        _training(recipe, manifest),
        "## Limits",
        _limits(recipe, evaluation),
        "## Provenance",
        _provenance(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(recipe: Recipe) -> str:
    kind = "lora" if isinstance(recipe.adapter, LoRA) else "oft"
    return (
        f"---\nbase_model: {base_name(recipe)}\nlibrary_name: peft\npipeline_tag: text-generation\n"
        f"tags: [{kind}, reinforcement-learning, {recipe.precision.format}]\n---"
    )


def _adapter(recipe: Recipe) -> str:
    adapter = recipe.adapter
    if isinstance(adapter, LoRA):
        return f"A LoRA adapter (rank {adapter.rank}, alpha {adapter.alpha:g})"
    return f"An OFT adapter (blocks of {adapter.block_size}, Cayley-Neumann with 5 terms)"


def _precision(recipe: Recipe) -> str:
    name = FORMATS[recipe.precision.format]
    return f"{name} (group size {recipe.precision.group})" if recipe.precision.format == "int4" else name


def _results(evaluation: Mapping[str, Any]) -> str:
    before, after, gains = evaluation["before"], evaluation["after"], evaluation["gains"]["greedy"]
    rows = [("greedy accuracy", before["greedy"], after["greedy"])]
    rows += [(f"pass@{k}", before["pass_at_k"][k], after["pass_at_k"][k]) for k in before["pass_at_k"]]
    table = "\n".join(f"| {name} | {_figure(was)} | {_figure(now)} |" for name, was, now in rows)
    return (
        f"{evaluation['prompts']} held-out prompts, none of them seen in training; 95% intervals in brackets.\n\n"
        f"| | base | with adapter |\n|---|---|---|\n{table}\n\n"
        f"Of the greedy answers {gains['gained']} became right and {gains['lost']} became wrong "
        f"(exact McNemar p = {gains['p_value']:.2g})."
    )


def _figure(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure.get('accuracy', figure.get('value')):.1%} [{low:.1%}, {high:.1%}]"


def _use(merged: bool) -> str:
    text = (
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'base = AutoModelForCausalLM.from_pretrained("BASE", dtype="bfloat16")  # the base, quantised or not\n'
        'tokenizer = AutoTokenizer.from_pretrained("BASE")\n'
        'model = PeftModel.from_pretrained(base, "adapter")\n'
        "```\n\n"
        "The figures above are of the quantised base; on the unquantised one the adapter computes something close to, "
        "but not the same as, what was trained. PEFT 0.18 or later."
    )
    if merged:
        text += (
            "\n\n`merged/` is a BF16 model with the adapter merged into the weights that the quantised base stands "
            "for; transformers and serving engines load it as it is."
        )
    return text


def _training(recipe: Recipe, manifest: Mapping[str, Any]) -> str:
    training, algorithm = manifest["training"], recipe.algorithm
    source = recipe.data
    data = f"`{source.path}`" if isinstance(source, PromptFile) else f"reasoning-gym `{source.dataset}`"
    lines = [
        f"- prompts: {data}; a step takes {algorithm.prompts_per_step} of them, "
        f"{algorithm.samples_per_prompt} samples each",
        f"- reward: {recipe.reward.kind.replace('_', '-')}"
        + (" (SHUFFLED: a control run, in which nothing can be learned)" if recipe.reward.shuffle else ""),
        f"- learning rate {algorithm.optimizer.learning_rate:g} ({algorithm.optimizer.schedule}), seed {recipe.seed}",
        "- trainer against rollout engine: mean |log-probability difference| of "
        f"{training['logprob_gap_mean']:.1e} a token",
    ]
    if training.get("max_orthogonality_error") is not None:
        lines.append(
            f"- largest orthogonality error of a block in the whole run: {training['max_orthogonality_error']:.1e}"
        )
    return "\n".join(lines)


def _limits(recipe: Recipe, evaluation: Mapping[str, Any]) -> str:
    lines = [
        "- Measured on the held-out prompts of its own task family only. Nothing is known about other tasks, about "
        "safety, or about what the base could do and the adapter has lost.",
        "- The reward judges the final answer, not the reasoning before it.",
    ]
    if not isinstance(recipe.model, LocalModel):
        lines.insert(
            0,
            "- A demonstration: the base is a toy, pretrained on homework in which most carries are forgotten, so that "
            "there is something to amplify.",
        )
    if evaluation["gains"]["greedy"]["interval"][0] <= 0:
        lines.insert(0, "- The change in greedy accuracy is within what chance explains (95%).")
    return "\n".join(lines)


def _provenance(manifest: Mapping[str, Any]) -> str:
    code = manifest["code"]
    rows = [("code", f"{code['package']} {code['version']}" + (f", commit {code['commit']}" if code["commit"] else ""))]
    rows += [(name, f"`{digest}`") for name, digest in manifest["digests"].items()]
    return "\n".join(["`manifest.json` has all of it.", "", "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
