"""The packed model is the transformers model with the values that the bytes stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import tiny

from orbit_core.errors import InputError
from orbit_core.modeling.families import build_skeleton
from orbit_core.modeling.loading import load_model

IDS = torch.randint(0, tiny.VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fmt", tiny.FORMATS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama"])
def test_logits_are_those_of_transformers_with_dequantized_weights(family: str, fmt: str) -> None:
    source = tiny.quantized(tiny.reference(family), fmt)
    expected = tiny.use_dequantized(tiny.reference(family), source)(input_ids=IDS).logits
    model = load_model(source, source.config, "float32", "cpu", resident_mib=0)
    found = model.logits(model.hidden(IDS))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_llama3_position_scaling_and_biases_are_honoured() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, "rope_theta": 10000.0}  # fmt: skip
    model = tiny.reference("llama", attention_bias=True, rope_parameters=rope)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).bfloat16().float())
    source = tiny.quantized(model, "int4")
    expected = tiny.use_dequantized(model, source)(input_ids=IDS).logits
    packed = load_model(source, source.config, "float32", "cpu")
    torch.testing.assert_close(packed.logits(packed.hidden(IDS)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resident_weights_change_no_bit(dtype: str) -> None:
    source = tiny.quantized(tiny.reference(), "nvfp4")
    lean, fat = (load_model(source, source.config, dtype, "cpu", resident_mib=mib) for mib in (0, 64))
    assert all(linear.resident is None for linear in lean.linears.values())
    assert all(linear.resident is not None for linear in fat.linears.values())
    assert torch.equal(lean.hidden(IDS), fat.hidden(IDS))


def test_a_tied_model_uses_its_embedding_as_head() -> None:
    source = tiny.quantized(tiny.reference(tied=True), "bf16")
    assert "lm_head.weight" not in source.plain_tensors
    model = load_model(source, source.config, "float32", "cpu")
    expected = tiny.reference(tied=True)(input_ids=IDS).logits
    torch.testing.assert_close(model.logits(model.hidden(IDS)), expected, atol=1e-5, rtol=0)
    assert "lm_head.weight" not in dict(model.packed_tensors())


def test_a_tied_model_with_another_head_is_refused() -> None:
    source = tiny.quantized(tiny.reference(tied=True))
    embedding = source.plain_tensors["model.embed_tokens.weight"]
    load_model(
        replace(source, plain_tensors={**source.plain_tensors, "lm_head.weight": embedding}),
        source.config,
        "float32",
        "cpu",
    )
    other = replace(source, plain_tensors={**source.plain_tensors, "lm_head.weight": embedding + 1})
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        load_model(other, source.config, "float32", "cpu")


def test_a_quantized_head_is_computed_from_its_bytes() -> None:
    from orbit_kernels import FormatSpec, dequantize, quantize

    source = tiny.quantized(tiny.reference(), "int4")
    head = quantize(source.plain_tensors.pop("lm_head.weight"), FormatSpec("int4"))
    source.packed_weights["lm_head"] = head
    reference = tiny.use_dequantized(tiny.reference(), source)
    reference.lm_head.weight.copy_(dequantize(head).float())
    model = load_model(source, source.config, "float32", "cpu")
    torch.testing.assert_close(model.logits(model.hidden(IDS)), reference(input_ids=IDS).logits, atol=1e-5, rtol=0)
    assert "lm_head" not in model.shapes  # an adapter has no place there


def test_missing_and_unexpected_tensors_are_named() -> None:
    source = tiny.quantized(tiny.reference(), "int4")
    del source.packed_weights["model.layers.1.mlp.up_proj"]
    del source.plain_tensors["model.norm.weight"]
    source.plain_tensors["model.layers.7.extra"] = torch.zeros(1, dtype=torch.bfloat16)
    with pytest.raises(InputError) as refused:
        load_model(source, source.config, "float32", "cpu")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.layers.7.extra"):
        assert name in str(refused.value)


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="needs a machine without that many GPUs")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    source = tiny.quantized(tiny.reference())
    with pytest.raises(InputError, match=r"engines\.device cuda:7"):
        load_model(source, source.config, "bfloat16", "cuda:7")


def test_a_shape_that_contradicts_the_config_is_refused() -> None:
    source = tiny.quantized(tiny.reference(), "bf16")
    for name, what in (("model.norm.weight", source.plain_tensors), ("model.layers.0.mlp.up_proj", None)):
        changed = tiny.quantized(tiny.reference(), "bf16")
        if what is not None:
            changed.plain_tensors[name] = torch.ones(65, dtype=torch.bfloat16)
        else:
            changed.packed_weights[name] = changed.packed_weights["model.layers.0.self_attn.k_proj"]
        with pytest.raises(InputError, match=name):
            load_model(changed, source.config, "float32", "cpu")


def test_values_that_the_compute_dtype_would_round_are_refused() -> None:
    source = tiny.quantized(tiny.reference(), "int4")
    source.plain_tensors["model.norm.weight"] = torch.full((64,), 1.0 + 2**-20)
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        load_model(source, source.config, "bfloat16", "cpu")
    model = load_model(source, source.config, "float32", "cpu")
    assert dict(model.packed_tensors())["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding_window"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "rope_type"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        build_skeleton({**tiny.reference().config.to_dict(), **change})


def test_engines_hold_the_bytes_of_the_checkpoint(tmp_path: Path) -> None:
    from orbit_core.checkpoints.hf import HFCheckpoint
    from orbit_core.recipe import OFT
    from orbit_core.rollout import load_rollout_engine
    from orbit_core.trainers import load_trainer

    prepared = tiny.prepare(tiny.reference("qwen3_moe"), "nvfp4", tmp_path)
    checkpoint = HFCheckpoint(prepared.quantized)
    engines = [
        load_trainer(tiny.ENGINES, prepared.converted, prepared.quantized, OFT(), seed=0),
        load_rollout_engine(tiny.ENGINES, prepared.quantized, OFT()),
    ]
    for engine in engines:
        held = dict(engine.packed_tensors())
        assert set(held) == set(checkpoint.metas)
        for name, tensor in held.items():
            assert torch.equal(
                tensor.reshape(-1).view(torch.uint8), checkpoint.tensor(name).reshape(-1).view(torch.uint8)
            )


def test_an_engine_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    from orbit_core.recipe import OFT, Engines
    from orbit_core.rollout import load_rollout_engine
    from orbit_core.trainers import load_trainer

    with pytest.raises(InputError, match="megatron"):
        load_trainer(Engines(trainer="megatron"), tmp_path, tmp_path, OFT(), seed=0)
    with pytest.raises(InputError, match="sglang"):
        load_rollout_engine(Engines(rollout="sglang"), tmp_path, OFT())
