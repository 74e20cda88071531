"""The gate lets equal engines pass and catches, and names, an error planted in one engine only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import tiny

from orbit_core.adapters.layout import random_adapter
from orbit_core.checkpoints.hf import HFCheckpoint
from orbit_core.parity.report import Thresholds, examine
from orbit_core.recipe import OFT, Engines, LoRA, Preflight, Sampling
from orbit_core.rollout import load_rollout_engine
from orbit_core.trainers import load_trainer

PROMPTS = [tuple(3 + (5 * i + j) % 30 for j in range(1 + i * 7 % 11)) for i in range(32)]
SAMPLING = Sampling(max_new_tokens=8)
LEAN = Engines(threads=1, resident_mib=0)  # dequantises on every call: what is planted is computed with


class Pair:
    """Trainer and rollout engine of one model, loaded as a run loads them."""

    def __init__(self, prepared: tiny.Prepared, adapter: OFT | LoRA, engines: Engines = LEAN) -> None:
        self.engines = engines
        self.quantized = prepared.quantized
        self.trainer: Any = load_trainer(engines, prepared.converted, prepared.quantized, adapter, seed=0)
        self.rollout: Any = load_rollout_engine(engines, prepared.quantized, adapter)

    def examine(self, prompts: list[tuple[int, ...]] = PROMPTS) -> dict[str, Any]:
        checkpoint = HFCheckpoint(self.quantized)
        return examine(
            self.trainer,
            self.rollout,
            lambda: ((name, checkpoint.tensor(name)) for name in checkpoint.metas),
            random_adapter(self.trainer.export_adapter(), seed=0),
            prompts,
            SAMPLING,
            self.engines,
            Thresholds.of(Preflight(), self.engines.compute_dtype),
            seed=0,
        )

    def packed(self, engine: str, module: str) -> dict[str, torch.Tensor]:
        """The loaded tensors of one linear of one engine, to be spoiled in place."""
        return getattr(self, engine).model.linears[module].packed.tensors


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[str, str], tiny.Prepared] = {}

    def of(family: str, fmt: str) -> tiny.Prepared:
        if (family, fmt) not in made:
            made[family, fmt] = tiny.prepare(tiny.reference(family), fmt, tmp_path_factory.mktemp(f"{family}-{fmt}"))
        return made[family, fmt]

    return of


def named(report: dict[str, Any], engine: str) -> list[str]:
    return [entry["name"] for entry in report["bytes"]["engines"][engine]["differing"]]


@pytest.mark.parametrize("adapter", [OFT(), LoRA()], ids=lambda a: a.kind)
@pytest.mark.parametrize("fmt", tiny.FORMATS)
def test_equal_engines_pass(prepared: Any, fmt: str, adapter: OFT | LoRA) -> None:
    report = Pair(prepared("qwen3", fmt), adapter, tiny.ENGINES).examine()
    assert report["ok"] and report["reasons"] == []
    assert report["bytes"]["worst"] is None and report["worst_tensor"] is None
    assert report["bytes"]["engines"]["trainer"]["equal"] == report["bytes"]["tensors"] > 20
    logprobs = report["logprobs"]
    assert logprobs["prompts"] == 32 and logprobs["response"]["mean_gap"] <= 1e-6
    assert logprobs["prompt"]["tokens"] == sum(len(prompt) - 1 for prompt in PROMPTS)
    assert report["first_drifting_layer"] is None
    assert report["adapter"]["sent_digest"] == report["adapter"]["arrived_digest"]


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
@pytest.mark.parametrize("adapter", [OFT(share_experts=True), LoRA()], ids=lambda a: a.kind)
def test_other_families_pass(prepared: Any, family: str, adapter: OFT | LoRA) -> None:
    assert Pair(prepared(family, "int4"), adapter, tiny.ENGINES).examine()["ok"]


def test_bfloat16_compute_passes_within_its_own_thresholds(prepared: Any) -> None:
    report = Pair(prepared("qwen3", "int4"), OFT(), Engines(threads=1, compute_dtype="bfloat16")).examine()
    assert report["ok"] and report["compute_dtype"] == "bfloat16"
    assert 1e-5 < report["logprobs"]["mean_gap"] <= report["thresholds"]["mean_gap"]


MODULE = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("engine", ["trainer", "rollout"])
@pytest.mark.parametrize("fmt", tiny.FORMATS)
def test_one_wrong_bit_of_a_packed_tensor_is_named(prepared: Any, fmt: str, engine: str) -> None:
    pair = Pair(prepared("qwen3", fmt), OFT())
    suffix, codes = max(pair.packed(engine, MODULE).items(), key=lambda item: item[1].numel())
    size = codes.element_size()
    codes.view(torch.uint8).view(-1)[100 * size] ^= 4
    report = pair.examine()
    assert not report["ok"]
    other = "rollout" if engine == "trainer" else "trainer"
    assert named(report, engine) == [f"{MODULE}.{suffix}"] and named(report, other) == []
    worst = report["bytes"]["worst"]
    assert worst["engine"] == engine and worst["differing_bits"] == worst["differing_elements"] == 1
    assert worst["first_index"] == 100
    assert report["worst_tensor"] == f"{MODULE}.{suffix}"
    assert any(engine in reason and f"{MODULE}.{suffix}" in reason for reason in report["reasons"])


SCALES = [
    ("int4", "weight_scale"),
    ("nvfp4", "weight_scale"),
    ("nvfp4", "weight_global_scale"),
    ("fp8", None),
    ("mxfp4", None),
]


@pytest.mark.parametrize("engine", ["trainer", "rollout"])
@pytest.mark.parametrize(("fmt", "suffix"), SCALES)
def test_a_scale_off_by_one_ulp_is_named(prepared: Any, fmt: str, suffix: str | None, engine: str) -> None:
    pair = Pair(prepared("qwen3", fmt), LoRA())
    tensors = pair.packed(engine, MODULE)
    suffix = suffix or next(key for key in tensors if "scale" in key)
    scale = tensors[suffix]
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[scale.element_size()]
    scale.view(integers).view(-1)[0] += 1
    report = pair.examine()
    assert not report["ok"] and named(report, engine) == [f"{MODULE}.{suffix}"]
    worst = report["bytes"]["worst"]
    assert worst["first_index"] == 0 and worst["differing_elements"] == 1
    assert worst["found_value"] != worst["expected_value"]


ATTENTION = "model.layers.0.self_attn."


def split_in_a_wrong_order(pair: Pair, engine: str) -> None:
    """Rows that were fused per query group [q.. k v], split as if they lay [all q, all k, all v]."""
    parts = [pair.packed(engine, f"{ATTENTION}{part}_proj") for part in "qkv"]
    for suffix in ("weight_packed", "weight_scale"):
        q, k, v = (part[suffix] for part in parts)
        groups = 2
        fused = torch.cat([torch.cat([t.chunk(groups)[g] for t in (q, k, v)]) for g in range(groups)])
        for target, rows in zip((q, k, v), fused.split([len(q), len(k), len(v)]), strict=True):
            target.copy_(rows)


@pytest.mark.parametrize("engine", ["trainer", "rollout"])
def test_a_wrong_qkv_order_is_named_by_both_sides(prepared: Any, engine: str) -> None:
    pair = Pair(prepared("qwen3", "int4"), OFT())
    split_in_a_wrong_order(pair, engine)
    report = pair.examine()
    assert not report["ok"]
    differing = report["bytes"]["engines"][engine]["differing"]
    assert {entry["name"] for entry in differing} == {
        f"{ATTENTION}{part}_proj.{suffix}" for part in "qkv" for suffix in ("weight_packed", "weight_scale")
    }
    assert all("rows of q/k/v in another order" in entry["diagnosis"] for entry in differing)
    assert not report["logprobs"]["ok"] and report["logprobs"]["mean_gap"] > 1e-2
    assert report["first_drifting_layer"] == "model.layers.0"
    assert any("first drifting layer model.layers.0" in reason for reason in report["reasons"])


def test_rows_of_one_tensor_in_another_order_are_recognised(prepared: Any) -> None:
    pair = Pair(prepared("qwen3", "int4"), OFT())
    for tensor in list(pair.packed("trainer", MODULE).values())[:2]:
        tensor.copy_(tensor.roll(1, dims=0).clone())
    differing = pair.examine()["bytes"]["engines"]["trainer"]["differing"]
    assert [entry["diagnosis"] for entry in differing] == ["the same rows in another order"] * 2


def test_a_wrong_norm_is_named_and_its_layer_drifts_first(prepared: Any) -> None:
    pair = Pair(prepared("qwen3", "fp8"), OFT())
    pair.rollout.model.module.model.layers[1].input_layernorm.weight.data[3] += 0.5
    report = pair.examine()
    assert named(report, "rollout") == ["model.layers.1.input_layernorm.weight"]
    assert report["first_drifting_layer"] == "model.layers.1" and not report["logprobs"]["ok"]


@pytest.mark.parametrize("adapter", [OFT(), LoRA()], ids=lambda a: a.kind)
def test_an_adapter_dropped_in_one_module_is_seen_with_equal_bytes(prepared: Any, adapter: OFT | LoRA) -> None:
    """What no comparison of base bytes can see, and no identity adapter either."""
    pair = Pair(prepared("qwen3", "int4"), adapter)
    honest = pair.rollout.layout.operands

    def forgetful(values: Any, dtype: Any) -> Any:
        return {
            name: operand for name, operand in honest(values, dtype).items() if not name.endswith("1.self_attn.o_proj")
        }

    object.__setattr__(pair.rollout.layout, "operands", forgetful)
    report = pair.examine()
    assert report["bytes"]["ok"] and not report["logprobs"]["ok"] and not report["ok"]
    assert report["first_drifting_layer"] == "model.layers.1"
    assert report["logprobs"]["reference"]["max_gap"] == 0.0  # the base alone is equal


def test_a_rotation_of_the_wrong_side_is_seen(prepared: Any) -> None:
    """R^T for R: the mistake of exact Cayley against its series."""
    pair = Pair(prepared("qwen3", "int4"), OFT())
    honest = pair.rollout.layout.operands

    def transposed(values: Any, dtype: Any) -> Any:
        return {n: o.on((o.R.transpose(-1, -2).contiguous(),)) for n, o in honest(values, dtype).items()}

    object.__setattr__(pair.rollout.layout, "operands", transposed)
    report = pair.examine()
    assert not report["logprobs"]["ok"] and report["first_drifting_layer"] == "model.layers.0"


def test_numbers_that_are_not_finite_are_refused_not_skipped(prepared: Any) -> None:
    pair = Pair(prepared("qwen3", "int4"), OFT())
    pair.rollout.model.module.model.norm.weight.data[0] = float("nan")
    report = pair.examine()
    assert not report["ok"] and not report["logprobs"]["ok"]
    assert report["logprobs"]["max_gap"] == "inf"


def test_a_missing_and_a_surplus_tensor_are_refused(prepared: Any) -> None:
    pair = Pair(prepared("qwen3", "int4"), OFT())
    held = dict(pair.trainer.packed_tensors())
    norm = held.pop("model.norm.weight")
    pair.trainer.packed_tensors = lambda: iter({**held, "model.stray": norm}.items())
    report = pair.examine()
    verdict = report["bytes"]["engines"]["trainer"]
    assert verdict["missing"] == ["model.norm.weight"] and verdict["unexpected"] == ["model.stray"]
    assert not report["ok"] and len(report["reasons"]) == 2
