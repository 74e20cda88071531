"""What a run leaves on Prefect's dashboard: progress while a step works, its facts, reports, curves and links after.

Artifact keys are `orbit-<step>...`, so the dashboard keeps a history over runs under one name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException

from orbit_core.executors.base import Event
from orbit_core.store.artifacts import Artifact
from tasks.curves import curve_as_data_url
from tasks.watching import tell

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]
PROGRESS_SECONDS = 2.0  # between two updates of the bar
LOG_SECONDS = 15.0  # between two lines of progress in the log
TABLE_ROWS = 30
TABLE_COLUMNS = ("step", "reward_mean", "accuracy", "kl", "grad_norm", "logprob_gap_mean", "max_orthogonality_error")
CURVES = ("reward_mean", "logprob_gap_mean")


class Follower:
    """Carries a step's events to the dashboard, the log and the watchers."""

    def __init__(self, step: str, logger: Logger) -> None:
        self.step, self.logger = step, logger
        self._bar: UUID | None = None
        self._next_update = self._next_line = 0.0

    def __call__(self, event: Event) -> None:
        tell(self.step, event)
        if event["orbit"] == "progress":
            with self._whatever_the_server_does():
                self._progress(event)
        elif event["orbit"] == "report":
            with self._whatever_the_server_does():
                show_report(self.step, str(event.get("name", "report")), event.get("content"))
        elif event["orbit"] == "log":
            self.logger.info("%s", event["message"])
        elif event["orbit"] == "status":
            self._status(event)

    @contextlib.contextmanager
    def _whatever_the_server_does(self) -> Iterator[None]:
        """A dashboard that is away for a while costs a picture, not the step."""
        try:
            yield
        except (httpx.HTTPError, PrefectException) as error:
            self.logger.warning("%s: not shown on the dashboard: %s", self.step, error)

    def _status(self, event: Event) -> None:
        """Where the step runs and what it waits for; a warning when a person should do something."""
        fix = event.get("fix")
        if fix:
            self.logger.warning("%s: %s. What to do: %s", self.step, event["message"], fix)
        else:
            self.logger.info("%s: %s", self.step, event["message"])

    def _progress(self, event: Event) -> None:
        done, total, now = event.get("done", 0), event.get("total", 0), time.monotonic()
        if total and (now >= self._next_update or done >= total):
            self._next_update = now + PROGRESS_SECONDS
            percent = min(100.0, 100.0 * done / total)
            if self._bar is None:
                self._bar = _uuid(create_progress_artifact(percent, key=_key(self.step, "progress")))
            else:
                update_progress_artifact(self._bar, percent)
        if now >= self._next_line:
            self._next_line = now + LOG_SECONDS
            self.logger.info("%s/%s %s", done, total, event.get("message", ""))


def show_report(step: str, name: str, content: Any) -> None:
    """A report as the step wrote it: markdown as text, a list of rows as a table, anything else as JSON."""
    key = _key(step, name)
    if isinstance(content, str):
        create_markdown_artifact(content, key=key)
    elif isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
        create_table_artifact(content[:TABLE_ROWS], key=key)
    else:
        text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
        create_markdown_artifact(f"### {step}: {name}\n\n```json\n{text}\n```", key=key)


def show_facts(artifact: Artifact) -> None:
    """The step's facts as a table, its curves, and where its files lie."""
    step = artifact.manifest.step
    rows = [{"fact": name, "value": _short(value)} for name, value in artifact.facts.items()]
    if rows:
        create_table_artifact(rows, key=_key(step, "facts"), description=f"`{artifact.url}`")
    if step == "train":
        _show_curves(artifact)
    if step == "report":
        create_link_artifact(_link(artifact, "report.html"), link_text="report.html", key=_key(step, "html"))


def _show_curves(artifact: Artifact) -> None:
    text = artifact.store.read(f"{artifact.prefix}/metrics.jsonl").decode()
    metrics: list[MutableMapping[str, Any]] = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not metrics:
        return
    every = max(1, len(metrics) // TABLE_ROWS)
    table = [{name: _short(row[name]) for name in TABLE_COLUMNS if name in row} for row in metrics[::every]]
    create_table_artifact(table, key="orbit-train-metrics", description="every step's row is in metrics.jsonl")
    for name in CURVES:
        values = [row[name] for row in metrics if isinstance(row.get(name), int | float)]
        if len(values) > 1:
            url = curve_as_data_url(values, title=name.replace("_", " "))
            create_image_artifact(url, key=_key("train", name), description=f"{name} by step")


def _link(artifact: Artifact, name: str) -> str:
    local = artifact.store.local_path(f"{artifact.prefix}/{name}")
    return Path(local).as_uri() if local else artifact.store.url_of(f"{artifact.prefix}/{name}")


def _key(step: str, name: str) -> str:
    return f"orbit-{step}-{name}".lower().replace("_", "-").replace(".", "-").replace(" ", "-")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 120 else text[:117] + "..."


def _uuid(value: Any) -> UUID:
    if not isinstance(value, UUID):
        raise TypeError(f"expected the id of a progress artifact, found {type(value).__name__}")
    return value
