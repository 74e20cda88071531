"""Merging: the dense model with the adapter merged in is the packed model with the adapter on."""

from __future__ import annotations

import pytest
import torch
from engines import tiny
from orbit_kernels import cayley_neumann, dequantize

from orbit_core.adapters.layout import AdapterLayout, random_adapter
from orbit_core.adapters.merge import Merger, merged_tensors
from orbit_core.errors import InputError
from orbit_core.modeling.loading import load_model
from orbit_core.recipe import OFT, LoRA

IDS = torch.randint(0, tiny.VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("adapter", [OFT(), OFT(share_experts=True), LoRA()], ids=["oft", "shared", "lora"])
def test_the_merged_model_computes_what_the_adapter_does(family: str, adapter: OFT | LoRA) -> None:
    source = tiny.quantized(tiny.reference(family), "int4")
    model = load_model(source, source.config, "float32", "cpu")
    layout = AdapterLayout.of(model.shapes, adapter)
    values = random_adapter(layout.initial(0), seed=2)
    model.use(layout.operands({name: value.float() for name, value in values.items()}, torch.float32))
    expected = model.logits(model.hidden(IDS))
    model.use(None)
    plain = model.logits(model.hidden(IDS))

    dense = dict(merged_tensors(source, adapter, values))
    assert all(tensor.dtype == torch.bfloat16 for tensor in dense.values())
    merged = load_model(tiny.Source(source.config, {}, dense), source.config, "float32", "cpu")
    found = merged.logits(merged.hidden(IDS))
    rounding, effect = (found - expected).abs().mean(), (plain - expected).abs().mean()
    assert rounding < 0.1 * effect  # one BF16 rounding of the weights is left


def test_oft_merges_on_the_transposed_side() -> None:
    """W' = W blockdiag(R^T), not W blockdiag(R): the two differ, and only one is y = (x R) W^T."""
    name, weight = "model.layers.0.self_attn.q_proj", torch.randn(24, 64, dtype=torch.float64)
    layout = AdapterLayout.of({name: (64, 24)}, OFT(targets=("q_proj",)))
    values = random_adapter(layout.initial(0), seed=0, scale=0.4)
    R = torch.block_diag(*cayley_neumann(values[f"base_model.model.{name}.oft_R.weight"].double(), 32))
    x = torch.randn(5, 64, dtype=torch.float64)
    merged = Merger(layout.adapter, values).merge(name, weight)
    torch.testing.assert_close(x @ merged.T, (x @ R) @ weight.T)
    assert (x @ (weight @ R).T - (x @ R) @ weight.T).abs().max() > 0.1


@pytest.mark.parametrize("adapter", [OFT(targets=("q_proj",)), LoRA(targets=("q_proj",))], ids=lambda a: a.kind)
def test_unmerge_undoes_merge(adapter: OFT | LoRA) -> None:
    name, weight = "model.layers.0.self_attn.q_proj", torch.randn(24, 64)
    values = random_adapter(AdapterLayout.of({name: (64, 24)}, adapter).initial(0), seed=0, scale=0.4)
    merger = Merger(adapter, values)
    merged = merger.merge(name, weight)
    assert (merged - weight).abs().max() > 1e-2
    torch.testing.assert_close(merger.unmerge(name, merged), weight, atol=1e-6, rtol=1e-6)


def test_where_no_adapter_sits_the_weight_is_itself() -> None:
    source = tiny.quantized(tiny.reference(), "mxfp4")
    adapter = OFT(targets=("q_proj",))
    layout = AdapterLayout.of(load_model(source, source.config, "float32", "cpu").shapes, adapter)
    dense = dict(merged_tensors(source, adapter, random_adapter(layout.initial(0), seed=1)))
    for module, packed in source.packed_weights.items():
        assert torch.equal(dense[f"{module}.weight"], dequantize(packed)) != module.endswith("q_proj")


def test_an_adapter_of_another_base_is_refused() -> None:
    source = tiny.quantized(tiny.reference(), "bf16")
    adapter = OFT(targets=("q_proj",))
    layout = AdapterLayout.of(load_model(source, source.config, "float32", "cpu").shapes, adapter)
    values = random_adapter(layout.initial(0), seed=1)
    stray = {name.replace("layers.1", "layers.9"): value for name, value in values.items()}
    with pytest.raises(InputError, match=r"layers\.9"):
        dict(merged_tensors(source, adapter, stray))
    wrong = {name: value[:1] for name, value in values.items()}
    with pytest.raises(InputError, match="shape"):
        dict(merged_tensors(source, adapter, wrong))
