"""Answers side by side. The choice is by kind and then by order of the prompts: none is picked for its looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orbit_core.report.markup import Markup, element

KINDS = (  # (right before, right after), how many are shown at once, what they are called
    ((False, True), 4, "became right"),
    ((True, False), 4, "became wrong"),
    ((False, False), 3, "stayed wrong"),
    ((True, True), 2, "stayed right"),
)
FOLDED = 24  # further ones of each kind, behind a fold

Row = Mapping[str, Any]


def sample_cards(samples: Sequence[Row]) -> list[Markup]:
    """Of each kind the first few, and more behind a fold."""
    groups = [([row for row in samples if _kind(row) == kind], shown, name) for kind, shown, name in KINDS]
    counts = ", ".join(f"{len(rows)} {name}" for rows, _, name in groups)
    lead = element(
        "p", f"Greedy answers: {counts}. The first of each kind, in the order of the prompts.", class_="lead"
    )
    first = [_card(row, name) for rows, shown, name in groups for row in rows[:shown]]
    more = [_card(row, name) for rows, shown, name in groups for row in rows[shown : shown + FOLDED]]
    fold = element(
        "details", element("summary", f"{len(more)} more"), element("div", *more, class_="samples"), class_="card"
    )
    return [lead, element("div", *first, fold if more else None, class_="samples")]


def _kind(row: Row) -> tuple[bool, bool]:
    return bool(row["before_right"]), bool(row["after_right"])


def _card(row: Row, kind: str) -> Markup:
    return element(
        "article",
        element("p", element("span", kind, class_="quiet"), row["prompt"], element("b", f" {row['label']}")),
        element("div", _answer(row, "before"), _answer(row, "after"), class_="answers"),
        class_="card sample",
    )


def _answer(row: Row, side: str) -> Markup:
    right = bool(row[f"{side}_right"])
    return element(
        "div",
        element("header", side, element("span", "✓ right" if right else "✗ wrong", class_="mark")),
        element("pre", row[side] or "(nothing)"),
        class_=f"answer {'right' if right else 'wrong'}",
    )
