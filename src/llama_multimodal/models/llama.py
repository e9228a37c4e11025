"""The Llama decoder: self-attention blocks, and gated cross-attention blocks that read an image.

Shapes: B rows · T tokens · E hidden size · H query heads · Hkv key heads · D head dim · S vision tokens in the batch
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..cache import CrossAttentionCache, SelfAttentionCache
from ..config import TextConfig
from ..errors import PromptError
from ..ops import CacheBlocks, DecoderBlock, KeyRanges, PagedCache, PagedReads, Span
from .layers import Linear, Projections, RMSNorm, merge_heads, split_heads

SegmentLengths = tuple[tuple[int, ...], ...]
"""Of rows that hold several texts: the tokens of each text, row by row."""


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.qkv = Projections(size, q_proj=size, k_proj=kv_size, v_proj=kv_size)
        self.o_proj = Linear(size, size, bias=False)

    def forward(
        self,
        x: Tensor,  # [B, T, E]
        angles: tuple[Tensor, Tensor],
        positions: Tensor,
        mask: Tensor | None,
        cache: SelfAttentionCache | PagedCache | None,
        layer: int,
        segments: SegmentLengths | None = None,
    ) -> Tensor:
        q, k, v = self.qkv(x)
        q = split_heads(q, self.num_heads)  # [B, H, T, D]
        k, v = split_heads(k, self.num_kv_heads), split_heads(v, self.num_kv_heads)  # [B, Hkv, T, D]
        q, k = ops.apply_rope(q, k, *angles)
        if segments is not None:
            return self.o_proj(merge_heads(ops.segment_attention(q, k, v, segments)))
        if cache is None:
            return self.o_proj(merge_heads(ops.attention(q, k, v, causal=True)))
        if isinstance(cache, PagedCache):
            cache.write(layer, k, v)
            keys, values = cache.keys[layer], cache.values[layer]
            return self.o_proj(merge_heads(ops.paged_attention(q, keys, values, cache.reads)))
        k, v = cache.write(layer, k, v, positions)
        if mask is None:  # a whole prompt: nothing before it, so the fresh keys are all there is
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        else:
            k, v = k[:, :, : mask.shape[-1]], v[:, :, : mask.shape[-1]]
            if q.shape[2] == 1:
                lengths = (positions[:, 0] + 1).to(torch.int32)
                return self.o_proj(ops.decode_attention(q[:, :, 0], k, v, lengths).flatten(1)[:, None])
        return self.o_proj(merge_heads(ops.attention(q, k, v, causal=mask is None, mask=mask)))


class CrossAttention(nn.Module):
    """Attention from text to vision tokens, with per-head norms on queries and keys and no positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(size, size, bias=False)
        self.kv = Projections(size, k_proj=kv_size, v_proj=kv_size)
        self.o_proj = Linear(size, size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of vision tokens: [S, E] → two of [Hkv, S, D]."""
        k, v = (split_heads(x[None], self.num_kv_heads)[0] for x in self.kv(features))
        return self.k_norm(k), v

    def forward(self, x: Tensor, k: CacheBlocks, v: CacheBlocks, ranges: KeyRanges | PagedReads) -> Tensor:
        q = self.q_norm(split_heads(self.q_proj(x), self.num_heads))  # [B, H, T, D]
        if isinstance(ranges, PagedReads):
            return self.o_proj(merge_heads(ops.paged_attention(q, k, v, ranges)))
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        return self.o_proj(merge_heads(ops.cross_attention(q, k, v, ranges)))


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.gate_up = Projections(config.hidden_size, gate_proj=inner, up_proj=inner)
        self.down_proj = Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(*self.gate_up(x)))


class SelfAttentionBlock(nn.Module):
    """Pre-norm Llama block."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self._packed: tuple[tuple[Any, ...], DecoderBlock] | None = None  # what it was made of, and the block
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = SelfAttention(config)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        positions: Tensor,
        mask: Tensor | None,
        cache: SelfAttentionCache | PagedCache | None,
        layer: int,
        segments: SegmentLengths | None = None,
    ) -> Tensor:
        attended = self.attention(self.input_norm(x), angles, positions, mask, cache, layer, segments)
        normed, x = self.post_attention_norm.after_adding(attended, x)
        return x + self.mlp(normed)

    def packed(self) -> DecoderBlock | None:
        """The block as a decoding step computes it, if all of its weights are packed and no hook wants to see it.

        Kept between calls, until something of it is replaced.
        """
        children: Any = self._modules  # a step asks every block, and `nn.Module.__getattr__` is slow
        attention, mlp = children["attention"], children["mlp"]
        layers = [attention._modules.get(name) for name in ("qkv", "o_proj")]
        layers += [mlp._modules.get(name) for name in ("gate_up", "down_proj")]
        qkv, output, gate_up, down = (getattr(layer, "product", None) for layer in layers)
        hooked = self._forward_hooks or self._forward_pre_hooks
        if qkv is None or output is None or gate_up is None or down is None or hooked:
            if self._packed is not None:
                self._packed = None
            return None
        before, after = children["input_norm"], children["post_attention_norm"]
        norms = before._parameters["weight"], after._parameters["weight"]
        parts = qkv, output, gate_up, down, *norms, before.eps, attention.num_heads, attention.num_kv_heads
        if self._packed is None or any(a is not b for a, b in zip(parts, self._packed[0], strict=True)):
            self._packed = parts, DecoderBlock(*parts)
        return self._packed[1]

    def _apply(self, *args: Any, **kwargs: Any) -> SelfAttentionBlock:
        self._packed = None  # would keep what moves to another device here too
        return super()._apply(*args, **kwargs)


