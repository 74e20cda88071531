"""Hugging Face directories: read exactly, written exactly, refused precisely."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from orbit_kernels import FormatSpec
from small_models import MODELS, config_of, shapes_of, tensors_of, write_model

from orbit_core.checkpoints.hf import INDEX, HFCheckpoint, HFWriter, load_packed
from orbit_core.checkpoints.tensorfile import DTYPES, TensorMeta
from orbit_core.errors import InputError


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_model(tmp_path / "sharded", config_of(**MODELS["dense-gqa"]), max_shard_bytes=100_000)


def test_every_dtype_survives_writing_and_reading_bit_for_bit(tmp_path: Path) -> None:
    values = {name: torch.arange(48, dtype=torch.uint8).view(dtype) for name, dtype in DTYPES.items() if name != "BOOL"}
    values |= {"BOOL": torch.tensor([True, False]), "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    with HFWriter(tmp_path, {name: TensorMeta.of(value) for name, value in values.items()}) as writer:
        for name in reversed(values):
            writer.add(name, values[name])
    ours = tensors_of(tmp_path)  # the safetensors library agrees with our writer
    for name, value in values.items():
        assert ours[name] == (value.dtype, tuple(value.shape), bytes(value.reshape(-1).view(torch.uint8).numpy()))


def test_a_tensor_may_come_in_pieces_and_in_any_order(tmp_path: Path) -> None:
    weight, other = torch.randn(10, 3), torch.randn(2)
    plan = {"w": TensorMeta.of(weight), "o": TensorMeta.of(other)}
    for directory, order in ((tmp_path / "whole", "ow"), (tmp_path / "pieces", "wo")):
        with HFWriter(directory, plan) as writer:
            for name in order:
                if name == "o":
                    writer.add("o", other)
                elif directory.name == "whole":
                    writer.add("w", weight)
                else:
                    for piece in weight.split(4):
                        writer.append("w", piece)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "pieces/model.safetensors").read_bytes()


def test_what_was_not_planned_is_not_written(tmp_path: Path) -> None:
    writer = HFWriter(tmp_path, {"w": TensorMeta(torch.float32, (4, 2))})
    with pytest.raises(ValueError, match="w: planned"):
        writer.add("w", torch.zeros(4, 2, dtype=torch.float64))
    writer.append("w", torch.zeros(3, 2))
    with pytest.raises(ValueError, match="8 bytes to come"):
        writer.append("w", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="not whole, first w"):
        writer.close()


def test_shards_have_an_index_that_reads_back(sharded: Path) -> None:
    checkpoint = HFCheckpoint(sharded)
    assert len(checkpoint.files) > 3 and checkpoint.files[0].name.startswith("model-00001-of-")
    assert {name: meta.shape for name, meta in checkpoint.metas.items()} == shapes_of(checkpoint.config)
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(meta.nbytes for meta in checkpoint.metas.values())
    for name, (dtype, shape, content) in tensors_of(sharded).items():
        tensor = checkpoint.tensor(name)
        assert (tensor.dtype, tuple(tensor.shape), bytes(tensor.reshape(-1).view(torch.uint8).numpy())) == (
            dtype,
            shape,
            content,
        )


def test_rows_are_read_alone(sharded: Path) -> None:
    checkpoint, name = HFCheckpoint(sharded), "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(checkpoint.rows(name, 7, 19), checkpoint.tensor(name)[7:19])


def test_layers_come_in_their_order_not_the_alphabets(tmp_path: Path) -> None:
    config = config_of(**MODELS["dense-gqa"]) | {"num_hidden_layers": 11}
    modules = [module for module, _ in load_packed(write_model(tmp_path / "m", config))]
    layers = [int(module.split(".")[2]) for module in modules]
    assert layers == sorted(layers) and len(modules) == 77


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["int4-32", "int4-128", "fp8", "nvfp4", "mxfp4", "bf16"])
def test_packed_and_plain_are_every_tensor_once(quantized, model: str, precision: str) -> None:  # type: ignore[no-untyped-def]
    checkpoint = HFCheckpoint(quantized(model, precision))
    seen = [name for name, _ in checkpoint.load_plain()]
    name, _, group = precision.partition("-")
    for module, weight in checkpoint.load_packed():
        assert weight.spec == FormatSpec(name, int(group)) if group else FormatSpec(name)
        seen += [f"{module}.{suffix}" for suffix in weight.tensors]
    assert sorted(seen) == sorted(checkpoint.metas)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00011.safetensors").unlink(missing_ok=True)
    victim = sorted(sharded.glob("*.safetensors"))[0]
    victim.unlink()
    with pytest.raises(InputError, match=r"model-00001-of.*\n.*expected: a file"):
        HFCheckpoint(sharded)


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_truncated_shard_is_refused(sharded: Path, cut: int) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-cut])
    with pytest.raises(InputError, match="truncated"):
        HFCheckpoint(sharded)


def test_bytes_after_the_last_tensor_are_refused(sharded: Path) -> None:
    with open(sorted(sharded.glob("*.safetensors"))[1], "ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="too long"):
        HFCheckpoint(sharded)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, struct.pack("<Q", 2) + b"[]", b"\x80\x04N."])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    model = write_model(tmp_path / "m", config_of(**MODELS["dense-gqa"]))
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        HFCheckpoint(model)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},  # too few bytes for the shape
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},  # a gap
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },  # an overlap
        {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"shape": [1]}},
        {"a": 3},
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: dict[str, object]) -> None:
    model = write_model(tmp_path / "m", config_of(**MODELS["dense-gqa"]))
    raw = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(InputError):
        HFCheckpoint(model)


@pytest.mark.parametrize("where", ["../outside.safetensors", "/etc/hostname", "sub/model.safetensors", "..", ""])
def test_an_index_may_not_lead_outside_its_directory(sharded: Path, where: str) -> None:
    shutil.copy(sorted(sharded.glob("*.safetensors"))[0], sharded.parent / "outside.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], where)
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="a file of that directory"):
        HFCheckpoint(sharded)


def test_links_are_refused(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[0]
    shutil.move(victim, sharded.parent / "elsewhere")
    os.symlink(sharded.parent / "elsewhere", victim)
    with pytest.raises(InputError, match="symbolic link"):
        HFCheckpoint(sharded)


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.bias"] = index["weight_map"]["model.norm.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model\.norm\.bias"):
        HFCheckpoint(sharded)


def test_a_directory_without_config_is_refused(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json"):
        HFCheckpoint(sharded)


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": "gpt2"}', '{"model_type": "qwen3"}'])
def test_a_config_that_is_not_a_supported_model_is_refused(sharded: Path, text: str) -> None:
    (sharded / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        HFCheckpoint(sharded)


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    model = write_model(tmp_path / "m", config_of(**MODELS["dense-gqa"]))
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="pickle"):
        HFCheckpoint(model)
    assert not (tmp_path / "exploded").exists()
