"""Number formats and the operations on them: what a packed byte means, and what is computed with it.

Knows only torch. Every operation here is the readable reference; a fast path has the same signature and is held to it.
"""

from .adapted import lora_linear, oft_linear
from .formats import FORMATS, FormatError, FormatSpec, PackedWeight, dequantize, detect, is_finite, quantize, read
from .formats.stack import PackedStack
from .grouped import grouped_linear
from .linear import linear
from .lora import lora_delta
from .modes import is_batch_invariant, set_batch_invariant
from .oft import cayley_neumann, orthogonality_error, rotate, rotate_slices, skew, skew_norm
from .w8a8 import linear_w8a8, quantize_activations

__all__ = [
    "FORMATS",
    "FormatError",
    "FormatSpec",
    "PackedStack",
    "PackedWeight",
    "cayley_neumann",
    "dequantize",
    "detect",
    "grouped_linear",
    "is_batch_invariant",
    "is_finite",
    "linear",
    "linear_w8a8",
    "lora_delta",
    "lora_linear",
    "oft_linear",
    "orthogonality_error",
    "quantize",
    "quantize_activations",
    "read",
    "rotate",
    "rotate_slices",
    "set_batch_invariant",
    "skew",
    "skew_norm",
]
