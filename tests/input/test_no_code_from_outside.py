"""Data stays data: no unpickler, no evaluator and no stranger's module is ever given what lies in a file."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from doors import World, edit_json

from orbit_core.data.encode import load_tokenizer
from orbit_core.errors import InputError

ROOT = Path(__file__).parents[2]
HOUSES = ("kernels", "orbit_core", "k8s", "tasks", "flows")
FORBIDDEN = {  # what runs or rebuilds whatever the bytes say
    "pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.load", "_pickle.loads", "cloudpickle.load",
    "cloudpickle.loads", "dill.load", "dill.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open",
    "pandas.read_pickle", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.export.load",
    "torch.ops.load_library", "torch.classes.load_library", "torch.distributed.checkpoint.load",
    "torch.distributed.checkpoint.FileSystemReader", "torch.distributed.checkpoint.filesystem.FileSystemReader",
    "torch.serialization.add_safe_globals", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "eval",
    "exec", "compile", "runpy.run_path", "runpy.run_module", "os.system", "os.popen",
}  # fmt: skip
BY_NAME = {  # modules imported by a name that is not in the source, and where that name comes from
    "orbit_core/modeling/families.py": "a list of ours",
    "orbit_core/steps/runner.py": "a step of ours, or of a package that the command line names",
    "orbit_core/rl/judges.py": "the reward.function of the recipe",
}


def offences(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (name for base in node.bases if (name := full_name(base, known)) in FORBIDDEN)
        if not isinstance(node, ast.Call):
            continue
        called = full_name(node.func, known)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in FORBIDDEN:
            yield called
        if called == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if called == "yaml.load" or called == "yaml.load_all":
            yield "yaml.load: use safe_load"
        if given.get("allow_pickle", "False") != "False" or given.get("trust_remote_code", "False") != "False":
            yield f"{called} of what may be code"
        if called.endswith(".from_pretrained") and "trust_remote_code" not in given and "Auto" in called:
            yield f"{called} without trust_remote_code=False"
        if called in ("importlib.import_module", "__import__") and not isinstance(node.args[0], ast.Constant):
            yield "import by name"


def full_name(node: ast.expr, known: dict[str, str]) -> str:
    first, dot, rest = ast.unparse(node).partition(".")
    return known.get(first, first) + dot + rest


@pytest.mark.parametrize("house", HOUSES)
def test_no_source_gives_outside_bytes_to_an_interpreter(house: str) -> None:
    for file in sorted((ROOT / house).rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        found = [each for each in offences(file.read_text()) if not (each == "import by name" and name in BY_NAME)]
        assert not found, f"{name}: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b)",
        "import pickle as p\np.load(f)",
        "from pickle import load as read\nread(f)",
        "import pickle\nclass Mine(pickle.Unpickler): ...",
        "import torch\ntorch.load(f)",
        "from torch import load\nload(f, weights_only=False)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import torch.distributed.checkpoint as dcp\ndcp.load(s)",
        "import yaml\nyaml.load(f, Loader=yaml.Loader)",
        "from transformers import AutoConfig\nAutoConfig.from_pretrained(d)",
        "from transformers import AutoConfig\nAutoConfig.from_pretrained(d, trust_remote_code=flag)",
        "eval(text)",
        "import importlib\nimportlib.import_module(name)",
    ],
)
def test_the_scan_finds_what_it_looks_for(source: str) -> None:
    assert list(offences(source))


EVIL = "import pathlib\npathlib.Path({mark!r}).touch()\nclass Evil: ...\n"


def test_code_beside_a_tokenizer_is_not_run(world: World, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"

    def damage(base: Path) -> None:
        (base / "evil.py").write_text(EVIL.format(mark=str(mark)))
        (base / "tokenizer.json").unlink()
        (base / "vocab.json").write_text("{}")
        edit_json(
            base / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}
        )
        edit_json(base / "config.json", model_type="qwen3")

    error = world.with_base(tmp_path / "base", damage).refused("quantize")
    assert "tokenizer" in error.what and not mark.exists()


def test_a_chat_template_reaches_nothing_but_its_messages(world: World, tmp_path: Path) -> None:
    template = "{{ cycler.__init__.__globals__.os.system('true') }}"
    own = world.with_base(
        tmp_path / "base", lambda base: edit_json(base / "tokenizer_config.json", chat_template=template)
    )
    tokenizer = load_tokenizer(own.base)
    with pytest.raises(InputError, match="chat template"):
        tokenizer.render([{"role": "user", "content": json.dumps("hello")}])
