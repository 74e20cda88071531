"""`orbit promotions`, `orbit promote`, `orbit rollback`: which adapter serves, by hand. No Prefect here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows.arguments import StoreOption

if TYPE_CHECKING:
    from rich.table import Table

    from orbit_core.publication.promotions import Promotion

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="name of the recipe")]
WhyOption = Annotated[str, typer.Option("--why", help="for those who read the history later")]


def promotions(
    name: NameArgument,
    store: StoreOption = ".orbit",
    as_json: Annotated[bool, typer.Option("--json", help="all entries, oldest first, as one JSON array")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="only where the adapter that serves lies")] = False,
) -> None:
    """The history of the adapters that served under a name; the newest entry is the one that serves."""
    from rich.console import Console

    from flows.running import short_errors
    from orbit_core.errors import InputError
    from orbit_core.publication.promotions import Promotions
    from orbit_core.store import open_store

    with short_errors():
        opened = open_store(store)
        entries = Promotions(opened, name).entries()
        if as_json:
            typer.echo(json.dumps([entry.model_dump(mode="json") for entry in entries], ensure_ascii=False))
        elif not entries:
            raise InputError(f"promotions of {name}", "at least one", f"none in store {store}", "orbit promote --help")
        elif adapter:
            typer.echo(opened.url_of(entries[-1].adapter))
        else:
            Console().print(_table(entries))
            typer.echo(f"serves: {opened.url_of(entries[-1].adapter)}")


def promote(name: NameArgument, digest: str, store: StoreOption = ".orbit", why: WhyOption = "by hand") -> None:
    """Let a published adapter serve; DIGEST is the beginning of its publish artifact's."""
    from flows.running import short_errors
    from orbit_core.publication.promotions import Promotions, Published, find_published
    from orbit_core.store import open_store

    with short_errors():
        opened = open_store(store)
        history = Promotions(opened, name)
        entry = history.promote(Published.of(find_published(opened, digest)), history.newest(), why)
        typer.echo(f"promotion {entry.number} of {name}: {opened.url_of(entry.adapter)}")


def rollback(
    name: NameArgument,
    store: StoreOption = ".orbit",
    to: Annotated[int | None, typer.Option("--to", metavar="N", help="an entry; default: what it replaced")] = None,
    why: WhyOption = "",
) -> None:
    """Let an earlier adapter serve again, by a new entry that points at it. Twice goes back two adapters."""
    from flows.running import short_errors
    from orbit_core.publication.promotions import Promotions
    from orbit_core.store import open_store

    with short_errors():
        opened = open_store(store)
        entry = Promotions(opened, name).roll_back(to, why)
        typer.echo(f"promotion {entry.number} of {name}, as in {entry.restores}: {opened.url_of(entry.adapter)}")


def _table(entries: list[Promotion]) -> Table:
    from rich.table import Table

    table = Table("number", "when", "accuracy", "adapter", "base", "replaced", "why", box=None, pad_edge=False)
    for entry in entries:
        table.add_row(
            str(entry.number),
            entry.when.replace("+00:00", "Z"),
            f"{entry.accuracy:.1%}",
            entry.adapter_digest[:12],
            entry.base_digest[:12],
            str(entry.replaced or ""),
            entry.why,
        )
    return table