class CrossAttentionBlock(nn.Module):
    """Gated cross-attention and feed-forward; a token that sees no image passes unchanged."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = CrossAttention(config)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Tensor, k: CacheBlocks, v: CacheBlocks, ranges: KeyRanges | PagedReads, sees_image: Tensor
    ) -> Tensor:
        # `cross_attention` already returns zeros for tokens outside every span, and `o_proj` has no bias.
        x = x + self.attention_gate.tanh() * self.attention(self.input_norm(x), k, v, ranges)
        return x + self.mlp_gate.tanh() * self.mlp(self.post_attention_norm(x)) * sees_image


class LlamaDecoder(nn.Module):
    """Embedding, blocks, final norm and LM head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + config.num_extra_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            CrossAttentionBlock(config) if i in config.cross_attention_layers else SelfAttentionBlock(config)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie_lm_head()

    @property
    def num_kv_heads(self) -> int:
        """Key heads that its blocks compute and caches hold: fewer than the configuration's where processes share."""
        block = self.layers[self.config.self_attention_layers[0]]
        assert isinstance(block, SelfAttentionBlock)
        return block.attention.num_kv_heads

    def tie_lm_head(self) -> None:
        """Make the LM head the embedding's own table, again after either was replaced."""
        self.lm_head.weight = self.embedding.weight

    def project_images(self, features: Tensor, cache: CrossAttentionCache) -> None:
        """Fill a cross-attention cache from image features [S, E]."""
        for layer in self.config.cross_attention_layers:
            block = self.layers[layer]
            assert isinstance(block, CrossAttentionBlock)
            k, v = block.attention.project(features)
            cache.keys.append(k)
            cache.values.append(v)

    def forward(
        self,
        x: Tensor,  # [B, T, E], embeddings of tokens, or of images in their place
        positions: Tensor,  # [B, T]
        visible: Tensor,  # [B, T, 2], CPU
        cross_cache: CrossAttentionCache | PagedCache | None = None,
        self_cache: SelfAttentionCache | PagedCache | None = None,
        last_token_of: Sequence[int] | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab]; with `last_token_of` (one index a row) only that token's, [B, 1, vocab].

        With paged caches the rows lie one after the other in a single one, B = 1, and `last_token_of` lists any of its
        tokens: [tokens, 1, vocab]. Whoever made them has checked the positions. `visible` may lie on the device then.

        angles: cos and sin of the positions, fp32 [B, T, D/2], where they are there already

        Raises:
            PromptError: a position past `max_position_embeddings` or past the cache.
        """
        hidden = self.hidden(x, positions, visible, cross_cache, self_cache, last_token_of, angles=angles)
        logits = self.lm_head(hidden)
        # An embedding that is the LM head too may have rows past the vocabulary: they stand for images.
        return logits if logits.shape[-1] == self.config.vocab_size else logits[..., : self.config.vocab_size]

    def hidden(
        self,
        x: Tensor,
        positions: Tensor,
        visible: Tensor,
        cross_cache: CrossAttentionCache | PagedCache | None = None,
        self_cache: SelfAttentionCache | PagedCache | None = None,
        last_token_of: Sequence[int] | None = None,
        segments: Tensor | None = None,  # [B, T], CPU, without a cache only
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What the LM head reads, [B, T, E] or [B, 1, E]; arguments and errors are those of the whole decoder."""
        mask = None if isinstance(self_cache, PagedCache) else self._cache_mask(positions, self_cache)
        lengths = None if segments is None else segment_lengths(segments)
        if angles is None:
            frequencies = ops.rope_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
            angles = ops.rope_angles(positions, frequencies.to(x.device))
        ranges = None if cross_cache is None else _ranges(visible, cross_cache, x.device)
        sees_image = (visible[..., 0] < visible[..., 1])[..., None].to(x.device, x.dtype)  # [B, T, 1]
        self_layer = cross_layer = 0
        for block in self._stretches(_one_token_a_row(x, self_cache)):
            if isinstance(block, list):
                assert self_cache is not None
                x = _decode(x, block, angles, positions, self_cache, self_layer)
                self_layer += len(block)
            elif isinstance(block, SelfAttentionBlock):
                x = block(x, angles, positions, mask, self_cache, self_layer, lengths)
                self_layer += 1
            else:
                if cross_cache is not None and ranges is not None:
                    x = block(x, cross_cache.keys[cross_layer], cross_cache.values[cross_layer], ranges, sees_image)
                cross_layer += 1
        if last_token_of is not None:
            x = x[torch.arange(x.shape[0]), torch.as_tensor(last_token_of, dtype=torch.int64)][:, None]
        return self.norm(x)

    def _stretches(self, decoding: bool) -> list[nn.Module | list[DecoderBlock]]:
        """The layers in their order; where `decoding`, packed ones that follow each other are one entry."""
        stretches: list[nn.Module | list[DecoderBlock]] = []
        for layer in self.layers:
            packed = layer.packed() if decoding and isinstance(layer, SelfAttentionBlock) else None
            if packed is None:
                stretches.append(layer)
            elif stretches and isinstance(stretches[-1], list):
                stretches[-1].append(packed)
            else:
                stretches.append([packed])
        return stretches

    def _cache_mask(self, positions: Tensor, cache: SelfAttentionCache | None) -> Tensor | None:
        """Which cache slots each query may read: bool [B, 1, T, slots]; None when the call starts every row."""
        if positions.device.type == "meta":
            return None
        end = int(positions.max()) + 1
        if end > self.config.max_position_embeddings:
            raise PromptError(
                f"position {end - 1} is past the model's context of {self.config.max_position_embeddings} tokens;"
                " shorten the prompt or lower max_new_tokens"
            )
        if cache is None:
            return None
        cache.check_room(end)
        if int(positions[:, 0].max()) == 0:
            return None
        slots = torch.arange(end, device=positions.device)
        return slots <= positions[:, None, :, None]


