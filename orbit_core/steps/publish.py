"""publish: what a person takes away.

adapter/       PEFT directory; `peft.PeftModel.from_pretrained` computes what was trained
manifest.json  digests of base, data, recipe and every file; code version; evaluation
README.md      model card
merged/        on request: a BF16 model with the adapter merged in
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orbit_core.adapters.peft_io import load_adapter, save_adapter
from orbit_core.checkpoints.hf import HFCheckpoint
from orbit_core.errors import OrbitError
from orbit_core.publication.card import base_name, write_card
from orbit_core.publication.manifest import make_manifest
from orbit_core.publication.merged import write_merged
from orbit_core.recipe import Publication, Recipe, Section
from orbit_core.steps.contract import StepContext


class Params(Section):
    publication: Publication
    recipe: Recipe


def run(context: StepContext) -> dict[str, Any]:
    params = Params.model_validate(context.spec.params)
    recipe, output = params.recipe, context.output
    training = _read(context.inputs["train"] / "summary.json")
    evaluation = _read(context.inputs["evaluate"] / "evaluation.json")

    tensors = load_adapter(context.inputs["train"] / "adapter", recipe.adapter)
    frozen = context.spec.inputs["quantized"].digest
    digest = save_adapter(output / "adapter", tensors, recipe.adapter, base_name(recipe), frozen)
    if not digest == evaluation["adapter_digest"] == training["adapter_digest"]:
        raise OrbitError(
            "publish: the adapter is not the one that was trained and evaluated\n"
            f"  expected: {training['adapter_digest']} (train), {evaluation['adapter_digest']} (evaluate)\n"
            f"  found: {digest}\n  what to do: the store's files were changed; run train and evaluate again"
        )
    if params.publication.merge:
        quantized = HFCheckpoint(context.inputs["quantized"])
        write_merged(
            quantized,
            tensors,
            recipe.adapter,
            output / "merged",
            lambda done, total: context.progress(done, total, "merging"),
        )
    manifest = make_manifest(context.spec, recipe, output, training, evaluation)
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)
    (output / "manifest.json").write_text(text + "\n", encoding="utf-8")
    card = write_card(recipe, manifest, params.publication.merge)
    (output / "README.md").write_text(card, encoding="utf-8")
    context.emit("report", name="card", content=card)
    context.progress(1, 1, f"adapter {digest[:16]}")
    return {"adapter_digest": digest, "merged": params.publication.merge, "files": sorted(manifest["files"])}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
