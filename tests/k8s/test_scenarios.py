"""Every promise of the scenario table in k8s/README.md, kept once. soak.py keeps them many times.

Of `demo` the learning is cut short here; ../flows/test_demo.py learns it whole.
"""

from __future__ import annotations

import os

import pytest
from cluster.binaries import why_not
from lanes import ALL, Outcome, outcomes


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """What came of the scenarios that this session selects, played side by side."""
    reason = why_not()
    if reason and os.environ.get("CI"):
        pytest.fail(f"{reason}; CI must have it", pytrace=False)
    if reason:
        pytest.skip(reason)
    selected = [item.callspec.params["name"] for item in request.session.items if _ours(item)]
    return {outcome.name: outcome for outcome in outcomes(selected, brief=True)}


@pytest.mark.parametrize("name", ALL)
def test_promise(name: str, played: dict[str, Outcome]) -> None:
    assert name in played, "its cluster did not start"
    assert not played[name].broken, played[name].broken


def _ours(item: pytest.Item) -> bool:
    return item.path.name == "test_scenarios.py" and hasattr(item, "callspec")
