"""What rounding a decoder's weights spares unless it is told otherwise."""

from __future__ import annotations

from .text import TextConfig

CROSS_ATTENTION = "cross_attention.*"
"""The projections of the gated blocks' attention, as `quant.pack.Packing.keep` calls them."""


def spared(format: str, text: TextConfig) -> tuple[str | None, tuple[str, ...]]:
    """The LM head's format, None for that of the rest, and globs of layers that stay as they are: with int4 the head is
    int8, and the projections of gated cross-attention stay. docs/quantization.md measures what that saves."""
    if format != "int4":
        return None, ()
    return "int8", (CROSS_ATTENTION,) if text.cross_attention_layers else ()
