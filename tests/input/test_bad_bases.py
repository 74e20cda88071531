"""Bases that are damaged, incomplete or not what they say: refused by the step that first reads them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import Damage, World, edit_json, edit_tensors, make_base, replaced, write_tokenizer

from orbit_core.checkpoints.hf import INDEX

Q = "model.layers.0.self_attn.q_proj"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def shard(directory: Path, number: int = 1) -> Path:
    return sorted(directory.glob("*.safetensors"))[number]


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Damage that rewrites the header of one shard."""

    def damage(directory: Path) -> None:
        file = shard(directory)
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        content = json.loads(raw[8 : 8 + length])
        change(content)
        text = json.dumps(content).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return damage


def first(content: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in content.items() if name != "__metadata__")


def overlap(content: dict[str, Any]) -> None:
    entry = dict(first(content))
    content["model.layers.0.mlp.extra.weight"] = entry


def out_of_bounds(content: dict[str, Any]) -> None:
    entry = first(content)
    entry["data_offsets"] = [offset + 10**12 for offset in entry["data_offsets"]]


def index(where: str) -> Damage:
    def damage(directory: Path) -> None:
        shutil.copy(shard(directory), directory.parent / "outside.safetensors")
        edit_json(
            directory / INDEX,
            weight_map=dict.fromkeys(json.loads((directory / INDEX).read_text())["weight_map"], where),
        )

    return damage


def linked(name: str | None) -> Damage:
    def damage(directory: Path) -> None:
        file = shard(directory) if name is None else directory / name
        target = directory.parent / "elsewhere"
        shutil.move(file, target)
        os.symlink(target, file)

    return damage


def set_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def only_pickles(directory: Path) -> None:
    for file in [*directory.glob("*.safetensors"), directory / INDEX]:
        file.unlink()
    torch.save({"w": torch.zeros(1)}, directory / "pytorch_model.bin")


def config(**changes: Any) -> Damage:
    return lambda directory: edit_json(directory / "config.json", **changes)


BASES: dict[str, tuple[Damage, list[str]]] = {
    "missing shard": (lambda d: shard(d).unlink(), ["model-00002", "nothing there"]),
    "truncated shard": (lambda d: os.truncate(shard(d), shard(d).stat().st_size - 1), ["model-00002", "truncated"]),
    "truncated header": (lambda d: os.truncate(shard(d), 20), ["model-00002", "truncated"]),
    "no header": (lambda d: os.truncate(shard(d), 3), ["model-00002", "truncated"]),
    "huge header": (lambda d: shard(d).write_bytes(b"\xff" * 64), ["model-00002"]),
    "overlapping tensors": (header(overlap), ["without gap or overlap"]),
    "tensor out of bounds": (header(out_of_bounds), ["without gap or overlap"]),
    "offsets that are three": (header(lambda c: first(c).update(data_offsets=[0, 4, 8])), ["model-00002"]),
    "sizes beyond 64 bits": (header(lambda c: first(c).update(shape=[0, 2**70])), ["model-00002"]),
    "dtype nobody knows": (header(lambda c: first(c).update(dtype="F7")), ["F7"]),
    "index leads outside": (index("../outside.safetensors"), ["a file of that directory"]),
    "index leads anywhere": (index("/etc/hostname"), ["a file of that directory"]),
    "shard is a link": (linked(None), ["symbolic link"]),
    "index is a link": (linked(INDEX), ["symbolic link"]),
    "config is a link": (linked("config.json"), ["symbolic link"]),
    "tokenizer is a link": (linked("tokenizer.json"), ["symbolic link"]),
    "only pickles": (only_pickles, ["pickle"]),
    "too few rows": (replaced(f"{Q}.weight", lambda t: t[:-32]), [Q, "(128, 128)", "(96, 128)"]),
    "too narrow": (replaced(f"{Q}.weight", lambda t: t[:, :96]), [Q, "(128, 128)", "(128, 96)"]),
    "norm of another size": (replaced(NORM, lambda t: t[:-1]), [NORM, "(128,)", "(127,)"]),
    "embedding of another size": (replaced(EMBEDDING, lambda t: t[:-1]), [EMBEDDING, "(40, 128)"]),
    "integers for weights": (replaced(f"{Q}.weight", lambda t: t.to(torch.int8)), [Q, "int8"]),
    "8-bit floats without scales": (replaced(f"{Q}.weight", lambda t: t.to(torch.float8_e4m3fn)), [Q, "float8"]),
    "a number for a norm": (replaced(NORM, lambda t: t[0]), [NORM, "(128,)"]),
    "NaN in a weight": (replaced(f"{Q}.weight", set_first(float("nan"))), [Q, "NaN or infinity"]),
    "infinity in a weight": (replaced(f"{Q}.weight", set_first(float("inf"))), [Q, "NaN or infinity"]),
    "NaN in a norm": (replaced(NORM, set_first(float("nan"))), [NORM, "NaN or infinity"]),
    "more layers than tensors": (config(num_hidden_layers=3), ["layers.2", "missing"]),
    "a billion layers": (config(num_hidden_layers=10**9), ["num_hidden_layers"]),
    "fewer layers than tensors": (config(num_hidden_layers=1), ["layers.1"]),
    "a model that is not computed here": (config(model_type="gpt2"), ["model_type", "gpt2"]),
    "code of its own": (config(auto_map={"AutoModel": "evil.Model"}), ["auto_map", "no code of a checkpoint"]),
    "sizes that are text": (config(hidden_size="128"), ["hidden_size", "'128'"]),
    "quantization_config of nobody": (config(quantization_config={"quant_method": "awq"}), ["quant_method", "awq"]),
    "tokenizer larger than the embedding": (
        lambda d: write_tokenizer(d, [*map(str, range(41))]), ["tokenizer", "below 40", "id of 40"]),
    "tokenizer that is none": (lambda d: (d / "tokenizer.json").write_text("{}"), ["tokenizer.json"]),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ["tokenizer"]),
    "stop token outside the vocabulary": (config(eos_token_id=40), ["eos_token_id", "40"]),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), BASES.values(), ids=BASES)
