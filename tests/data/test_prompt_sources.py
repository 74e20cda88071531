"""Where prompts come from: reasoning-gym, and a person's files; what is wrong with them is said by name and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st

from orbit_core.data.files import read_rows
from orbit_core.data.generated import draw
from orbit_core.data.prompts import read_prompts, write_prompts
from orbit_core.errors import InputError
from orbit_core.recipe import ReasoningGym
from orbit_core.rl.types import Prompt

SUMS = ReasoningGym(config={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, pool=400)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=6,
)
texts = st.text(st.characters(codec="utf-8"), min_size=1)
chats = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": texts}), min_size=1)


@settings(max_examples=30)
@given(st.lists(st.builds(Prompt, texts, texts | chats, json_values, st.dictionaries(texts, json_values))))
def test_the_prompt_table_gives_back_what_was_written(tmp_path_factory, prompts: list[Prompt]) -> None:
    path = tmp_path_factory.mktemp("table") / "train.parquet"
    write_prompts(path, prompts)
    assert read_prompts(path) == prompts


def test_a_file_that_is_no_prompt_table_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    for name in ("other.parquet", "missing.parquet"):
        with pytest.raises(InputError, match="prompt table"):
            read_prompts(tmp_path / name)


# reasoning-gym


def test_each_question_is_drawn_once_and_matches_keep() -> None:
    prompts = draw(SUMS.model_copy(update={"keep": "^[^-]*$"}), seed=0)
    questions = [prompt.messages for prompt in prompts]
    assert len(questions) == len(set(questions)) and 100 < len(questions) < 400
    assert not any("-" in question for question in questions)


def test_the_same_seed_draws_the_same_questions_and_its_neighbour_others() -> None:
    first, again, neighbour = (draw(SUMS, seed) for seed in (7, 7, 8))
    assert first == again
    shared = {prompt.messages for prompt in first} & {prompt.messages for prompt in neighbour}
    assert len(shared) < len(first) / 4  # neighbouring seeds of the library itself share all but one question


def test_the_stored_entry_is_enough_to_judge_an_answer(tmp_path: Path) -> None:
    write_prompts(tmp_path / "train.parquet", draw(SUMS.model_copy(update={"pool": 20}), seed=0))
    for prompt in read_prompts(tmp_path / "train.parquet"):
        dataset = reasoning_gym.create_dataset(prompt.metadata["dataset"], size=1, seed=0, **prompt.metadata["config"])
        assert dataset.score_answer(prompt.label, prompt.metadata["entry"]) == 1.0
        assert dataset.score_answer("no number", prompt.metadata["entry"]) < 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "chain_sums"}, "did you mean chain_sum"),
        ({"config": {"min_termz": 2}}, "min_termz"),
        ({"config": {"min_terms": 5, "max_terms": 2}}, "max_terms must be >= min_terms"),
        ({"config": {"seed": 1}}, "use the recipe's seed and data.pool"),
        ({"keep": "("}, "regular expression"),
        ({"keep": "no such question"}, "change data.keep"),
        ({"dataset": "arc_agi", "config": {}}, "cannot be judged from a stored prompt table"),
    ],
)
def test_a_source_that_cannot_work_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw(SUMS.model_copy(update={**change, "pool": 10}), seed=0)


# Files


def write_lines(path: Path, *rows: object) -> Path:
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return path


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


def test_rows_may_be_text_or_chat_with_any_label_and_further_columns(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl",
        {"prompt": "2+2?", "label": 4},
        {"prompt": CHAT, "label": {"answer": "2"}, "metadata": {"level": 1}, "id": "chat", "source": "mine"},
    )
    assert read_rows(path, "rows.jsonl") == [
        Prompt("row-000001", "2+2?", 4, {}),
        Prompt("chat", CHAT, {"answer": "2"}, {"level": 1, "source": "mine"}),
    ]


def test_parquet_and_jsonl_of_the_same_rows_are_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": CHAT, "label": "2", "metadata": {"level": i}} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    parquet = read_rows(tmp_path / "rows.parquet", "rows")
    assert parquet == read_rows(write_lines(tmp_path / "rows.jsonl", *rows), "rows")


def test_blank_lines_a_byte_order_mark_and_windows_newlines_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "\xc3\xa9?", "label": "1"}\r\n\r\n{"prompt": "b", "label": "2"}\r\n')
    assert [(prompt.id, prompt.messages) for prompt in read_rows(path, "rows")] == [
        ("row-000001", "é?"),
        ("row-000003", "b"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{", "row 2.*\n.*one JSON object a line"),
        (b'{"prompt": "\xff", "label": "1"}', "row 2.*\n.*UTF-8"),
        (b'{"prompt": "\\ud800", "label": "1"}', "row 2.*\n.*UTF-8"),
        (b'{"prompt": "a", "label": NaN}', "row 2.*\n.*JSON"),
        (["a"], "row 2.*\n.*an object"),
        ({"label": "1"}, "row 2.*\n.*'prompt'"),
        ({"prompt": "a"}, "row 2.*\n.*'label'"),
        ({"prompt": "a", "label": None}, "row 2.*\n.*'label'"),
        ({"prompt": " ", "label": "1"}, "row 2, prompt.*\n.*text"),
        ({"prompt": [], "label": "1"}, "row 2, prompt"),
        ({"prompt": [{"role": "user"}], "label": "1"}, "row 2, prompt"),
        ({"prompt": [{"role": "user", "content": 3}], "label": "1"}, "row 2, prompt"),
        ({"prompt": "a", "label": "1", "metadata": 3}, "row 2, metadata"),
        ({"prompt": "a", "label": "1", "metadata": {"x": 1}, "x": 2}, "row 2.*\n.*each name once"),
        ({"prompt": "a", "label": "1", "id": "first"}, "row 2.*\n.*an id of its own"),
        ({"prompt": "a", "label": "1", "id": []}, "row 2, id"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_number(tmp_path: Path, row: object, message: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "ok", "label": "1", "id": "first"}, row)
    with pytest.raises(InputError, match="mine.jsonl, " + message):
        read_rows(path, "mine.jsonl")


def test_an_empty_file_and_a_damaged_parquet_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match="at least one prompt"):
        read_rows(tmp_path / "empty.jsonl", "empty.jsonl")
    with pytest.raises(InputError, match="a Parquet file"):
        read_rows(tmp_path / "bad.parquet", "bad.parquet")
