"""Everything that reads bytes which somebody else wrote, one function each: bytes in, nothing or OrbitError out.

`READERS` name -> function(folder, content): lays the bytes where such a file lies and opens it as a run would.
`SAMPLES` name -> a valid file of that kind, small: what mutations start from.
Used by test_fuzzed_readers.py (hypothesis, every run of the tests) and fuzz.py (coverage-guided, by the hour).
"""

from __future__ import annotations

import atexit
import io
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from orbit_core.adapters.peft_io import CONFIG, WEIGHTS, read_adapter, save_adapter
from orbit_core.checkpoints.hf import INDEX, HFCheckpoint, HFWriter, write_json
from orbit_core.checkpoints.megatron import MegatronCheckpoint, to_megatron
from orbit_core.checkpoints.quantization import precision_of
from orbit_core.checkpoints.tensorfile import TensorMeta
from orbit_core.data.encode import load_tokenizer, stop_ids
from orbit_core.data.files import read_rows
from orbit_core.data.prompts import read_prompts, write_prompts
from orbit_core.errors import OrbitError
from orbit_core.recipe import OFT, Recipe
from orbit_core.rl.types import Prompt
from orbit_core.steps.quantize import check_companions, take_stock
from orbit_core.store import open_store
from orbit_core.store.artifacts import ArtifactStore
from orbit_core.store.rollouts import SCHEMA, Commit, RolloutReader, StateFile, encode_step, rollouts_path

CONFIG_JSON = {
    "model_type": "qwen3",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 4,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
SHAPES = {
    "model.embed_tokens.weight": (4, 8),
    "model.norm.weight": (8,),
    **{f"model.layers.0.{name}_layernorm.weight": (8,) for name in ("input", "post_attention")},
    **{f"model.layers.0.self_attn.{name}_norm.weight": (4,) for name in "qk"},
    **{f"model.layers.0.self_attn.{name}_proj.weight": (8, 8) for name in "qo"},
    **{f"model.layers.0.self_attn.{name}_proj.weight": (4, 8) for name in "kv"},
    **{f"model.layers.0.mlp.{name}_proj.weight": (8, 8) for name in ("gate", "up", "down")},
}  # fmt: skip
TOKENIZER = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
 "pre_tokenizer": null, "post_processor": null, "decoder": null,
 "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 3}, "unk_token": "a"}}"""
QUANTIZED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 4}}},
    "ignore": ["lm_head"],
}
DIGEST = "0" * 64
Reader = Callable[[Path, bytes], None]


@cache
def good() -> Path:
    """A folder with one valid thing of each kind."""
    folder = _place("good")
    plan = {name: TensorMeta(torch.bfloat16, shape) for name, shape in SHAPES.items()}
    for name, limit in (("model", 10**9), ("shards", 300)):
        with HFWriter(folder / name, plan, limit) as writer:
            for tensor, meta in plan.items():
                writer.add(tensor, torch.ones(meta.shape, dtype=meta.dtype))
        write_json(folder / name / "config.json", CONFIG_JSON)
        (folder / name / "tokenizer.json").write_text(TOKENIZER)
    (folder / "megatron").mkdir()
    to_megatron(folder / "model", folder / "megatron")
    site = "base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight"
    save_adapter(folder / "adapter", {site: torch.zeros(2, 6)}, OFT(block_size=4, targets=("q_proj",)), "m", DIGEST)
    write_prompts(folder / "train.parquet", [Prompt("a", "1+1=", "2", {}), Prompt("b", "1+2=", {"x": [3]}, {"k": 1})])
    return folder


def safetensors(folder: Path, content: bytes) -> None:
    model = _replaced(folder, "model", "model.safetensors", content)
    _use(HFCheckpoint(model))


def index(folder: Path, content: bytes) -> None:
    _use(HFCheckpoint(_replaced(folder, "shards", INDEX, content)))


def config(folder: Path, content: bytes) -> None:
    model = _replaced(folder, "model", "config.json", content)
    base = HFCheckpoint(model)
    check_companions(base)
    _use(base)


def companions(folder: Path, content: bytes) -> None:
    """generation_config.json and tokenizer_config.json are read alike; tokenizer.json is the tokenizers library's."""
    model = _replaced(folder, "model", "generation_config.json", content)
    stop_ids(model)
    (model / "tokenizer_config.json").write_bytes(content)
    load_tokenizer(model)


def adapter_config(folder: Path, content: bytes) -> None:
    read_adapter(_replaced(folder, "adapter", CONFIG, content))


def adapter_weights(folder: Path, content: bytes) -> None:
    read_adapter(_replaced(folder, "adapter", WEIGHTS, content))


