"""The quantize step on bases that are quantised already: taken as they lie, or refused; never quantised twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import TOKENIZER, tensors_of

from orbit_core.checkpoints.hf import HFCheckpoint, HFWriter, write_json
from orbit_core.checkpoints.megatron import to_hf, to_megatron
from orbit_core.checkpoints.tensorfile import TensorMeta
from orbit_core.errors import InputError, Interrupted
from orbit_core.steps import convert, quantize
from orbit_core.steps.contract import InputRef, StepContext, StepSpec

Quantized = Callable[[str, str], Path]
_WEIGHTS = {"symmetric": True, "dynamic": False, "observer": "memoryless_minmax", "actorder": None}


def _run(base: Path, output: Path, **precision: Any) -> dict[str, Any]:
    output.mkdir()
    spec = StepSpec(
        step="quantize", version=1, params={"precision": precision}, inputs={"base": InputRef(digest="0")}, store=""
    )
    return quantize.run(StepContext(spec, {"base": base}, output, output, emit=lambda *_, **__: None))


def _as_published(
    source: Path, target: Path, rename: dict[str, str], config: dict[str, Any], **extra: torch.Tensor
) -> Path:
    """The same codes in the spelling of another tool: suffixes renamed, per-module tensors added, its own config."""
    checkpoint, tensors = HFCheckpoint(source), {}
    for name in checkpoint.metas:
        module, _, suffix = name.rpartition(".")
        tensor = checkpoint.tensor(name)
        if suffix == "weight_scale_inv" and rename:
            tensor = tensor.to(torch.bfloat16)
        tensors[f"{module}.{rename.get(suffix, suffix)}"] = tensor
        if suffix == "weight_packed":
            tensors |= {f"{module}.{key}": value.clone() for key, value in extra.items()}
    with HFWriter(target, {name: TensorMeta.of(tensor) for name, tensor in tensors.items()}, 120_000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    write_json(target / "config.json", {**checkpoint.config, "quantization_config": config})
    (target / "tokenizer.json").write_text(TOKENIZER)
    return target


def _compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": _WEIGHTS | weights, "input_activations": inputs, "format": layout}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@pytest.fixture(params=["W4A16", "FP8_BLOCK", "NVFP4", "ModelOpt"])
def published(request: pytest.FixtureRequest, quantized: Quantized, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """(a base in the layout of a published tool, the precision that it is in)."""
    target = tmp_path / "published"
    if request.param == "W4A16":
        config = _compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128})
        return _as_published(quantized("dense-gqa", "int4-128"), target, {}, config), {
            "format": "int4",
            "group_size": 128,
        }
    if request.param == "FP8_BLOCK":
        weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
        activations = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
        config = _compressed("float-quantized", weights, activations)
        rename = {"weight_scale_inv": "weight_scale"}
        return _as_published(quantized("dense-gqa", "fp8"), target, rename, config), {"format": "fp8"}
    if request.param == "NVFP4":
        weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        config = _compressed("nvfp4-pack-quantized", weights, weights | {"dynamic": "local"})
        base = _as_published(quantized("moe", "nvfp4"), target, {}, config, input_global_scale=torch.tensor([3.0]))
        return base, {"format": "nvfp4"}
    rename = {"weight_packed": "weight", "weight_global_scale": "weight_scale_2"}
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}
    base = _as_published(quantized("dense-gqa", "nvfp4"), target, rename, config, input_scale=torch.tensor(0.5))
    return base, {"format": "nvfp4"}


def test_a_published_base_is_taken_byte_for_byte(published: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    base, precision = published
    facts = _run(base, tmp_path / "out", **precision)
    assert facts["passed_through"] and facts["quantized_modules"] >= 14
    for path in base.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_published_base_survives_megatron_and_back(published: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    base, _ = published
    to_megatron(base, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back", like=base)
    assert tensors_of(tmp_path / "back") == tensors_of(base)


@pytest.mark.parametrize("wanted", [{"format": "int4"}, {"format": "mxfp4"}, {"format": "bf16"}])
def test_a_base_in_another_format_is_refused(
    published: tuple[Path, dict[str, Any]], tmp_path: Path, wanted: dict[str, Any]
) -> None:
    base, precision = published
    with pytest.raises(InputError, match="is quantised already") as error:
        _run(base, tmp_path / "out", **wanted)
    assert precision["format"] in error.value.found and wanted["format"] in error.value.expected


def test_a_damaged_quantised_base_is_named(quantized: Quantized, tmp_path: Path) -> None:
    source = HFCheckpoint(quantized("dense-gqa", "int4-32"))
    bad, name = source.stored["model.layers.1.mlp.up_proj.weight_scale"], "model.layers.1.mlp.up_proj"
    for path in source.directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(bad.offset)
        file.write(b"\xc0\x7f")  # NaN in bfloat16
    with pytest.raises(InputError, match=f"module {name}"):
        _run(tmp_path, tmp_path / "out", format="int4")


def test_a_config_that_contradicts_the_tensors_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    source = quantized("dense-gqa", "mxfp4")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="as quantization_config says"):
        _run(tmp_path, tmp_path / "out", format="fp8")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", None])
def test_unknown_schemes_are_refused(quantized: Quantized, tmp_path: Path, method: str | None) -> None:
    source = quantized("dense-gqa", "int4-32")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quant_method"):
        _run(tmp_path, tmp_path / "out", format="int4")


def test_the_steps_run_one_after_the_other(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    facts = _run(base_model("moe"), tmp_path / "quantized", format="fp8")
    assert facts["format"] == "fp8" and facts["quantized_modules"] == 2 * (4 + 3 * 3) and not facts["passed_through"]
    assert facts["bytes_after"] < 0.7 * facts["bytes_before"]
    (tmp_path / "converted").mkdir()
    seen: list[dict[str, Any]] = []
    spec = StepSpec(step="convert", version=1, params={}, inputs={"quantized": InputRef(digest="0")}, store="")
    output = tmp_path / "converted"
    context = StepContext(
        spec, {"quantized": tmp_path / "quantized"}, output, output, emit=lambda _, **values: seen.append(values)
    )
    facts = convert.run(context)
    assert facts["format"] == "fp8" and facts["tensors"] == len(seen) > 20
    to_hf(output, tmp_path / "back", like=tmp_path / "quantized")
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "quantized")


def test_a_bf16_base_passes_through_unchanged(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    assert _run(base_model("moe"), tmp_path / "out", format="bf16")["passed_through"]
    assert tensors_of(tmp_path / "out") == tensors_of(base_model("moe"))


@pytest.mark.parametrize("form", ["fp8", "bf16"])
def test_a_request_to_stop_is_heard_between_tensors(
    base_model: Callable[[str], Path], tmp_path: Path, form: str
) -> None:
    spec = StepSpec(
        step="quantize",
        version=1,
        params={"precision": {"format": form}},
        inputs={"base": InputRef(digest="0")},
        store="",
    )
    asked = iter([False, False, True])
    context = StepContext(
        spec, {"base": base_model("moe")}, tmp_path, tmp_path, lambda *_, **__: None, lambda: next(asked)
    )
    with pytest.raises(Interrupted, match="stopped on request"):
        quantize.run(context)
