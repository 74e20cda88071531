"""q, k and v, or gate and up, turned in one pass: what each of them would have computed alone."""

from __future__ import annotations

import pytest
import torch
from engines import tiny

from orbit_core.adapters.layout import AdapterLayout, random_adapter
from orbit_core.modeling.loading import load_model
from orbit_core.modeling.model import PackedModel
from orbit_core.modeling.shared_input import shared_inputs
from orbit_core.recipe import OFT, LoRA

IDS = torch.tensor([[3, 5, 7, 9, 11], [4, 4, 8, 2, 6]])


def loaded(family: str = "qwen3") -> PackedModel:
    source = tiny.quantized(tiny.reference(family))
    return load_model(source, source.config, "float32", "cpu")


def adapt(model: PackedModel, adapter: OFT | LoRA, together: bool, gradients: bool = False) -> list[torch.Tensor]:
    """Give the model a random adapter; returns its values."""
    layout = AdapterLayout.of(model.shapes, adapter)
    values = {name: value.float() for name, value in random_adapter(layout.initial(0), seed=0).items()}
    for value in values.values():
        value.requires_grad_(gradients)
    model._shared = list(shared_inputs(model.module)) if together else []
    model.use(layout.operands(values, model.dtype))
    return list(values.values())


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama"])
def test_a_layer_has_the_same_bits_with_its_inputs_turned_together(family: str) -> None:
    states = []
    for together in (False, True):
        model = loaded(family)
        adapt(model, OFT(), together)
        states.append(model.hidden(IDS))
        assert all(not shared._waiting and shared._x is None for shared in model._shared)
    assert torch.equal(*states)


def test_gradients_are_those_of_a_rotation_each() -> None:
    grads = []
    for together in (False, True):
        model = loaded()
        values = adapt(model, OFT(), together, gradients=True)
        for _ in range(2):  # as micro-batches do, through one set of operands
            model.hidden(IDS).square().sum().backward(retain_graph=True)
        grads.append([value.grad for value in values])
    torch.testing.assert_close(*grads)


def test_who_shares_an_input_and_who_turns_it_alone() -> None:
    model = loaded("qwen3_moe")
    adapt(model, OFT(targets=("q_proj", "v_proj", "o_proj", "gate_proj")), together=True)
    together = {name for name, linear in model.linears.items() if linear.shared is not None}
    assert together == {f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")}


def test_another_adapter_or_none_leaves_nothing_behind() -> None:
    model = loaded()
    plain = model.hidden(IDS)
    adapt(model, OFT(), together=True)
    model.use(None)
    assert torch.equal(model.hidden(IDS), plain)
    adapt(model, LoRA(), together=True)
    assert all(linear.shared is None for linear in model.linears.values())