def torch_dist(folder: Path, content: bytes) -> None:
    checkpoint = MegatronCheckpoint(_replaced(folder, "megatron", "orbit.json", content))
    for name in checkpoint.metas:
        checkpoint.tensor(name)


def prompt_parquet(folder: Path, content: bytes) -> None:
    (folder / "rows").write_bytes(b"PAR1" + content[4:])
    read_rows(folder / "rows", "rows")


def jsonl(folder: Path, content: bytes) -> None:
    (folder / "rows").write_bytes(content)
    read_rows(folder / "rows", "rows")


def prompt_table(folder: Path, content: bytes) -> None:
    (folder / "train.parquet").write_bytes(content)
    read_prompts(folder / "train.parquet")


def rollouts(folder: Path, content: bytes) -> None:
    file = folder / rollouts_path("r", 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    RolloutReader(open_store(folder), "r").rows(0)


def manifest(folder: Path, content: bytes) -> None:
    file = folder / "artifacts" / "data" / f"{DIGEST[:16]}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    ArtifactStore(open_store(folder)).find("data", DIGEST)


def recipe(folder: Path, content: bytes) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    Recipe.load(folder / "recipe.yaml")


READERS: dict[str, Reader] = {
    each.__name__: each
    for each in (safetensors, index, config, companions, adapter_config, adapter_weights, torch_dist, prompt_parquet,
                 jsonl, prompt_table, rollouts, manifest, recipe)
}  # fmt: skip


def read(name: str, content: bytes) -> bool:
    """Whether the reader took the bytes; any exception other than our own error passes through."""
    try:
        READERS[name](_place(name), content)
    except OrbitError:
        return False
    return True


@cache
def _place(name: str) -> Path:
    """A folder of the reader's own, used again for each input and removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="orbit-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def samples(name: str) -> list[bytes]:
    """Valid files of the kind."""
    folder = good()
    parquet = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "b"], "label": ["1", "2"], "id": ["x", "y"]}), parquet)
    commit = Commit(run="r", step=0, rows=0, state=StateFile(path="s", sha256=DIGEST), adapter_version=1,
                    adapter_digest="a", metrics={"loss": 0.5}, previous=None)  # fmt: skip
    rows = [{"prompt": "a", "label": 1}, {"id": "x", "prompt": [{"role": "user", "content": "é"}], "label": [1, None]}]
    small = {"model": {"kind": "local", "path": "m"}, "data": {"kind": "file", "path": "p"}, "adapter": {"kind": "oft"}}
    about = {"schema_version": 1, "step": "data", "digest": DIGEST, "version": 1, "params": {}, "inputs": {},
             "attempt": "a", "files": {"f": {"sha256": DIGEST, "size": 1}}, "facts": {},
             "code_version": "1"}  # fmt: skip
    return {
        "safetensors": [(folder / "model" / "model.safetensors").read_bytes()],
        "index": [(folder / "shards" / INDEX).read_bytes()],
        "config": [_json(CONFIG_JSON), _json({**CONFIG_JSON, "quantization_config": QUANTIZED})],
        "companions": [_json({"eos_token_id": [1], "eos_token": {"content": "a"}}), _json({"eos_token_id": 1})],
        "adapter_config": [(folder / "adapter" / CONFIG).read_bytes()],
        "adapter_weights": [(folder / "adapter" / WEIGHTS).read_bytes()],
        "torch_dist": [(folder / "megatron" / "orbit.json").read_bytes()],
        "prompt_parquet": [parquet.getvalue()],
        "jsonl": [b"\n".join(_json(row) for row in rows)],
        "prompt_table": [(folder / "train.parquet").read_bytes()],
        "rollouts": [encode_step({field: [] for field in SCHEMA.names}, commit)],
        "manifest": [_json(about)],
        "recipe": [yaml.safe_dump(small).encode()],
    }[name]


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file of this header."""
    return struct.pack("<Q", len(header)) + header + data


def _use(checkpoint: HFCheckpoint) -> None:
    """What the quantize step does before it begins, and every tensor once."""
    precision_of(checkpoint)
    take_stock(checkpoint)
    for _ in checkpoint.load_packed():
        pass
    for _ in checkpoint.load_plain():
        pass


def _replaced(folder: Path, kind: str, name: str, content: bytes) -> Path:
    """A copy of a valid directory with one file replaced."""
    target = folder / kind
    if not target.exists():
        shutil.copytree(good() / kind, target)
    (target / name).write_bytes(content)
    return target


def _json(content: object) -> bytes:
    return json.dumps(content).encode()
