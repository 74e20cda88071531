"""Prompt files that are empty, broken or contradict themselves: refused by the data step, with the row's number."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from doors import World, row

GOOD = row(1) + row(2)


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def repeated(times: int) -> bytes:
    """A few kilobytes that unpack to `times` megabytes: one long text, stored once and named again and again."""
    text = pa.array(["x" * 2**20])
    words = pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), text)
    return parquet(pa.table({"prompt": words, "label": words}))


ROWS = {"prompt": ["a", "b"], "label": ["1", "2"]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["at least one prompt"]),
        (b"\n \n\r\n", ["at least one prompt"]),
        (GOOD + b'{"prompt": "\xff", "label": "1"}\n', ["row 3", "UTF-8", "byte 12"]),
        ("\ufeff".encode("utf-16"), ["row 1", "UTF-8"]),
        (GOOD + b'{"prompt": "3", "label"\n', ["row 3", "JSON"]),
        (GOOD + b"[" * 100_000 + b"\n", ["row 3", "JSON"]),
        (GOOD + b'{"prompt": "3", "label": ' + b"9" * 5000 + b"}\n", ["row 3", "JSON"]),
        (GOOD + b'{"prompt": "3", "label": NaN}\n', ["row 3", "values that JSON can carry"]),
        (GOOD + b'{"prompt": "\\ud800", "label": "1"}\n', ["row 3", "UTF-8"]),
        (GOOD + b"[1]\n", ["row 3", "an object", "list"]),
        (GOOD + b'{"prompt": "3"}\n', ["row 3", "'label'"]),
        (GOOD + b'{"prompt": "3", "label": null}\n', ["row 3", "'label'"]),
        (GOOD + b'{"label": "3"}\n', ["row 3", "'prompt'"]),
        (GOOD + b'{"prompt": " ", "label": "3"}\n', ["row 3", "empty"]),
        (GOOD + b'{"prompt": [{"role": "user"}], "label": "3"}\n', ["row 3", "chat messages"]),
        (row(1, id="a") + row(2, id="b") + row(3, id="a"), ["row 3", "'a'", "row 1"]),
        (b"PAR1 and then nothing", ["a Parquet file"]),
        (parquet(pa.table(ROWS))[:-6], ["a Parquet file"]),
        (parquet(pa.table({"prompt": ["a"]})), ["row 1", "'label'"]),
        (parquet(pa.table({**ROWS, "id": ["x", "x"]})), ["row 2", "'x'", "row 1"]),
        (parquet(pa.table({**ROWS, "day": pa.array([0, 1], pa.date32())})), ["row 1", "JSON can carry"]),
        (repeated(200), ["times its", "JSONL"]),
        (row(1) + row(1, prompt="1+1 = "), ["hold out"]),
    ],
    ids=["empty", "blank lines", "not UTF-8", "UTF-16", "broken line", "nested too deep", "number too long", "NaN",
         "half a character", "a list", "no label", "null label", "no prompt", "blank prompt", "broken chat",
         "duplicate ids", "no Parquet", "truncated Parquet", "Parquet without labels", "Parquet duplicate ids",
         "Parquet dates", "Parquet bomb", "too few rows"],
)  # fmt: skip
def test_bad_rows_are_refused_by_name_and_number(
    world: World, tmp_path: Path, content: bytes, words: list[str]
) -> None:
    error = world.with_rows(tmp_path / "mine.jsonl", content).refused("data")
    assert all(word in str(error) for word in words), str(error)
    assert "mine.jsonl" in error.what or "prompts" in error.what


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_bytes(GOOD)
    error = World(world.folder, world.base, tmp_path / "folder").refused("data")
    assert "a directory" in error.found and "JSONL or Parquet" in error.fix


def test_held_out_rows_that_are_all_the_rows_are_refused(world: World, tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_bytes(world.rows.read_bytes())
    data = {"kind": "file", "path": str(world.rows), "heldout_path": str(heldout)}
    assert "give separate files" in world.refused("data", data=data).fix


def test_what_is_right_passes_the_same_door(world: World) -> None:
    facts = world.made("data").facts
    assert facts == {"train": 8, "heldout": 4} and json.loads(row(3))["label"] == "4"
