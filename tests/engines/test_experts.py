"""Experts computed together are those computed one by one: same bits, same gradients, every byte held once."""

from __future__ import annotations

import pytest
import torch
from engines import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from orbit_kernels import FormatSpec, quantize

from orbit_core.adapters.layout import AdapterLayout, random_adapter
from orbit_core.modeling.layers import PackedExperts
from orbit_core.modeling.loading import load_model
from orbit_core.modeling.model import PackedModel
from orbit_core.modeling.routing import Routing
from orbit_core.recipe import OFT, Adapter, LoRA

ADAPTERS = {
    "none": None,
    "oft": OFT(),
    "oft-shared": OFT(share_experts=True),
    "lora": LoRA(),
    "elsewhere": OFT(targets=("q_proj",)),
    "some-experts": OFT(targets=("experts.0.up_proj", "experts.2.down_proj")),
}


def models(fmt: str = "int4") -> tuple[PackedModel, PackedModel]:
    """The same model twice: experts one by one, and stacked."""
    source = tiny.quantized(tiny.reference("qwen3_moe", num_experts_per_tok=3), fmt)
    alone, stacked = (load_model(source, source.config, "float32", "cpu", 64, stack_experts=s) for s in (False, True))
    return alone, stacked


def banks(model: PackedModel) -> list[PackedExperts]:
    return [module for module in model.module.modules() if isinstance(module, PackedExperts)]


def adapt(model: PackedModel, adapter: Adapter | None) -> dict[str, torch.Tensor]:
    """Give the model an adapter away from the identity; returns its leaves."""
    if adapter is None:
        return {}
    layout = AdapterLayout.of(model.shapes, adapter)
    values = random_adapter(layout.initial(0), seed=1, scale=0.3)
    leaves = {name: value.float().requires_grad_() for name, value in values.items()}
    model.use(layout.operands(leaves, torch.float32))
    return leaves


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_together_gives_the_bits_of_one_by_one(adapter: Adapter | None) -> None:
    alone, stacked = models()
    states = torch.randn(40, 64)
    leaves = [adapt(model, adapter) for model in (alone, stacked)]
    assert all(bank.together for bank in banks(stacked)) == (adapter is not ADAPTERS["some-experts"])
    chosen = torch.rand(40, 4).argsort(1)[:, :3]
    found = []
    for model, values in zip((alone, stacked), leaves, strict=True):
        x, weights = states.clone().requires_grad_(), torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
        y = banks(model)[0](x, chosen, weights.requires_grad_())
        mine = [value for name, value in values.items() if ".layers.0.mlp." in name]
        grads = torch.autograd.grad(y, [x, weights, *mine], torch.ones_like(y).cumsum(0) / 40)
        found.append((y, grads))
    (y, grads), (other, others) = found
    assert torch.equal(y, other)
    for left, right in zip(grads, others, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fmt", tiny.FORMATS)
def test_a_model_with_stacked_experts_computes_the_same_and_holds_every_byte_once(fmt: str) -> None:
    alone, stacked = models(fmt)
    ids = torch.randint(0, tiny.VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))
    assert torch.equal(alone.hidden(ids), stacked.hidden(ids))
    held = dict(stacked.packed_tensors())
    for name, tensor in alone.packed_tensors():
        assert torch.equal(tensor.view(torch.uint8), held[name].contiguous().view(torch.uint8))
    for bank in banks(stacked):
        for projection, stack in bank.stacks.items():
            for expert in bank:
                linear = getattr(expert, projection)
                assert linear.resident is None
                for key, tensor in linear.packed.tensors.items():
                    assert tensor.untyped_storage().data_ptr() == stack.tensors[key].untyped_storage().data_ptr()


def test_an_expert_of_another_format_leaves_its_layer_to_be_computed_one_by_one() -> None:
    source = tiny.quantized(tiny.reference("qwen3_moe"))
    name = "model.layers.0.mlp.experts.2.up_proj"
    source.packed_weights[name] = quantize(torch.randn(64, 64) * 0.05, FormatSpec("mxfp4"))
    alone, stacked = (load_model(source, source.config, "float32", "cpu", stack_experts=s) for s in (False, True))
    assert [bank.together for bank in banks(stacked)] == [False, True]
    ids = torch.randint(0, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(alone.hidden(ids), stacked.hidden(ids))


@given(tokens=st.integers(0, 9), experts=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_rows_are_sorted_by_expert_and_find_back_to_their_tokens(tokens: int, experts: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    k = 1 + seed % experts
    chosen = torch.rand(tokens, experts, generator=draw).argsort(1)[:, :k]
    routing = Routing.of(chosen, experts)
    expert = chosen.flatten()[routing.order]
    assert expert.tolist() == sorted(expert.tolist())
    assert routing.counts.tolist() == torch.bincount(chosen.flatten(), minlength=experts).tolist()
    states = torch.randn(tokens, 5, generator=draw, requires_grad=True)
    rows = routing.spread(states)
    assert torch.equal(rows, states[routing.order // k])
    total = torch.zeros_like(states)
    for e in range(experts):
        mine = (chosen == e).any(1)
        total = total + torch.where(mine[:, None], states * (e + 1.5), 0.0)
    back = routing.gather(rows * (expert[:, None] + 1.5))
    assert torch.equal(back, total)
    (dx,), (expected,) = (torch.autograd.grad(y.square().sum(), states) for y in (back, total))
    torch.testing.assert_close(dx, expected)
