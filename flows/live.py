"""A run on the terminal: a line per step that moves on a terminal, a few plain lines anywhere else. On stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

PLAIN_SECONDS = 10.0  # between two plain lines of one step
SHOWN_FACTS = {
    "data": ("train", "heldout"),
    "quantize": ("format", "bytes_before", "bytes_after"),
    "pretrain": ("parameters", "loss"),
    "preflight": ("mean_gap", "max_gap"),
    "train": ("reward_first", "reward_last", "logprob_gap_mean", "max_orthogonality_error"),
    "evaluate": ("accuracy_before", "accuracy_after"),
}
View = Callable[[str, dict[str, Any]], None]


@contextmanager
def live_view(steps: Sequence[str], console: Console, quiet: bool = False) -> Iterator[View]:
    """A watcher of tasks.watching that shows the given steps, in their order."""
    if quiet:
        yield lambda step, event: None
    elif console.is_terminal:
        with _progress(console) as progress:
            yield _Bars(progress, steps)
    else:
        yield _Lines(console)


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}", style="bold", table_column=Column(no_wrap=True, min_width=10)),
        BarColumn(bar_width=None, table_column=Column(width=16)),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7, justify="right")),
        TextColumn("{task.fields[time]}", style="cyan", table_column=Column(no_wrap=True, min_width=9)),
        TextColumn("{task.fields[message]}", style="dim", table_column=Column(no_wrap=True, ratio=1)),
        console=console,
        expand=True,
    )


class _Bars:
    def __init__(self, progress: Progress, steps: Sequence[str]) -> None:
        self.progress = progress
        self.began: dict[str, float] = {}
        self.rows: dict[str, TaskID] = {
            step: progress.add_task(f"{step:10}", total=None, start=False, visible=True, message="", time="")
            for step in steps
        }

    def __call__(self, step: str, event: dict[str, Any]) -> None:
        row = self.rows[step]
        if event["orbit"] == "started":
            self.began[step] = time.monotonic()
            self.progress.start_task(row)
        elif event["orbit"] == "progress":
            self.progress.update(
                row,
                completed=event.get("done", 0),
                total=event.get("total") or None,
                message=_describe(event),
                time=_seconds(time.monotonic() - self.began[step]),
            )
        elif event["orbit"] == "status":
            self.progress.update(row, message=_sentence(event))
        elif event["orbit"] == "finished":
            took = "reused" if event["reused"] else _seconds(event["seconds"])
            total = self.progress.tasks[row].total or 1
            self.progress.update(row, completed=total, total=total, time=took, message=_facts(step, event["facts"]))


class _Lines:
    def __init__(self, console: Console) -> None:
        self.console = console
        self.next_line: dict[str, float] = {}

    def __call__(self, step: str, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if event["orbit"] == "started":
            self.next_line[step] = now + PLAIN_SECONDS
        elif event["orbit"] == "progress" and now >= self.next_line.get(step, 0):
            self.next_line[step] = now + PLAIN_SECONDS
            self._line(f"  {step:10} {event.get('done', 0)}/{event.get('total', 0)}  {_describe(event)}")
        elif event["orbit"] == "status":
            self._line(f"  {step:10} {_sentence(event)}")
        elif event["orbit"] == "finished":
            took = "reused" if event["reused"] else _seconds(event["seconds"])
            self._line(f"✓ {step:10} {took:>8}  {_facts(step, event['facts'])}".rstrip())

    def _line(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)


def _describe(event: dict[str, Any]) -> str:
    """The step's own words, then the figures that came with them and are not in the words already."""
    message = str(event.get("message", ""))
    values = [
        f"{name.replace('_', ' ')} {_figure(value)}"
        for name, value in event.items()
        if name not in {"orbit", "done", "total", "message"} and name not in message and isinstance(value, int | float)
    ]
    return "  ".join([message, *values]).strip()


def _sentence(event: dict[str, Any]) -> str:
    fix = event.get("fix")
    return f"{event['message']}. What to do: {fix}" if fix else str(event["message"])


def _facts(step: str, facts: dict[str, Any]) -> str:
    shown = (name for name in SHOWN_FACTS.get(step, ()) if facts.get(name) is not None)
    return "  ".join(f"{name.replace('_', ' ')} {_figure(facts[name])}" for name in shown)


def _figure(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
