"""HF -> Megatron torch_dist -> HF: the same bytes; torch's own reader and Megatron's key names agree."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from orbit_kernels import dequantize
from small_models import MODELS, PRECISIONS, config_of, tensors_of, write_model

from orbit_core.checkpoints import megatron, tensorfile
from orbit_core.checkpoints.fusion import interleave
from orbit_core.checkpoints.hf import HFCheckpoint, HFWriter
from orbit_core.checkpoints.megatron import INDEX, MegatronCheckpoint, to_hf, to_megatron
from orbit_core.checkpoints.tensorfile import TensorMeta, as_bytes
from orbit_core.checkpoints.torch_dist import _write_archive
from orbit_core.errors import InputError

Quantized = Callable[[str, str], Path]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_there_and_back_is_the_same_bytes(quantized: Quantized, tmp_path: Path, model: str, precision: str) -> None:
    source = quantized(model, precision)
    to_megatron(source, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back", like=source)
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["int4-32", "fp8", "nvfp4"])
def test_the_megatron_reader_yields_what_the_hf_reader_yields(
    quantized: Quantized, tmp_path: Path, model: str, precision: str
) -> None:
    source = HFCheckpoint(quantized(model, precision))
    to_megatron(source.directory, tmp_path)
    megatron = MegatronCheckpoint(tmp_path)
    assert dict(megatron.metas) == dict(source.metas)
    assert megatron.architecture == source.architecture
    for (name, ours), (module, theirs) in zip(megatron.load_packed(), source.load_packed(), strict=True):
        assert name == module and ours.spec == theirs.spec and ours.block == theirs.block
        assert torch.equal(dequantize(ours), dequantize(theirs))
    for (name, ours), (plain, theirs) in zip(megatron.load_plain(), source.load_plain(), strict=True):
        assert name == plain and torch.equal(ours, theirs)


def test_shards_and_files_of_any_size_change_nothing(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", config_of(**MODELS["moe"]), max_shard_bytes=150_000)
    to_megatron(source, tmp_path / "megatron", max_file_bytes=200_000)
    assert len(list((tmp_path / "megatron").glob("__0_*.distcp"))) > 3
    to_hf(tmp_path / "megatron", tmp_path / "back", like=source, max_shard_bytes=99_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert tensors_of(tmp_path / "back") == tensors_of(source)


@pytest.mark.parametrize(("model", "precision"), [("dense-gqa", "bf16"), ("moe", "fp8"), ("moe", "nvfp4")])
def test_torchs_own_checkpoint_reader_loads_the_same_tensors(
    quantized: Quantized, tmp_path: Path, model: str, precision: str
) -> None:
    import torch.distributed.checkpoint as dcp

    to_megatron(quantized(model, precision), tmp_path)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    entries = metadata.state_dict_metadata
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    megatron = MegatronCheckpoint(tmp_path)
    assert set(state) == set(megatron.keys())
    for key, tensor in state.items():
        experts = range(tensor.shape[0]) if ".experts." in key else [None]
        for expert in experts:
            theirs = tensor if expert is None else tensor[expert]
            ours = megatron.fused(key, expert or 0)
            assert torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8)), key


def test_keys_and_shapes_are_megatron_cores(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    to_megatron(base_model("dense-gqa"), tmp_path / "dense")
    to_megatron(base_model("moe"), tmp_path / "moe")
    dense = {
        key: entry["shape"] for key, entry in _index(tmp_path / "dense")["tensors"].items() if "layers.1" not in key
    }
    layer = "decoder.layers.0"
    assert dense == {
        "embedding.word_embeddings.weight": [40, 128],
        f"{layer}.self_attention.linear_qkv.layer_norm_weight": [128],
        f"{layer}.self_attention.linear_qkv.weight": [(4 + 2 + 2) * 32, 128],
        f"{layer}.self_attention.q_layernorm.weight": [32],
        f"{layer}.self_attention.k_layernorm.weight": [32],
        f"{layer}.self_attention.linear_proj.weight": [128, 128],
        f"{layer}.mlp.linear_fc1.layer_norm_weight": [128],
        f"{layer}.mlp.linear_fc1.weight": [512, 128],
        f"{layer}.mlp.linear_fc2.weight": [128, 256],
        "decoder.final_layernorm.weight": [128],
        "output_layer.weight": [40, 128],
    }
    moe = {
        key: entry["shape"]
        for key, entry in _index(tmp_path / "moe")["tensors"].items()
        if ".0.mlp" in key or ".0.pre" in key
    }
    assert moe == {
        f"{layer}.pre_mlp_layernorm.weight": [128],
        f"{layer}.mlp.router.weight": [3, 128],
        f"{layer}.mlp.experts.experts.linear_fc1.weight": [3, 256, 128],
        f"{layer}.mlp.experts.experts.linear_fc2.weight": [3, 128, 128],
    }
    assert "output_layer.weight" not in moe  # tied
    assert json.loads((tmp_path / "moe/metadata.json").read_text())["sharded_backend"] == "torch_dist"


def test_qkv_is_interleaved_per_query_group(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = HFCheckpoint(base_model("dense-gqa"))
    to_megatron(source.directory, tmp_path)
    q, k, v = (source.tensor(f"model.layers.1.self_attn.{name}_proj.weight") for name in "qkv")
    expected = torch.cat([q[:64], k[:32], v[:32], q[64:], k[32:], v[32:]])
    assert torch.equal(
        MegatronCheckpoint(tmp_path).fused("decoder.layers.1.self_attention.linear_qkv.weight"), expected
    )


def test_a_wrong_qkv_order_in_the_file_does_not_read_back(quantized: Quantized, tmp_path: Path) -> None:
    source = HFCheckpoint(quantized("dense-gqa", "int4-32"))
    to_megatron(source.directory, tmp_path)
    key = "decoder.layers.0.self_attention.linear_qkv.weight_packed"
    (chunk,) = _index(tmp_path)["tensors"][key]["chunks"]
    parts = [source.tensor(name) for name in chunk["parts"]]
    with open(tmp_path / chunk["file"], "r+b") as file:
        file.seek(chunk["bytes"][0])
        file.write(interleave(parts, 1).numpy().tobytes())  # all q, all k, all v: the order before GQA
    name = chunk["parts"][1]
    assert not torch.equal(MegatronCheckpoint(tmp_path).tensor(name), source.tensor(name))


def test_fp8_scales_are_refined_only_where_heads_are_no_multiple_of_128(quantized: Quantized, tmp_path: Path) -> None:
    to_megatron(quantized("dense-gqa", "fp8"), tmp_path / "32")
    to_megatron(quantized("dense-bias-128", "fp8"), tmp_path / "128")
    key = "decoder.layers.0.self_attention.linear_qkv.weight_scale_inv"
    fine, coarse = (_index(tmp_path / head)["tensors"][key] for head in ("32", "128"))
    assert fine["chunks"][0]["fusion"]["grid"] == 32 and fine["shape"] == [256 // 32, 1]
    assert coarse["chunks"][0]["fusion"]["grid"] == 128 and coarse["shape"] == [9, 1]


def test_per_tensor_scales_are_stacked(quantized: Quantized, tmp_path: Path) -> None:
    to_megatron(quantized("moe", "nvfp4"), tmp_path)
    tensors = _index(tmp_path)["tensors"]
    assert tensors["decoder.layers.0.self_attention.linear_qkv.weight_global_scale"]["shape"] == [3, 1]
    assert tensors["decoder.layers.0.mlp.experts.experts.linear_fc1.weight_global_scale"]["shape"] == [3, 2, 1]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4-32"])
def test_tensors_that_are_moved_in_pieces_give_the_same_files(  # type: ignore[no-untyped-def]
    quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, precision: str
) -> None:
    to_megatron(quantized(model, precision), tmp_path / "whole")
    for module in (megatron, tensorfile):
        monkeypatch.setattr(module, "PIECE", 1000)
    to_megatron(quantized(model, precision), tmp_path / "pieces")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "pieces" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 5), (1, 7, 2)])
def test_an_archive_is_the_one_that_torch_saves(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, dtype=torch.bfloat16)
    with open(tmp_path / "two", "x+b") as file:
        file.write(b"before")
        place = _write_archive(file, torch.empty_like(tensor), [as_bytes(tensor)])
        assert file.tell() == sum(place["archive"])
    torch.save(tensor, tmp_path / "archive")
    archive = (tmp_path / "two").read_bytes()[6:]
    offset, length = place["bytes"]
    assert archive[offset - 6 :][:length] == bytes(as_bytes(tensor))
    (tmp_path / "ours").write_bytes(archive)
    assert torch.equal(torch.load(tmp_path / "ours", weights_only=True), tensor)
    with zipfile.ZipFile(tmp_path / "ours") as ours, zipfile.ZipFile(tmp_path / "archive") as theirs:
        assert ours.testzip() is None, "a checksum is wrong"
        assert [entry.header_offset for entry in ours.infolist()] == [e.header_offset for e in theirs.infolist()]
        differing = [name for name in theirs.namelist() if ours.read(name) != theirs.read(name)]
        assert differing in ([], ["archive/.data/serialization_id"])


def test_a_tensor_of_other_bytes_than_planned_is_not_written(tmp_path: Path) -> None:
    with open(tmp_path / "one", "x+b") as file, pytest.raises(RuntimeError, match="3 bytes for a tensor of 4"):
        _write_archive(file, torch.empty(4, dtype=torch.uint8), [memoryview(b"abc")])


def test_equal_checkpoints_convert_to_equal_files(quantized: Quantized, tmp_path: Path) -> None:
    for name in ("one", "two"):
        to_megatron(quantized("moe", "int4-32"), tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [".metadata", "__0_0.distcp", "common.pt", "metadata.json", "orbit.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_no_pickle_in_the_directory_is_ever_opened(quantized: Quantized, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    source = quantized("dense-gqa", "mxfp4")
    to_megatron(source, tmp_path / "m")
    for name in (".metadata", "common.pt"):
        (tmp_path / "m" / name).write_bytes(pickle.dumps(Bomb()))
    to_hf(tmp_path / "m", tmp_path / "back", like=source)
    assert not (tmp_path / "exploded").exists()
    assert tensors_of(tmp_path / "back") == tensors_of(source)


def _change(directory: Path, name: str, value: torch.Tensor | None) -> None:
    """Rewrite a single-file checkpoint with one tensor replaced, or dropped."""
    source = HFCheckpoint(directory)
    tensors = {key: source.tensor(key) for key in source.metas}
    tensors |= {name: value} if value is not None else {}
    if value is None:
        del tensors[name]
    (directory / "model.safetensors").unlink()
    with HFWriter(directory, {key: TensorMeta.of(tensor) for key, tensor in tensors.items()}) as writer:
        for key, tensor in tensors.items():
            writer.add(key, tensor)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, r"layers\.1\.mlp\.up_proj"),
        ("model.norm.weight", None, r"model\.norm"),
        ("lm_head.weight", None, "lm_head"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(4), "a place for"),
        ("model.layers.7.mlp.up_proj.weight", torch.zeros(256, 128, dtype=torch.bfloat16), r"layers\.7"),
        (Q, torch.zeros(96, 128, dtype=torch.bfloat16), "128 rows"),
        (Q, torch.zeros(128, 128, dtype=torch.float16), "float16 like"),
    ],
)
def test_what_does_not_fit_the_model_is_named(
    tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    source = write_model(tmp_path / "m", config_of(**MODELS["dense-gqa"]))
    _change(source, name, value)
    with pytest.raises(InputError, match=message):
        to_megatron(source, tmp_path / "out")


def test_parts_in_different_formats_cannot_be_fused(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    from orbit_core.checkpoints.quantizer import quantize_checkpoint
    from orbit_core.recipe import Precision

    precision = Precision(format="int4", ignore=("lm_head", "self_attn.k_proj"))
    quantize_checkpoint(HFCheckpoint(base_model("dense-gqa")), tmp_path / "mixed", precision)
    with pytest.raises(InputError, match="one number format"):
        to_megatron(tmp_path / "mixed", tmp_path / "out")


def test_a_torch_dist_directory_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(InputError, match=r"orbit\.json"):
        MegatronCheckpoint(tmp_path)


def test_the_way_back_needs_the_same_model(quantized: Quantized, tmp_path: Path) -> None:
    to_megatron(quantized("dense-gqa", "bf16"), tmp_path / "m")
    with pytest.raises(InputError, match="config of"):
        to_hf(tmp_path / "m", tmp_path / "back", like=quantized("moe", "bf16"))


@pytest.mark.parametrize(
    "tamper",
    [
        {"file": "../escape"},
        {"bytes": [0, 10**12]},
        {"bytes": [10**9, 64]},
        {"shape": [-1, 4]},
        {"fusion": {"kind": "rows", "groups": 2, "rows": [1, 1, 1]}},
        {"fusion": {"kind": "magic"}},
        {"fusion": {"kind": "rows", "groups": 3, "rows": [128, 64, 64]}},
        {"parts": ["a"]},
        {"parts": ["lm_head.weight"] * 3},
        {"parts": None},
    ],
)
def test_an_index_that_lies_is_refused(quantized: Quantized, tmp_path: Path, tamper: dict[str, object]) -> None:
    to_megatron(quantized("dense-gqa", "bf16"), tmp_path)
    index = _index(tmp_path)
    index["tensors"]["decoder.layers.0.self_attention.linear_qkv.weight"]["chunks"][0] |= tamper
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError):
        MegatronCheckpoint(tmp_path)


def test_converting_imports_no_transformers(quantized: Quantized, tmp_path: Path) -> None:
    code = (
        "import sys; from orbit_core.checkpoints.megatron import to_megatron, to_hf;"
        "import orbit_core.steps.convert, orbit_core.steps.quantize;"
        f"to_megatron({str(quantized('dense-gqa', 'int4-32'))!r}, {str(tmp_path / 'out')!r});"
        "print(sorted({'transformers', 'matplotlib', 'prefect', 'compressed_tensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _index(directory: Path) -> dict[str, Any]:
    return json.loads((directory / INDEX).read_text())
