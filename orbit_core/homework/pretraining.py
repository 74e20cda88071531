"""Teach a small Qwen3 the homework: plain next-token prediction on the written work, AdamW, linear decay.

The loss counts the work only, not the question. Texts are drawn from the training prompts alone, so a held-out
question is unknown to the base model too. Everything is a function of (settings, prompts, seed, CPU threads).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from orbit_core.errors import InputError
from orbit_core.homework.sums import Chain, Sloppiness, parse_question, write_work
from orbit_core.homework.vocabulary import EOS, PAD, build_tokenizer, save_tokenizer
from orbit_core.recipe import PretrainedModel
from orbit_core.rl.types import Prompt

WARMUP_STEPS = 50
IGNORED = -100


def pretrain(
    settings: PretrainedModel,
    prompts: Sequence[Prompt],
    seed: int,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Qwen3ForCausalLM, Tokenizer]:
    """The model (float32) and its tokenizer. Raises InputError when the prompts are not chains of sums."""
    lead, chains = _chains(prompts)
    tokenizer = build_tokenizer(lead)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(_config(settings, tokenizer))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    batches = _batches(chains, prompts, tokenizer, settings, random.Random(seed))
    for step in range(settings.steps):
        warmth = min((step + 1) / WARMUP_STEPS, 1.0)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * warmth * (1 - step / settings.steps)
        loss = _loss(model, *next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, loss.item())
    return model, tokenizer


def save_model(model: Qwen3ForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """A Hugging Face directory in BF16: config, generation_config, model.safetensors, tokenizer."""
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    content = save(weights, metadata={"format": "pt"})  # `save_file` would make the file private
    (directory / "model.safetensors").write_bytes(content)
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)


def _chains(prompts: Sequence[Prompt]) -> tuple[str, list[Chain]]:
    parsed = [
        (prompt, parse_question(prompt.messages) if isinstance(prompt.messages, str) else None) for prompt in prompts
    ]
    for prompt, found in parsed:
        if found is None:
            raise InputError(
                f"prompt {prompt.id}",
                "a chain of sums and differences, such as reasoning-gym's chain_sum",
                repr(prompt.messages)[:200],
                "model.kind pretrain knows this homework alone; for other data use model.kind local",
            )
    leads = {found[0] for _, found in parsed if found}
    if len(leads) != 1:
        raise InputError(
            "the questions",
            "one text before the numbers",
            f"{len(leads)}: {sorted(leads)[:3]}",
            "choose a data set whose questions are alike",
        )
    return leads.pop(), [found[1] for _, found in parsed if found]


def _config(settings: PretrainedModel, tokenizer: Tokenizer) -> Qwen3Config:
    if settings.hidden_size % settings.heads or settings.heads % settings.key_value_heads:
        raise InputError(
            "model",
            "hidden_size a multiple of heads, and heads of key_value_heads",
            f"{settings.hidden_size}, {settings.heads}, {settings.key_value_heads}",
            "mend the sizes of model",
        )
    return Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        head_dim=settings.hidden_size // settings.heads,
        max_position_embeddings=256,
        initializer_range=0.05,  # the default of 0.02 is meant for wider models and learns carries late
        tie_word_embeddings=False,
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
        bos_token_id=None,
    )


def _batches(
    chains: Sequence[Chain],
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    settings: PretrainedModel,
    rng: random.Random,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (token ids, labels), int64 [batch, longest]; padded on the right, which a causal model does not see."""
    questions = [encoding.ids for encoding in tokenizer.encode_batch([str(prompt.messages) for prompt in prompts])]
    sloppiness = Sloppiness(settings.forget_carry, settings.slip)
    token_id = tokenizer.get_vocab()
    end, pad = token_id[EOS], token_id[PAD]
    while True:
        drawn = rng.choices(range(len(chains)), k=settings.batch_size)
        works = [[token_id[character] for character in write_work(chains[i], sloppiness, rng)] + [end] for i in drawn]
        texts = [questions[i] + work for i, work in zip(drawn, works, strict=True)]
        hidden = [[IGNORED] * len(questions[i]) + work for i, work in zip(drawn, works, strict=True)]
        longest = max(map(len, texts))
        yield (
            torch.tensor([text + [pad] * (longest - len(text)) for text in texts]),
            torch.tensor([label + [IGNORED] * (longest - len(label)) for label in hidden]),
        )


def _loss(model: Qwen3ForCausalLM, token_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    hidden = model.model(input_ids=token_ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    counted = targets != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[counted]), targets[counted])
