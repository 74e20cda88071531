"""Log-probabilities of responses: right-padded rows, heads only on the positions that predict a response token.

    logprob(t) = log_softmax(logits / temperature)[token t]      in float32, over the full vocabulary

Rows do not see one another, and padding stands after everything that is read, so the plain causal mask is enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from orbit_core.errors import InputError
from orbit_core.modeling.model import PackedModel

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]  # (prompt ids, response ids)
HEAD_ELEMENTS = 2**25  # logits held at once: 128 MiB of float32


def batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences of similar length, cut so that rows * longest <= max_tokens (one row always fits)."""
    cut: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if cut and (len(cut[-1]) + 1) * lengths[index] <= max_tokens:
            cut[-1].append(index)
        else:
            cut.append([index])
    return cut


def response_logprobs(model: PackedModel, sequences: Sequences, temperature: float) -> Tensor:
    """float32 [sequences, longest response], 0 after the end of a response; differentiable in the operands.

    Raises InputError for an empty prompt: its first token has nothing that predicts it.
    """
    if any(len(prompt) == 0 for prompt, _ in sequences):
        raise InputError(
            "sequence to score", "a prompt of at least one token", "an empty prompt", "give a prompt with text"
        )
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    width = max(len(response) for _, response in sequences)
    if width == 0:
        return torch.zeros(len(sequences), 0, device=model.device)
    rows = [[*prompt, *response] for prompt, response in sequences]
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    lengths = torch.tensor([len(response) for _, response in sequences], device=model.device)
    starts = torch.tensor([len(prompt) for prompt, _ in sequences], device=model.device)

    row, offset = torch.nonzero(torch.arange(width, device=model.device) < lengths[:, None], as_tuple=True)
    target = starts[row] + offset
    states = model.hidden(ids[:, :-1])[row, target - 1]
    values = token_logprobs(model, states, ids[row, target], temperature)
    return torch.zeros(len(rows), width, device=model.device).index_put((row, offset), values)


def token_logprobs(model: PackedModel, states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """states[n, hidden], tokens[n] -> float32 [n]; logits of at most HEAD_ELEMENTS elements exist at a time."""
    step = max(1, HEAD_ELEMENTS // model.config.vocab_size)
    if len(states) <= step:
        return _logprobs(model, states, tokens, temperature)
    parts = []
    for start in range(0, len(states), step):
        part = (model, states[start : start + step], tokens[start : start + step], temperature)
        again = torch.is_grad_enabled() and states.requires_grad
        parts.append(checkpoint(_logprobs, *part, use_reentrant=False) if again else _logprobs(*part))
    return torch.cat(parts)


def _logprobs(model: PackedModel, states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    scaled = torch.log_softmax(model.logits(states) / temperature, dim=-1)
    return scaled.gather(-1, tokens[:, None])[:, 0]


def score(model: PackedModel, sequences: Sequences, temperature: float, max_tokens: int) -> list[Tensor]:
    """float32 [len(response)] on the CPU for every sequence, in order; without gradient."""
    if not temperature > 0:
        raise InputError("temperature", "above 0", str(temperature), "raise the temperature")
    results: list[Tensor] = [torch.empty(0)] * len(sequences)
    with torch.inference_mode():
        for batch in batches([len(prompt) + len(response) for prompt, response in sequences], max_tokens):
            values = response_logprobs(model, [sequences[i] for i in batch], temperature).cpu()
            for index, line in zip(batch, values, strict=True):
                results[index] = line[: len(sequences[index][1])].clone()
    return results
