"""The same engines on a GPU: the gate passes there, a repeat is bit-identical, and log-probs are those of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import tiny

from orbit_core.adapters.layout import random_adapter
from orbit_core.checkpoints.hf import HFCheckpoint
from orbit_core.parity.report import Thresholds, examine
from orbit_core.recipe import OFT, Algorithm, Engines, LoRA, Preflight, Sampling
from orbit_core.rl.types import Completion, Prompt, Request, Sample, SampleKey
from orbit_core.rollout import load_rollout_engine
from orbit_core.trainers import load_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [tuple(3 + (5 * i + j) % 30 for j in range(1 + i * 7 % 11)) for i in range(32)]
SAMPLING = Sampling(max_new_tokens=8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [OFT(), LoRA()], ids=lambda a: a.kind)
@pytest.mark.parametrize("fmt", tiny.FORMATS)
def test_the_gate_passes(fmt: str, adapter: OFT | LoRA, dtype: Any, tmp_path: Path) -> None:
    report, _, _ = examined(tiny.prepare(tiny.reference(), fmt, tmp_path), adapter, dtype)
    assert report["ok"], report["reasons"]


def examined(prepared: tiny.Prepared, adapter: OFT | LoRA, dtype: Any) -> tuple[dict[str, Any], Any, Any]:
    """The gate's report, and the engines."""
    engines = Engines(threads=1, device="cuda", compute_dtype=dtype)
    trainer = load_trainer(engines, prepared.converted, prepared.quantized, adapter, seed=0)
    rollout = load_rollout_engine(engines, prepared.quantized, adapter)
    checkpoint = HFCheckpoint(prepared.quantized)
    report = examine(
        trainer,
        rollout,
        lambda: ((name, checkpoint.tensor(name)) for name in checkpoint.metas),
        random_adapter(trainer.export_adapter(), seed=0),
        PROMPTS,
        SAMPLING,
        engines,
        Thresholds.of(Preflight(), dtype),
        seed=0,
    )
    return report, trainer, rollout


