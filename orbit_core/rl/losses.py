"""The clipped policy-gradient loss that every trainer uses.

Per token, with r = exp(logprob - old_logprob), A the sample's advantage and w the truncated importance weight:

    token loss = -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + coefficient * KL(policy || reference)

What GRPO, Dr.GRPO and DAPO disagree about is the mean. It is written as one weight per sequence, fixed before the
batch is cut into micro-batches, so that the losses (and gradients) of micro-batches simply add up:

    sequence (GRPO)     1 / (sequences * length)      every answer counts the same, long ones per token less
    token (DAPO)        1 / (all tokens)              every token counts the same
    constant (Dr.GRPO)  1 / (sequences * max length)  no division by a length that the policy can influence
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from orbit_core.errors import InputError
from orbit_core.recipe import Algorithm
from orbit_core.rl.corrections import importance_weights
from orbit_core.rl.kl import kl_per_token


def token_weights(lengths: Sequence[int], algorithm: Algorithm) -> torch.Tensor:
    """Weight (float32 [sequences]) of each token of each sequence of the whole batch; see the module's table.

    lengths: response lengths of all trained samples of the update, before it is cut into micro-batches.
    """
    counts = torch.tensor(list(lengths), dtype=torch.float64)
    if algorithm.aggregation == "token":
        weights = torch.full_like(counts, 1.0) / counts.sum().clamp(min=1)
    elif algorithm.aggregation == "sequence":
        weights = 1.0 / (len(counts) * counts.clamp(min=1))
    elif algorithm.aggregation == "constant":
        weights = torch.full_like(counts, 1.0) / (len(counts) * algorithm.sampling.max_new_tokens)
    else:
        raise InputError("loss aggregation", "token, sequence or constant", algorithm.aggregation, "choose one of them")
    return weights.float()


def policy_loss(
    logprobs: torch.Tensor,
    *,
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    algorithm: Algorithm,
    reference_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss (float32 scalar) of one micro-batch, and sums of its metrics for `mean_metrics`.

    logprobs: float32 [sequences, tokens], under the current weights, with gradient.
    old_logprobs: same shape; the trainer's own before the first update of the step (`Sample.trainer_logprobs`).
    rollout_logprobs: same shape; as the rollout engine sampled them (`Completion.logprobs`).
    reference_logprobs: same shape, adapter off; needed when the KL coefficient is above 0 and placed in the loss.
    advantages: float32 [sequences]. mask: bool [sequences, tokens]. weights: float32 [sequences], this micro-batch's
    part of `token_weights(...)`. Padding may hold any finite value.

    The losses of the micro-batches of an update add up to the loss of the whole batch: call backward on each.
    """
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()
    advantage = advantages[:, None].to(logprobs.dtype)
    clipped_ratio = ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_upper)
    unclipped, clipped = ratio * advantage, clipped_ratio * advantage
    importance, cut = importance_weights(old_logprobs, rollout_logprobs, mask, algorithm.importance_sampling)
    token_loss = -importance * torch.minimum(unclipped, clipped)

    kl = torch.zeros_like(token_loss)
    if reference_logprobs is not None:
        kl = kl_per_token(logprobs, reference_logprobs, algorithm.kl.estimator).masked_fill(~mask, 0.0)
    if algorithm.kl.coefficient > 0 and algorithm.kl.place == "loss":
        if reference_logprobs is None:
            raise InputError("KL penalty", "log-probs of the reference", "none", "score the samples with adapter=False")
        token_loss = token_loss + algorithm.kl.coefficient * kl

    loss = (token_loss.masked_fill(~mask, 0.0) * weights[:, None]).sum()
    with torch.no_grad():
        sums = {
            "loss": loss.detach(),
            "tokens": mask.sum(),
            "clip_fraction": ((clipped < unclipped) & mask).sum(),
            "ratio_mean": (ratio * mask).sum(),
            "kl": kl.sum(),
            "importance_weight_mean": (importance * mask).sum(),
            "importance_capped_fraction": cut.sum(),
        }
    return loss, sums


def mean_metrics(parts: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Metrics of an update from the sums of its micro-batches: `loss` adds up, the others become means per token."""
    total: dict[str, float] = {}
    for sums in parts:
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + float(value)
    tokens = max(1.0, total.get("tokens", 0.0))
    return {name: value if name in ("loss", "tokens") else value / tokens for name, value in total.items()}
