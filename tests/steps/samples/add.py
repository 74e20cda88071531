"""A real small step: the sum of the numbers that `count` wrote."""

from __future__ import annotations

from typing import Any

from orbit_core.errors import GateError
from orbit_core.steps.contract import StepContext


def run(context: StepContext) -> dict[str, Any]:
    total = sum(int(file.read_text().split()[0]) for file in (context.inputs["numbers"] / "parts").iterdir())
    (context.output / "sum.txt").write_text(str(total))
    context.emit("report", name="sum", content={"total": total})
    if total > context.spec.params["at_most"]:
        raise GateError("the sum", f"at most {context.spec.params['at_most']}", str(total), "count less far")
    return {"total": total}
