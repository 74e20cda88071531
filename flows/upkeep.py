"""`orbit verify`, `orbit redo`, `orbit gc`: whether a store holds what was published, and what may go. No Prefect."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.arguments import StoreOption

PathArgument = Annotated[
    str, typer.Argument(metavar="PATH", help="a store, or an artifact or a run in one: folder or URL")
]


def verify(path: PathArgument = ".orbit") -> None:
    """Read every byte and name what is damaged or missing, with what to do. Exit code 42 if anything is."""
    from flows.running import short_errors
    from orbit_core.errors import ExitCode, InputError
    from orbit_core.store.verifying import damages_of, place_of

    with short_errors():
        read: list[str] = []
        damages = 0
        for damage in damages_of(place_of(path), read.append):
            damages += 1
            typer.echo(str(damage))
        if not read and not damages:
            raise InputError(path, "a store, or an artifact or a run in one", "nothing that was published")
        typer.echo(f"{len(read)} read, {damages or 'nothing'} damaged")
        if damages:
            raise typer.Exit(int(ExitCode.REFUSED))


def redo(
    path: Annotated[str, typer.Argument(metavar="PATH", help="folder or URL of an artifact")],
    input_: Annotated[
        list[str], typer.Option("--input", metavar="NAME=PATH", help="where a file or model of your own lies")
    ] = [],  # noqa: B006  typer reads the default and passes a fresh list
) -> None:
    """Make a damaged artifact again, on this machine: take it away and run its step. Does nothing to a whole one."""
    from rich.console import Console

    from flows.live import live_view
    from flows.options import parse_inputs
    from flows.running import short_errors
    from orbit_core.executors.local import LocalExecutor
    from orbit_core.store.redoing import redo as redo_artifact
    from orbit_core.store.verifying import place_of

    with short_errors():
        place = place_of(path)
        step = (place.manifest or "/artifact").split("/")[1]
        with live_view([step], Console(stderr=True)) as view:
            artifact = redo_artifact(
                place, parse_inputs(input_), LocalExecutor(), lambda event: view(step, dict(event))
            )
        typer.echo(artifact.url if artifact else "whole: nothing to redo")


def gc(
    store: StoreOption = ".orbit",
    older_than: Annotated[float, typer.Option("--older-than", metavar="DAYS", help="without a change; at least 1")] = 7,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and remove nothing")] = False,
) -> None:
    """Remove what killed tries have left and no manifest names; never what a running step needs."""
    from flows.running import short_errors
    from orbit_core.store import open_store
    from orbit_core.store.cleaning import DAY, Cleaning

    with short_errors():
        found = 0
        for leftover in Cleaning(open_store(store), older_than).leftovers():
            removed = dry_run or leftover.remove()
            found += removed
            state = "" if removed else "   kept: it is needed after all"
            typer.echo(f"{leftover.what}   {leftover.why}, {leftover.seconds / DAY:.1f} days old{state}")
        typer.echo(f"{found or 'nothing'} {'would be' if dry_run else 'was'} removed")
