"""report: one file, no script, no request, and nothing in it that a model or a person could have made markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import SmallRun

from orbit_core.report.charts import Series, line_chart, linear_axis, log_axis, stacked_bars
from orbit_core.report.markup import element, visible
from orbit_core.report.page import RunRecord, render
from orbit_core.report.thinning import MOST, buckets, thinned

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre></article><iframe src='https://example.org'>",
    "{{7*7}} ${7*7} &lt;b&gt;",
    "a\u202egnp.exe\u0000\u200b\x1b[31m",
]
VOID = {"meta", "br", "img", "line", "rect", "circle", "path", "polyline"}


class Reader(HTMLParser):
    """Collects tags, text and attributes; fails on tags that are closed in the wrong order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID or self._open[-1:] == [tag]:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def record(run: SmallRun) -> RunRecord:
    def read(step: str, name: str) -> dict[str, Any]:
        return dict(json.loads((run.output(step) / name).read_text()))

    metrics = (run.output("train") / "metrics.jsonl").read_text().splitlines()
    samples = pq.read_table(run.output("evaluate") / "samples.parquet").to_pylist()
    return RunRecord(
        name="small",
        preflight=read("preflight", "report.json"),
        metrics=[json.loads(line) for line in metrics],
        summary=read("train", "summary.json"),
        evaluation=read("evaluate", "evaluation.json"),
        samples=samples,
        manifest=read("publish", "manifest.json"),
    )


def test_the_page_holds_everything_it_shows(run: SmallRun) -> None:
    page = (run.output("report") / "report.html").read_text()
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(reader.tags)
    assert not any(name in ("src", "href", "xlink:href", "action", "style") for name, _ in reader.attributes)
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    assert not re.search(r"@import|url\(|https?:", page)


def test_the_figures_are_those_of_the_evaluation(record: RunRecord) -> None:
    text = Reader(render(record)).text
    for side in ("before", "after"):
        assert f"{record.evaluation[side]['greedy']['accuracy']:.1%}" in text
    assert f"{record.summary['logprob_gap_mean']:.1e}" in text
    assert record.manifest["digests"]["adapter"] in text
    for title in ("Reward", "Accuracy", "Log-prob gap", "Orthogonality error", "Response length", "Time by phase"):
        assert title in text


def test_all_that_models_and_people_wrote_is_shown_as_text(record: RunRecord) -> None:
    def fouled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fouled(item) for key, item in value.items()}
        return f"{value}{''.join(HOSTILE)}" if isinstance(value, str) else value

    samples = [
        {**row, "prompt": text, "label": text, "before": text, "after": text[::-1]}
        for row, text in zip(record.samples, HOSTILE * 9, strict=False)
    ]
    clean = Reader(render(record))
    preflight = {**record.preflight, "first_drifting_layer": HOSTILE[2]}
    manifest = fouled(record.manifest)
    page = render(replace(record, name=HOSTILE[1], samples=samples, manifest=manifest, preflight=preflight))
    hostile = Reader(page)
    assert set(hostile.tags) == set(clean.tags)
    assert {name for name, _ in hostile.attributes} == {name for name, _ in clean.attributes}
    assert "<script>alert(1)</script>" in hostile.text
    assert "a⟨U+202E⟩gnp.exe⟨U+0000⟩⟨U+200B⟩⟨U+001B⟩[31m" in hostile.text


@given(st.text(), st.text())
def test_text_survives_markup_as_text(content: str, attribute: str) -> None:
    reader = Reader(element("p", content, title=attribute))
    assert reader.tags == ["p"]
    assert reader.text.replace("\r", "") == visible(content).replace("\r", "")
    assert dict(reader.attributes) == {"title": visible(attribute)}


def test_a_run_without_change_is_not_sold_as_one(record: RunRecord) -> None:
    gains = {"difference": 0.0, "interval": [-0.05, 0.05], "gained": 3, "lost": 3, "p_value": 1.0}
    evaluation = {**record.evaluation, "gains": {"greedy": gains}}
    assert "within what chance explains" in Reader(render(replace(record, evaluation=evaluation))).text
    worse = {**record.evaluation, "gains": {"greedy": {**gains, "interval": [-0.3, -0.1]}}}
    assert "made the model worse" in Reader(render(replace(record, evaluation=worse))).text


def test_a_control_run_says_so(record: RunRecord) -> None:
    recipe = {**record.manifest["recipe"], "reward": {**record.manifest["recipe"]["reward"], "shuffle": True}}
    page = render(replace(record, manifest={**record.manifest, "recipe": recipe}))
    assert "rewards were shuffled" in Reader(page).text


