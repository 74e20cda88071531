"""Which models are computed, and their empty skeletons.

The concrete classes of transformers are imported, never AutoModel: that is faster, and no code of a checkpoint can run.
A skeleton stands on the meta device, so building one costs no memory; its weights come from `loading`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from orbit_core.checkpoints.architecture import COMPUTED, refuse_code
from orbit_core.errors import InputError

FAMILIES = dict(zip(COMPUTED, ("Qwen3", "Qwen3Moe", "Llama"), strict=True))
_FETCH = "fetch the model's config.json again"
_OTHER = "give a model without it; it is not computed here"
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # others change with the length of the batch


def build_skeleton(config: Mapping[str, Any]) -> nn.Module:
    """A `...ForCausalLM` on the meta device, in eval mode, from the contents of a config.json.

    Raises InputError for a family, a position encoding or an attention window that is not computed here.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError("config.json model_type", f"one of {', '.join(FAMILIES)}", repr(family), _OTHER)
    refuse_code(config)
    package = f"transformers.models.{family}"
    config_class = getattr(importlib.import_module(f"{package}.configuration_{family}"), f"{FAMILIES[family]}Config")
    model_class = getattr(importlib.import_module(f"{package}.modeling_{family}"), f"{FAMILIES[family]}ForCausalLM")
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype", "dtype")}
    try:
        typed = config_class(**plain)
        rope = typed.rope_parameters["rope_type"]
        if getattr(typed, "sliding_window", None):
            found = f"a window of {typed.sliding_window}"
            raise InputError("config.json sliding_window", "full attention", found, _OTHER)
        if rope not in _FIXED_ROPE:
            raise InputError("config.json rope_type", f"one of {', '.join(_FIXED_ROPE)}", repr(rope), _OTHER)
        typed._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = model_class(typed)
    except InputError:
        raise
    except Exception as error:  # the library checks a config in many places, each with exceptions of its own
        found = f"{type(error).__name__}: {error}"[:500]
        raise InputError("config.json", f"a configuration of {FAMILIES[family]}", found, _FETCH) from None
    return model.requires_grad_(False).eval()


def fresh_rotary(model: nn.Module, device: torch.device) -> None:
    """Give the skeleton a rotary embedding with real frequencies: they are derived, not stored in checkpoints."""
    decoder: Any = model.model
    with torch.device(device):
        decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config)
