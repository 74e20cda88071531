"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """`ok`; `note`: nothing to do, or not to be seen from here; `wrong`: a run would fail or wait for ever."""

    level: Literal["ok", "note", "wrong"]
    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.level:5}  {self.what:20}  {self.found}"
        return f"{line}\n{'':7}{'what to do:':20}  {self.fix}" if self.fix else line