def wide_moe() -> torch.nn.Module:
    """Experts of sizes that grouped products take, more of them than a few tokens choose."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 12, "num_experts_per_tok": 3}
    return tiny.reference("qwen3_moe", **sizes)


@pytest.mark.parametrize("adapter", [OFT(), OFT(share_experts=True), LoRA()], ids=["oft", "oft-shared", "lora"])
@pytest.mark.parametrize("fmt", ["int4", "nvfp4", "bf16"])
def test_the_gate_passes_with_experts_computed_together(
    fmt: str, adapter: OFT | LoRA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orbit_kernels import fast

    calls, product = [], fast.grouped_product
    monkeypatch.setattr(fast, "grouped_product", lambda *given: calls.append(given[3]) or product(*given))
    prepared = tiny.prepare(wide_moe(), fmt, tmp_path)
    report, trainer, _ = examined(prepared, adapter, "bfloat16")
    assert report["ok"], report["reasons"]
    assert all(bank.together for bank in trainer.model._stacked) and len(trainer.model._stacked) == 2
    assert calls


def test_rows_decoded_take_one_launch_for_what_shares_an_input_and_keep_their_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orbit_kernels import fast

    wide = tiny.reference(hidden_size=256, intermediate_size=256, num_attention_heads=4, head_dim=64)
    prepared = tiny.prepare(wide, "int4", tmp_path)
    requests = [Request(prompt, SampleKey(0, 0, i, 0)) for i, prompt in enumerate(PROMPTS)]
    answers, calls = [], dict.fromkeys(("slices", "decode_adapted"), 0)
    for together in (True, False):
        engine = load_rollout_engine(
            Engines(threads=1, device="cuda", compute_dtype="bfloat16"), prepared.quantized, OFT()
        )
        if not together:
            engine.model._shared = []
        engine.stage_adapter(1, random_adapter(engine.layout.initial(0), seed=0))
        engine.activate_adapter(1)
        with monkeypatch.context() as patched:
            for name in calls if together else ():
                _count(patched, fast, calls, name)
            answers.append(engine.generate(requests, SAMPLING))
    assert answers[0] == answers[1]
    assert 0 < calls["decode_adapted"] <= calls["slices"]  # two sets a layer; o and down are turned alone


def _count(patched: pytest.MonkeyPatch, fast: Any, calls: dict[str, int], name: str) -> None:
    kept = getattr(fast, name)

    def call(*given: Any) -> Any:
        calls[name] += 1
        return kept(*given)

    patched.setattr(fast, name, call)


@pytest.mark.parametrize("adapter", [OFT(), LoRA()], ids=lambda a: a.kind)
def test_experts_together_train_as_one_by_one(adapter: OFT | LoRA, tmp_path: Path) -> None:
    """Gradients of one batch, both in bfloat16: much closer to each other than that is to float32. (An expert alone
    adds LoRA inside its product and rounds once; together it is rounded before it is added.)"""
    prepared = tiny.prepare(wide_moe(), "int4", tmp_path)
    engines = Engines(threads=1, device="cuda", compute_dtype="bfloat16")
    rollout = load_rollout_engine(engines, prepared.quantized, adapter)
    requests = [Request(prompt, SampleKey(0, 0, i, s)) for i, prompt in enumerate(PROMPTS) for s in range(4)]
    completions = rollout.generate(requests, SAMPLING)

    def gradient(dtype: Any, together: bool) -> torch.Tensor:
        settings = engines.model_copy(update={"compute_dtype": dtype})
        trainer = load_trainer(settings, prepared.converted, prepared.quantized, adapter, seed=0)
        trainer.load_adapter(random_adapter(trainer.export_adapter(), seed=1))
        for bank in trainer.model._stacked:
            bank.apart = not together
        trainer._accumulate(_samples(requests, completions, trainer), Algorithm(steps=10))
        return torch.cat([master.grad.flatten() for master in trainer._masters.values()])

    together, alone, exact = gradient("bfloat16", True), gradient("bfloat16", False), gradient("float32", False)
    assert (together - alone).norm() < 0.5 * (alone - exact).norm()


def test_log_probs_are_those_of_the_cpu(tmp_path: Path) -> None:
    prepared = tiny.prepare(tiny.reference("qwen3_moe"), "nvfp4", tmp_path)
    pairs = [(prompt, (3, 7, 9, 11)) for prompt in PROMPTS]
    sides = []
    for device in ("cpu", "cuda"):
        engine = load_rollout_engine(Engines(threads=1, device=device), prepared.quantized, OFT())
        sides.append(torch.cat(engine.score(pairs)))
    assert (sides[0] - sides[1]).abs().mean() < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_repeated_step_is_bit_identical(dtype: Any, family: str, tmp_path: Path) -> None:
    prepared = tiny.prepare(tiny.reference() if family == "qwen3" else wide_moe(), "int4", tmp_path)
    engines = Engines(threads=1, device="cuda", compute_dtype=dtype)
    states = []
    for _ in range(2):
        trainer = load_trainer(engines, prepared.converted, prepared.quantized, OFT(), seed=0)
        rollout = load_rollout_engine(engines, prepared.quantized, OFT())
        rollout.stage_adapter(1, trainer.export_adapter())
        rollout.activate_adapter(1)
        requests = [Request(prompt, SampleKey(0, 0, i, s)) for i, prompt in enumerate(PROMPTS) for s in range(4)]
        completions = rollout.generate(requests, SAMPLING)
        for step in range(3):
            trainer.update(_samples(requests, completions, trainer), Algorithm(steps=10), step)
        states.append({**trainer.state(), "tokens": torch.tensor([sum(c.token_ids) for c in completions])})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def _samples(requests: list[Request], completions: list[Completion], trainer: Any) -> list[Sample]:
    pairs = [(r.prompt_ids, c.token_ids) for r, c in zip(requests, completions, strict=True)]
    return [
        Sample(
            Prompt("p", "", None, {}),
            request.key,
            request.prompt_ids,
            completion,
            "",
            advantage=float(request.key.sample) - 1.5,
            trainer_logprobs=tuple(logprobs.tolist()),
        )
        for request, completion, logprobs in zip(requests, completions, trainer.score(pairs), strict=True)
    ]
