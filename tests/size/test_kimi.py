"""The names of Kimi-K2.6: none is refused, none is missed, and its tensors come back from Megatron's layout unchanged.

Three layers of four experts here; all 208,000 tensors by `measure_tensors.py --kimi`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from kimi import config_of_kimi, names_of_kimi, write_kimi
from small_models import tensors_of

from orbit_core.checkpoints import latent
from orbit_core.checkpoints.architecture import Architecture
from orbit_core.checkpoints.hf import HFCheckpoint, write_json
from orbit_core.checkpoints.inventory import Inventory
from orbit_core.checkpoints.megatron import MegatronCheckpoint, to_hf, to_megatron
from orbit_core.errors import InputError
from orbit_core.steps import quantize
from orbit_core.steps.contract import InputRef, StepContext, StepSpec


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kimi")
    write_kimi(folder, layers=3, experts=4)
    return folder


def published(names: dict[str, object]) -> set[str]:
    return {name.replace(".weight_packed", ".weight") for name in names
            if not name.endswith(("_scale", "_shape"))}  # fmt: skip


def test_the_config_implies_every_name_of_the_real_checkpoint() -> None:
    arch = Architecture.from_config(config_of_kimi())
    names = published(dict(names_of_kimi()))
    implied = {name for name, _ in latent.expected(arch)}
    assert implied <= names
    assert all(latent.is_carried(arch, name) for name in names - implied)
    assert sum(".experts." in name for name in implied) == 60 * 384 * 3


def test_it_goes_through_quantize_as_it_lies(kimi: Path, tmp_path: Path) -> None:
    params = {"precision": {"format": "int4"}}
    spec = StepSpec(step="quantize", version=1, params=params, inputs={"base": InputRef(digest="0")}, store="")
    output = tmp_path / "out"
    output.mkdir()
    facts = quantize.run(StepContext(spec, {"base": kimi}, output, tmp_path, emit=lambda *_, **__: None))
    assert facts["quantized_modules"] == 2 * 4 * 3 and facts["passed_through"]
    assert tensors_of(output) == tensors_of(kimi)


def test_it_comes_back_from_megatron_byte_for_byte(kimi: Path, tmp_path: Path) -> None:
    to_megatron(kimi, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back", like=kimi)
    assert tensors_of(tmp_path / "back") == tensors_of(kimi)
    keys = MegatronCheckpoint(tmp_path / "megatron").keys()
    assert {
        "decoder.layers.1.self_attention.linear_kv_up_proj.layer_norm_weight",
        "decoder.layers.1.mlp.router.expert_bias",
        "decoder.layers.2.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.2.mlp.experts.experts.linear_fc1.weight_packed",
        "vision_tower.encoder.blocks.26.wqkv.bias",
    } <= set(keys)


@pytest.mark.parametrize("lost", ["layers.1.self_attn.kv_b_proj.weight", "layers.2.mlp.experts.3.up_proj.weight"])
def test_a_tensor_that_is_missing_is_named(lost: str) -> None:
    arch = Architecture.from_config(config_of_kimi(3, 4))
    inventory = Inventory(arch, "base", 10**4)
    for name, shape in latent.expected(arch):
        if not name.endswith(lost):
            inventory.take(name, shape)
    with pytest.raises(InputError, match=lost):
        inventory.check_complete()


def test_a_name_or_a_number_of_experts_that_is_not_there_is_refused(kimi: Path, tmp_path: Path) -> None:
    arch = Architecture.from_config(config_of_kimi(3, 4))
    for name in ("language_model.model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "vision.x.weight"):
        with pytest.raises(InputError, match="no such one"):
            Inventory(arch, "base", 10**4).take(name, (1,))
    config = config_of_kimi(3, 10**9)
    with pytest.raises(InputError, match="as many as the checkpoint has"):
        Inventory(Architecture.from_config(config), "base", len(HFCheckpoint(kimi).metas))
    write_json(tmp_path / "config.json", {**config, "text_config": None})
    with pytest.raises(InputError, match="text_config"):
        Architecture.from_config({**config, "text_config": None})
