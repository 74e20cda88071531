"""Bytes that nearly are what a reader expects: valid files with a few bytes changed, or with one value of their JSON
replaced by one that no honest writer writes there."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

import yaml
from hypothesis import strategies as st
from readers import samples, with_header

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**53, 2**63 - 1, 2**64, -(2**63), 10**30, 10**300, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "a", "..", "../x", "/etc/hostname", "\0", "\ud800", "é" * 20, "int4", "BF16",
    [], {}, [[]], [0], [-1], [2**62, 2**62], [1, 2, 3], ["a"], [None], [[1, 2]], {"a": 1}, {"": None}, {"a": {"b": []}},
]  # fmt: skip
odd = st.sampled_from(ODD).map(copy.deepcopy)  # later changes may go inside


@st.composite
def changed_bytes(draw: st.DrawFn, name: str) -> bytes:
    """A sample with up to four stretches overwritten, removed, doubled or cut off."""
    content = bytearray(draw(st.sampled_from(samples(name))))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 8)))
        kind = draw(st.sampled_from(["overwrite", "insert", "remove", "double", "cut"]))
        if kind == "overwrite":
            content[start:stop] = draw(st.binary(min_size=stop - start, max_size=stop - start))
        elif kind == "insert":
            content[start:start] = draw(st.binary(max_size=8))
        elif kind == "remove":
            del content[start:stop]
        elif kind == "double":
            content[start:start] = content[start:stop] * draw(st.integers(1, 3))
        else:
            del content[start:]
    return bytes(content)


@st.composite
def changed_json(draw: st.DrawFn, content: Any, times: int = 3) -> Any:
    """A JSON value of which up to `times` nodes were replaced, removed or added."""
    value = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, times))):
        value = draw(_changed_once(value))
    return value


@st.composite
def _changed_once(draw: st.DrawFn, value: Any) -> Any:
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or draw(st.integers(0, 5)) == 0:
        return draw(odd)
    key = draw(st.sampled_from(keys))
    action = draw(st.sampled_from(["inside", "inside", "inside", "remove", "add"]))
    if action == "remove":
        del value[key]
    elif action == "add" and isinstance(value, dict):
        value[draw(st.sampled_from(["auto_map", "x", "", "quantization_config", "rope_scaling"]))] = draw(odd)
    elif action == "add":
        value.insert(draw(st.integers(0, len(value))), draw(odd))
    else:
        value[key] = draw(_changed_once(value[key]))
    return value


def damaged(name: str) -> st.SearchStrategy[bytes]:
    """What the reader `name` is given."""
    return st.one_of(st.binary(max_size=64), changed_bytes(name), *_structured(name))


def _structured(name: str) -> list[st.SearchStrategy[bytes]]:
    first = samples(name)
    if name in ("safetensors", "adapter_weights"):
        (length,) = struct.unpack("<Q", first[0][:8])
        header, data = json.loads(first[0][8 : 8 + length]), first[0][8 + length :]
        return [changed_json(header).map(lambda value: with_header(_dump(value), data))]
    if name == "recipe":
        # what YAML alone can say (dates, anchors, sets) is left to changed_bytes
        return [changed_json(yaml.safe_load(text)).map(_dump) for text in first]
    if name == "jsonl":
        return [changed_json(json.loads(line)).map(_dump) for line in first[0].splitlines()]
    if name in ("prompt_parquet", "prompt_table", "rollouts"):
        return []
    return [changed_json(json.loads(text)).map(_dump) for text in first]


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()
