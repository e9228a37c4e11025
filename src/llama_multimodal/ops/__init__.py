"""The only entry points to heavy arithmetic. Each op has one file: signature, torch reference, dispatch."""

from ._dispatch import BACKENDS, available, use_backend
from .attention import attention
from .cross_attention import Span, cross_attention
from .linear import linear
from .rms_norm import rms_norm
from .rope import apply_rope, rope_angles, rope_frequencies
from .swiglu import swiglu

__all__ = [
    "BACKENDS",
    "Span",
    "apply_rope",
    "attention",
    "available",
    "cross_attention",
    "linear",
    "rms_norm",
    "rope_angles",
    "rope_frequencies",
    "swiglu",
    "use_backend",
]
