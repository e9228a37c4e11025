"""The only entry points to heavy arithmetic. Each op has one file: signature, torch reference, dispatch."""

from ._dispatch import BACKENDS, available, use_backend
from .attention import attention, segment_attention
from .cross_attention import KeyRanges, Span, cross_attention
from .decode_attention import decode_attention, kv_write, paged_decode_attention
from .decode_blocks import DecoderBlock, PackedProduct, decode_blocks, paged_decode_blocks
from .fp8_linear import fp8_linear
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_gelu import Approximation, linear_gelu
from .packed_linear import (
    ACTIVATION_BLOCK,
    INTEGERS,
    Format,
    Grid,
    PackedWeight,
    divides,
    pack_weight,
    packed_linear,
    prepare_weight,
    restore_weight,
    round_activations,
    round_to_fp8,
    unpack_weight,
)
from .paged_attention import PagedCache, PagedReads, PagedRun, paged_attention
from .quantized_blocks import CACHE_DTYPES, SCALE_BYTES, CacheBlocks, QuantizedBlocks, put_blocks
from .rms_norm import add_rms_norm, rms_norm
from .rope import apply_rope, rope_angles, rope_frequencies
from .swiglu import swiglu

__all__ = [
    "ACTIVATION_BLOCK",
    "BACKENDS",
    "CACHE_DTYPES",
    "INTEGERS",
    "SCALE_BYTES",
    "Approximation",
    "CacheBlocks",
    "DecoderBlock",
    "Format",
    "Grid",
    "KeyRanges",
    "PackedProduct",
    "PackedWeight",
    "PagedCache",
    "PagedReads",
    "PagedRun",
    "QuantizedBlocks",
    "Span",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "available",
    "cross_attention",
    "decode_attention",
    "decode_blocks",
    "divides",
    "fp8_linear",
    "kv_write",
    "linear",
    "linear_cross_entropy",
    "linear_gelu",
    "pack_weight",
    "packed_linear",
    "paged_attention",
    "paged_decode_attention",
    "paged_decode_blocks",
    "prepare_weight",
    "put_blocks",
    "restore_weight",
    "rms_norm",
    "rope_angles",
    "rope_frequencies",
    "round_activations",
    "round_to_fp8",
    "segment_attention",
    "swiglu",
    "unpack_weight",
    "use_backend",
]
