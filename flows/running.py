"""Run the flow in this process and show it; turn every expected failure into a short message and an exit code."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from orbit_core.errors import ExitCode, Interrupted, OrbitError
from orbit_core.recipe import Recipe
from orbit_core.secrets import masked
from orbit_core.store import open_store


def run_flow(recipe: Recipe, store: str, quiet: bool = False, verbose: bool = False) -> dict[str, Any]:
    """The outcome of `post_train`, shown on stderr while it runs. Raises OrbitError where a step refused."""
    from flows.server import ensure_server, settle_environment
    from orbit_core.pipeline import plan
    from tasks.executors import executor_for

    steps = list(plan(recipe, store))  # what is wrong is said before anything starts
    executor_for(recipe)
    open_store(store)
    console = Console(stderr=True)
    settle_environment(verbose)
    if not quiet:
        console.print(Text("starting Prefect", style="dim"))
    ensure_server()

    from flows.live import live_view
    from flows.post_train import post_train
    from tasks.watching import watching

    with live_view(steps, console, quiet or verbose) as view, watching(view):
        return post_train(recipe, store)


def show_outcome(outcome: dict[str, Any], as_json: bool) -> None:
    """For people on stderr and stdout; with `--json` the last line of stdout is the outcome as one object."""
    console = Console(stderr=as_json)
    before, after, prompts = (outcome[name] for name in ("accuracy_before", "accuracy_after", "prompts"))
    lines = [
        "",
        f"held-out accuracy   {before:.1%} -> {after:.1%}  ({prompts} prompts)",
        f"adapter             {outcome['paths']['adapter']}",
        f"rollouts            {outcome['paths']['rollouts']}   (orbit rollouts {outcome['run']})",
        f"report              {outcome['paths']['report']}",
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)
    if as_json:
        print(json.dumps(outcome, ensure_ascii=False), flush=True)


@contextmanager
def short_errors() -> Iterator[None]:
    """Expected failures as red text without traceback; exit code 42, 75 or 1."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    except OrbitError as error:
        _stop(str(error), error.exit_code)
    except KeyboardInterrupt:
        _stop("stopped; the same command goes on from here", ExitCode.RESUMABLE)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise Interrupted("stopped by SIGTERM; the same command goes on from here")


def _stop(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    Console(stderr=True).print(Text(masked(message), style="red"), soft_wrap=True)
    raise typer.Exit(int(code))
