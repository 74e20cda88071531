"""The prompt table: one Parquet file, a row per prompt, JSON in the columns that vary from data set to data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from orbit_core.errors import InputError
from orbit_core.rl.types import Prompt
from orbit_core.store.parquet import damage_refused

SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "prompt", "label", "metadata")])


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    columns = {
        "id": [prompt.id for prompt in prompts],
        "prompt": [_json(prompt.messages) for prompt in prompts],
        "label": [_json(prompt.label) for prompt in prompts],
        "metadata": [_json(prompt.metadata) for prompt in prompts],
    }
    pq.write_table(pa.table(columns, schema=SCHEMA), path)


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts in the order of the table. Raises InputError when the file is not a prompt table."""
    fix = "run the data step again"
    if not path.is_file():
        raise InputError(f"prompt table {path}", "a file", "nothing there", fix)
    with damage_refused(f"prompt table {path}", f"Parquet with columns {SCHEMA.names}", fix):
        if not pq.read_schema(path).equals(SCHEMA):
            raise ValueError(f"columns {pq.read_schema(path).names}")
        return [
            Prompt(row["id"], json.loads(row["prompt"]), json.loads(row["label"]), json.loads(row["metadata"]))
            for row in pq.read_table(path).to_pylist()
        ]


def prompt_text(prompt: Prompt) -> str:
    """What a person would read: the text itself, or the contents of the chat messages, one a line."""
    if isinstance(prompt.messages, str):
        return prompt.messages
    return "\n".join(message["content"] for message in prompt.messages)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
