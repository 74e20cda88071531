"""Damage is refused for good; what the disk or the network does may be tried again."""

from __future__ import annotations

import errno

import pyarrow as pa
import pytest

from orbit_core.errors import InputError
from orbit_core.store.parquet import damage_refused

NO_TEXT = UnicodeDecodeError("utf-8", b"x", 0, 1, "?")


@pytest.mark.parametrize("damage", [OSError("cannot deserialize thrift"), pa.ArrowInvalid("magic bytes"), NO_TEXT])
def test_damage_is_a_wrong_input(damage: Exception) -> None:
    with pytest.raises(InputError) as caught, damage_refused("file", "Parquet", "write it again"):
        raise damage
    assert type(damage).__name__ in caught.value.found


@pytest.mark.parametrize(
    "trouble",
    [ConnectionResetError("peer"), OSError(errno.EIO, "disk"), TimeoutError(), FileNotFoundError(), PermissionError()],
)
def test_trouble_of_the_machine_passes_through(trouble: OSError) -> None:
    with pytest.raises(type(trouble)), damage_refused("file", "Parquet", "write it again"):
        raise trouble
