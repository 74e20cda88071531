"""What a finished run is summed up in: figures, times and where things lie. JSON."""

from __future__ import annotations

from typing import Any

from tasks.steps import StepResult

FIGURES = {
    "accuracy_before": "evaluate",
    "accuracy_after": "evaluate",
    "prompts": "evaluate",
    "logprob_gap_mean": "train",
    "max_orthogonality_error": "train",
    "adapter_digest": "train",
}


def outcome(done: dict[str, StepResult]) -> dict[str, Any]:
    """Figures from the steps' facts (None where a step does not have one, as LoRA has no orthogonality error)."""
    figures = {name: done[step].artifact.facts.get(name) for name, step in FIGURES.items()}
    seconds = {step: result.seconds for step, result in done.items()}
    train, publish, report = (done[step].artifact for step in ("train", "publish", "report"))
    run = train.facts.get("run")
    return {
        **figures,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 3)},
        "reused": [step for step, result in done.items() if result.reused],
        "run": run,
        "paths": {
            "adapter": publish.store.url_of(f"{publish.prefix}/adapter"),
            "rollouts": train.store.url_of(f"rollouts/run={run}"),
            "report": report.store.url_of(f"{report.prefix}/report.html"),
        },
    }
