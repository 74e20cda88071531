"""The pages say what is there: the table of promises is that of the last soak, and no link or command leads nowhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from lanes import ALL
from table import README, SOAK, table, with_table

K8S = README.parent
PAGES = sorted(K8S.rglob("*.md"))


def test_the_table_of_promises_is_that_of_the_last_soak() -> None:
    assert README.read_text() == with_table(README.read_text(), table()), "run: python tests/k8s/table.py"


def test_every_scenario_is_in_the_table_and_every_promise_was_kept() -> None:
    rows = json.loads(SOAK.read_text())
    assert list(rows) == list(ALL)
    assert all(row["kept"] == row["trials"] > 0 for row in rows.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(K8S).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines()]
        assert anchor in headings, anchor


def test_files_that_the_overview_names_exist() -> None:
    cells = re.findall(r"^\| (`.+?) \|", README.read_text(), flags=re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`([\w./]+\.py|[\w]+/)`", cell)]
    assert named and all((K8S / name).exists() for name in named)
