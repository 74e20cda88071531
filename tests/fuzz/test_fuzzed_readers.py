"""Whatever lies in a file, a reader takes it or refuses it with our own error, and within bounded memory."""

from __future__ import annotations

import itertools
import json
import resource
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import damaged
from readers import CONFIG_JSON, READERS, read, samples, with_header

MIB = 2**20
FOUND = Path(__file__).with_name("found")


def peak() -> int:
    """Bytes of memory that this process has had at once, so far."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


@pytest.mark.parametrize("name", READERS)
def test_what_is_right_is_read(name: str) -> None:
    assert all(read(name, content) for content in samples(name))


@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes_are_refused_in_our_own_words(name: str) -> None:
    for content in samples(name):
        read(name, content)  # what is imported on the way is not the reader's memory
    before = peak()

    @settings(max_examples=50, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(damaged(name))
    def every(content: bytes) -> None:
        read(name, content)

    every()
    assert peak() - before < 64 * MIB, "inputs are of a few kilobytes"


@pytest.mark.parametrize("file", sorted(FOUND.iterdir()), ids=lambda file: file.name)
def test_what_fuzzing_has_found_is_refused(file: Path) -> None:
    """Inputs that once ended the process or were refused in others' words: READER-what-it-is."""
    assert not read(file.name.partition("-")[0], file.read_bytes())


def tensor(**fields: object) -> bytes:
    return with_header(json.dumps({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], **fields}}).encode())


def config(**sizes: object) -> bytes:
    return json.dumps({**CONFIG_JSON, **sizes}).encode()


LETTERS = [bytes([code]) for code in range(97, 107)]
LAUGHS = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    new + b": &" + new + b" [" + b",".join([b"*" + old] * 9) + b"]\n" for old, new in itertools.pairwise(LETTERS)
)
MOE = {"model_type": "qwen3_moe", "moe_intermediate_size": 8}
BOMBS = {
    "an endless shape of nothing": ("safetensors", tensor(shape=[2**62, 0])),
    "a header longer than the file": ("safetensors", b"\xff" * 7 + b"\x7f" + b"{}"),
    "a billion layers": ("config", config(num_hidden_layers=2**31 - 1)),
    "a billion experts": ("config", config(num_experts=2**31 - 1, **MOE)),
    "a billion columns": ("config", config(hidden_size=2**31 - 1)),
    "deep JSON": ("config", b"[" * 100_000),
    "a billion laughs": ("recipe", LAUGHS),
    "an endless block": (
        "adapter_config", samples("adapter_config")[0].replace(b'"oft_block_size": 4', b'"oft_block_size": 1e99')),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), BOMBS.values(), ids=BOMBS)
def test_a_few_bytes_that_promise_much_cost_little(name: str, content: bytes) -> None:
    read(name, samples(name)[0])
    before = peak()
    assert not read(name, content)
    assert peak() - before < 32 * MIB


@settings(max_examples=20, derandomize=True, database=None)
@given(st.sampled_from(list(READERS)), st.binary(max_size=2000))
def test_noise_is_refused_or_empty(name: str, content: bytes) -> None:
    read(name, content)
