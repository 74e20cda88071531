"""The trainer: exact gradients at the published values, however a batch is cut; a state that resumes bit for bit."""

from __future__ import annotations

import pytest
import torch
from engines import tiny
from orbit_kernels import cayley_neumann, dequantize

from orbit_core.adapters.layout import published, random_adapter
from orbit_core.errors import InputError, OrbitError
from orbit_core.modeling.loading import load_model
from orbit_core.recipe import OFT, Algorithm, LoRA
from orbit_core.rl.types import Completion, Prompt, Sample, SampleKey
from orbit_core.trainers.torch import TorchTrainer

ALGORITHM = Algorithm.model_validate({"steps": 10, "kl": {"coefficient": 0.1}, "optimizer": {"clip_norm": 1e9}})
PROMPT = Prompt("p", "", None, {})


def trainer_of(
    adapter: OFT | LoRA, family: str = "qwen3", fmt: str = "int4", tokens: int = 4096, seed: int = 0
) -> TorchTrainer:
    source = tiny.quantized(tiny.reference(family), fmt)
    return TorchTrainer(load_model(source, source.config, "float32", "cpu", 64), adapter, seed, tokens)


def samples_of(trainer: TorchTrainer, count: int = 12) -> list[Sample]:
    """Answers of different lengths with log-probs off by a little, so that every term of the loss is alive."""
    draw = torch.Generator().manual_seed(3)
    samples = []
    for index in range(count):
        prompt = tuple(torch.randint(3, 40, (1 + index % 4,), generator=draw).tolist())
        answer = tuple(torch.randint(3, 40, (1 + index * 5 % 9,), generator=draw).tolist())
        (logprobs,), (reference,) = trainer.score([(prompt, answer)]), trainer.score([(prompt, answer)], adapter=False)
        drift = 0.05 * torch.randn(len(answer), generator=draw)
        samples.append(
            Sample(
                PROMPT, SampleKey(0, 0, index, 0), prompt,
                Completion(answer, tuple((logprobs + drift).tolist()), (0,) * len(answer), "length"), "",
                advantage=float(index % 3) - 1.0, trainer_logprobs=tuple((logprobs - drift).tolist()),
                reference_logprobs=tuple(reference.tolist()),
            )
        )  # fmt: skip
    return samples