def test_a_damaged_base_is_refused_before_it_is_quantised(
    world: World, tmp_path: Path, damage: Damage, words: list[str]
) -> None:
    error = world.with_base(tmp_path / "base", damage).refused("quantize")
    assert all(word in str(error) for word in words), str(error)


def test_a_group_size_that_does_not_divide_is_refused_with_the_tensor(world: World, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", inner=160)
    own = World(world.folder, base, world.rows)
    error = own.refused("quantize", precision={"format": "int4", "group_size": 128})
    assert "down_proj" in error.what and "128" in error.expected and "160" in error.found


def mixed(directory: Path) -> None:
    """One projection of an INT4 base in FP8, its config untouched."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if f"{Q}.weight_packed" in tensors:
            for suffix in ("weight_packed", "weight_scale", "weight_shape"):
                tensors.pop(f"{Q}.{suffix}")
            tensors[f"{Q}.weight"] = torch.ones(128, 128).to(torch.float8_e4m3fn)
            tensors[f"{Q}.weight_scale_inv"] = torch.ones(1, 1)

    edit_tensors(directory, change)


def gptq(directory: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if f"{Q}.weight_packed" in tensors:
            tensors[f"{Q}.qweight"] = tensors.pop(f"{Q}.weight_packed")

    edit_tensors(directory, change)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (replaced(f"{Q}.weight_scale", set_first(float("nan"))), [Q, "finite scales"]),
        (replaced(f"{Q}.weight_scale", set_first(float("inf"))), [Q, "finite scales"]),
        (replaced(f"{Q}.weight_scale", lambda t: t * 0), [Q, "nonzero scale"]),
        (replaced(f"{Q}.weight_scale", lambda t: t[:, :-1]), [Q, "group"]),
        (replaced(f"{Q}.weight_scale", lambda t: t.to(torch.float64)), [Q, "float64"]),
        (replaced(f"{Q}.weight_packed", lambda t: t[:-1]), [Q, "weight_packed"]),
        (replaced(f"{Q}.weight_shape", lambda t: t * 0), [Q]),
        (replaced(f"{Q}.weight_shape", lambda t: t - 2**62), [Q]),
        (replaced(NORM, set_first(float("nan"))), [NORM, "NaN or infinity"]),
        (mixed, [Q, "fp8", "int4"]),
        (gptq, [Q, "qweight"]),
        (config(quantization_config=None), ["weight_packed", "int32", "unquantised"]),
    ],
    ids=["NaN scale", "inf scale", "zero scales", "too few scales", "scale dtype", "too few codes", "zero shape",
         "negative shape", "NaN norm", "mixed formats", "unknown format", "undeclared format"],
)  # fmt: skip
def test_a_damaged_quantised_base_is_refused(world: World, tmp_path: Path, damage: Damage, words: list[str]) -> None:
    packed = Path(world.made("quantize").url)
    shutil.copytree(packed, tmp_path / "packed")
    for file in (tmp_path / "packed").iterdir():
        file.chmod(0o644)
    damage(tmp_path / "packed")
    own = World(world.folder, tmp_path / "packed", world.rows)
    error = own.refused("quantize")
    assert all(word in str(error) for word in words), str(error)


def test_a_base_in_another_format_than_the_recipes_is_refused(world: World) -> None:
    own = World(world.folder, Path(world.made("quantize").url), world.rows)
    error = own.refused("quantize", precision={"format": "fp8"})
    assert "quantised already" in error.what and "fp8" in error.expected and "int4" in error.found
