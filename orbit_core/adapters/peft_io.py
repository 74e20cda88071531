"""Adapters as PEFT directories: adapter_config.json and adapter_model.safetensors, both ways.

What is written, `peft.PeftModel.from_pretrained` loads (0.18 or later, where the Cayley-Neumann series is the one of
orbit_kernels.oft). What is read must mean exactly what is computed here: a field that would change the function (exact
Cayley, COFT, shared blocks, rsLoRA, DoRA, rank patterns, biases, further trained modules) is refused, never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from orbit_core.adapters.digest import tensors_digest
from orbit_core.adapters.layout import published
from orbit_core.adapters.sites import PREFIX
from orbit_core.checkpoints.files import read_json
from orbit_core.checkpoints.tensorfile import SafetensorsWriter, TensorMeta, read_safetensors
from orbit_core.errors import InputError
from orbit_core.recipe import OFT, Adapter, LoRA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_KEY = "orbit.base"  # in the metadata of WEIGHTS: digest of the frozen base
_AS_PEFT = "give a directory as PEFT saves it"
_SHARED = re.compile(r"\.experts\.[a-z_]+\.oft_R\.")  # no expert number: one rotation for all of a layer
PEFT_VERSION = "0.18.0"  # the first with this series; PEFT warns about older or missing versions

_COMMON: dict[str, Any] = {
    "base_model_name_or_path": None,
    "bias": "none",
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_version": PEFT_VERSION,
    "task_type": "CAUSAL_LM",
}
_OFT: dict[str, Any] = {
    "peft_type": "OFT",
    "r": 0,
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
    "coft": False,
    "block_share": False,
    "module_dropout": 0.0,
    "init_weights": True,
}
_LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
}
_HARMLESS = {  # what a reader may find without the function changing
    "base_model_name_or_path", "inference_mode", "task_type", "peft_version", "revision", "auto_mapping",
    "target_modules", "oft_block_size", "lora_alpha", "r", "peft_type", "module_dropout", "lora_dropout",
    "init_weights", "init_lora_weights", "eps", "megatron_config", "megatron_core", "loftq_config", "runtime_config",
    "eva_config", "corda_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
_MEANING: dict[str, Any] = {  # fields that change the function, and the one value that is computed here
    "use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "coft": False, "block_share": False,
    "use_rslora": False, "use_dora": False, "lora_bias": False, "bias": "none", "fan_in_fan_out": False,
}  # fmt: skip
_PEFT_DEFAULTS = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "bias": "none"}


def adapter_config(adapter: Adapter, base: str | None = None) -> dict[str, Any]:
    """Contents of adapter_config.json; `base` names the model that the adapter belongs to."""
    config = {**_COMMON, "base_model_name_or_path": base, "target_modules": sorted(adapter.targets)}
    if isinstance(adapter, OFT):
        return {**config, **_OFT, "oft_block_size": adapter.block_size}
    return {**config, **_LORA, "r": adapter.rank, "lora_alpha": adapter.alpha}


def save_adapter(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    adapter: Adapter,
    base: str | None = None,
    base_digest: str | None = None,
) -> str:
    """Write a PEFT directory in the publication dtype (BF16); returns the digest of the tensors as written.

    `base` is the model's name for people; `base_digest` says which frozen base, so that no other is taken for it.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    rounded = {name: published(tensor).cpu().contiguous() for name, tensor in sorted(tensors.items())}
    metadata = {"format": "pt"} | ({BASE_KEY: base_digest} if base_digest else {})
    (target / WEIGHTS).unlink(missing_ok=True)
    plan = {name: TensorMeta.of(tensor) for name, tensor in rounded.items()}
    writer = SafetensorsWriter(target / WEIGHTS, plan, metadata)  # the library orders metadata by chance
    for name, tensor in rounded.items():
        writer.append(name, tensor)
    writer.close()
    text = json.dumps(adapter_config(adapter, base), indent=2, sort_keys=True)
    (target / CONFIG).write_text(text + "\n", encoding="utf-8")
    return tensors_digest(rounded)


