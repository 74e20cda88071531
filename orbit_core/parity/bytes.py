"""Bytes: every base tensor of each engine against the checkpoint, by sha256 of (dtype, shape, bytes).

A tensor that differs is looked at again: how many elements and bits, where first, and whether it holds the right rows
in another order, or the rows of its fused siblings (q/k/v, gate/up), which is what a wrong interleaving leaves behind.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from orbit_core.adapters.digest import tensor_bytes, tensor_digest

Tensors = Callable[[], Iterator[tuple[str, Tensor]]]  # may be walked through more than once
EXAMINED = 16  # differing tensors that are looked at again, per engine
_DERIVED = "rotary_emb.inv_freq"  # some checkpoints store it; engines compute it from config.json
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def compare_bytes(checkpoint: Tensors, engines: Mapping[str, Tensors]) -> dict[str, Any]:
    """Verdict on every engine ("trainer", "rollout") against the checkpoint; JSON.

    {"ok", "tensors", "worst": the entry of the tensor with the largest share of differing elements or None,
     "engines": {engine: {"ok", "equal", "missing": [...], "unexpected": [...], "differing": [entry...]}}}
    """
    expected = {name: tensor_digest(tensor) for name, tensor in checkpoint() if not name.endswith(_DERIVED)}
    verdicts = {engine: _compare(engine, checkpoint, expected, tensors) for engine, tensors in engines.items()}
    entries = [entry for verdict in verdicts.values() for entry in verdict["differing"]]
    return {
        "ok": all(verdict["ok"] for verdict in verdicts.values()),
        "tensors": len(expected),
        "worst": max(entries, key=lambda entry: entry["differing_share"], default=None),
        "engines": verdicts,
    }


def _compare(engine: str, checkpoint: Tensors, expected: Mapping[str, str], tensors: Tensors) -> dict[str, Any]:
    found = {name: tensor_digest(tensor) for name, tensor in tensors()}
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    differing = [name for name in expected if name in found and found[name] != expected[name]]
    examined = differing[:EXAMINED]
    wanted = {sibling for name in examined for sibling in siblings(name)}
    right = {name: tensor.cpu() for name, tensor in checkpoint() if name in wanted}
    wrong = {name: tensor.cpu().clone() for name, tensor in tensors() if name in wanted}
    entries = [{"engine": engine, **difference(name, right, wrong)} for name in examined]
    entries += [{"engine": engine, "name": name, "differing_share": 0.0} for name in differing[EXAMINED:]]
    return {
        "ok": not (missing or unexpected or differing),
        "equal": sum(found.get(name) == digest for name, digest in expected.items()),
        "missing": missing,
        "unexpected": unexpected,
        "differing": entries,
    }


def difference(name: str, right: Mapping[str, Tensor], wrong: Mapping[str, Tensor]) -> dict[str, Any]:
    """How tensor `name` of an engine (`wrong`) differs from the checkpoint's (`right`); both hold its siblings too."""
    expected, found = right[name], wrong[name]
    entry: dict[str, Any] = {"name": name, "dtype": _dtype(expected), "shape": list(expected.shape)}
    if found.dtype != expected.dtype or found.shape != expected.shape:
        where = f"{_dtype(found)} {list(found.shape)}"
        return {**entry, "differing_share": 1.0, "diagnosis": f"another dtype or shape: {where}"}
    size = expected.element_size()
    xor = (_rows(expected, size) ^ _rows(found, size)).reshape(-1, size)
    elements = xor.any(axis=1)
    first = int(elements.argmax())
    return {
        **entry,
        "elements": len(elements),
        "differing_elements": int(elements.sum()),
        "differing_bits": int(np.unpackbits(xor).sum()),
        "differing_share": float(elements.mean()),
        "first_index": first,
        "expected_value": _value(expected, first),
        "found_value": _value(found, first),
        "diagnosis": _diagnose(name, right, wrong),
    }


def siblings(name: str) -> list[str]:
    """The tensors that are fused with this one, itself included."""
    for group in _FUSED:
        for part in group:
            match = re.search(rf"\.{part}\.", name)
            if match:
                return [name[: match.start()] + f".{other}." + name[match.end() :] for other in group]
    return [name]


def _diagnose(name: str, right: Mapping[str, Tensor], wrong: Mapping[str, Tensor]) -> str:
    if right[name].dim() == 2:
        if _same_rows([right[name]], [wrong[name]]):
            return "the same rows in another order"
        group = siblings(name)
        if len(group) > 1 and all(part in right and part in wrong for part in group):
            parts = "/".join(part.split(".")[-2].removesuffix("_proj") for part in group)
            if _same_rows([right[part] for part in group], [wrong[part] for part in group]):
                return f"the rows of {parts} in another order: fused or split in a wrong order"
    return "other values"


def _same_rows(left: list[Tensor], other: list[Tensor]) -> bool:
    def count(tensors: list[Tensor]) -> Counter[bytes]:
        return Counter(row.tobytes() for tensor in tensors for row in _rows(tensor, tensor.element_size()))

    return count(left) == count(other)


def _rows(tensor: Tensor, size: int) -> np.ndarray:
    """uint8 [first dimension (or elements), bytes of a row]."""
    raw = np.frombuffer(tensor_bytes(tensor), dtype=np.uint8)
    return raw.reshape(tensor.shape[0] if tensor.dim() == 2 else -1, -1 if tensor.dim() == 2 else size)


def _value(tensor: Tensor, index: int) -> float | int:
    value = tensor.reshape(-1)[index]
    return float(value.float()) if value.is_floating_point() else int(value)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
