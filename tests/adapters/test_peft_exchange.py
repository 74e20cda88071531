"""Adapters travel to PEFT and back: what either trained, the other computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import tiny
from safetensors.torch import load_file, save_file

from orbit_core.adapters.layout import published, random_adapter
from orbit_core.adapters.peft_io import adapter_config, load_adapter, read_adapter, save_adapter
from orbit_core.errors import InputError
from orbit_core.modeling.loading import load_model
from orbit_core.recipe import ATTENTION, MLP, OFT, LoRA
from orbit_core.rollout.torch import TorchRolloutEngine

IDS = torch.randint(0, tiny.VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(0))
CASES = [
    ("qwen3", OFT(block_size=32)), ("qwen3", LoRA(rank=4, alpha=12)),
    ("llama", OFT(block_size=16, targets=("q_proj", "down_proj"))), ("llama", LoRA(targets=MLP)),
    ("qwen3_moe", OFT(block_size=8, targets=ATTENTION)), ("qwen3_moe", LoRA(targets=ATTENTION)),
]  # fmt: skip


def base(family: str) -> tuple[Any, TorchRolloutEngine]:
    """The reference with dequantised weights, and an engine on the packed ones."""
    source = tiny.quantized(tiny.reference(family), "int4")
    return tiny.use_dequantized(tiny.reference(family), source), source


def logits(engine: TorchRolloutEngine) -> torch.Tensor:
    engine.model.use(engine._active.operands)
    return engine.model.logits(engine.model.hidden(IDS))


@pytest.mark.parametrize(("family", "adapter"), CASES)
def test_peft_computes_the_same_with_what_we_save(family: str, adapter: OFT | LoRA, tmp_path: Path) -> None:
    import peft

    reference, source = base(family)
    engine = TorchRolloutEngine(load_model(source, source.config, "float32", "cpu"), adapter, (1,), 4096)
    values = random_adapter(engine.layout.initial(0), seed=5)
    sent = engine.stage_adapter(1, values)
    engine.activate_adapter(1)
    assert save_adapter(tmp_path, values, adapter, base="some/model") == sent
    loaded = peft.PeftModel.from_pretrained(reference, tmp_path, autocast_adapter_dtype=True)
    with torch.no_grad():
        expected = loaded(input_ids=IDS).logits
        with loaded.disable_adapter():
            assert (expected - loaded(input_ids=IDS).logits).abs().max() > 1e-2
    torch.testing.assert_close(logits(engine), expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize(("family", "adapter"), CASES)
def test_we_compute_the_same_with_what_peft_trained(family: str, adapter: OFT | LoRA, tmp_path: Path) -> None:
    import peft

    reference, source = base(family)
    targets = list(adapter.targets)
    config = (
        peft.OFTConfig(oft_block_size=adapter.block_size, target_modules=targets, task_type="CAUSAL_LM")
        if isinstance(adapter, OFT)
        else peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets, task_type="CAUSAL_LM")
    )
    model = peft.get_peft_model(reference, config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():  # the publication dtype is BF16; what PEFT saves is not
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(published(parameter).float())
        expected = model(input_ids=IDS).logits
        with model.disable_adapter():
            assert (expected - model(input_ids=IDS).logits).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    tensors = load_adapter(tmp_path, adapter)
    engine = TorchRolloutEngine(load_model(source, source.config, "float32", "cpu"), adapter, (1,), 4096)
    engine.stage_adapter(1, tensors)
    engine.activate_adapter(1)
    torch.testing.assert_close(logits(engine), expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("adapter", [OFT(block_size=16), OFT(share_experts=True), LoRA(rank=3, alpha=5)])
def test_what_is_saved_is_read_back(adapter: OFT | LoRA, tmp_path: Path) -> None:
    from orbit_core.adapters.layout import AdapterLayout

    source = tiny.quantized(tiny.reference("qwen3_moe"))
    shapes = load_model(source, source.config, "float32", "cpu").shapes
    values = random_adapter(AdapterLayout.of(shapes, adapter).initial(0), seed=1)
    save_adapter(tmp_path, values, adapter)
    tensors, found = read_adapter(tmp_path)
    assert found.model_copy(update={"targets": adapter.targets}) == adapter
    assert sorted(found.targets) == sorted(adapter.targets)
    assert tensors.keys() == values.keys() and all(torch.equal(tensors[name], values[name]) for name in values)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    values = {
        "base_model.model.b.oft_R.weight": torch.randn(2, 28),
        "base_model.model.a.oft_R.weight": torch.randn(1, 28),
    }
    for folder in ("one", "two"):
        save_adapter(
            tmp_path / folder, dict(reversed(values.items())) if folder == "two" else values, OFT(block_size=8)
        )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def directory(path: Path, adapter: OFT | LoRA, **changes: Any) -> Path:
    suffix, shape = ("oft_R.weight", (2, 496)) if isinstance(adapter, OFT) else ("lora_A.weight", (8, 64))
    save_adapter(path, {f"base_model.model.model.layers.0.self_attn.q_proj.{suffix}": torch.zeros(shape)}, adapter)
    config = {**adapter_config(adapter), **changes}
    (path / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return path


@pytest.mark.parametrize(
    ("adapter", "field", "value"),
    [
        (OFT(), "use_cayley_neumann", False), (OFT(), "num_cayley_neumann_terms", 7), (OFT(), "coft", True),
        (OFT(), "block_share", True), (OFT(), "r", 4), (OFT(), "bias", "oft_only"), (OFT(), "peft_type", "BOFT"),
        (OFT(), "oft_block_size", 0), (OFT(), "layers_to_transform", [0]), (OFT(), "modules_to_save", ["lm_head"]),
        (LoRA(), "use_rslora", True), (LoRA(), "use_dora", True), (LoRA(), "rank_pattern", {"q_proj": 2}),
        (LoRA(), "lora_bias", True), (LoRA(), "fan_in_fan_out", True), (LoRA(), "a_future_switch", True),
        (LoRA(), "target_modules", "all-linear"), (LoRA(), "r", 0), (LoRA(), "alpha_pattern", {"q_proj": 1}),
    ],
)  # fmt: skip
def test_another_convention_is_refused_by_name(adapter: OFT | LoRA, field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=field.replace("oft_block_size", "block_size").replace("r", "r")):
        read_adapter(directory(tmp_path, adapter, **{field: value}))


def test_an_adapter_of_another_size_than_the_recipes_is_refused(tmp_path: Path) -> None:
    stored = directory(tmp_path, OFT(block_size=32))
    load_adapter(stored, OFT(block_size=32))
    for other in (OFT(block_size=16), LoRA(), OFT(targets=("q_proj",))):
        with pytest.raises(InputError, match="adapter directory"):
            load_adapter(stored, other)


def test_damaged_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        read_adapter(tmp_path)
    stored = directory(tmp_path / "a", OFT())
    (stored / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="JSON"):
        read_adapter(stored)
    stored = directory(tmp_path / "b", OFT())
    (stored / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle, not safetensors")
    with pytest.raises(InputError, match="safetensors"):
        read_adapter(stored)
    stored = directory(tmp_path / "c", OFT())
    tensors = load_file(stored / "adapter_model.safetensors")
    save_file(
        {**tensors, "base_model.model.model.lm_head.weight": torch.zeros(2)}, stored / "adapter_model.safetensors"
    )
    with pytest.raises(InputError, match="lm_head"):
        read_adapter(stored)
