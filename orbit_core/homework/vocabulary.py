"""The demo's tokenizer: one token a character, and one for each constant piece of the question.

`State the final answer to the following arithmetic problem: 29 + 97 =` is seven tokens: the sentence, 2, 9, ` + `, 9,
7, ` =`. Written as the two files that transformers' PreTrainedTokenizerFast reads, without importing transformers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from orbit_core.homework.sums import ALPHABET

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def build_tokenizer(lead: str) -> Tokenizer:
    """The tokenizer for questions that begin with `lead`."""
    pieces = [piece for piece in (lead, " + ", " - ", " =") if piece]
    words = [PAD, EOS, UNKNOWN, *pieces, *ALPHABET]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([PAD, EOS, UNKNOWN])
    # Oniguruma's (?m) lets . match a newline as well.
    tokenizer.pre_tokenizer = Split(Regex("(?m)" + "|".join([*map(re.escape, pieces), "."])), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
