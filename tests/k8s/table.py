"""The table of promises in k8s/README.md, from soak.json: `python tests/k8s/table.py` writes it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
README, SOAK = HERE.parents[1] / "k8s" / "README.md", HERE / "soak.json"
BEGIN, END = "<!-- table: python tests/k8s/table.py -->\n", "<!-- end -->"


def table() -> str:
    rows = json.loads(SOAK.read_text())
    lines = ["| what happens | what is promised | kept | seconds |", "|---|---|---|---|"]
    for name, row in rows.items():
        promise, seconds = " ".join(row["promise"].split()), statistics.median(row["seconds"])
        lines.append(f"| `{name}` | {promise} | {row['kept']} of {row['trials']} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, rows: str) -> str:
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + rows + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(), table()))
