"""Where an adapter sits and what it consists of: exactly what was asked for, or an error that says why not."""

from __future__ import annotations

import pytest
import torch
from orbit_kernels import orthogonality_error

from orbit_core.adapters.digest import tensors_digest
from orbit_core.adapters.layout import AdapterLayout, random_adapter
from orbit_core.errors import InputError
from orbit_core.recipe import OFT, LoRA

LINEARS = {
    "model.layers.0.self_attn.q_proj": (64, 48),
    "model.layers.0.mlp.experts.0.gate_proj": (64, 96),
    "model.layers.0.mlp.experts.1.gate_proj": (64, 96),
    "model.layers.0.mlp.experts.0.down_proj": (96, 64),
    "model.layers.0.mlp.experts.1.down_proj": (96, 64),
}
TARGETS = ("q_proj", "gate_proj", "down_proj")
PREFIX = "base_model.model.model.layers.0."


def test_names_and_shapes_are_pefts() -> None:
    oft = AdapterLayout.of(LINEARS, OFT(block_size=32, targets=TARGETS)).shapes()
    assert oft[f"{PREFIX}self_attn.q_proj.oft_R.weight"] == (2, 496)
    assert oft[f"{PREFIX}mlp.experts.1.down_proj.oft_R.weight"] == (3, 496)
    assert len(oft) == 5
    lora = AdapterLayout.of(LINEARS, LoRA(rank=4, targets=TARGETS)).shapes()
    assert lora[f"{PREFIX}mlp.experts.0.gate_proj.lora_A.weight"] == (4, 64)
    assert lora[f"{PREFIX}mlp.experts.0.gate_proj.lora_B.weight"] == (96, 4)


def test_every_expert_has_its_own_rotation_unless_sharing_is_asked_for() -> None:
    own = AdapterLayout.of(LINEARS, OFT(targets=TARGETS))
    shared = AdapterLayout.of(LINEARS, OFT(targets=TARGETS, share_experts=True))
    assert len(own.shapes()) == 5 and len(shared.shapes()) == 3
    assert f"{PREFIX}mlp.experts.gate_proj.oft_R.weight" in shared.shapes()
    values = {name: torch.zeros(shape) for name, shape in shared.shapes().items()}
    operands = shared.operands(values, torch.float32)
    assert set(operands) == set(LINEARS)
    assert operands["model.layers.0.mlp.experts.0.gate_proj"] is operands["model.layers.0.mlp.experts.1.gate_proj"]


@pytest.mark.parametrize("block", [48, 64, 128])
def test_a_block_that_does_not_divide_the_width_is_an_error(block: int) -> None:
    with pytest.raises(InputError, match=f"block size {block}"):
        AdapterLayout.of(LINEARS, OFT(block_size=block, targets=TARGETS))


def test_a_target_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="q_prj"):
        AdapterLayout.of(LINEARS, LoRA(targets=("q_proj", "q_prj")))
    with pytest.raises(InputError, match="proj"):  # a part of a name is not a name
        AdapterLayout.of(LINEARS, LoRA(targets=("proj",)))


def test_the_start_is_the_identity_and_a_function_of_seed_and_name() -> None:
    oft = AdapterLayout.of(LINEARS, OFT(targets=TARGETS)).initial(0)
    assert all(not value.any() for value in oft.values())
    layout = AdapterLayout.of(LINEARS, LoRA(targets=TARGETS))
    first, again, other = layout.initial(3), layout.initial(3), layout.initial(4)
    alone = AdapterLayout.of(LINEARS, LoRA(targets=("down_proj",))).initial(3)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if name.endswith("lora_B.weight"):
            assert not value.any()
        else:
            assert not torch.equal(value, other[name])
            bound = value.shape[1] ** -0.5
            assert value.abs().max() <= bound and value.std() == pytest.approx(bound / 3**0.5, rel=0.15)
    assert all(torch.equal(value, first[name]) for name, value in alone.items())


def test_the_gates_random_rotations_are_away_from_the_identity_but_orthogonal() -> None:
    for block in (8, 16, 32):
        layout = AdapterLayout.of(LINEARS, OFT(block_size=block, targets=TARGETS))
        values = random_adapter(layout.initial(0), seed=0)
        monitors = layout.monitors(values)
        assert 0.05 < monitors["max_skew_norm"] < 0.2
        assert monitors["max_orthogonality_error"] < 4e-3
        v = torch.cat([values[site.peft_name("oft_R.weight")].float() for site in layout.sites])
        assert monitors["max_orthogonality_error"] == pytest.approx(float(orthogonality_error(v, block)))


def test_the_digest_sees_names_dtypes_shapes_and_bytes_but_not_order() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2, dtype=torch.bfloat16)
    digest = tensors_digest({"a": a, "b": b})
    assert digest == tensors_digest({"b": b, "a": a.clone()}) and len(digest) == 64
    flipped = b.clone().view(torch.int16)
    flipped[1] ^= 1
    for changed in (
        {"a": a, "c": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a, "b": b.float()},
        {"a": a, "b": flipped.view(torch.bfloat16)},
        {"a": a},
    ):
        assert tensors_digest(changed) != digest
    assert tensors_digest({"a": a.T.contiguous().T, "b": b}) == digest  # strides are not content
