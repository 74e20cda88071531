"""How a container's texts are made from its pod's, without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster.environment import Paths, expanded
from hypothesis import given
from hypothesis import strategies as st

PATHS = Paths({"/scratch": Path("/real/a"), "/scratch/cache": Path("/real/b"), "/mnt/store/": Path("/real/c")})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/scratch", "/real/a"),
        ("/scratch/x/y", "/real/a/x/y"),
        ("/scratch/cache/x", "/real/b/x"),
        ("--to=/mnt/store", "--to=/real/c"),
        ("file:///mnt/store/x", "file:///real/c/x"),
        ("/bin:/scratch/bin", "/bin:/real/a/bin"),
        ("open('/scratch/x')", "open('/real/a/x')"),
        ("/scratch2 /scratch-old /other/scratch a/scratch", "/scratch2 /scratch-old /other/scratch a/scratch"),
    ],
)
def test_a_mount_path_is_replaced_where_it_begins_a_path(text: str, expected: str) -> None:
    assert PATHS(text) == expected


@given(st.text(alphabet="abc/$()AB \n", max_size=20))
def test_without_mounts_and_references_a_text_stays_as_it_is(text: str) -> None:
    assert Paths({})(text) == text
    assert expanded(text.replace("$", "$$"), {"A": "1", "B": "2"}) == text


def test_references_are_expanded_once() -> None:
    assert expanded("$(A)$(B) $$(A) $(C)", {"A": "$(B)", "B": "2"}) == "$(B)2 $(A) $(C)"
