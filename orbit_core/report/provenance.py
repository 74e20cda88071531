"""The gate's verdict, and where everything comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orbit_core.recipe import as_yaml
from orbit_core.report.markup import Markup, element


def preflight_table(report: Mapping[str, Any]) -> list[Markup]:
    """What was compared before training, against which threshold."""
    logprobs, limits, packed = report["logprobs"], report["thresholds"], report["bytes"]
    rows = [
        ("tensors, bit for bit", f"{packed['tensors']} in each engine", "all equal", packed["ok"]),
        ("log-prob gap, mean", f"{logprobs['mean_gap']:.2e} nats", _at_most(limits["mean_gap"]), logprobs["ok"]),
        ("log-prob gap, largest", f"{logprobs['max_gap']:.2e} nats", _at_most(limits["token_gap"]), logprobs["ok"]),
        (
            "first drifting layer",
            report["first_drifting_layer"] or "none",
            "none beyond rounding",
            report["first_drifting_layer"] is None,
        ),
    ]
    body = [
        element("tr", element("td", name), element("td", found, class_="mono"), element("td", wanted), _tick(good))
        for name, found, wanted, good in rows
    ]
    head = element("tr", *(element("th", name) for name in ("compared", "found", "wanted", "")))
    lead = (
        f"Trainer ({report['engines']['trainer']}) against rollout engine ({report['engines']['rollout']}) in "
        f"{report['compute_dtype']}, with an adapter away from the identity: {logprobs['tokens']} tokens of "
        f"{logprobs['prompts']} prompts."
    )
    table = element("table", element("thead", head), element("tbody", *body))
    return [element("p", lead, class_="lead"), element("div", table, class_="card scroll")]


def origins(manifest: Mapping[str, Any]) -> list[Markup]:
    """Digests of all that went in and of the adapter that came out; the recipe in full."""
    rows = [
        element("tr", element("th", name), element("td", digest, class_="mono"))
        for name, digest in manifest["digests"].items()
    ]
    recipe = as_yaml(manifest["recipe"])
    fold = element("details", element("summary", "Recipe, with every default"), element("pre", recipe), class_="card")
    return [element("div", element("div", element("table", *rows), class_="card"), fold, class_="stack")]


def _at_most(value: float) -> str:
    return f"at most {value:g}"


def _tick(good: bool) -> Markup:
    return element("td", "✓" if good else "✗", class_="good" if good else "bad")
