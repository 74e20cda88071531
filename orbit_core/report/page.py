"""The page: verdict first, then the figures behind it, the curves, the answers themselves, the gate and the origins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orbit_core.report.charts import interval_rule
from orbit_core.report.curves import chart_cards, measures_kl
from orbit_core.report.markup import Markup, element, join, raw
from orbit_core.report.provenance import origins, preflight_table
from orbit_core.report.samples import sample_cards
from orbit_core.report.style import CSS


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report shows, as the steps left it."""

    name: str
    preflight: Mapping[str, Any]  # report.json
    metrics: Sequence[Mapping[str, Any]]  # metrics.jsonl, one row per step
    summary: Mapping[str, Any]  # summary.json
    evaluation: Mapping[str, Any]  # evaluation.json
    samples: Sequence[Mapping[str, Any]]  # samples.parquet
    manifest: Mapping[str, Any]  # manifest.json of publish


def render(run: RunRecord) -> str:
    """The whole HTML document."""
    body = element(
        "main",
        element("h1", "Orbit · ", element("b", run.name)),
        _verdict(run),
        _figures(run),
        element("h2", "Training"),
        element("p", _training_lead(run), class_="lead"),
        element("div", *chart_cards(run.metrics, run.evaluation, run.summary), class_="charts"),
        element("h2", "Answers to held-out prompts"),
        *sample_cards(run.samples),
        element("h2", "Preflight"),
        *preflight_table(run.preflight),
        element("h2", "Provenance"),
        *origins(run.manifest),
        element("footer", _footer(run.manifest)),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{run.name} · Orbit"),
        element("style", raw(CSS)),
    )
    return "<!doctype html>\n" + element("html", head, element("body", body), lang="en") + "\n"


def _verdict(run: RunRecord) -> Markup:
    evaluation = run.evaluation
    before, after = evaluation["before"]["greedy"], evaluation["after"]["greedy"]
    was, now = before["accuracy"], after["accuracy"]
    rule = interval_rule(
        "held-out accuracy before and after, with 95% intervals",
        [("before", was, tuple(before["interval"]), "b"), ("after", now, tuple(after["interval"]), "a")],
    )
    return element(
        "section",
        element(
            "div",
            element(
                "div",
                element("span", f"{was:.1%}", class_="was"),
                element("span", "→", class_="arrow"),
                element("span", f"{now:.1%}", class_="now"),
                class_="numbers",
            ),
            element("p", *_sentence(run)),
        ),
        element("div", rule),
        class_="card verdict",
    )


def _sentence(run: RunRecord) -> list[object]:
    evaluation, gains = run.evaluation, run.evaluation["gains"]["greedy"]
    low, high = gains["interval"]
    change = f"{gains['difference'] * 100:+.1f} points (95%: {low * 100:+.1f} to {high * 100:+.1f})"
    text: list[object] = [
        f"Greedy accuracy on {evaluation['prompts']} held-out prompts that training never saw: {change}. "
        f"{gains['gained']} answers became right, {gains['lost']} became wrong."
    ]
    if run.manifest["recipe"]["reward"]["shuffle"]:
        text.append(element("b", " A control run: the rewards were shuffled, so nothing could be learned."))
    if low <= 0 <= high:
        text.append(element("b", " This is within what chance explains.", class_="warning"))
    elif high < 0:
        text.append(element("b", " The adapter made the model worse.", class_="warning"))
    return text


def _figures(run: RunRecord) -> Markup:
    before, after, summary = run.evaluation["before"], run.evaluation["after"], run.summary
    figures: list[tuple[str, str, str]] = []
    for k, was in before["pass_at_k"].items():
        figures.append((f"pass@{k}, sampled", f"{after['pass_at_k'][k]['value']:.1%}", f"before: {was['value']:.1%}"))
    figures.append(
        ("log-prob gap, mean", f"{summary['logprob_gap_mean']:.1e}", "nats a token, trainer against rollout")
    )
    error = summary.get("max_orthogonality_error")
    if error is not None:
        figures.append(("orthogonality error, max", f"{error:.1e}", "of any block at any step"))
    if "kl_to_base" in after:
        figures.append(("KL to the base", f"{after['kl_to_base']:.2f}", "nats a token, at the end"))
    figures.append(("rollouts", f"{summary['rows']:,}", f"{summary['rows_trained']:,} trained on"))
    cards = [
        element("div", element("dt", name), element("dd", value, element("small", note)), class_="card")
        for name, value, note in figures
    ]
    return element("dl", *cards, class_="figures")


def _training_lead(run: RunRecord) -> str:
    text = f"{run.summary['steps']} steps; hover over a curve for its values."
    if not measures_kl(run.metrics):
        text += " KL was measured only at the end."
    return text


def _footer(manifest: Mapping[str, Any]) -> Markup:
    code = manifest["code"]
    commit = f", commit {code['commit']}" if code["commit"] else ""
    return join([f"{code['package']} {code['version']}{commit}. This file holds everything it shows."])
