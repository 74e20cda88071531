"""`quantization_config` as a stranger wrote it, checked once: what is read of it has the types that readers expect.

What it means is for quantization.py and orbit_kernels to say; here nothing is interpreted.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from orbit_core.errors import InputError

GIVE = "give the unquantised model, or one in a supported scheme"


class _Weights(BaseModel):
    model_config = ConfigDict(strict=True)
    num_bits: int | None = None
    type: str | None = None
    strategy: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    block_structure: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None


class _Group(BaseModel):
    weights: _Weights | None = None


class _Block(BaseModel):
    """The parts of a quantization_config that are read here, of whichever dialect; the others may be anything."""

    model_config = ConfigDict(strict=True)
    quant_method: str
    quant_algo: str | None = None
    config_groups: dict[str, _Group] | None = None
    weight_block_size: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    ignore: list[str] | None = None
    exclude_modules: list[str] | None = None
    modules_to_not_convert: list[str] | None = None


def checked_block(found: Any, where: str) -> dict[str, Any] | None:
    """A quantization_config as it was found (None: there is none), its parts of the types that are read here."""
    if found is None:
        return None
    try:
        _Block.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, ("quantization_config", *first["loc"])))
        raise InputError(f"{where}: {field}", first["msg"], repr(first["input"])[:80], GIVE) from None
    block: dict[str, Any] = found
    return block