def gradients(trainer: TorchTrainer, samples: list[Sample]) -> dict[str, torch.Tensor]:
    trainer._accumulate(samples, ALGORITHM)
    return {name: master.grad.clone() for name, master in trainer._masters.items()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("adapter", [OFT(), LoRA()], ids=lambda a: a.kind)
def test_the_gradient_is_that_of_the_dense_model(adapter: OFT | LoRA) -> None:
    """Against autograd through transformers with merged weights, taken at the published values."""
    from torch.func import functional_call

    from orbit_core.rl.losses import policy_loss, token_weights

    trainer = trainer_of(adapter)
    trainer.load_adapter(random_adapter(trainer.export_adapter(), seed=1))
    samples = samples_of(trainer)
    found = gradients(trainer, samples)

    values = {name: published(v).double().requires_grad_() for name, v in trainer._masters.items()}
    dense = {}
    for site in trainer.layout.sites:
        weight = dequantize(trainer.model.linears[site.name].packed).double()
        if isinstance(adapter, OFT):
            R = cayley_neumann(values[site.peft_name("oft_R.weight")], adapter.block_size)
            dense[f"{site.name}.weight"] = weight @ torch.block_diag(*R).T
        else:
            a, b = values[site.peft_name("lora_A.weight")], values[site.peft_name("lora_B.weight")]
            dense[f"{site.name}.weight"] = weight + adapter.alpha / adapter.rank * (b @ a)
    reference = tiny.reference().double()
    weights = token_weights([len(s.completion.token_ids) for s in samples], ALGORITHM)
    total = torch.zeros((), dtype=torch.float64)
    for sample, weight in zip(samples, weights, strict=True):
        answer = sample.completion.token_ids
        ids = torch.tensor([[*sample.prompt_ids, *answer]])
        logits = functional_call(reference, dense, kwargs={"input_ids": ids}).logits[0, len(sample.prompt_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        loss, _ = policy_loss(
            logprobs[None],
            old_logprobs=torch.tensor([sample.trainer_logprobs]),
            rollout_logprobs=torch.tensor([sample.completion.logprobs]),
            reference_logprobs=torch.tensor([sample.reference_logprobs]),
            advantages=torch.tensor([sample.advantage]),
            mask=torch.ones(1, len(answer), dtype=torch.bool),
            weights=weight[None],
            algorithm=ALGORITHM,
        )
        total = total + loss
    total.backward()
    for name, value in values.items():
        assert value.grad is not None and value.grad.abs().max() > 1e-6, name
        assert relative(found[name].double(), value.grad) < 1e-4, name


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("adapter", [OFT(), LoRA()], ids=lambda a: a.kind)
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(adapter: OFT | LoRA, family: str) -> None:
    values = random_adapter(trainer_of(adapter, family).export_adapter(), seed=1)
    results = []
    for tokens in (1, 30, 4096):
        trainer = trainer_of(adapter, family, tokens=tokens)
        trainer.load_adapter(values)
        samples = samples_of(trainer_of(adapter, family))
        results.append(gradients(trainer, samples))
    for name, whole in results[-1].items():
        assert all(relative(cut[name], whole) < 1e-4 for cut in results[:-1]), name


@pytest.mark.parametrize("adapter", [OFT(), LoRA()], ids=lambda a: a.kind)
def test_a_resumed_trainer_goes_on_bit_for_bit(adapter: OFT | LoRA) -> None:
    straight, stopped = trainer_of(adapter), trainer_of(adapter)
    samples = samples_of(straight)
    for step in range(3):
        straight.update(samples, ALGORITHM, step)
        stopped.update(samples, ALGORITHM, step)
    resumed = trainer_of(adapter, seed=99)
    resumed.load_state(stopped.state())
    assert_same(resumed.state(), stopped.state())
    metrics = [trainer.update(samples, ALGORITHM, 3) for trainer in (straight, resumed)]
    assert metrics[0] == metrics[1]
    assert_same(straight.state(), resumed.state())
    assert_same(straight.export_adapter(), resumed.export_adapter())


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


def test_a_state_is_a_snapshot_and_starts_complete() -> None:
    trainer = trainer_of(LoRA())
    state = trainer.state()
    copy = {name: value.clone() for name, value in state.items()}
    trainer.update(samples_of(trainer), ALGORITHM, 0)
    assert_same(state, copy)
    fresh = trainer_of(LoRA(), seed=5)
    fresh.load_state(state)
    assert_same(fresh.state(), copy)


def test_another_adapters_state_is_refused_before_anything_changes() -> None:
    trainer = trainer_of(OFT())
    before = trainer.state()
    for state in (trainer_of(OFT(block_size=16)).state(), trainer_of(LoRA()).state(), {}):
        with pytest.raises(InputError):
            trainer.load_state(state)
    assert_same(trainer.state(), before)


def test_an_update_moves_towards_rewarded_answers() -> None:
    trainer = trainer_of(OFT())
    samples = samples_of(trainer)
    pairs = [(sample.prompt_ids, sample.completion.token_ids) for sample in samples]
    before = [float(values.sum()) for values in trainer.score(pairs)]
    for sample in samples:
        sample.advantage = 1.0 if sample is samples[5] else 0.0
    algorithm = Algorithm.model_validate({"optimizer": {"warmup_steps": 0, "learning_rate": 5e-3}})
    metrics = trainer.update(samples, algorithm, 0)
    after = [float(values.sum()) for values in trainer.score(pairs)]
    assert after[5] > before[5] + 0.01
    assert metrics["grad_norm"] > 0 and metrics["learning_rate"] == 5e-3
    assert {"loss", "kl", "clip_fraction", "importance_weight_mean", "max_orthogonality_error", "max_skew_norm"} <= set(
        metrics
    )


def test_without_a_trained_sample_nothing_moves() -> None:
    trainer = trainer_of(OFT())
    samples = samples_of(trainer)
    trainer.update(samples, ALGORITHM, 0)
    before = trainer.state()
    for sample in samples:
        sample.trained = False
    metrics = trainer.update(samples, ALGORITHM, 1)
    assert metrics["trained_samples"] == 0 and "max_orthogonality_error" in metrics
    assert_same(trainer.state(), before)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    trainer = trainer_of(OFT())
    samples = samples_of(trainer)
    before = trainer.state()
    samples[0].advantage = float("nan")
    with pytest.raises(OrbitError, match="finite"):
        trainer.update(samples, ALGORITHM, 0)
    assert_same(trainer.state(), before)


def test_missing_logprobs_are_named() -> None:
    trainer = trainer_of(OFT())
    samples = samples_of(trainer)
    samples[0].trainer_logprobs = ()
    with pytest.raises(InputError, match="trainer_logprobs"):
        trainer.update(samples, ALGORITHM, 0)


def test_what_is_scored_is_what_is_published() -> None:
    """Masters carry more bits than the file; the forward pass must not use them."""
    trainer, other = trainer_of(LoRA()), trainer_of(LoRA(), seed=1)
    trainer.update(samples_of(trainer), ALGORITHM, 0)
    exported = trainer.export_adapter()
    assert all(value.dtype == torch.bfloat16 for value in exported.values())
    other.load_adapter(exported)
    pairs = [((3, 4), (5, 6, 7)), ((8,), (9,))]
    assert all(torch.equal(a, b) for a, b in zip(trainer.score(pairs), other.score(pairs), strict=True))


def test_long_vocabularies_are_scored_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(OFT())
    samples = samples_of(trainer)
    whole = gradients(trainer, samples)
    monkeypatch.setattr("orbit_core.modeling.scoring.HEAD_ELEMENTS", 5 * tiny.VOCABULARY)
    pieces = gradients(trainer, samples)
    for name, value in whole.items():
        assert relative(pieces[name], value) < 1e-4, name


def test_empty_answers_and_prompts() -> None:
    trainer = trainer_of(OFT())
    assert [len(values) for values in trainer.score([((3,), ()), ((3,), (4, 5))])] == [0, 2]
    assert [len(values) for values in trainer.score([((3,), ())])] == [0]
    with pytest.raises(InputError, match="empty prompt"):
        trainer.score([((), (4,))])
