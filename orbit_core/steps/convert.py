"""Step `convert`: the quantised HF base -> Megatron-Core's `torch_dist` layout, codes and scales carried as bytes.

Input `quantized`: HF directory. Output: the torch_dist checkpoint with `orbit.json` (checkpoints/megatron.py). The way
back is `checkpoints.megatron.to_hf`; it returns the same bytes.
"""

from __future__ import annotations

from typing import Any

from orbit_core.checkpoints.megatron import to_megatron
from orbit_core.steps.contract import StepContext
from orbit_core.steps.quantize import reporter
from orbit_core.store.growing import Growing


def run(context: StepContext) -> dict[str, Any]:
    """Facts: format, tensors, bytes, refined_scales (fused FP8 scales whose row grid had to be refined)."""
    growing = Growing(context.unfinished)
    facts = to_megatron(context.inputs["quantized"], context.output, reporter(context), growing=growing)
    context.digests.update(growing.digests)
    return facts
