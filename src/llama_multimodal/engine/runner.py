"""The cache's tensors, and the two computations of a step: images into the cache, and tokens to logits.

A step is one forward pass over a flat batch: first the rows of one token, then the others one after the other. Few
tokens behind an answer's beginning (proposed ones) are rows of one token each, that read the same blocks.

Shapes: N tokens of the step · R rows of one token · P blocks · U units of images · S slots · Hkv key heads · D head dim
E hidden size
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.lora import adapter_in_force, adapter_names, adapter_numbers, adapter_set
from ..cache import CrossAttentionCache, SplicedImages
from ..config import nearest
from ..errors import PromptError
from ..inputs import ModelInputs
from ..models import LanguageModel
from ..ops import CACHE_DTYPES, CacheBlocks, PagedCache, PagedReads, PagedRun, QuantizedBlocks, put_blocks
from .config import CachePlan
from .graphs import StaticDecode
from .request import PLAIN, Adapter, ImageUse, Job

Segment = tuple[Job, int, int]
"""A request, and its tokens [first, end) that are computed, proposed ones behind its last."""

_FEW = 16  # tokens behind a prompt that go as rows: they take the kernels of decoding


class Runner:
    """Runs a model over a cache in blocks."""

    def __init__(
        self,
        model: LanguageModel,
        plan: CachePlan,
        *,
        spliced: bool,
        cache_dtype: str | None = None,
        static_rows: int = 0,
    ) -> None:
        """static_rows: the most rows of a decoding step of fixed shapes; 0: none has."""
        text, heads = model.config.text, model.decoder.num_kv_heads
        self.model, self.plan, self.spliced = model, plan, spliced
        self._cache_dtype = None if cache_dtype is None else CACHE_DTYPES[cache_dtype]
        shape = (plan.num_blocks + plan.padding_blocks, plan.block_size, heads, text.head_dim)
        self.keys, self.values = (self._pools(shape, len(text.self_attention_layers)) for _ in range(2))
        self.image_keys: list[CacheBlocks] = []
        self.image_values: list[CacheBlocks] = []
        self.embeddings: Tensor | None = None
        if spliced:
            self.embeddings = self._zeros((plan.num_units, text.hidden_size), model.dtype)
        elif plan.num_units:
            shape = (plan.num_units, plan.unit_tokens, heads, text.head_dim)
            layers = len(text.cross_attention_layers)
            self.image_keys, self.image_values = (self._pools(shape, layers) for _ in range(2))
        self.static: StaticDecode | None = None
        if static_rows and heads == text.num_key_value_heads:  # processes that share heads talk within a step
            caches, images = (self.keys, self.values), (self.image_keys, self.image_values)
            self.static = StaticDecode(model, plan, caches, images, static_rows)

    @property
    def nbytes(self) -> int:
        """What the cache takes."""
        pools = (*self.keys, *self.values, *self.image_keys, *self.image_values)
        return sum(pool.nbytes for pool in pools) + (0 if self.embeddings is None else self.embeddings.nbytes)

    def _pools(self, shape: tuple[int, ...], layers: int) -> list[CacheBlocks]:
        if (dtype := self._cache_dtype) is None:
            return [self._zeros(shape, self.model.dtype) for _ in range(layers)]
        zeros = self._zeros
        return [QuantizedBlocks(zeros(shape, dtype), zeros(shape[:-1], torch.float32)) for _ in range(layers)]

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        device = self.model.device
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # The system gives such zeros a page at a time as they are written to: what is not used takes no memory.
        nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        return torch.from_numpy(np.zeros(nbytes, np.uint8)).view(dtype).view(shape)

    # --- images ------------------------------------------------------------------------------------------------------

    def encode(self, uses: Sequence[ImageUse]) -> list[list[Tensor]]:
        """What the cache keeps of each image; nothing is stored yet.

        Returns, for each image, a key and a value [U, S, Hkv, D] a layer, or its embeddings [U, E].
        """
        groups: dict[tuple[Adapter, torch.Size], list[int]] = {}
        for i, use in enumerate(uses):
            groups.setdefault((use.adapter, use.tiles.shape[1:]), []).append(i)
        found: dict[int, list[Tensor]] = {}
        for (adapter, _), together in groups.items():
            with self._one_adapter(adapter):
                found |= zip(together, self._encode([uses[i] for i in together]), strict=True)
        return [found[i] for i in range(len(uses))]

    @torch.inference_mode()
    def _encode(self, uses: Sequence[ImageUse]) -> list[list[Tensor]]:
        one = torch.zeros(1, 1, dtype=torch.int64)
        tiles = torch.cat([use.tiles for use in uses])
        layouts = tuple(replace(use.layout, row=0) for use in uses)
        inputs = ModelInputs(one, one, (1,), tiles, layouts, one[..., None].expand(1, 1, 2))
        images = self.model.read_images(inputs)
        if isinstance(images, SplicedImages):
            return [[part] for part in images.embeddings.split([use.tokens for use in uses])]
        assert isinstance(images, CrossAttentionCache)
        unit = self.plan.unit_tokens
        sizes = [use.tokens for use in uses]
        layers = [tensor for pair in zip(images.keys, images.values) for tensor in pair]  # [Hkv, all tokens, D]
        cut = [layer.transpose(0, 1).split(sizes) for layer in layers]
        rest = [(0, 0, 0, 0, 0, use.size * unit - use.tokens) for use in uses]  # of a last unit that is not full
        return [[F.pad(layer[i], rest[i]).unflatten(0, (-1, unit)) for layer in cut] for i in range(len(uses))]

    @torch.inference_mode()
    def store(self, units: Sequence[int], parts: Sequence[Tensor]) -> None:
        """Put what `encode` returned for an image into its units."""
        pools: Sequence[CacheBlocks] = (
            [self.embeddings]
            if self.embeddings is not None
            else [pool for pair in zip(self.image_keys, self.image_values) for pool in pair]
        )
        index = torch.tensor(units, device=self.model.device)
        for pool, part in zip(pools, parts, strict=True):
            put_blocks(pool, index, part)

    # --- tokens ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> dict[Job, Tensor]:
        """Compute the segments' tokens into the cache: requests whose last token was among them, and the logits of it
        and of those proposed behind it, [tokens, vocab]."""
        segments = [piece for segment in segments for piece in _pieces(*segment)]
        segments.sort(key=lambda segment: segment[2] - segment[1] > 1)  # stable
        device, size = self.model.device, self.plan.block_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: dict[Job, list[int]] = {}
        for job, first, end in segments:
            wanted_first = max(first, len(job.tokens) - 1)
            if wanted_first < end:
                wanted.setdefault(job, []).extend(len(tokens) + p - first for p in range(wanted_first, end))
            tokens += self._tokens(job, first, end)
            positions += range(first, end)
            slots += [job.blocks[p // size] * size + p % size for p in range(first, end)]
        if (static := self._static_logits(segments, tokens, positions, slots)) is not None:
            return {job: static[places] for job, places in wanted.items()}
        ids = torch.tensor([tokens], device=device)
        spliced = self._spliced(segments) if self.spliced else None
        images, sees = self._image_reads(segments, len(tokens))
        caches = PagedCache(
            self.keys, self.values, self._reads(segments), torch.tensor(slots, dtype=torch.int64, device=device)
        )
        with self._adapters(segments):
            logits = self.model.decoder(
                self.model.embed(ids, spliced),
                torch.tensor([positions], device=device),
                sees,
                cross_cache=images,
                self_cache=caches,
                last_token_of=[place for places in wanted.values() for place in places],
            )
        return dict(zip(wanted, logits[:, 0].split([len(places) for places in wanted.values()])))

    def _tokens(self, job: Job, first: int, end: int) -> list[int]:
        return job.between(first, end)

    def _static_logits(
        self, segments: Sequence[Segment], tokens: list[int], positions: list[int], slots: list[int]
    ) -> Tensor | None:
        """Each token's logits by a step of fixed shapes; None where there is none for these segments."""
        if self.static is None or len(tokens) > len(segments):
            return None
        if self.spliced and any(job.image_places and first <= job.image_places[-1] for job, first, _ in segments):
            return None  # an image's embedding may be among them
        size, image_rows = self.plan.block_size, []
        for job, first, end in segments:
            seen = [uses for *_, uses in _seen(job, first, end)]
            if seen and not self._are_full(seen[0]):
                return None
            image_rows.append(_units(seen[0]) if seen else ([], 0))
        rows = [(job.blocks[: -(-end // size)], end) for job, _, end in segments]
        return self.static.logits(tokens, positions, slots, rows, image_rows, self._places(segments))

    def _reads(self, segments: Sequence[Segment]) -> PagedReads:
        """Each segment reads its own tokens so far."""
        size = self.plan.block_size
        rows = [(job.blocks[: -(-end // size)], end) for job, first, end in segments if end - first == 1]
        runs, place = [], len(rows)
        for job, first, end in segments[len(rows) :]:
            blocks = torch.tensor(job.blocks[: -(-end // size)], device=self.model.device)
            runs.append(PagedRun(place, place + end - first, blocks, end, causal=True))
            place += end - first
        return PagedReads(*self._table(rows), tuple(runs))

    def _image_reads(self, segments: Sequence[Segment], count: int) -> tuple[PagedCache | None, Tensor]:
        """What the tokens read of images through cross-attention, None where none reads any; and, as the decoder
        takes it, which of them do: [1, N, 2]."""
        sees = torch.zeros(1, count, 2, dtype=torch.int64)
        rows: list[tuple[list[int], int]] = []
        runs = []
        place = 0
        for job, first, end in segments:
            found = [
                (place + begin - first, place + stop - first, uses) for begin, stop, uses in _seen(job, first, end)
            ]
            for begin, stop, _ in found:
                sees[0, begin:stop, 1] = 1
            one = end - first == 1
            full = one and found and self._are_full(found[0][2])
            rows += [_units(found[0][2]) if full else ([], 0)] * one
            runs += [self._image_run(*part) for part in found if not full]
            place += end - first
        if not sees.any():
            return None, sees
        return PagedCache(self.image_keys, self.image_values, PagedReads(*self._table(rows), tuple(runs))), sees

    def _are_full(self, uses: Sequence[ImageUse]) -> bool:
        """Whether the images' tokens lie without gaps in their units: all but the last one fill theirs."""
        return all(use.tokens == use.size * self.plan.unit_tokens for use in uses[:-1])

    def _image_run(self, first: int, end: int, uses: Sequence[ImageUse]) -> PagedRun:
        """Tokens [first, end) of the batch that read these images."""
        units, length = _units(uses)
        device, places = self.model.device, None
        if not self._are_full(uses):
            starts = itertools.accumulate((use.size * self.plan.unit_tokens for use in uses), initial=0)
            places = torch.cat([torch.arange(start, start + use.tokens) for start, use in zip(starts, uses)]).to(device)
        return PagedRun(first, end, torch.tensor(units, device=device), length, causal=False, places=places)

    def _table(self, rows: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        """Blocks of each row, filled up to one width, and how many keys it reads."""
        width = max((len(blocks) for blocks, _ in rows), default=1)
        table = torch.tensor(
            [blocks + [0] * (width - len(blocks)) for blocks, _ in rows], dtype=torch.int32, device=self.model.device
        ).view(len(rows), width)
        lengths = torch.tensor([length for _, length in rows], dtype=torch.int32, device=self.model.device)
        return table, lengths

    def _spliced(self, segments: Sequence[Segment]) -> SplicedImages | None:
        """Embeddings for the placeholders among the segments' tokens, in their order; None without any."""
        units: list[int] = []
        for job, first, end in segments:
            begin, stop = (bisect.bisect_left(job.image_places, place) for place in (first, end))
            at = 0
            for use in job.images:
                if use.entry is not None:
                    units += use.entry.units[max(0, begin - at) : max(0, stop - at)]
                at += use.size
        if not units:
            return None
        assert self.embeddings is not None
        return SplicedImages(self.embeddings[torch.tensor(units, device=self.model.device)])

    # --- adapters ----------------------------------------------------------------------------------------------------

    @property
    def has_adapters(self) -> bool:
        return bool(adapter_names(self.model))

    def adapter_of(self, name: str | None) -> Adapter:
        """The adapter that a request asks for: for an empty name the plain model, for None what is in force outside.

        Raises:
            PromptError: no such adapter.
        """
        numbers = adapter_numbers(self.model)
        if name is None:
            name = adapter_set(self.model).default if numbers else None
        if not name:
            return PLAIN
        if name not in numbers:
            names = tuple(numbers)
            known = f"; known: {', '.join(names)}{nearest(name, names)}" if names else ", nor any other; leave it out"
            raise PromptError(f'this model has no adapter "{name}"{known}')
        return Adapter(name, numbers[name])

    def _adapters(self, segments: Sequence[Segment]) -> AbstractContextManager[None]:
        """Each token's own adapter in force; the same one for all where they agree, which is faster."""
        chosen = {job.adapter for job, _, _ in segments}
        if len(chosen) == 1:
            return self._one_adapter(chosen.pop())
        counts = [end - first for _, first, end in segments]
        index = torch.tensor(self._places(segments)).repeat_interleave(torch.tensor(counts))
        return adapter_in_force(self.model, index[None])

    def _one_adapter(self, adapter: Adapter) -> AbstractContextManager[None]:
        self._place(adapter)
        return adapter_in_force(self.model, adapter.name or None)

    def _places(self, segments: Sequence[Segment]) -> list[int]:
        return [self._place(job.adapter) for job, _, _ in segments]

    def _place(self, adapter: Adapter) -> int:
        """An adapter's place among the model's, -1 for the plain model.

        Raises:
            PromptError: it is not there any more.
        """
        if adapter == PLAIN:
            return -1
        numbers = adapter_numbers(self.model)
        if numbers.get(adapter.name) != adapter.number:
            raise PromptError(f'the adapter "{adapter.name}" was removed before the answer had ended; ask again')
        return list(numbers).index(adapter.name)


def _seen(job: Job, first: int, end: int) -> Iterator[tuple[int, int, list[ImageUse]]]:
    """Runs of a request's tokens [first, end) that look at the same images, and these."""
    for begin, stop, *images in job.spans:
        begin, stop = max(begin, first), min(stop, end)
        if begin < stop:
            yield begin, stop, [use for use in job.images[images[0] : images[1]] if use.entry is not None]


def _units(uses: Sequence[ImageUse]) -> tuple[list[int], int]:
    """The units of some images, and how many tokens these have."""
    units = [unit for use in uses if use.entry is not None for unit in use.entry.units]
    return units, sum(use.tokens for use in uses)


def _pieces(job: Job, first: int, end: int) -> list[Segment]:
    """A segment as it goes through the model: in one piece, or token by token."""
    if first >= job.prompt_length - 1 and end - first <= _FEW:
        return [(job, place, place + 1) for place in range(first, end)]
    return [(job, first, end)]
