"""Prompts from a person's file: JSONL or Parquet rows {"prompt": str | chat messages, "label": ..., "metadata": {...}}.

An `id` is optional; further columns become metadata, where rewards can read them.
Every row is checked before the run starts; an error names file, line and field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orbit_core.errors import InputError
from orbit_core.rl.types import Prompt

FIELDS = ("id", "prompt", "label", "metadata")


def read_rows(path: Path, name: str) -> list[Prompt]:
    """Prompts of `path` in file order; `name` is what the person calls the file. Raises InputError."""
    prompts: list[Prompt] = []
    lines_of: dict[str, int] = {}
    for number, row in _parquet_rows(path, name) if _is_parquet(path) else _jsonl_rows(path, name):
        where = f"{name}, row {number}"
        prompt = _prompt(row, where, number)
        if prompt.id in lines_of:
            raise InputError(where, "an id of its own", f"id {prompt.id!r}, which row {lines_of[prompt.id]} has too")
        lines_of[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise InputError(name, "at least one prompt", "none", "check the path")
    return prompts


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _jsonl_rows(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{name}, row {number}", "UTF-8", f"byte {error.start} is not", "save as UTF-8") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{name}, row {number}", "one JSON object a line", f"{error}", "see docs: JSONL") from None


def _parquet_rows(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise InputError(name, "a Parquet file", str(error)) from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield number, {key: value for key, value in row.items() if value is not None}


def _prompt(row: Any, where: str, number: int) -> Prompt:
    if not isinstance(row, dict):
        raise InputError(where, f"an object with {FIELDS}", type(row).__name__)
    for field in ("prompt", "label"):
        if row.get(field) is None:
            raise InputError(where, f"a value for {field!r}", f"fields {sorted(row)}", f"add {field!r}")
    _require_json(row, where)
    identity = row.get("id")
    if identity is not None and not isinstance(identity, (str, int)):
        raise InputError(f"{where}, id", "text or a number", type(identity).__name__)
    name = f"row-{number:06d}" if identity is None else str(identity)
    return Prompt(name, _messages(row["prompt"], where), row["label"], _metadata(row, where))


def _require_json(row: dict[str, Any], where: str) -> None:
    try:
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(where, "text that UTF-8 can write", str(error)) from None
    except (TypeError, ValueError) as error:
        raise InputError(where, "values that JSON can carry", str(error)) from None


def _metadata(row: dict[str, Any], where: str) -> dict[str, Any]:
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise InputError(f"{where}, metadata", "an object", type(metadata).__name__)
    further = {name: value for name, value in row.items() if name not in FIELDS}
    both = sorted(set(further) & set(metadata))
    if both:
        raise InputError(where, "each name once", f"{both} as a column and in metadata", "rename one of them")
    return {**metadata, **further}


def _messages(prompt: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"{where}, prompt", "text", "an empty string")
        return prompt
    valid = (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(value, str) for value in message.values())
            for message in prompt
        )
    )
    if not valid:
        raise InputError(
            f"{where}, prompt", 'text, or chat messages [{"role": ..., "content": ...}]', repr(prompt)[:200]
        )
    return [{"role": message["role"], "content": message["content"]} for message in prompt]
