"""The embedded trainer: policy gradients for the adapter through the frozen packed model.

The values that are trained are float32 masters; the forward pass computes with them rounded to BF16, as they are
published, and the gradient passes the rounding unchanged. What the forward pass reads (rotations, low-rank pairs) is
derived once per update: micro-batches add up its gradient, and one backward pass carries the sum to the masters. So the
gradient does not depend on how a batch is cut, up to the order of floating-point additions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from orbit_kernels import set_batch_invariant
from torch import Tensor

from orbit_core.adapters.layout import AdapterLayout, published
from orbit_core.adapters.operands import Operand
from orbit_core.checkpoints.files import read_json
from orbit_core.checkpoints.megatron import MegatronCheckpoint
from orbit_core.errors import InputError, OrbitError
from orbit_core.modeling.loading import load_model
from orbit_core.modeling.model import PackedModel
from orbit_core.modeling.scoring import batches, response_logprobs, score
from orbit_core.recipe import Adapter, Algorithm, Engines
from orbit_core.rl.losses import mean_metrics, policy_loss, token_weights
from orbit_core.rl.schedule import learning_rate
from orbit_core.rl.types import Sample

_MOMENTS = ("exp_avg", "exp_avg_sq")


class TorchTrainer:
    def __init__(self, model: PackedModel, adapter: Adapter, seed: int, micro_batch_tokens: int) -> None:
        self.model = model
        self.layout = AdapterLayout.of(model.shapes, adapter)
        self.micro_batch_tokens = micro_batch_tokens
        initial = self.layout.initial(seed)
        self._masters = {name: value.to(model.device).requires_grad_() for name, value in initial.items()}
        self._optimizer = torch.optim.AdamW(self._masters.values(), weight_decay=0.0)
        self._operands: Mapping[str, Operand] | None = None  # of the present values; made when first needed

    @classmethod
    def load(
        cls, engines: Engines, converted_dir: Path, quantized_dir: Path, adapter: Adapter, seed: int
    ) -> TorchTrainer:
        torch.set_num_threads(engines.threads)
        set_batch_invariant(engines.batch_invariant)
        config = read_json(quantized_dir, "config.json")
        model = load_model(
            MegatronCheckpoint(converted_dir), config, engines.compute_dtype, engines.device, engines.resident_mib
        )
        return cls(model, adapter, seed, engines.micro_batch_tokens)

    def score(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0, adapter: bool = True
    ) -> list[Tensor]:
        self.model.use(self._present() if adapter else None)
        return score(self.model, sequences, temperature, self.micro_batch_tokens)

    def update(self, samples: Sequence[Sample], algorithm: Algorithm, step: int) -> dict[str, float]:
        """One optimiser update. Without a trained sample nothing moves, not even the moments.

        Raises InputError when a sample lacks the log-probs that the loss needs; OrbitError, before anything moved, when
        the gradient is not finite.
        """
        rate = learning_rate(step, algorithm.steps, algorithm.optimizer)
        trained = [sample for sample in samples if sample.trained]
        metrics = {"trained_samples": float(len(trained)), "learning_rate": rate, "grad_norm": 0.0}
        if trained:
            metrics |= self._accumulate(trained, algorithm)
            norm = float(torch.nn.utils.clip_grad_norm_(self._masters.values(), algorithm.optimizer.clip_norm))
            if not torch.isfinite(torch.tensor(norm)):
                raise OrbitError(f"gradient norm at step {step}: expected a finite number, found {norm}")
            self._step(rate, algorithm)
            metrics["grad_norm"] = norm
        return metrics | self.layout.monitors(self._masters)

    def _accumulate(self, trained: Sequence[Sample], algorithm: Algorithm) -> dict[str, float]:
        """Fill the masters' gradients with that of the whole batch; returns the metrics of its loss."""
        weights = token_weights([len(sample.completion.token_ids) for sample in trained], algorithm)
        leaves = {name: published(value).float().requires_grad_() for name, value in self._masters.items()}
        graph = self.layout.operands(leaves, self.model.dtype)
        cut, joints = _detach(graph)
        self.model.use(cut)
        parts = []
        lengths = [len(sample.prompt_ids) + len(sample.completion.token_ids) for sample in trained]
        for indices in batches(lengths, self.micro_batch_tokens):
            loss, sums = self._loss([trained[i] for i in indices], weights[indices], algorithm)
            loss.backward()
            parts.append(sums)
        reached = [(derived, leaf.grad) for derived, leaf in joints if leaf.grad is not None]
        torch.autograd.backward([derived for derived, _ in reached], [grad for _, grad in reached])
        for name, master in self._masters.items():
            grad = leaves[name].grad
            master.grad = torch.zeros_like(master) if grad is None else grad
        return mean_metrics(parts)

    def _loss(
        self, samples: Sequence[Sample], weights: Tensor, algorithm: Algorithm
    ) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.model.device
        responses = [sample.completion.token_ids for sample in samples]
        pairs = [(sample.prompt_ids, response) for sample, response in zip(samples, responses, strict=True)]
        logprobs = response_logprobs(self.model, pairs, algorithm.sampling.temperature)
        width = logprobs.shape[1]
        lengths = torch.tensor([len(response) for response in responses], device=device)
        penalised = algorithm.kl.coefficient > 0 and algorithm.kl.place == "loss"
        return policy_loss(
            logprobs,
            old_logprobs=_padded("trainer_logprobs", [s.trainer_logprobs for s in samples], responses, width, device),
            rollout_logprobs=_padded("logprobs", [s.completion.logprobs for s in samples], responses, width, device),
            reference_logprobs=_padded(
                "reference_logprobs", [s.reference_logprobs for s in samples], responses, width, device
            )
            if penalised
            else None,
            advantages=torch.tensor([sample.advantage for sample in samples], device=device),
            mask=torch.arange(width, device=device) < lengths[:, None],
            weights=weights.to(device),
            algorithm=algorithm,
        )

    def _step(self, rate: float, algorithm: Algorithm) -> None:
        settings = algorithm.optimizer
        for group in self._optimizer.param_groups:
            group.update(lr=rate, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._operands = None

    def export_adapter(self) -> dict[str, Tensor]:
        return {name: published(value).cpu() for name, value in self._masters.items()}

    def load_adapter(self, tensors: dict[str, Tensor]) -> None:
        """Replace the adapter's values; the optimiser starts afresh, its moments belonged to others."""
        self.layout.check(tensors)
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(tensors[name])
        self._optimizer.state.clear()
        self._operands = None

    def state(self) -> dict[str, Tensor]:
        """`master.`, `exp_avg.` and `exp_avg_sq.` + PEFT name (float32), and `optimizer.step` (int64)."""
        state = {f"master.{name}": value.detach().cpu().clone() for name, value in self._masters.items()}
        steps = 0
        for name, master in self._masters.items():
            held: Mapping[str, Any] = self._optimizer.state.get(master, {})
            steps = int(held.get("step", 0))
            for moment in _MOMENTS:
                value = held.get(moment, torch.zeros_like(master))
                state[f"{moment}.{name}"] = value.detach().cpu().clone()
        return state | {"optimizer.step": torch.tensor(steps, dtype=torch.int64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Raises InputError, before anything changed, unless `state` has exactly the tensors of `state()`."""
        expected = {f"{part}.{name}" for part in ("master", *_MOMENTS) for name in self._masters} | {"optimizer.step"}
        if set(state) != expected:
            odd = sorted(set(state) ^ expected)
            raise InputError(
                "trainer state",
                f"{len(expected)} tensors of this adapter",
                f"they differ by {odd[:4]}",
                "resume with the recipe that the run was started with",
            )
        for part in ("master", *_MOMENTS):
            self.layout.check({name: state[f"{part}.{name}"] for name in self._masters}, f"trainer state, {part}")
        step = int(state["optimizer.step"])
        self._optimizer.state.clear()
        for name, master in self._masters.items():
            with torch.no_grad():
                master.copy_(state[f"master.{name}"])
            if step:
                moments = {moment: state[f"{moment}.{name}"].to(master.device, copy=True) for moment in _MOMENTS}
                self._optimizer.state[master] = {"step": torch.tensor(float(step)), **moments}
        self._operands = None

    def packed_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self.model.packed_tensors()

    def layer_outputs(self, token_ids: Sequence[int]) -> list[tuple[str, Tensor]]:
        self.model.use(self._present())
        return self.model.layer_outputs(token_ids)

    def _present(self) -> Mapping[str, Operand]:
        if self._operands is None:
            with torch.no_grad():
                values = {name: published(value).float() for name, value in self._masters.items()}
                self._operands = self.layout.operands(values, self.model.dtype)
        return self._operands


def _detach(graph: Mapping[str, Operand]) -> tuple[dict[str, Operand], list[tuple[Tensor, Tensor]]]:
    """Operands on detached copies that collect gradients, and (derived tensor, its copy) for the way back.

    Operands that several modules share stay shared.
    """
    copies: dict[int, Operand] = {}
    joints: list[tuple[Tensor, Tensor]] = []
    for operand in graph.values():
        if id(operand) not in copies:
            leaves = tuple(tensor.detach().requires_grad_() for tensor in operand.tensors)
            joints += zip(operand.tensors, leaves, strict=True)
            copies[id(operand)] = operand.on(leaves)
    return {module: copies[id(operand)] for module, operand in graph.items()}, joints


def _padded(
    what: str, rows: Sequence[Sequence[float]], responses: Sequence[Sequence[int]], width: int, device: torch.device
) -> Tensor:
    """float32 [rows, width], 0 after the end of a row."""
    for row, response in zip(rows, responses, strict=True):
        if len(row) != len(response):
            raise InputError(
                f"sample's {what}", f"one per response token ({len(response)})", str(len(row)), "sample and score again"
            )
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], device=device)
