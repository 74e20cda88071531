"""A person's own model and prompts, everything in an object store: a Qwen3-MoE directory, chat messages in JSONL, S3.

Every step is its own process, as in a run; nothing of the demo's homework is involved.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from orbit_core.executors.local import LocalExecutor
from orbit_core.pipeline import plan
from orbit_core.recipe import Recipe
from orbit_core.store import open_store
from orbit_core.store.artifacts import Artifact
from orbit_core.store.rollouts import RolloutReader

CANARY = "canary-7d1f33aa"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "PREFECT_API_KEY", "DB_PASSWORD", "MY_SECRET")
ALPHABET = "0123456789+=? abcdefghijklmnopqrstuvwxyz"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

    words = ["<pad>", "<eos>", *ALPHABET]
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=128, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path / "model"
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"prompt": [{"role": "user", "content": f"what is {a}+{b}?"}], "label": str(a + b), "metadata": {"kind": "sum"}}
        for a in range(8)
        for b in range(8)
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def vowels(prompt: Any, response: str, label: str) -> float:
    """A reward that an untrained model earns now and then, and that says every secret of its environment."""
    print("\n".join(f"{name}={value}" for name, value in os.environ.items() if CANARY in value))
    return float(sum(letter in "aeiou" for letter in response) >= 2)


def test_a_moe_directory_and_chat_prompts_run_through_all_steps_on_s3(
    model: Path, prompts: Path, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    for name in SECRETS:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    monkeypatch.setenv("CATALOGUE_URL", f"postgresql://me:{CANARY}@host/db")
    monkeypatch.setenv("PRESIGNED", f"https://host/file?X-Amz-Signature={CANARY}&part=1")
    recipe = Recipe.parse(
        {
            "name": "own",
            "model": {"kind": "local", "path": str(model)},
            "adapter": {"kind": "oft", "block_size": 16, "targets": ["q_proj", "v_proj", "gate_proj", "down_proj"]},
            "data": {"kind": "file", "path": str(prompts), "heldout": 16},
            "reward": {"kind": "python", "function": "test_local_model:vowels"},
            "algorithm": {
                "variant": "dapo",
                "steps": 2,
                "prompts_per_step": 4,
                "samples_per_prompt": 4,
                "kl": {"coefficient": 0.01},
                "sampling": {"max_new_tokens": 8},
            },
            "engines": {"threads": 1},
            "evaluation": {"prompts": 16, "samples": 2, "k": [1, 2]},
            "publication": {"merge": True},
        }
    )
    done: dict[str, Artifact] = {}
    executor = LocalExecutor(scratch=tmp_path / "scratch")
    events: list[dict[str, Any]] = []
    for step, spec in plan(recipe, s3_url).items():
        done[step] = executor.run(spec, events.append)
    assert done["preflight"].facts["ok"]
    assert done["train"].facts["logprob_gap_mean"] <= 1e-6
    assert done["evaluate"].facts["prompts"] == 16
    reader = RolloutReader(open_store(s3_url), done["train"].facts["run"])
    assert [commit.rows for commit in reader.commits()] == [16, 16]
    files = set(open_store(s3_url).list(done["publish"].prefix))
    assert f"{done['publish'].prefix}/merged/model.safetensors" in files
    assert f"{done['publish'].prefix}/adapter/adapter_model.safetensors" in files
    heard = json.dumps(events)
    assert "postgresql://***@host/db" in heard and "X-Amz-Signature=***&part=1" in heard, "the canary has sung"
    for path, text in [("what the steps said", heard), *everything_in(s3_url)]:
        assert CANARY not in text and "test-secret-value" not in text and "test-key" not in text, path
        assert str(tmp_path) not in text or path == "what the steps said", path


def everything_in(store: str) -> Iterator[tuple[str, str]]:
    """(path, contents) of all that the run has written; of Parquet its values and its footer."""
    for path in open_store(store).list():
        content = open_store(store).read(path)
        if path.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(content))
            content = (str(table.to_pydict()) + str(table.schema.metadata)).encode()
        yield path, content.decode(errors="replace")
