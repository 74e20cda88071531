"""Text to token ids and back, from the tokenizer files of a Hugging Face directory.

`tokenizer.json` is read by the `tokenizers` library alone (20 ms); transformers (seconds) is imported only for what it
alone can do: render chat templates, and build a tokenizer for a directory that has no tokenizer.json. Code that lies
in the directory is never run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from orbit_core.checkpoints.files import read_json
from orbit_core.errors import InputError
from orbit_core.rl.types import Prompt


class _Backend(Protocol):
    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...

    def highest_id(self) -> int: ...


@dataclass(frozen=True)
class Tokenizer:
    directory: Path
    backend: _Backend
    eos_token_id: int | None
    pad_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(token_ids, skip_special_tokens)

    def render(self, messages: list[dict[str, str]]) -> str:
        """Chat messages as the model expects them, up to where its answer begins. InputError without a template."""
        try:
            text = self._transformers.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program: it raises what it likes
            raise InputError(
                f"tokenizer {self.directory.name}",
                "a chat template for these messages",
                f"{type(error).__name__}: {error}"[:500],
                "give the prompts as plain text, or mend the template",
            ) from None
        assert isinstance(text, str)
        return text

    @cached_property
    def _transformers(self) -> Any:
        return _load_with_transformers(self.directory)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of an HF directory.

    Raises InputError when there is none, it cannot be read, or it knows more tokens than the embedding of the
    config.json beside it.
    """
    tokenizer = _open(directory)
    vocabulary = _read_json(directory / "config.json").get("vocab_size")
    highest = tokenizer.backend.highest_id()
    if isinstance(vocabulary, int) and highest >= vocabulary:
        raise InputError(
            f"tokenizer of {directory.name}",
            f"token ids below {vocabulary}, the rows of the embedding by config.json's vocab_size",
            f"an id of {highest}",
            "give the tokenizer that the model was trained with",
        )
    return tokenizer


def stop_ids(directory: Path) -> tuple[int, ...]:
    """Tokens that end a completion: generation_config.json's eos_token_id, else config.json's; a number or a list.

    Raises InputError unless they are tokens of the vocabulary.
    """
    vocabulary = _read_json(directory / "config.json").get("vocab_size")
    for name in ("generation_config.json", "config.json"):
        found = _read_json(directory / name).get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(number) is int and 0 <= number < (vocabulary or 2**31) for number in ids):
            limit = f"below vocab_size {vocabulary}" if vocabulary else "from 0 on"
            fix = f"mend {name}: answers would never end"
            raise InputError(f"{directory.name}/{name}: eos_token_id", f"token ids {limit}", str(found)[:80], fix)
        return tuple(ids)
    return ()


def _open(directory: Path) -> Tokenizer:
    config = _read_json(directory / "tokenizer_config.json")
    fast = directory / "tokenizer.json"
    if fast.exists():
        backend = _Fast(fast)
        ids = {name: backend.id_of(config.get(name), name) for name in ("eos_token", "pad_token")}
        return Tokenizer(directory, backend, ids["eos_token"], ids["pad_token"])
    if not any(directory.glob("*.model")) and not (directory / "vocab.json").exists():
        raise InputError(
            f"tokenizer of {directory.name}", "tokenizer.json", "no tokenizer files", "copy them beside config.json"
        )
    slow = _load_with_transformers(directory)
    return Tokenizer(directory, _Slow(slow), slow.eos_token_id, slow.pad_token_id)


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the prompt: text as it is, chat messages through the template with the generation prompt.

    A template writes its own special tokens, so none are added to what it renders. Raises InputError when empty.
    """
    if isinstance(prompt.messages, str):
        ids = tokenizer.encode(prompt.messages)
    else:
        ids = tokenizer.encode(tokenizer.render(prompt.messages), add_special_tokens=False)
    if not ids:
        raise InputError(
            f"prompt {prompt.id}", "at least one token", "none", "give a prompt with text the tokenizer knows"
        )
    return ids


class _Fast:
    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        try:
            self._tokenizer = Fast.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of malformed file
            where, found = f"{path.parent.name}/tokenizer.json", str(error)[:300]
            raise InputError(where, "a tokenizer", found, "fetch the model's tokenizer again") from None

    def id_of(self, token: Any, field: str) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        if content is not None and not isinstance(content, str):
            fix = "fetch the model's tokenizer again"
            raise InputError(f"tokenizer_config.json: {field}", "a token", repr(content)[:80], fix)
        return None if content is None else self._tokenizer.token_to_id(content)

    def highest_id(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text


class _Slow:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def highest_id(self) -> int:
        return max(self._tokenizer.get_vocab().values(), default=-1)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text


def _load_with_transformers(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each kind of tokenizer fails on a damaged file in its own way
        raise InputError(
            f"tokenizer of {directory.name}",
            "files that transformers can read, without code of their own",
            f"{type(error).__name__}: {error}"[:500],
            "fetch the model's tokenizer again",
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path.parent, path.name) if path.exists() else {}
