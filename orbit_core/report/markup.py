"""HTML by construction: whatever is not markup already is escaped.

`element("td", text)` escapes `text`; only the results of `element` and `raw` are markup. So text of models and users
cannot become markup by being forgotten. Characters that would be invisible or reorder the line are shown by name.
"""

from __future__ import annotations

import html
import unicodedata


class Markup(str):
    """Text that is HTML (or SVG) already."""

    __slots__ = ()


VOID = {"br", "meta", "line", "rect", "circle", "path", "polyline"}


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """<tag attribute="...">children</tag>. `class_` is class, `stroke_width` is stroke-width; None is left out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_text(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID and not children:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: object) -> Markup:
    """Children one after the other, each escaped unless it is markup; None is nothing."""
    if isinstance(children, (list, tuple)):
        return Markup("".join(join(child) for child in children))
    if children is None:
        return Markup("")
    return children if isinstance(children, Markup) else Markup(_text(children))


def raw(text: str) -> Markup:
    """Text of this program's own that is markup. Never for anything that came from outside."""
    return Markup(text)


def visible(text: str) -> str:
    """Control, format (bidirectional, zero-width) and surrogate characters by their code; tab and newline stay."""
    return "".join(
        f"⟨U+{ord(character):04X}⟩"
        if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\n\t"
        else character
        for character in text
    )


def _text(value: object) -> str:
    return html.escape(visible(str(value)), quote=True)
