"""Quantize and convert go on where a killed try was: the same bytes, and no tensor done twice.

`kill_converter.py` kills at every boundary; here at each seventeenth of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

KILLER = Path(__file__).parent / "kill_converter.py"


def test_a_killed_quantize_or_convert_goes_on_at_the_tensor_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, str(KILLER), str(tmp_path), "--every", "17"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for step, found in json.loads(done.stdout).items():
        assert found["units"] >= 14 and found["files"] >= 5, (step, "several shards of several tensors")
        assert {"_append", "rename", "link"} <= set(found["kinds"])
        assert found["different"] == [] and found["repeated"] == [], step
