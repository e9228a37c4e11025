"""The cache's tensors, and the two computations of a step: images into the cache, and tokens to logits.

A step is one forward pass over a flat batch: first the rows of one token, then the others one after the other. Few
tokens behind an answer's beginning (proposed ones) are rows of one token each, that read the same blocks.

Shapes: N tokens of the step · R rows of one token · P blocks · U units of images · S slots · Hkv key heads · D head dim
E hidden size
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.lora import adapter_names, adapter_set, use_adapter
from ..cache import CrossAttentionCache, SplicedImages
from ..config import nearest
from ..errors import PromptError
from ..inputs import ModelInputs
from ..models import LanguageModel
from ..ops import PagedCache, PagedReads, PagedRun
from .config import CachePlan
from .request import ImageUse, Job

Segment = tuple[Job, int, int]
"""A request, and its tokens [first, end) that are computed, proposed ones behind its last."""

_FEW = 16  # tokens behind a prompt that go as rows: they take the kernels of decoding


class Runner:
    """Runs a model over a cache in blocks."""

    def __init__(self, model: LanguageModel, plan: CachePlan, *, spliced: bool) -> None:
        text = model.config.text
        self.model, self.plan, self.spliced = model, plan, spliced
        shape = (plan.num_blocks, plan.block_size, text.num_key_value_heads, text.head_dim)
        self.keys, self.values = (self._pools(shape, len(text.self_attention_layers)) for _ in range(2))
        self.image_keys: list[Tensor] = []
        self.image_values: list[Tensor] = []
        self.embeddings: Tensor | None = None
        if spliced:
            self.embeddings = self._pools((plan.num_units, text.hidden_size), 1)[0]
        elif plan.num_units:
            shape = (plan.num_units, plan.unit_tokens, text.num_key_value_heads, text.head_dim)
            layers = len(text.cross_attention_layers)
            self.image_keys, self.image_values = (self._pools(shape, layers) for _ in range(2))

    @property
    def nbytes(self) -> int:
        """What the cache takes."""
        tensors = (*self.keys, *self.values, *self.image_keys, *self.image_values)
        return sum(t.nbytes for t in tensors) + (0 if self.embeddings is None else self.embeddings.nbytes)

    def _pools(self, shape: tuple[int, ...], layers: int) -> list[Tensor]:
        dtype, device = self.model.dtype, self.model.device
        if device.type != "cpu":
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        # The system gives such zeros a page at a time as they are written to: what is not used takes no memory.
        nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        return [torch.from_numpy(np.zeros(nbytes, np.uint8)).view(dtype).view(shape) for _ in range(layers)]

    # --- images ------------------------------------------------------------------------------------------------------

    def check_image(self, use: ImageUse) -> None:
        """Raises:
        PromptError: an image whose tiles become another number of tokens than the cache's units have.
        """
        if self.spliced:
            return
        tokens = self.model.config.num_tokens(*use.tiles.shape[2:])  # type: ignore[union-attr]
        if tokens != self.plan.unit_tokens:
            size = f"{use.tiles.shape[3]} × {use.tiles.shape[2]} pixels"
            raise PromptError(
                f"the engine keeps images of {self.plan.unit_tokens} tokens, and one of {size} has {tokens}"
            )

    def encode(self, uses: Sequence[ImageUse]) -> list[list[Tensor]]:
        """What the cache keeps of each image; nothing is stored yet.

        Returns, for each image, a key and a value [U, S, Hkv, D] a layer, or its embeddings [U, E].
        """
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, use in enumerate(uses):
            groups.setdefault((use.adapter, *use.tiles.shape[1:]), []).append(i)
        found: dict[int, list[Tensor]] = {}
        for (adapter, *_), together in groups.items():
            with self._adapter(adapter or None):
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
            return [[part] for part in images.embeddings.split([use.size for use in uses])]
        assert isinstance(images, CrossAttentionCache)
        sizes = [use.size * self.plan.unit_tokens for use in uses]
        layers = [tensor for pair in zip(images.keys, images.values) for tensor in pair]  # [Hkv, all tokens, D]
        cut = [layer.transpose(0, 1).split(sizes) for layer in layers]
        return [[layer[i].unflatten(0, (-1, self.plan.unit_tokens)) for layer in cut] for i in range(len(uses))]

    @torch.inference_mode()
    def store(self, units: Sequence[int], parts: Sequence[Tensor]) -> None:
        """Put what `encode` returned for an image into its units."""
        pools = (
            [self.embeddings]
            if self.embeddings is not None
            else [pool for pair in zip(self.image_keys, self.image_values) for pool in pair]
        )
        index = torch.tensor(units, device=self.model.device)
        for pool, part in zip(pools, parts, strict=True):
            pool[index] = part.to(pool.dtype)

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
            found = []
            for begin, stop, *images in job.spans:
                begin, stop = max(begin, first), min(stop, end)
                if begin < stop:
                    uses = job.images[images[0] : images[1]]
                    units = [unit for use in uses if use.entry is not None for unit in use.entry.units]
                    found.append((place + begin - first, place + stop - first, units))
                    sees[0, place + begin - first : place + stop - first, 1] = 1
            if end - first == 1:
                units = found[0][2] if found else []
                rows.append((units, len(units) * self.plan.unit_tokens))
            else:
                for begin, stop, units in found:
                    blocks = torch.tensor(units, device=self.model.device)
                    runs.append(PagedRun(begin, stop, blocks, len(units) * self.plan.unit_tokens, causal=False))
            place += end - first
        if not sees.any():
            return None, sees
        return PagedCache(self.image_keys, self.image_values, PagedReads(*self._table(rows), tuple(runs))), sees

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

    def adapter_of(self, name: str | None) -> str:
        """The adapter that a request asks for: empty for the plain model; for None the one in force outside.

        Raises:
            PromptError: no such adapter.
        """
        names = adapter_names(self.model)
        if name is None:
            return adapter_set(self.model).default or "" if names else ""
        if name and name not in names:
            known = f"; known: {', '.join(names)}{nearest(name, names)}" if names else ", nor any other; leave it out"
            raise PromptError(f'this model has no adapter "{name}"{known}')
        return name

    def _adapters(self, segments: Sequence[Segment]) -> AbstractContextManager[None]:
        """Each token's own adapter in force; the same one for all where they agree, which is faster."""
        chosen = {job.adapter for job, _, _ in segments}
        if len(chosen) == 1:
            return self._adapter(chosen.pop() or None)
        place = {"": -1, **{name: i for i, name in enumerate(adapter_names(self.model))}}
        index = [place[job.adapter] for job, first, end in segments for _ in range(first, end)]
        return self._adapter(torch.tensor([index]))

    def _adapter(self, choice: Any) -> AbstractContextManager[None]:
        merged = self.has_adapters and adapter_set(self.model).merged  # it is in the weights, and nothing is chosen
        return use_adapter(self.model, choice) if self.has_adapters and not merged else nullcontext()


def _pieces(job: Job, first: int, end: int) -> list[Segment]:
    """A segment as it goes through the model: in one piece, or token by token."""
    if first >= job.prompt_length - 1 and end - first <= _FEW:
        return [(job, place, place + 1) for place in range(first, end)]
    return [(job, first, end)]
