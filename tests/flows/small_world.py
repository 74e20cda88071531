"""A base of thirty thousand parameters, prompts in a file, and an executor that runs the real steps in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from orbit_core.executors.base import Event
from orbit_core.recipe import Recipe
from orbit_core.steps.contract import StepSpec
from orbit_core.steps.runner import run_step
from orbit_core.store.artifacts import Artifact

ALPHABET = "0123456789+=? abcdefghijklmnopqrstuvwxyz"


def write_base(folder: Path, seed: int = 0, hidden: int = 32) -> Path:
    """A dense Qwen3 with random weights and a tokenizer of one token a letter."""
    from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    words = ["<pad>", "<eos>", *ALPHABET]
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=hidden, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, eos_token_id=1, pad_token_id=0,
        bos_token_id=None, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_prompts(file: Path, rows: range) -> Path:
    lines = [json.dumps({"prompt": f"{n:03d}+{n + 1:03d}=", "label": str(2 * n + 1)}) for n in rows]
    file.write_text("\n".join(lines) + "\n")
    return file


def recipe_of(base: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "model": {"kind": "local", "path": str(base)},
        "precision": {"format": "int4", "group_size": 32},
        "adapter": {"kind": "oft", "block_size": 16},
        "data": {"kind": "file", "path": str(prompts), "heldout": 16},
        "reward": {"kind": "python", "function": "peoples_rewards:vowels"},
        "algorithm": {
            "steps": 4,
            "prompts_per_step": 4,
            "samples_per_prompt": 8,
            "skip_zero_variance": False,
            "sampling": {"max_new_tokens": 8},
            "optimizer": {"learning_rate": 0.02, "warmup_steps": 0},
        },
        "preflight": {"prompts": 2},
        "evaluation": {"prompts": 16, "samples": 0},
        "engines": {"threads": 1},
        **changes,
    }


class InThisProcess:
    """The real runner and the real steps without a process for each: the same specs, the same artifacts."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(self, spec: StepSpec, on_event: Callable[[Event], None]) -> Artifact:
        self.ran.append(spec.step)
        return run_step(spec, lambda kind, **values: on_event({"orbit": kind, **values}))


def parsed(content: dict[str, Any]) -> Recipe:
    return Recipe.parse(content)
