"""Generation: a sample depends on its key and its prompt alone, and its log-probs are those of plain scoring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engines import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from orbit_kernels import is_batch_invariant, set_batch_invariant

from orbit_core.adapters.digest import tensors_digest
from orbit_core.adapters.layout import random_adapter
from orbit_core.data.encode import stop_ids
from orbit_core.errors import InputError, OrbitError
from orbit_core.modeling.loading import load_model
from orbit_core.recipe import OFT, Engines, LoRA, Sampling
from orbit_core.rl.types import Request, SampleKey
from orbit_core.rollout import load_rollout_engine
from orbit_core.rollout.sampling import choose, uniforms
from orbit_core.rollout.torch import TorchRolloutEngine
from orbit_core.trainers import load_trainer

SAMPLING = Sampling(max_new_tokens=12)
PROMPTS = [tuple(3 + (5 * i + j) % 30 for j in range(1 + i * 7 % 11)) for i in range(9)]  # 1 to 11 tokens


def requests(prompts: list[tuple[int, ...]] = PROMPTS, samples: int = 3) -> list[Request]:
    return [Request(p, SampleKey(7, 0, g, s)) for g, p in enumerate(prompts) for s in range(samples)]


def engine_of(
    family: str = "qwen3", adapter: OFT | LoRA | None = None, dtype: str = "float32", stop: tuple[int, ...] = (1, 2)
) -> TorchRolloutEngine:
    source = tiny.quantized(tiny.reference(family), "int4")
    engine = TorchRolloutEngine(load_model(source, source.config, dtype, "cpu", 64), adapter or OFT(), stop, 4096)
    fresh = engine.layout.initial(0)
    engine.stage_adapter(1, random_adapter(fresh, seed=0))
    engine.activate_adapter(1)
    return engine


@pytest.fixture(scope="module")
def engine() -> TorchRolloutEngine:
    return engine_of()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama"])
def test_reported_logprobs_are_those_of_scoring_each_sequence_alone(family: str) -> None:
    engine = engine_of(family, LoRA())
    asked = requests(samples=2)
    completions = engine.generate(asked, SAMPLING)
    for request, completion in zip(asked, completions, strict=True):
        (alone,) = engine.score([(request.prompt_ids, completion.token_ids)])
        torch.testing.assert_close(torch.tensor(completion.logprobs), alone, atol=2e-5, rtol=0)


def test_padding_on_the_left_changes_nothing(engine: TorchRolloutEngine) -> None:
    """Log-probs of a mixed batch against those of the same requests one length at a time."""
    mixed = engine.generate(requests(), SAMPLING)
    gaps = []
    for request, expected in zip(requests(), mixed, strict=True):
        (alone,) = engine.generate([request], SAMPLING)
        assert alone.token_ids == expected.token_ids
        gaps += [abs(a - b) for a, b in zip(alone.logprobs, expected.logprobs, strict=True)]
    assert sum(gaps) / len(gaps) <= 1e-6


def test_a_sample_does_not_depend_on_its_batch(engine: TorchRolloutEngine) -> None:
    everything = engine.generate(requests(), SAMPLING)
    backwards = engine.generate(requests()[::-1], SAMPLING)[::-1]
    half = engine.generate(requests()[::2], SAMPLING)
    assert [c.token_ids for c in everything] == [c.token_ids for c in backwards]
    assert [c.token_ids for c in everything[::2]] == [c.token_ids for c in half]


def test_samples_of_a_group_differ_and_repeat(engine: TorchRolloutEngine) -> None:
    first, again = (engine.generate(requests([PROMPTS[0]], samples=8), SAMPLING) for _ in range(2))
    assert first == again
    assert len({completion.token_ids for completion in first}) > 4


def test_greedy_is_transformers_own_greedy() -> None:
    source = tiny.quantized(tiny.reference(), "int4")
    reference = tiny.use_dequantized(tiny.reference(), source)
    engine = TorchRolloutEngine(load_model(source, source.config, "float32", "cpu", 64), OFT(), (1, 2), 4096)
    found = engine.generate(requests(samples=1), SAMPLING, greedy=True)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=[1, 2],
            pad_token_id=0,
        )[0, len(prompt) :]
        assert completion.token_ids == tuple(expected.tolist())


def test_a_completion_ends_at_the_first_stop_token_and_says_so(engine: TorchRolloutEngine) -> None:
    completions = engine.generate(requests(samples=8), SAMPLING)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert not set(completion.token_ids[:-1]) & {1, 2}
        assert (completion.token_ids[-1] in (1, 2)) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 12
        assert len(completion.logprobs) == len(completion.versions) == len(completion.token_ids)


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.0, 0.3, 0.2])).repeat(20_000, 1)
    keys = [SampleKey(0, 0, 0, sample) for sample in range(20_000)]
    tokens, logprobs = choose(logits, uniforms(keys, 1)[:, 0], Sampling())
    share = torch.bincount(tokens, minlength=4) / len(tokens)
    torch.testing.assert_close(share, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.015, rtol=0)
    assert share[1] == 0
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.5, 0.0, 0.3, 0.2])[tokens])


@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.integers(0, 6))
@settings(max_examples=60)
def test_top_p_and_top_k_keep_the_smallest_head_of_the_distribution(seed: int, top_p: float, top_k: int) -> None:
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(top_p=top_p, top_k=top_k, temperature=0.7)
    probabilities = torch.softmax(logits[0].double() / 0.7, dim=-1)
    order = probabilities.argsort(descending=True)[: top_k or 8]
    mass = probabilities[order] / probabilities[order].sum()
    kept = {int(t) for t, before in zip(order, mass.cumsum(0) - mass, strict=True) if before < top_p - 1e-6}
    u = torch.linspace(0, 1 - 1e-9, 200, dtype=torch.float64)
    tokens, logprobs = choose(logits.expand(200, -1), u, sampling)
    assert set(tokens.tolist()) <= kept | {int(order[len(kept) - 1])}
    torch.testing.assert_close(logprobs.double(), probabilities.log()[tokens], atol=1e-5, rtol=0)


def test_a_draw_at_the_very_end_never_leaves_the_support() -> None:
    logits = torch.log(torch.tensor([[0.3, 0.7, 0.0, 0.0]]))
    tokens, _ = choose(logits, torch.tensor([1.0 - 2**-53], dtype=torch.float64), Sampling())
    assert tokens.item() == 1


def test_staging_changes_nothing_until_activation() -> None:
    engine = engine_of()
    before = engine.generate(requests(), SAMPLING)
    other = random_adapter(engine.layout.initial(0), seed=9, scale=0.3)
    assert engine.stage_adapter(2, other) == tensors_digest(other)
    assert engine.adapter_version == 1
    assert engine.generate(requests(), SAMPLING) == before
    engine.activate_adapter(2)
    after = engine.generate(requests(), SAMPLING)
    assert engine.adapter_version == 2 and after != before
    assert {version for completion in after for version in completion.versions} == {2}


def test_only_the_staged_version_can_be_activated() -> None:
    engine = engine_of()
    with pytest.raises(OrbitError, match="staged version is none"):
        engine.activate_adapter(2)
    engine.stage_adapter(2, random_adapter(engine.layout.initial(0), seed=1))
    with pytest.raises(OrbitError, match="staged version is 2"):
        engine.activate_adapter(3)
    assert engine.adapter_version == 1


def test_an_adapter_of_another_shape_is_refused_and_the_old_one_goes_on() -> None:
    engine = engine_of()
    tensors = random_adapter(engine.layout.initial(0), seed=1)
    name = next(iter(tensors))
    for broken in ({**tensors, name: tensors[name][:1]}, {**tensors, "extra": tensors[name]}, {}):
        with pytest.raises(InputError):
            engine.stage_adapter(2, broken)
    poisoned = {**tensors, name: torch.full_like(tensors[name], float("nan"))}
    with pytest.raises(InputError, match="finite"):
        engine.stage_adapter(2, poisoned)
    assert engine.adapter_version == 1


def test_the_adapter_off_is_the_base(engine: TorchRolloutEngine) -> None:
    source = tiny.quantized(tiny.reference(), "int4")
    base = TorchRolloutEngine(load_model(source, source.config, "float32", "cpu"), OFT(), (1, 2), 4096)
    pairs = [((3, 4, 5), (6, 7, 8)), ((9,), (10, 11))]
    for off, on, plain in zip(engine.score(pairs, adapter=False), engine.score(pairs), base.score(pairs), strict=True):
        torch.testing.assert_close(off, plain, atol=1e-6, rtol=0)
        assert (off - on).abs().max() > 1e-3


def test_prompts_that_do_not_fit_are_refused(engine: TorchRolloutEngine) -> None:
    limit = tiny.SIZES["max_position_embeddings"]
    for prompt in ((), (5,) * limit):
        with pytest.raises(InputError, match="prompt to complete"):
            engine.generate([Request(prompt, SampleKey(0, 0, 0, 0))], SAMPLING)


def test_a_small_cache_budget_only_cuts_the_batch(engine: TorchRolloutEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [completion.token_ids for completion in engine.generate(requests(), SAMPLING)]
    monkeypatch.setattr("orbit_core.rollout.torch.CACHE_BYTES", 40_000)
    assert [completion.token_ids for completion in engine.generate(requests(), SAMPLING)] == expected


def test_stop_tokens_come_from_generation_config_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert stop_ids(tmp_path) == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert stop_ids(tmp_path) == (7, 8)


@pytest.mark.parametrize("invariant", [False, True])
def test_the_engines_say_whether_rows_keep_their_bits_beside_others(tmp_path: Path, invariant: bool) -> None:
    prepared = tiny.prepare(tiny.reference(), "int4", tmp_path)
    engines = Engines(threads=1, batch_invariant=invariant)
    loads = (
        lambda: load_rollout_engine(engines, prepared.quantized, OFT()),
        lambda: load_trainer(engines, prepared.converted, prepared.quantized, OFT(), seed=0),
    )
    for load in loads:
        set_batch_invariant(not invariant)
        try:
            load()
            assert is_batch_invariant() == invariant
        finally:
            set_batch_invariant(True)
