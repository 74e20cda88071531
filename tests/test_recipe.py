"""A recipe is validated once, at the door, with messages that name field, value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from orbit_core.errors import InputError
from orbit_core.pipeline import plan
from orbit_core.recipe import OFT, LoRA, Recipe, as_yaml

RECIPES = Path(__file__).parents[1] / "flows" / "recipes"
DEMO = RECIPES / "demo.yaml"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_in_the_house_is_valid(path: Path) -> None:
    assert Recipe.load(path).name


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("algoritm.steps", 3, ["algoritm", "did you mean 'algorithm'"]),
        ("adapter.block", 3, ["adapter.oft.block", "did you mean 'block_size'"]),
        ("precision.group_size", 64, ["precision", "[32, 128]", "64"]),
        ("precision.format", "int3", ["precision.format", "'int4'", "int3"]),
        ("algorithm.steps", "many", ["algorithm.steps", "integer", "many"]),
        ("name", "A b", ["name", "A b"]),
        ("evaluation.k", [1, 64], ["pass@64", "samples=4"]),
        ("adapter.kind", "dora", ["adapter", "'oft'", "'lora'"]),
    ],
)
def test_a_mistake_is_named(field: str, value: object, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.load(DEMO, {field: value})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.exit_code == 42


def test_a_missing_broken_or_binary_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    with pytest.raises(InputError, match="expected: YAML"):
        Recipe.load(tmp_path / "broken.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        Recipe.load(tmp_path / "binary.yaml")


def test_variants_set_the_published_defaults_and_fields_override_them() -> None:
    grpo = Recipe.load(DEMO).algorithm
    assert (grpo.std, grpo.aggregation, grpo.clip_upper) == (True, "sequence", 0.2)
    dr = Recipe.load(DEMO, {"algorithm.variant": "dr_grpo"}).algorithm
    assert (dr.std, dr.aggregation) == (False, "constant")
    dapo = Recipe.load(DEMO, {"algorithm.variant": "dapo", "algorithm.clip_high": 0.3}).algorithm
    assert (dapo.aggregation, dapo.clip_upper) == ("token", 0.3)


def test_the_adapter_is_chosen_by_one_word() -> None:
    assert isinstance(Recipe.load(DEMO).adapter, OFT)
    assert isinstance(Recipe.load(DEMO, {"adapter": {"kind": "lora"}}).adapter, LoRA)


def test_a_group_size_left_out_is_the_formats_own() -> None:
    written = plan(Recipe.load(DEMO), "store")
    left_out = plan(Recipe.load(DEMO, {"precision": {"format": "int4"}}), "store")
    assert {n: s.digest for n, s in written.items()} == {n: s.digest for n, s in left_out.items()}
    assert Recipe.load(DEMO, {"precision": {"format": "nvfp4"}}).precision.group == 16
    assert Recipe.load(DEMO, {"precision": {"format": "bf16"}}).precision.group == 0


def test_a_changed_learning_rate_reuses_the_quantised_base() -> None:
    before = plan(Recipe.load(DEMO), "store")
    after = plan(Recipe.load(DEMO, {"algorithm.optimizer.learning_rate": 1e-3}), "store")
    changed = [name for name in before if before[name].digest != after[name].digest]
    assert changed == ["train", "evaluate", "publish", "report"]


def test_a_model_that_no_engine_of_the_recipe_computes_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    local = {"model": {"kind": "local", "path": str(tmp_path)}}
    recipe = Recipe.load(DEMO, local)
    with pytest.raises(InputError, match=r"(?s)deepseek_v3.*engines\.trainer and engines\.rollout"):
        plan(recipe, "/nowhere")
    elsewhere = {"engines.trainer": "megatron", "engines.rollout": "sglang"}
    assert "quantize" in plan(Recipe.load(DEMO, {**local, **elsewhere}), "/nowhere")


def test_digests_depend_neither_on_the_store_nor_on_resources() -> None:
    one = plan(Recipe.load(DEMO), "here")
    two = plan(Recipe.load(DEMO, {"resources": {"train": {"gpus": 8}}}), "s3://there")
    assert {n: s.digest for n, s in one.items()} == {n: s.digest for n, s in two.items()}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    )
)
@example("a line\x85and another")
@example("多語 prompts stay \u2028 readable")
def test_what_is_shown_as_yaml_reads_as_it_was(value: object) -> None:
    assert yaml.safe_load(as_yaml({"text": value})) == {"text": value}


def test_what_need_not_be_escaped_is_not() -> None:
    assert "多語" in as_yaml({"text": "多語"})
