"""The embedded rollout engine: batched decoding with a key-value cache on the packed model.

Requests with one prompt share its prefill. Prompts of different lengths are padded on the left, finished rows leave the
batch, and every token records the adapter version that its logits came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from orbit_kernels import set_batch_invariant
from torch import Tensor

from orbit_core.adapters.digest import tensors_digest
from orbit_core.adapters.layout import AdapterLayout, published
from orbit_core.adapters.operands import Operand
from orbit_core.checkpoints.hf import HFCheckpoint
from orbit_core.data.encode import stop_ids
from orbit_core.errors import InputError, OrbitError
from orbit_core.modeling.cache import KeyValueCache
from orbit_core.modeling.loading import load_model
from orbit_core.modeling.model import PackedModel
from orbit_core.modeling.scoring import score
from orbit_core.recipe import Adapter, Engines, Sampling
from orbit_core.rl.types import Completion, Request
from orbit_core.rollout.sampling import choose, uniforms

CACHE_BYTES = 2**30  # keys and values held at once
COMPACT_BELOW = 0.75  # share of unfinished rows under which finished ones are dropped


@dataclass(frozen=True)
class Slot:
    """One version of the adapter, ready to compute with; no operands: the base alone."""

    version: int
    operands: Mapping[str, Operand] | None


class TorchRolloutEngine:
    def __init__(self, model: PackedModel, adapter: Adapter, stop_ids: Sequence[int], micro_batch_tokens: int) -> None:
        self.model = model
        self.layout = AdapterLayout.of(model.shapes, adapter)
        self.stop_ids = tuple(stop_ids)
        self.micro_batch_tokens = micro_batch_tokens
        self._active = Slot(0, None)
        self._staged: Slot | None = None

    @classmethod
    def load(cls, engines: Engines, quantized_dir: Path, adapter: Adapter) -> TorchRolloutEngine:
        torch.set_num_threads(engines.threads)
        set_batch_invariant(engines.batch_invariant)
        checkpoint = HFCheckpoint(quantized_dir)
        model = load_model(checkpoint, checkpoint.config, engines.compute_dtype, engines.device, engines.resident_mib)
        return cls(model, adapter, stop_ids(quantized_dir), engines.micro_batch_tokens)

    @property
    def adapter_version(self) -> int:
        return self._active.version

    def stage_adapter(self, version: int, tensors: dict[str, Tensor]) -> str:
        """Hold `tensors` as `version` without using them; returns the digest of what arrived.

        Raises InputError, and keeps whatever was staged and active, when the tensors are not this adapter's.
        """
        self.layout.check(tensors, f"adapter version {version}")
        values = {name: published(tensor).to(self.model.device).float() for name, tensor in tensors.items()}
        with torch.inference_mode():
            self._staged = Slot(version, self.layout.operands(values, self.model.dtype))
        return tensors_digest(tensors)

    def activate_adapter(self, version: int) -> None:
        if self._staged is None or self._staged.version != version:
            held = "none" if self._staged is None else str(self._staged.version)
            raise OrbitError(f"adapter version {version} cannot be activated: the staged version is {held}")
        self._active, self._staged = self._staged, None

    def score(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0, adapter: bool = True
    ) -> list[Tensor]:
        self.model.use(self._active.operands if adapter else None)
        return score(self.model, sequences, temperature, self.micro_batch_tokens)

    def packed_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self.model.packed_tensors()

    def layer_outputs(self, token_ids: Sequence[int]) -> list[tuple[str, Tensor]]:
        self.model.use(self._active.operands)
        return self.model.layer_outputs(token_ids)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling, greedy: bool = False) -> list[Completion]:
        """Completions in the order of the requests; `greedy` takes the most likely token and needs no key."""
        results: dict[int, Completion] = {}
        for indices in self._cut(requests, sampling.max_new_tokens):
            chosen = [requests[i] for i in indices]
            results.update(zip(indices, self._generate(chosen, sampling, greedy), strict=True))
        return [results[i] for i in range(len(requests))]

    def _cut(self, requests: Sequence[Request], new_tokens: int) -> Iterator[list[int]]:
        """Indices of requests in batches of rising prompt length whose caches fit into CACHE_BYTES."""
        config = self.model.config
        heads, size = config.num_key_value_heads, self.model.head_size
        per_token = 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize
        batch: list[int] = []
        for index in sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids)):
            capacity = len(requests[index].prompt_ids) + new_tokens
            if capacity == new_tokens or capacity > config.max_position_embeddings:
                limit = config.max_position_embeddings - new_tokens
                raise InputError(
                    "prompt to complete",
                    f"1 to {limit} tokens: the model's context less the answer's",
                    f"{capacity - new_tokens} tokens",
                    "shorten or remove it, or lower algorithm.sampling.max_new_tokens",
                )
            if batch and (len(batch) + 1) * capacity * per_token > CACHE_BYTES:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _generate(self, requests: Sequence[Request], sampling: Sampling, greedy: bool) -> list[Completion]:
        steps, device = sampling.max_new_tokens, self.model.device
        u = None if greedy else uniforms([request.key for request in requests], steps).to(device)
        stop = torch.tensor(self.stop_ids, dtype=torch.long, device=device)
        tokens = torch.zeros(len(requests), steps, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(requests), steps, device=device)
        lengths = torch.full((len(requests),), steps, device=device)
        versions = []

        slot = self._active
        batch = _Batch.prefill(self.model, slot, [request.prompt_ids for request in requests], steps)
        for step in range(steps):
            versions.append(slot.version)
            drawn, values = choose(batch.logits, None if u is None else u[batch.request, step], sampling)
            tokens[batch.request, step], logprobs[batch.request, step] = drawn, values
            ended = torch.isin(drawn, stop)
            lengths[batch.request[ended & ~batch.done]] = step + 1
            batch.done |= ended
            running = int((~batch.done).sum())
            if running == 0 or step == steps - 1:
                break
            if running <= COMPACT_BELOW * len(drawn):
                drawn = drawn[~batch.done]
                batch = batch.compact()
            slot = self._active
            batch.decode(self.model, slot, drawn)
        return _completions(tokens, logprobs, lengths, versions, self.stop_ids)


def _completions(
    tokens: Tensor, logprobs: Tensor, lengths: Tensor, versions: list[int], stop_ids: tuple[int, ...]
) -> list[Completion]:
    completions = []
    rows = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
    for row, values, length in rows:
        reason = "stop" if row[length - 1] in stop_ids else "length"
        completions.append(Completion(tuple(row[:length]), tuple(values[:length]), tuple(versions[:length]), reason))
    return completions


class _Batch:
    """The rows that are being decoded: their cache, padding, and the logits of their next token."""

    def __init__(
        self, cache: KeyValueCache, request: Tensor, position: Tensor, padding: Tensor | None, done: Tensor
    ) -> None:
        self.cache = cache
        self.request = request  # [rows] index of the request
        self.position = position  # [rows] of the next token, not counting padding
        self.padding = padding  # additive mask [rows, 1, 1, capacity]; None: no row is padded
        self.done = done  # [rows]
        self.logits: Tensor

    @classmethod
    def prefill(cls, model: PackedModel, slot: Slot, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> _Batch:
        """Compute each distinct prompt once, then give every request its row."""
        model.use(slot.operands)
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        width = max(len(prompt) for prompt in number)
        device = model.device
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in number], device=device)
        pads = torch.tensor([width - len(prompt) for prompt in number], device=device)
        cache = model.new_cache(width)
        padding, mask, positions = None, None, None
        if int(pads.max()):
            lowest = torch.finfo(model.dtype).min
            columns = torch.arange(width + new_tokens, device=device)
            padding = torch.where(columns < pads[:, None], lowest, 0.0).to(model.dtype)[:, None, None, :]
            future = torch.full((width, width), lowest, dtype=model.dtype, device=device).triu(1)
            mask = torch.maximum(padding[..., :width] + future, torch.tensor(lowest, device=device))
            positions = (columns[None, :width] - pads[:, None]).clamp(min=0)
        states = model.hidden(ids, positions, mask, cache)[:, -1]

        owner = torch.tensor([number[prompt] for prompt in prompts], device=device)
        batch = cls(
            cache.rows(owner, width + new_tokens),
            torch.arange(len(prompts), device=device),
            (width - pads)[owner],
            None if padding is None else padding[owner],
            torch.zeros(len(prompts), dtype=torch.bool, device=device),
        )
        batch.logits = model.logits(states)[owner]
        return batch

    def decode(self, model: PackedModel, slot: Slot, tokens: Tensor) -> None:
        """Feed one token to every row."""
        model.use(slot.operands)
        mask = None if self.padding is None else self.padding[..., : self.cache.length + 1]
        states = model.hidden(tokens[:, None], self.position[:, None], mask, self.cache)[:, -1]
        self.position = self.position + 1
        self.logits = model.logits(states)

    def compact(self) -> _Batch:
        keep = torch.nonzero(~self.done)[:, 0]
        padding = None if self.padding is None else self.padding[keep]
        return _Batch(self.cache.rows(keep), self.request[keep], self.position[keep], padding, self.done[keep])