def _one_token_a_row(x: Tensor, cache: SelfAttentionCache | PagedCache | None) -> bool:
    """Whether this is a decoding step; x: [B, T, E]"""
    return not cache.reads.runs if isinstance(cache, PagedCache) else cache is not None and x.shape[1] == 1


def _decode(
    x: Tensor,
    blocks: Sequence[DecoderBlock],
    angles: tuple[Tensor, Tensor],
    positions: Tensor,
    cache: SelfAttentionCache | PagedCache,
    layer: int,
) -> Tensor:
    """Packed blocks on one new token a row, the first of them with the cache's `layer`."""
    layers = slice(layer, layer + len(blocks))
    if isinstance(cache, PagedCache):
        cos, sin = (angle[0] for angle in angles)
        caches, reads = (cache.keys[layers], cache.values[layers]), cache.reads
        return ops.paged_decode_blocks(x[0], blocks, cos, sin, *caches, reads.table, reads.lengths)[None]
    cos, sin = (angle[:, 0] for angle in angles)
    lengths = (positions[:, 0] + 1).to(torch.int32)
    return ops.decode_blocks(x[:, 0], blocks, cos, sin, cache.keys[layers], cache.values[layers], lengths)[:, None]


def segment_lengths(segments: Tensor) -> SegmentLengths:
    """Tokens of each row's segments, in their order; segments: [B, T]"""
    return tuple(tuple(row.unique_consecutive(return_counts=True)[1].tolist()) for row in segments)


def _ranges(
    visible: Tensor, cache: CrossAttentionCache | PagedCache, device: torch.device
) -> KeyRanges | PagedReads | None:
    """What each token reads of the images; None where none of them reads any."""
    if isinstance(cache, PagedCache):
        return cache.reads
    ranges = key_ranges(visible, cache, device)
    return ranges if ranges.spans else None


def key_ranges(visible: Tensor, cache: CrossAttentionCache, device: torch.device) -> KeyRanges:
    """The vision tokens that each text token reads; visible: [B, T, 2], the images it sees, on the CPU."""
    spans = []
    for row, ranges in enumerate(visible.tolist()):
        start = 0
        for t in range(1, len(ranges) + 1):
            if t < len(ranges) and ranges[t] == ranges[start]:
                continue
            first, end = ranges[start]
            if end > first:
                spans.append(Span(row, start, t, *cache.key_range(row, first, end)))
            start = t
    return KeyRanges.of(spans, visible.shape[0], visible.shape[1], device)
