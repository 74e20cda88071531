"""What pyarrow raises when a Parquet file is damaged, in our words; what the disk or the network raises, as it is.

pyarrow reports damage in many ways, also as a plain OSError without a number. An OSError with a number, or of a kind of
its own, is about the machine: trying again may help, so it must not end a run as a wrong input does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from orbit_core.errors import InputError


@contextmanager
def damage_refused(what: str, expected: str, fix: str) -> Iterator[None]:
    """Raises InputError(what, expected, ..., fix) for damage that is found within."""
    try:
        yield
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise
        raise InputError(what, expected, _short(error), fix) from None
    except (pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(what, expected, _short(error), fix) from None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