def load_adapter(directory: str | Path, adapter: Adapter, base_digest: str | None = None) -> dict[str, Tensor]:
    """Tensors as stored (PEFT names). Raises InputError as `read_adapter` does, and unless they are of the kind, size
    and targets of `adapter`, and not known to be of another base than `base_digest` (an adapter that says nothing of
    its base, because another tool wrote it, is taken)."""
    tensors, found = read_adapter(directory)
    if _identity(found) != _identity(adapter):
        fix = "give an adapter of this kind and size, or change the recipe's adapter"
        raise InputError(f"adapter directory {directory}", str(_identity(adapter)), str(_identity(found)), fix)
    made_for = _base_of(Path(directory) / WEIGHTS)
    if base_digest and made_for and made_for != base_digest:
        raise InputError(
            f"adapter directory {directory}",
            f"an adapter of base {base_digest[:16]}, which this run trains",
            f"one of base {made_for[:16]}",
            "give an adapter that was trained on this base in this precision, or start without warm_start",
        )
    return tensors


def _base_of(weights: Path) -> str | None:
    with safe_open(weights, "pt") as file:
        return (file.metadata() or {}).get(BASE_KEY)


def read_adapter(directory: str | Path) -> tuple[dict[str, Tensor], Adapter]:
    """Tensors as stored (PEFT names) and the adapter that they belong to.

    Whether they fit a model is for `AdapterLayout.check` to say. Raises InputError for a directory without the two
    files, a convention that is not computed here, or tensors that are neither OFT's nor LoRA's.
    """
    source = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (source / name).is_file():
            raise InputError(f"adapter directory {source}", name, "no such file", "pickled adapters are not loaded")
    config = read_json(source, CONFIG)
    tensors = {name: stored.read() for name, stored in read_safetensors(source, WEIGHTS).items()}
    adapter = _read_config(config, str(source / CONFIG), shared=any(_SHARED.search(name) for name in tensors))
    suffixes = ("oft_R.weight",) if isinstance(adapter, OFT) else ("lora_A.weight", "lora_B.weight")
    odd = [name for name in tensors if not (name.startswith(PREFIX) and name.endswith(suffixes))]
    if odd or not tensors:
        found = f"{odd[:3] or 'none'}"[:300]
        raise InputError(f"{source / WEIGHTS}", f"tensors {PREFIX}<module>.{suffixes[0]}", found, _AS_PEFT)
    return tensors, adapter


def _read_config(config: Mapping[str, Any], what: str, shared: bool) -> Adapter:
    kind = str(config.get("peft_type", "")).upper()
    if kind not in ("OFT", "LORA"):
        raise InputError(f"{what}: peft_type", "OFT or LORA", repr(config.get("peft_type"))[:80], _AS_PEFT)
    for field, wanted in _MEANING.items():
        found = config.get(field, _PEFT_DEFAULTS.get(field, wanted))
        if found != wanted:
            raise InputError(
                f"{what}: {field}", repr(wanted), repr(found)[:80], "another convention computes another function"
            )
    for field, value in config.items():
        if field not in _HARMLESS and field not in _MEANING and value:
            raise InputError(
                f"{what}: {field}", "unset", repr(value)[:80], "this changes the function; it is not computed"
            )
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise InputError(f"{what}: target_modules", "a list of module names", repr(targets)[:80], _AS_PEFT)
    try:
        if kind == "OFT":
            if config.get("r"):
                raise InputError(f"{what}: r", "0, with oft_block_size set", repr(config["r"])[:80], _AS_PEFT)
            return OFT(
                block_size=config.get("oft_block_size", 32), targets=tuple(sorted(targets)), share_experts=shared
            )
        rank = config.get("r", 8)
        return LoRA(rank=rank, alpha=config.get("lora_alpha", 8), targets=tuple(sorted(targets)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{what}: {first['loc'][0]}", first["msg"], repr(first["input"])[:80], _AS_PEFT) from None


def _identity(adapter: Adapter) -> dict[str, Any]:
    return {**adapter.model_dump(), "targets": sorted(adapter.targets)}
