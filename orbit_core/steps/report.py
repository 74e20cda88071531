"""report: the run as one HTML file that opens anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from orbit_core.recipe import Section
from orbit_core.report.page import RunRecord, render
from orbit_core.steps.contract import StepContext


class Params(Section):
    name: str


def run(context: StepContext) -> dict[str, Any]:
    params = Params.model_validate(context.spec.params)
    inputs = context.inputs
    metrics = (inputs["train"] / "metrics.jsonl").read_text(encoding="utf-8")
    record = RunRecord(
        name=params.name,
        preflight=_read(inputs["preflight"] / "report.json"),
        metrics=[json.loads(line) for line in metrics.splitlines() if line.strip()],
        summary=_read(inputs["train"] / "summary.json"),
        evaluation=_read(inputs["evaluate"] / "evaluation.json"),
        samples=pq.read_table(inputs["evaluate"] / "samples.parquet").to_pylist(),
        manifest=_read(inputs["publish"] / "manifest.json"),
    )
    page = render(record)
    (context.output / "report.html").write_text(page, encoding="utf-8")
    context.progress(1, 1, "report.html")
    return {"bytes": len(page.encode()), "steps": len(record.metrics)}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
