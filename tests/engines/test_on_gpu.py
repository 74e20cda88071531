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
    prepared = tiny.prepare(tiny.reference(), fmt, tmp_path)
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
    assert report["ok"], report["reasons"]


def test_log_probs_are_those_of_the_cpu(tmp_path: Path) -> None:
    prepared = tiny.prepare(tiny.reference("qwen3_moe"), "nvfp4", tmp_path)
    pairs = [(prompt, (3, 7, 9, 11)) for prompt in PROMPTS]
    sides = []
    for device in ("cpu", "cuda"):
        engine = load_rollout_engine(Engines(threads=1, device=device), prepared.quantized, OFT())
        sides.append(torch.cat(engine.score(pairs)))
    assert (sides[0] - sides[1]).abs().mean() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_repeated_step_is_bit_identical(dtype: Any, tmp_path: Path) -> None:
    prepared = tiny.prepare(tiny.reference(), "int4", tmp_path)
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
