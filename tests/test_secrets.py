"""What is masked, what is refused, and that nothing else is touched."""

from __future__ import annotations

import io
import logging

import pytest

from orbit_core.errors import InputError
from orbit_core.recipe import Recipe
from orbit_core.secrets import MaskingFormatter, masked, masked_all, refuse_secrets

CANARY = "canary-7d1f33aa"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "DB_PASSWORD", "PREFECT_API_AUTH_STRING"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "harmless-value")
    monkeypatch.setenv("SHORT_TOKEN", "the")


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("get https://me:hunter2@host/x failed", "get https://***@host/x failed"),
        ("postgresql+asyncpg://u:p%40ss@db:5432/prefect", "postgresql+asyncpg://***@db:5432/prefect"),
        ("https://ghp_abcdef@github.com/a/b", "https://***@github.com/a/b"),
        ("https://b.s3/k?X-Amz-Date=1&X-Amz-Signature=abc&x=1", "https://b.s3/k?X-Amz-Date=1&X-Amz-Signature=***&x=1"),
        ("https://h/k?X-Amz-Credential=AKIA/1&X-Amz-Security-Token=t", "https://h/k?X-Amz-Credential=***&X-Amz-Security-Token=***"),
        ("https://a.blob/c?sv=1&sig=abc%3D'", "https://a.blob/c?sv=1&sig=***'"),
        (f"token is {CANARY}-HF_TOKEN.", "token is ***."),
        ("KeyError: 'canary-7d1f33aa-AWS_SECRET_ACCESS_KEY'", "KeyError: '***'"),
        ("reads /var/run/secrets/token, the harmless-value", "reads /var/run/secrets/token, the harmless-value"),
        ("s3://bucket/prefix?, a@b.c, 1+1=2 & 3", "s3://bucket/prefix?, a@b.c, 1+1=2 & 3"),
        ("user@host: https://host/a@b?q=signature", "user@host: https://host/a@b?q=signature"),
    ],
)  # fmt: skip
def test_secrets_are_masked_and_nothing_else(said: str, heard: str) -> None:
    assert masked(said) == heard
    assert masked_all({"a": [said, 3, None]}) == {"a": [heard, 3, None]}


def test_logs_are_masked_with_their_tracebacks() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(MaskingFormatter("%(message)s"))
    logger = logging.Logger("of this test")
    logger.addHandler(handler)
    try:
        raise ValueError(f"{CANARY}-HF_TOKEN")
    except ValueError:
        logger.exception("cannot reach %s", "https://me:hunter2@host")
    text = stream.getvalue()
    assert CANARY not in text and "hunter2" not in text and "ValueError: ***" in text


@pytest.mark.parametrize(
    "secret", ["https://me:hunter2@host/x.jsonl", "https://h/x?X-Amz-Signature=hunter2", f"{CANARY}-HF_TOKEN"]
)
@pytest.mark.parametrize("field", ["model", "data", "warm_start", "nowhere"])
def test_a_recipe_with_a_secret_is_refused_and_the_secret_not_repeated(field: str, secret: str) -> None:
    content = {"model": {"kind": "pretrain"}, "data": {"kind": "file", "path": "rows.jsonl"}}
    content[field] = {"kind": "local", "path": secret} if field == "model" else secret  # type: ignore[assignment]
    for door in (Recipe.parse, Recipe.model_validate):
        with pytest.raises(InputError) as caught:
            door(content)
        assert field in caught.value.what and caught.value.fix
        assert "hunter2" not in str(caught.value) and CANARY not in str(caught.value)


def test_a_recipe_that_names_itself_is_looked_at_once() -> None:
    content: dict[str, object] = {"a": "b"}
    content["itself"] = [content] * 9
    refuse_secrets(content, "recipe")
