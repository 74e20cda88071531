"""A test double of trainer and rollout engine, small enough to enumerate every boundary of the loop.

The "model" is a table of logits over 8 tokens, one row per prompt, the same at every position; the adapter is added.
It computes the real losses with real autograd and Adam, and samples by inverse transform from the requests' keys. Only
the model is missing: what the loop does around it is what is tested.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from orbit_core.adapters.digest import tensors_digest
from orbit_core.errors import OrbitError
from orbit_core.recipe import Algorithm, Reward, Sampling
from orbit_core.rl.loop import Loop
from orbit_core.rl.losses import mean_metrics, policy_loss, token_weights
from orbit_core.rl.recorder import Recorder
from orbit_core.rl.rewards import Judge
from orbit_core.rl.schedule import generator, learning_rate
from orbit_core.rl.types import Completion, Prompt, Request, Sample
from orbit_core.store.base import Store

VOCABULARY = 8
STOP = 0
BASE = torch.linspace(0.0, 0.7, VOCABULARY)
PROMPTS = [Prompt(f"p{n}", f"say {n}", str(n), {}) for n in range(1, 6)]
ALGORITHM = Algorithm.model_validate(
    {
        "steps": 3,
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "sampling": {"max_new_tokens": 3},
        "optimizer": {"learning_rate": 0.4, "warmup_steps": 0},
        "kl": {"coefficient": 0.01},
    }
)


def padded(rows: Sequence[Sequence[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    values = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return values, mask


class BanditTrainer:
    def __init__(self) -> None:
        self.theta = torch.zeros(VOCABULARY, VOCABULARY, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.theta], lr=0.0)
        self.theta.grad = torch.zeros_like(self.theta)
        self.optimizer.step()  # makes the moments, so that `state` has the same names from the start

    def score(self, sequences, temperature=1.0, adapter=True):
        logits = BASE + self.theta.detach() * adapter
        table = torch.log_softmax(logits / temperature, dim=-1)
        return [table[prompt[0], torch.tensor(response, dtype=torch.long)] for prompt, response in sequences]

    def update(self, samples: Sequence[Sample], algorithm: Algorithm, step: int) -> dict[str, float]:
        rate = learning_rate(step, algorithm.steps, algorithm.optimizer)
        if not samples:
            return {"learning_rate": rate}
        tokens, mask = padded([sample.completion.token_ids for sample in samples])
        row = torch.tensor([sample.prompt_ids[0] for sample in samples])[:, None]
        logprobs = torch.log_softmax(BASE + self.theta, dim=-1)[row, tokens.long()]
        loss, sums = policy_loss(
            logprobs,
            old_logprobs=padded([sample.trainer_logprobs for sample in samples])[0],
            rollout_logprobs=padded([sample.completion.logprobs for sample in samples])[0],
            reference_logprobs=padded([s.reference_logprobs for s in samples])[0] if algorithm.kl.coefficient else None,
            advantages=torch.tensor([sample.advantage for sample in samples]),
            mask=mask,
            weights=token_weights([len(sample.completion.token_ids) for sample in samples], algorithm),
            algorithm=algorithm,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {**mean_metrics([sums]), "learning_rate": rate}

    def export_adapter(self):
        return {"theta": self.theta.detach().to(torch.bfloat16)}

    def load_adapter(self, tensors):
        self.theta.data.copy_(tensors["theta"])

    def state(self):
        moments = self.optimizer.state[self.theta]
        return {"theta": self.theta.detach(), **{name: moments[name] for name in ("step", "exp_avg", "exp_avg_sq")}}

    def load_state(self, state):
        self.theta.data.copy_(state["theta"])
        for name, value in self.optimizer.state[self.theta].items():
            value.copy_(state[name])


class BanditEngine:
    def __init__(self) -> None:
        self.adapter_version = -1
        self.theta = torch.zeros(VOCABULARY, VOCABULARY)
        self.staged: tuple[int, dict[str, torch.Tensor]] | None = None

    def generate(self, requests: Sequence[Request], sampling: Sampling, greedy: bool = False) -> list[Completion]:
        table = torch.log_softmax((BASE + self.theta) / sampling.temperature, dim=-1)
        return [self._complete(request, sampling, table[request.prompt_ids[0]]) for request in requests]

    def _complete(self, request: Request, sampling: Sampling, row: torch.Tensor) -> Completion:
        key, tokens, cumulative = request.key, [], row.exp().cumsum(0)
        random = generator("bandit", key.seed, key.step, key.group, key.sample)
        while len(tokens) < sampling.max_new_tokens and STOP not in tokens:
            tokens.append(min(int(torch.searchsorted(cumulative, random.random())), VOCABULARY - 1))
        return Completion(
            tuple(tokens),
            tuple(row[token].item() for token in tokens),
            (self.adapter_version,) * len(tokens),
            "stop" if STOP in tokens else "length",
        )

    def stage_adapter(self, version, tensors):
        self.staged = version, dict(tensors)
        return tensors_digest(tensors)

    def activate_adapter(self, version):
        if self.staged is None or self.staged[0] != version:
            raise OrbitError(f"version {version} is not staged")
        self.adapter_version, self.theta = version, self.staged[1]["theta"].float()


def spell(tokens: Sequence[int]) -> str:
    return "".join(str(token) for token in tokens if token != STOP)


@functools.lru_cache
def judge_of(settings: str) -> Judge:
    """Its process serves loop after loop."""
    return Judge(Reward.model_validate_json(settings))


def bandit_loop(store: Store, run: str = "bandit", trainer=None, engines=None, algorithm=ALGORITHM, **reward) -> Loop:
    settings = Reward.model_validate(
        {"kind": "python", "function": "peoples_rewards:same_digit", "right_only": False, **reward}
    )
    return Loop(
        trainer or BanditTrainer(),
        engines or [BanditEngine()],
        PROMPTS,
        encode=lambda prompt: [int(prompt.label)],
        decode=spell,
        judge=judge_of(settings.model_dump_json()),
        algorithm=algorithm,
        seed=7,
        recorder=Recorder(store, run, base_digest="base"),
    )
