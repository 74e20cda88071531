"""Where an adapter sits: the linears that its targets name, each with the name that PEFT gives its tensors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orbit_core.errors import InputError

PREFIX = "base_model.model."
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.([^.]+)$")


@dataclass(frozen=True)
class Site:
    """One set of adapter values and the linears that use it: one, or all experts of a layer when they share."""

    name: str  # HF module name, e.g. model.layers.0.self_attn.q_proj
    in_features: int
    out_features: int
    modules: tuple[str, ...]

    def peft_name(self, suffix: str) -> str:
        return f"{PREFIX}{self.name}.{suffix}"


def choose_sites(
    linears: Mapping[str, tuple[int, int]], targets: Sequence[str], share_experts: bool = False
) -> tuple[Site, ...]:
    """Sites in the order of `linears` (HF module name -> (in, out) features).

    A target matches a module of that name or whose name ends in it, as in PEFT. With `share_experts`, the experts of a
    layer form one site, `...mlp.experts.gate_proj`. Raises InputError when a target matches nothing.
    """
    idle = [target for target in targets if not any(_matches(name, target) for name in linears)]
    if idle or not targets:
        known = sorted({name.rsplit(".", 1)[-1] for name in linears})
        found = f"no module for {', '.join(idle) or 'no target'}"
        near = [match for target in idle for match in difflib.get_close_matches(target, known, n=1)]
        fix = f"did you mean {' or '.join(near)}?" if near else "mend adapter.targets"
        raise InputError("adapter.targets", f"names among {', '.join(known)}", found, fix)
    grouped: dict[str, Site] = {}
    for name, (width, out) in linears.items():
        if not any(_matches(name, target) for target in targets):
            continue
        shared = _EXPERT.match(name) if share_experts else None
        site_name = f"{shared[1]}.{shared[3]}" if shared else name
        before = grouped.get(site_name)
        if before is not None and (before.in_features, before.out_features) != (width, out):
            fix = "set adapter.share_experts to false"
            raise InputError(f"shared adapter {site_name}", "experts of one shape", f"{name} is {(width, out)}", fix)
        grouped[site_name] = Site(site_name, width, out, (*(before.modules if before else ()), name))
    return tuple(grouped.values())


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
