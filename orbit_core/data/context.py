"""Does every prompt leave room for its answer in the model's context? Asked before training, not when one is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orbit_core.data.encode import Tokenizer, encode_prompt
from orbit_core.errors import InputError
from orbit_core.rl.types import Prompt


def context_of(config: dict[str, Any], chosen: int | None) -> int:
    """Tokens of prompt and answer together: the model's own limit, or the recipe's where that is lower."""
    limit = config.get("max_position_embeddings")
    if type(limit) is not int or limit < 1:
        fix = "fetch the model's config.json again"
        raise InputError("config.json: max_position_embeddings", "a positive integer", repr(limit)[:80], fix)
    return min(limit, chosen or limit)


def encode_all(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    context: int,
    new_tokens: int,
    table: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """Token ids of all prompts of a table. Raises InputError when one leaves fewer than `new_tokens` of `context`."""
    room = context - new_tokens
    if room < 1:
        found = f"{new_tokens} new tokens"
        fix = "lower algorithm.sampling.max_new_tokens"
        raise InputError("algorithm.sampling.max_new_tokens", f"less than the context of {context}", found, fix)
    encoded = []
    for number, prompt in enumerate(prompts):
        if number % 10_000 == 0:
            progress(number, len(prompts))
        encoded.append(encode_prompt(prompt, tokenizer))
    longer = [number for number, ids in enumerate(encoded) if len(ids) > room]
    if longer:
        more = f", and {len(longer) - 1} more prompts that are too long" if len(longer) > 1 else ""
        raise InputError(
            f"prompt {prompts[longer[0]].id} of {table}",
            f"at most {room} tokens: a context of {context} less {new_tokens} for the answer",
            f"{len(encoded[longer[0]])} tokens{more}",
            "shorten or remove it, or lower algorithm.sampling.max_new_tokens",
        )
    return encoded
