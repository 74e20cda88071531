"""Sampling by inverse CDF from counter-based random numbers.

The t-th token of a sample is F^-1(u_t), with F the distribution in vocabulary order and u_t the t-th number of the
Philox stream that the sample's key names. Nothing else enters: neither the batch, nor the order of requests, nor what
was drawn before. So a repeated step samples the same tokens, and a rounding difference of the logits moves a token
only when u_t falls between the two values of F.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from orbit_core.recipe import Sampling
from orbit_core.rl.types import SampleKey

_MASK = 2**64 - 1


def uniforms(keys: Sequence[SampleKey], count: int) -> Tensor:
    """float64 [keys, count] in [0, 1); row i depends on keys[i] alone."""
    rows = np.empty((len(keys), count))
    for row, key in zip(rows, keys, strict=True):
        stream = np.random.Philox(
            key=np.array([key.seed & _MASK, key.step & _MASK], dtype=np.uint64),
            counter=np.array([0, 0, key.group & _MASK, key.sample & _MASK], dtype=np.uint64),
        )
        row[:] = np.random.Generator(stream).random(count)
    return torch.from_numpy(rows)


def choose(logits: Tensor, u: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits float32 [n, vocabulary], u float64 [n] (None: greedy) -> tokens [n], their log-probs float32 [n].

    The log-prob is that of the temperature-scaled softmax over the full vocabulary, whatever top-p and top-k cut off.
    """
    logprobs = torch.log_softmax(logits / sampling.temperature, dim=-1)
    tokens = logits.argmax(dim=-1) if u is None else _inverse_cdf(_kept(logprobs.exp(), sampling), u)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds u times the total."""
    cumulative = weights.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, u[:, None].to(total.device) * total, right=True)[:, 0]
    last = (cumulative >= total).int().argmax(dim=-1)  # the last token of weight above 0: u * total may round to total
    return torch.minimum(tokens, last)


def _kept(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities with what top-k and then top-p (on what top-k left, renormalised) cut off set to 0."""
    vocabulary = probabilities.shape[-1]
    top_k = sampling.top_k if 0 < sampling.top_k < vocabulary else 0
    if not top_k and sampling.top_p >= 1.0:
        return probabilities
    falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k:
        falling[:, top_k:] = 0.0
    if sampling.top_p < 1.0:
        before = falling.double().cumsum(dim=-1) - falling.double()
        falling[before >= sampling.top_p * falling.double().sum(dim=-1, keepdim=True)] = 0.0
    return torch.zeros_like(probabilities).scatter_(-1, order, falling)
