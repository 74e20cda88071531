"""The curves of a run: what it learned, how far it moved, whether the engines agree, where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orbit_core.report.charts import Series, line_chart, linear_axis, log_axis, percent_axis, stacked_bars
from orbit_core.report.markup import Markup, element

ORTHOGONALITY_LIMIT = 1e-2
PHASES = (("rollout", "a"), ("score", "c"), ("reward", "d"), ("update", "e"), ("publish", "f"), ("commit", "b"))

Rows = Sequence[Mapping[str, Any]]


def chart_cards(metrics: Rows, evaluation: Mapping[str, Any], summary: Mapping[str, Any]) -> list[Markup]:
    """One card per quantity that the run measured."""
    cards = [_reward(metrics), _accuracy(metrics, evaluation)]
    if measures_kl(metrics):
        cards.append(_kl(metrics))
    cards.append(_gap(metrics))
    if summary.get("max_orthogonality_error") is not None:
        cards.append(_orthogonality(metrics))
    return [*cards, _length(metrics), _entropy(metrics), _time(metrics, summary)]


def measures_kl(metrics: Rows) -> bool:
    """False for a run whose steps did not score the reference."""
    return any(row.get("kl") for row in metrics)


def _reward(metrics: Rows) -> Markup:
    line = Series("reward", _column(metrics, "reward_mean"))
    axis = linear_axis("mean reward", _known(line), low=None if min(_known(line), default=0) < 0 else 0.0)
    return _card("Reward", "Mean over all samples of a step.", line_chart("reward by step", [line], axis))


def _accuracy(metrics: Rows, evaluation: Mapping[str, Any]) -> Markup:
    line = Series("right samples", _column(metrics, "accuracy"), "c")
    references = [
        (
            evaluation[side]["greedy"]["accuracy"],
            f"held out, greedy, {side} {evaluation[side]['greedy']['accuracy']:.1%}",
        )
        for side in ("before", "after")
    ]
    chart = line_chart("accuracy by step", [line], percent_axis("right answers"), references)
    return _card("Accuracy", "Sampled answers to training prompts; dashed: greedy on held-out prompts.", chart)


def _kl(metrics: Rows) -> Markup:
    line = Series("KL", _column(metrics, "kl"), "e")
    axis = linear_axis("nats a token", _known(line), low=None if min(_known(line)) < 0 else 0.0)
    return _card("KL to the base", "The same model with the adapter off.", line_chart("KL by step", [line], axis))


def _gap(metrics: Rows) -> Markup:
    mean = Series("mean", _column(metrics, "logprob_gap_mean"), "a")
    largest = Series("largest", _column(metrics, "logprob_gap_max"), "b")
    values = [*_known(mean), *_known(largest)]
    text = "|trainer - rollout| of each sampled token's log-probability; logarithmic."
    if not any(values):
        return _card("Log-prob gap", f"{text} Exactly 0 at every token of every step.", None)
    chart = line_chart("log-prob gap by step", [largest, mean], log_axis("nats", values))
    return _card("Log-prob gap", text, chart, [(mean, None), (largest, None)])


def _orthogonality(metrics: Rows) -> Markup:
    line = Series("error", _column(metrics, "max_orthogonality_error"), "d")
    axis = log_axis("max |R Rᵀ - I|₂", [*_known(line), ORTHOGONALITY_LIMIT])
    chart = line_chart("orthogonality error by step", [line], axis, [(ORTHOGONALITY_LIMIT, "limit 1e-2")])
    return _card("Orthogonality error", "Largest of all blocks; logarithmic. Rotations stay rotations.", chart)


def _length(metrics: Rows) -> Markup:
    mean = Series("mean", _column(metrics, "response_length_mean"), "a")
    longest = Series("longest", _column(metrics, "response_length_max"), "b")
    chart = line_chart(
        "response length by step", [longest, mean], linear_axis("tokens", [*_known(mean), *_known(longest)])
    )
    return _card("Response length", "With the end token.", chart, [(mean, None), (longest, None)])


def _entropy(metrics: Rows) -> Markup:
    line = Series("entropy", _column(metrics, "entropy"), "f")
    axis = linear_axis("nats a token", _known(line))
    return _card(
        "Entropy",
        "Of the sampling distribution, estimated on its samples.",
        line_chart("entropy by step", [line], axis),
    )


def _time(metrics: Rows, summary: Mapping[str, Any]) -> Markup:
    series = [Series(name, _column(metrics, f"seconds_{name}"), colour) for name, colour in PHASES]
    totals = [sum(values) for values in zip(*([v or 0.0 for v in line.values] for line in series), strict=True)]
    spent: Mapping[str, float] = summary.get("seconds", {})
    legend = [(line, f"{spent.get(line.name, sum(_known(line))):.1f} s") for line in series]
    chart = stacked_bars("seconds by phase and step", series, linear_axis("seconds", totals))
    return _card("Time by phase", f"{sum(totals):.1f} s in {len(metrics)} steps.", chart, legend)


def _column(metrics: Rows, name: str) -> list[float | None]:
    return [float(row[name]) if row.get(name) is not None else None for row in metrics]


def _known(line: Series) -> list[float]:
    return [value for value in line.values if value is not None]


def _card(title: str, text: str, chart: Markup | None, legend: Sequence[tuple[Series, str | None]] = ()) -> Markup:
    items = [
        element("li", element("i", class_=line.colour), line.name, None if note is None else f" {note}")
        for line, note in legend
    ]
    return element(
        "section",
        element("h3", title),
        element("p", text),
        chart,
        element("ul", *items, class_="legend") if items else None,
        class_="card",
    )
