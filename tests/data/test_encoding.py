"""Token ids: the same as transformers gives, without waiting for transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from orbit_core.data.encode import encode_prompt, load_tokenizer
from orbit_core.errors import InputError
from orbit_core.rl.types import Prompt

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE as large models have it: a special token in front, a chat template."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<begin>", "<end>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["be brief one plus one"] * 4, BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", tokenizer.token_to_id("<begin>"))]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40))
def test_text_is_encoded_and_decoded_as_transformers_does(directory: Path, theirs: Any, text: str) -> None:
    ours = load_tokenizer(directory)
    ids = encode_prompt(Prompt("p", text, "", {}), ours)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text


def test_chat_goes_through_the_template_up_to_where_the_answer_begins(directory: Path, theirs: Any) -> None:
    ours = load_tokenizer(directory)
    ids = encode_prompt(Prompt("p", CHAT, "", {}), ours)
    assert ids == theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=False).endswith("<end><|assistant|>")
    assert ids.count(theirs.convert_tokens_to_ids("<begin>")) == 0  # a template writes its own special tokens


def test_the_end_token_is_known(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    assert tokenizer.eos_token_id == 1 and tokenizer.pad_token_id is None


def test_plain_text_needs_no_transformers(directory: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from orbit_core.data.encode import load_tokenizer\n"
        f"load_tokenizer(Path({str(directory)!r})).encode('one plus one')\n"
        "sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_chat_without_a_template_is_refused(tmp_path: Path, directory: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InputError, match="give the prompts as plain text"):
        encode_prompt(Prompt("p", CHAT, "", {}), load_tokenizer(tmp_path))


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer files"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="a tokenizer"):
        load_tokenizer(tmp_path)
