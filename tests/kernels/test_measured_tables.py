"""MEASURED.md says what the recorded runs say."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")  # the dispatch table lies beside kernels
BENCH = Path(__file__).resolve().parents[2] / "kernels" / "bench"
write_tables = SimpleNamespace(**runpy.run_path(str(BENCH / "write_tables.py")))


def test_the_tables_between_marks_are_those_of_the_recorded_runs():
    text = write_tables.MEASURED.read_text()
    assert write_tables.made_anew(text) == text, "python kernels/bench/write_tables.py --write"


def test_a_mark_that_is_missing_is_named():
    with pytest.raises(ValueError, match="<!-- decode -->"):
        write_tables.made_anew("no marks")


def test_a_span_has_both_ends_where_they_differ():
    assert [write_tables.span(values) for values in ([], [1.004, 1.0], [2.0, 0.5, 1.0])] == ["", "1.00", "0.50 to 2.00"]
