"""A checkpoint with the names and the number of Kimi-K2.6's tensors, each of them tiny.

61 layers of latent attention, the first dense, the others with 384 experts and a shared one; the experts' weights in
INT4 of group 32 as compressed-tensors packs them, everything else BF16; a vision tower of 27 blocks beside it.
Listed by hand here, so that what the code expects is compared with something.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "checkpoints"), str(ROOT), str(ROOT / "kernels")]

from small_models import TOKENIZER  # noqa: E402

from orbit_core.checkpoints.hf import HFWriter, write_json  # noqa: E402
from orbit_core.checkpoints.tensorfile import TensorMeta  # noqa: E402

HIDDEN, INNER, EXPERT, VOCABULARY, SEEN = 32, 64, 32, 40, 8
HEADS, QUERY, LATENT, NOPE, ROPE, VALUE = 2, 16, 16, 8, 4, 8
SHARD_BYTES = 4 << 20  # 64 shards or so, as there are


def config_of_kimi(layers: int = 61, experts: int = 384) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "kimi_k2",
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "moe_intermediate_size": EXPERT,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "q_lora_rank": QUERY,
            "kv_lora_rank": LATENT,
            "qk_nope_head_dim": NOPE,
            "qk_rope_head_dim": ROPE,
            "v_head_dim": VALUE,
            "n_routed_experts": experts,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": False,
        },
        "vision_config": {"vt_hidden_size": SEEN, "vt_num_hidden_layers": 27},
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*"],
        },
    }


def names_of_kimi(layers: int = 61, experts: int = 384) -> dict[str, TensorMeta]:
    """Name -> dtype and shape, in the order of the layers."""
    shapes: dict[str, tuple[int, ...]] = {"language_model.model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    metas: dict[str, TensorMeta] = {}
    for layer in range(layers):
        base = f"language_model.model.layers.{layer}"
        shapes |= {
            f"{base}.input_layernorm.weight": (HIDDEN,),
            f"{base}.post_attention_layernorm.weight": (HIDDEN,),
            f"{base}.self_attn.q_a_proj.weight": (QUERY, HIDDEN),
            f"{base}.self_attn.q_a_layernorm.weight": (QUERY,),
            f"{base}.self_attn.q_b_proj.weight": (HEADS * (NOPE + ROPE), QUERY),
            f"{base}.self_attn.kv_a_proj_with_mqa.weight": (LATENT + ROPE, HIDDEN),
            f"{base}.self_attn.kv_a_layernorm.weight": (LATENT,),
            f"{base}.self_attn.kv_b_proj.weight": (HEADS * (NOPE + VALUE), LATENT),
            f"{base}.self_attn.o_proj.weight": (HIDDEN, HEADS * VALUE),
        }
        if layer == 0:
            shapes |= {f"{base}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
            shapes[f"{base}.mlp.down_proj.weight"] = (HIDDEN, INNER)
            continue
        shapes[f"{base}.mlp.gate.weight"] = (experts, HIDDEN)
        metas[f"{base}.mlp.gate.e_score_correction_bias"] = TensorMeta(torch.float32, (experts,))
        shapes |= {f"{base}.mlp.shared_experts.{name}_proj.weight": (EXPERT, HIDDEN) for name in ("gate", "up")}
        shapes[f"{base}.mlp.shared_experts.down_proj.weight"] = (HIDDEN, EXPERT)
        for expert in range(experts):
            for name, rows, width in (("gate", EXPERT, HIDDEN), ("up", EXPERT, HIDDEN), ("down", HIDDEN, EXPERT)):
                module = f"{base}.mlp.experts.{expert}.{name}_proj"
                metas[f"{module}.weight_packed"] = TensorMeta(torch.int32, (rows, width // 8))
                metas[f"{module}.weight_scale"] = TensorMeta(torch.bfloat16, (rows, width // 32))
                metas[f"{module}.weight_shape"] = TensorMeta(torch.int32, (2,))
    shapes |= {
        "language_model.model.norm.weight": (HIDDEN,),
        "language_model.lm_head.weight": (VOCABULARY, HIDDEN),
        "vision_tower.patch_embed.pos_emb.weight": (4, 4, SEEN),
        "vision_tower.patch_embed.proj.weight": (SEEN, 3, 2, 2),
        "vision_tower.patch_embed.proj.bias": (SEEN,),
    }
    seeing = [(f"vision_tower.encoder.blocks.{block}", name) for block in range(27)
              for name in ("norm0", "norm1", "wqkv", "wo", "mlp.fc0", "mlp.fc1")]  # fmt: skip
    seeing += [("vision_tower.encoder", "final_layernorm"), ("mm_projector", "pre_norm"),
               ("mm_projector", "proj.0"), ("mm_projector", "proj.2")]  # fmt: skip
    for base, name in seeing:
        norm = "norm" in name
        shapes[f"{base}.{name}.weight"] = (SEEN,) if norm else (SEEN, SEEN)
        shapes[f"{base}.{name}.bias"] = (SEEN,)
    return metas | {name: TensorMeta(torch.bfloat16, shape) for name, shape in shapes.items()}


def write_kimi(folder: Path, layers: int = 61, experts: int = 384) -> int:
    """Write it; returns how many tensors there are."""
    plan = names_of_kimi(layers, experts)
    with HFWriter(folder, plan, SHARD_BYTES) as writer:
        for name, meta in plan.items():
            if name.endswith("weight_shape"):
                shape = plan[name.replace("weight_shape", "weight_packed")].shape
                writer.add(name, torch.tensor([shape[0], shape[1] * 8], dtype=torch.int32))
            else:
                writer.add(name, torch.full(meta.shape, 1, dtype=meta.dtype))
    write_json(folder / "config.json", config_of_kimi(layers, experts))
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return len(plan)