def test_what_was_not_measured_is_left_out(record: RunRecord) -> None:
    dropped = {"max_orthogonality_error", "kl", "entropy"}
    metrics = [{name: value for name, value in row.items() if name not in dropped} for row in record.metrics]
    summary = {**record.summary, "max_orthogonality_error": None}
    text = Reader(render(replace(record, metrics=metrics, summary=summary))).text
    assert "Orthogonality error" not in text and "KL was measured only at the end" in text


def test_kl_is_drawn_where_it_was_measured(record: RunRecord) -> None:
    metrics = [{**row, "kl": 0.01 * i} for i, row in enumerate(record.metrics)]
    assert "KL by step" in render(replace(record, metrics=metrics))


def test_a_run_of_one_step_and_engines_that_agree_exactly_can_be_drawn(record: RunRecord) -> None:
    metrics = [{**record.metrics[0], "logprob_gap_mean": 0.0, "logprob_gap_max": 0.0}]
    assert "Exactly 0 at every token" in Reader(render(replace(record, metrics=metrics))).text


# Charts

finite = st.floats(-1e9, 1e9, allow_subnormal=False)


@given(st.lists(st.none() | finite, max_size=60))
def test_any_curve_stays_inside_its_frame(values: list[float | None]) -> None:
    known = [value for value in values if value is not None]
    axis = linear_axis("unit", known, low=None)
    slack = 1e-6 * (axis.high - axis.low)
    assert all(axis.low - slack <= value <= axis.high + slack for value in known)
    chart = line_chart("title", [Series("name", values)], axis)
    for x, y in re.findall(r"([-\d.]+),([-\d.]+)", "".join(re.findall(r'points="([^"]*)"', chart))):
        assert 0 <= float(x) <= 520 and 0 <= float(y) <= 240


@given(st.lists(st.floats(0, 1e6, allow_subnormal=False), max_size=20))
def test_logarithmic_axes_are_whole_decades_and_take_zeros(values: list[float]) -> None:
    axis = log_axis("nats", values)
    assert all(0.0 <= axis.place(value) <= 1.0 for value in values)
    assert axis.place(axis.ticks[-1]) == pytest.approx(1.0)
    assert 1 <= len(axis.ticks) <= 7


def test_bars_add_up() -> None:
    series = [Series("a", [1.0, 2.0], "a"), Series("b", [3.0, None], "b")]
    chart = stacked_bars("seconds", series, linear_axis("seconds", [4.0, 2.0]))
    a0, b0, a1, b1 = (float(height) for height in re.findall(r'height="([\d.]+)"', chart))
    assert b0 == pytest.approx(3 * a0, abs=0.5) and a1 == pytest.approx(2 * a0, abs=0.5) and b1 == 0
    assert "a, step 1: 2 s" in chart and "b, step 0: 3 s" in chart


# Long runs


@given(st.lists(st.none() | st.floats(-1e9, 1e9), max_size=1500))
def test_a_thinned_curve_has_few_points_and_keeps_every_extreme(values: list[float | None]) -> None:
    points = thinned(values)
    known = [(step, value) for step, value in enumerate(values) if value is not None]
    assert len(points) <= MOST + 2 and set(points) <= set(known) and points == sorted(points)
    assert points == known or len(values) > MOST
    for bucket in buckets(len(values), MOST // 2):
        there = [value for step, value in known if step in bucket]
        if there:
            drawn = [value for step, value in points if step in bucket]
            assert (min(drawn), max(drawn)) == (min(there), max(there))


@given(st.integers(0, 3000), st.integers(1, 300))
def test_buckets_are_all_steps_once(steps: int, most: int) -> None:
    found = list(buckets(steps, most))
    assert [step for bucket in found for step in bucket] == list(range(steps))
    assert len(found) <= most and all(found)


def test_the_report_of_10000_steps_is_hardly_larger_than_one_of_400(record: RunRecord) -> None:
    def page(steps: int) -> str:
        rows = [record.metrics[step % len(record.metrics)] for step in range(steps)]
        return render(replace(record, metrics=[{**row, "reward_mean": step / steps} for step, row in enumerate(rows)]))

    short, long = page(400), page(10_000)
    assert len(long) < 1.3 * len(short)
    assert "reward, step 9999: 0.9999" in long and "steps 0 to 49, mean" in long
