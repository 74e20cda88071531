"""The verdict: bytes and log-probabilities together, with thresholds, the worst of each, and who drifted first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orbit_core.adapters.digest import tensors_digest
from orbit_core.parity.bytes import Tensors, compare_bytes
from orbit_core.parity.layers import compare_layers
from orbit_core.parity.logprobs import PARTS, Measurement, measure, number
from orbit_core.recipe import Engines, Preflight, Sampling
from orbit_core.rollout.base import RolloutEngine
from orbit_core.trainers.base import Trainer

# Five to ten times what random models of 2 to 24 layers show (float32 7e-7 and 6e-6, bfloat16 1.5e-2 and 1.7e-1), and
# far below what a wrong tensor or a lost adapter leaves (above 1e-1).
MEAN_GAP = {"float32": 5e-6, "bfloat16": 5e-2}
TOKEN_GAP = {"float32": 1e-4, "bfloat16": 1.0}


@dataclass(frozen=True)
class Thresholds:
    mean_gap: float
    token_gap: float

    @classmethod
    def of(cls, preflight: Preflight, compute_dtype: str) -> Thresholds:
        """What the recipe sets, else what rounding in the compute dtype explains."""
        return cls(
            preflight.max_mean_gap or MEAN_GAP[compute_dtype], preflight.max_token_gap or TOKEN_GAP[compute_dtype]
        )


def examine(
    trainer: Trainer,
    rollout: RolloutEngine,
    checkpoint: Tensors,
    adapter: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    engines: Engines,
    thresholds: Thresholds,
    seed: int,
) -> dict[str, Any]:
    """The report (JSON). `adapter`: the values (PEFT names) that both engines are given, away from the identity.

    Both engines keep that adapter: they are examined, not used further.
    """
    trainer.load_adapter(adapter)
    exported = trainer.export_adapter()
    arrived = rollout.stage_adapter(rollout.adapter_version + 1, exported)
    rollout.activate_adapter(rollout.adapter_version + 1)
    sent = tensors_digest(exported)

    equal = compare_bytes(checkpoint, {"trainer": trainer.packed_tensors, "rollout": rollout.packed_tensors})
    measured = measure(trainer, rollout, prompts, sampling, seed)
    logprobs = _judge(measured, thresholds)
    worst = measured.worst
    layers = compare_layers(trainer, rollout, _tokens_around(measured, worst.prompt), engines.compute_dtype)
    ok = bool(equal["ok"] and logprobs["ok"] and arrived == sent)
    return {
        "ok": ok,
        "verdict": "equal" if ok else "refused",
        "reasons": _reasons(equal, logprobs, layers, sent, arrived),
        "thresholds": {"mean_gap": thresholds.mean_gap, "token_gap": thresholds.token_gap},
        "bytes": equal,
        "logprobs": logprobs,
        "worst_tensor": equal["worst"]["name"] if equal["worst"] else None,
        "first_drifting_layer": layers["first_drifting_layer"],
        "layers": layers,
        "adapter": {"sent_digest": sent, "arrived_digest": arrived, "tensors": len(exported)},
        "compute_dtype": engines.compute_dtype,
        "engines": {"trainer": engines.trainer, "rollout": engines.rollout},
        "layout": {"trainer": _parallel(trainer), "rollout": _parallel(rollout)},
    }


def _judge(measured: Measurement, thresholds: Thresholds) -> dict[str, Any]:
    """The largest mean of a part and the largest gap of a token, each against its threshold.

    Parts are judged one by one: many tokens that agree must not hide a part that does not.
    """
    worst = measured.worst
    mean = max(measured.mean(part) for part in PARTS)
    return {
        "ok": mean <= thresholds.mean_gap and worst.size <= thresholds.token_gap,
        "tokens": len(measured.gaps),
        "prompts": len(measured.sequences),
        "mean_gap": number(mean),
        "max_gap": number(worst.size),
        "worst_token": worst.to_json(),
        **{part: measured.summary(part) for part in PARTS},
    }


def _parallel(engine: Trainer | RolloutEngine) -> dict[str, int]:
    """The parallel layout that was examined; an engine that has none says nothing and is one process."""
    return dict(getattr(engine, "parallel_layout", {"tensor": 1, "pipeline": 1, "expert": 1}))


def _tokens_around(measured: Measurement, prompt: int) -> tuple[int, ...]:
    prompt_ids, response_ids = measured.sequences[prompt]
    return (*prompt_ids, *response_ids)


def _reasons(
    equal: dict[str, Any], logprobs: dict[str, Any], layers: dict[str, Any], sent: str, arrived: str
) -> list[str]:
    """One line for everything that was refused; empty when nothing was."""
    reasons = []
    for engine, verdict in equal["engines"].items():
        for entry in verdict["differing"]:
            where = f"{entry['differing_elements']} of {entry['elements']} elements" if "elements" in entry else "bytes"
            reasons.append(f"{engine}: {entry['name']}: {where} differ; {entry.get('diagnosis', 'not examined')}")
        reasons += [f"{engine}: {name}: missing" for name in verdict["missing"]]
        reasons += [f"{engine}: {name}: not in the checkpoint" for name in verdict["unexpected"]]
    if not logprobs["ok"]:
        drift = layers["first_drifting_layer"]
        tail = f"first drifting layer {drift}" if drift else "no single layer drifts beyond rounding"
        reasons.append(f"log-probs: mean gap {logprobs['mean_gap']}, largest {logprobs['max_gap']}; {tail}")
    if sent != arrived:
        reasons.append(f"adapter: the trainer sent {sent}, the rollout engine holds {arrived}")
    return reasons
