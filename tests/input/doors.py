"""The doors through which a person's input comes: steps run by the real runner into a real store.

`World.refused(step, ...)` is the promise of all these tests in one place: the step refuses with exit code 42, says
which object, what was expected, what was found and what to do next, and has written nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import config_of, write_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from orbit_core.errors import InputError
from orbit_core.pipeline import plan
from orbit_core.recipe import Recipe
from orbit_core.steps.contract import StepSpec
from orbit_core.steps.runner import run_step
from orbit_core.store import open_store
from orbit_core.store.artifacts import Artifact

LETTERS = "0123456789+= abcdefghijklmnopqrstuvwxy"  # with <pad> and <eos> the 40 of config_of
Damage = Callable[[Path], object]


@dataclass(frozen=True)
class World:
    """A base, a prompt file and a store in which finished steps are adopted by every test."""

    folder: Path
    base: Path
    rows: Path

    @property
    def store(self) -> str:
        return str(self.folder / "store")

    def with_base(self, target: Path, damage: Damage) -> World:
        """The same world with a damaged copy of the base."""
        shutil.copytree(self.base, target)
        damage(target)
        return replace(self, base=target)

    def with_rows(self, target: Path, content: bytes) -> World:
        target.write_bytes(content)
        return replace(self, rows=target)

    def recipe(self, **changes: Any) -> Recipe:
        return Recipe.parse(
            {
                "model": {"kind": "local", "path": str(self.base)},
                "adapter": {"kind": "oft", "block_size": 16},
                "data": {"kind": "file", "path": str(self.rows), "heldout": 4},
                "reward": {"kind": "exact_match"},
                "algorithm": {
                    "steps": 1,
                    "prompts_per_step": 2,
                    "samples_per_prompt": 4,
                    "sampling": {"max_new_tokens": 4},
                },
                "preflight": {"prompts": 2},
                "engines": {"threads": 1},
                **changes,
            }
        )

    def specs(self, **changes: Any) -> dict[str, StepSpec]:
        """The steps of the recipe; train without the gate, which other tests pass through."""
        specs = plan(self.recipe(**changes), self.store)
        inputs = {name: ref for name, ref in specs["train"].inputs.items() if name != "preflight"}
        return {**specs, "train": specs["train"].model_copy(update={"inputs": inputs})}

    def made(self, step: str, **changes: Any) -> Artifact:
        """The artifact of a step, its inputs made before it where they are missing."""
        return run_step(self._ready(step, **changes), ignore)

    def refused(self, step: str, **changes: Any) -> InputError:
        """The refusal of a step whose inputs are in order; it has all its parts and nothing was written."""
        spec = self._ready(step, **changes)
        stored = sorted(open_store(self.store).list())
        with pytest.raises(InputError) as caught:
            run_step(spec, ignore)
        assert sorted(open_store(self.store).list()) == stored, "nothing is written"
        return checked(caught.value)

    def _ready(self, step: str, **changes: Any) -> StepSpec:
        """The spec of a step whose inputs are made."""
        specs = self.specs(**changes)
        for name in before(specs, step):
            run_step(specs[name], ignore)
        return specs[step]


def checked(error: InputError) -> InputError:
    assert error.exit_code == 42
    parts = {name: getattr(error, name) for name in ("what", "expected", "found", "fix")}
    assert all(parts.values()), f"a refusal names object, expected, found and the next step: {parts}"
    assert len(str(error)) < 2000 and "Traceback" not in str(error)
    return error


def before(specs: dict[str, StepSpec], step: str) -> Iterator[str]:
    """The steps that `step` needs, each after its own needs."""
    for ref in specs[step].inputs.values():
        if ref.step is not None:
            yield from before(specs, ref.step)
            yield ref.step


def ignore(event: str, /, **values: Any) -> None:
    pass


def write_tokenizer(directory: Path, words: list[str]) -> None:
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=" "))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "pad_token": "<pad>"}))


def make_base(directory: Path, **shape: Any) -> Path:
    """A Qwen3 of two layers in several shards, with a context of 64 tokens."""
    sizes = {"model_type": "qwen3", "heads": 4, "groups": 2, "head_dim": 32, **shape}
    config = {**config_of(**sizes), "max_position_embeddings": 64, "eos_token_id": 1}
    write_model(directory, config, max_shard_bytes=100_000)
    write_tokenizer(directory, ["<pad>", "<eos>", *LETTERS])
    return directory


def row(number: int, **fields: Any) -> bytes:
    return json.dumps({"prompt": f"{number}+1=", "label": str(number + 1), **fields}).encode() + b"\n"


def make_world(folder: Path) -> World:
    torch.set_num_threads(1)
    rows = folder / "rows.jsonl"
    rows.write_bytes(b"".join(row(number) for number in range(12)))
    return World(folder, make_base(folder / "base"), rows)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors of a directory, wherever they lie; shards stay as they are but for their contents."""
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        held = dict(tensors)
        change(tensors)
        if {name: id(tensor) for name, tensor in tensors.items()} != {n: id(t) for n, t in held.items()}:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def replaced(name: str, new: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Damage that puts another tensor in the place of `name`."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name] = new(tensors[name].clone())

    return lambda directory: edit_tensors(directory, change)
