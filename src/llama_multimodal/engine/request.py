"""What is asked of the engine, what comes back, and a request while it is worked on."""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch

from ..errors import PromptError
from ..generate import AnswerRow
from ..inputs import ImageLayout, ModelInputs
from ..sampling import SamplingParams
from .block_manager import ImageEntry, Key, content_digest, digest

FinishReason = Literal["stop", "length", "cancelled", "error"]
FOREVER = sys.maxsize
"""The last token that sees an image which every new token sees."""


class Adapter(NamedTuple):
    """What answers a request. number: tells it from another one that has the name later."""

    name: str
    number: int


PLAIN = Adapter("", 0)
"""The model without one."""


class Constraint(Protocol):
    """What an answer must keep to; `constrained.Grammars` makes some."""

    def allow(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [vocab] with -inf where a token may not come next."""

    def take(self, tokens: Sequence[int]) -> None:
        """The answer goes on with these."""


@dataclass(frozen=True, eq=False)
class Request:
    """One conversation to answer.

    messages: as the processor takes them; or `inputs`, one row that it has prepared.
    adapter: a name of `adapter_names(model)`; None is the one in force outside of `use_adapter`, "" the plain model.
    priority: a request goes before those that came up to `EngineConfig.patience` places earlier for each step of
        priority that it has more than they.
    constraint: makes what the answer must keep to, afresh for each answer.
    """

    messages: Sequence[Any] | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    priority: int = 0
    inputs: ModelInputs | None = None
    constraint: Callable[[], Constraint] | None = None


@dataclass
class RequestMetrics:
    """Times in seconds; None where it never came to it. cached_tokens: of the prompt, that were not computed again.

    proposed_tokens: by speculation, that the model has checked; accepted_tokens: of these, that are in the answer.
    """

    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    total_seconds: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the proposed tokens that were accepted; None where none was proposed."""
        return self.accepted_tokens / self.proposed_tokens if self.proposed_tokens else None


@dataclass(frozen=True)
class Answer:
    """text: without special tokens and stop strings; empty without a tokenizer. token_ids: all that the model chose.

    error: what ended this request alone, where the finish reason is "error"; a `UserError` where the request is at
    fault.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    error: Exception | None
    metrics: RequestMetrics


@dataclass(frozen=True)
class Event:
    """One token of one request as it is chosen, or its end without one (error, cancelled).

    index: of the request in the list that was asked; text: what can be shown since its last event; answer: with the
    last event, all of it.
    """

    index: int
    token_id: int | None
    text: str
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    answer: Answer | None = None


@dataclass(eq=False)
class ImageUse:
    """An image of a request: tokens [first, last] of the request read its `tokens`. size: units of the pool that it
    takes; the last may be filled in part."""

    key: Key
    layout: ImageLayout
    tiles: torch.Tensor
    first: int
    last: int
    tokens: int
    size: int
    adapter: Adapter = PLAIN  # that reads it
    entry: ImageEntry | None = None


@dataclass(frozen=True)
class ImageSizes:
    """of_tile: tokens of a tile by its height and width in pixels. of_unit: tokens that a unit of the pool holds."""

    of_tile: Callable[[int, int], int]
    of_unit: int


class Job:
    """A request while it is worked on: its tokens so far, how many are in the cache, and what it holds there.

    proposed: tokens behind them that the step checks. drafted: how many a draft model has in its cache, proposed ones
    among them. trust: how many may be proposed next. named: how many of the blocks have their names.
    """

    def __init__(self, number: int, request: Request, index: int, patience: int) -> None:
        self.number, self.request, self.index = number, request, index
        self.rank = (number - patience * request.priority, number)  # the smallest goes first; it never changes
        self.arrived = time.monotonic()
        self.last_token: float | None = None
        self.metrics = RequestMetrics()
        self.events: deque[Event] = deque()
        self.answer: Answer | None = None
        self.tokens: list[int] = []
        self.proposed: list[int] = []
        self.trust = sys.maxsize
        self.running = False
        self.computed = self.drafted = self.named = 0
        self.blocks: list[int] = []
        self.images: list[ImageUse] = []
        self.spans: list[tuple[int, int, int, int]] = []  # tokens [first, end) see images [first, end)
        self.image_places: list[int] = []  # of the tokens that spliced images take
        self.row: AnswerRow | None = None
        self.constraint: Constraint | None = None
        self.adapter = PLAIN
        self._keys: list[Key] = []
        self._root = digest()

    def prepare(
        self,
        inputs: ModelInputs,
        eos_token_ids: tuple[int, ...],
        context: int,
        *,
        images: ImageSizes | None = None,
        spliced_token: int | None = None,
        adapter: Adapter = PLAIN,
    ) -> None:
        """Take a prepared prompt in.

        images: how many tokens text looks at, None where there are none or they take `spliced_token`'s places.
        Raises:
            PromptError: not one row, no room for an answer in the context, or stop strings without a tokenizer.
            ImageError: an image of a size that the encoder does not take.
        """
        if inputs.num_rows != 1:
            raise PromptError(f"a request is one conversation, and these inputs have {inputs.num_rows} rows")
        if inputs.decoder is None and self.request.params.stop:
            raise PromptError("stop strings need a tokenizer, and this checkpoint has none; use the end tokens instead")
        length = inputs.lengths[0]
        if length >= context:
            raise PromptError(
                f"the prompt must leave room for an answer in the context of {context} tokens; shorten it"
            )
        self.row = AnswerRow(self.request.params, inputs, 0, eos_token_ids, context)
        self.constraint = None if self.request.constraint is None else self.request.constraint()
        self.adapter, self._root = adapter, digest(*adapter)
        self.tokens = inputs.tokens[0, :length].tolist()
        self.metrics.prompt_tokens = length
        if spliced_token is None:
            self.spans = _spans(inputs.visible[0, :length])
            reach = _reach_of_spans(self.spans, length, len(inputs.images))
        else:
            self.image_places = [t for t, token in enumerate(self.tokens) if token == spliced_token]
            ends = itertools.accumulate((image.num_tokens for image in inputs.images), initial=0)
            reach = [(self.image_places[a], self.image_places[b - 1]) for a, b in itertools.pairwise(ends)]
        first_tile = 0
        for image, (first, last) in zip(inputs.images, reach, strict=True):
            tiles = inputs.tiles[first_tile : first_tile + image.num_tiles]
            first_tile += image.num_tiles
            if image.pixels is not None:  # alone it is named as it is beside larger ones
                tiles, image = tiles[:, :, : image.pixels[0], : image.pixels[1]], replace(image, pixels=None)
            tokens = image.num_tokens if images is None else image.num_tiles * images.of_tile(*tiles.shape[2:])
            size = tokens if images is None else -(-tokens // images.of_unit)
            key = _image_key(self._root, image, tiles)
            self.images.append(ImageUse(key, image, tiles, first, last, tokens, size, adapter))

    def restart(self) -> None:
        """As if nothing of it was in the cache; what it has said stays said."""
        self.running, self.blocks, self.computed, self.proposed = False, [], 0, []
        for use in self.images:
            use.entry = None
        if self.row is not None:
            self.tokens = [*self.tokens[: self.prompt_length], *self.row.answer]
            if self.request.constraint is not None:
                self.constraint = self.request.constraint()
                self.constraint.take(self.row.answer)

    @property
    def prompt_length(self) -> int:
        return self.metrics.prompt_tokens

    @property
    def remaining(self) -> int:
        """Tokens that are not in the cache yet; one while decoding."""
        return len(self.tokens) - self.computed

    @property
    def most_proposals(self) -> int:
        """Tokens that can be accepted before the answer's last one."""
        assert self.row is not None
        params, row = self.request.params, self.row
        return max(0, min(params.max_new_tokens - len(row.answer), row.context - row.length) - 1)

    def between(self, first: int, end: int) -> list[int]:
        """Tokens [first, end), and proposed ones behind the last."""
        length = len(self.tokens)
        return self.tokens[first:end] + self.proposed[max(0, first - length) : max(0, end - length)]

    def block_keys(self, count: int, block_size: int) -> list[Key]:
        """Names of the first `count` blocks of its tokens: what was before, the tokens, and images that begin there."""
        while len(self._keys) < count:
            first = len(self._keys) * block_size
            begun = [(use.first - first, use.key) for use in self.images if first <= use.first < first + block_size]
            before = self._keys[-1] if self._keys else self._root
            self._keys.append(digest(before, self.tokens[first : first + block_size], begun))
        return self._keys[:count]

    def seen_in(self, first: int, end: int) -> list[ImageUse]:
        """The images that tokens [first, end) read."""
        return [use for use in self.images if use.first < end and first <= use.last]

    def most_units_at_once(self) -> int:
        """Units of the images that some token sees together."""
        if not self.spans:
            return max((use.size for use in self.images), default=0)
        groups = ({use.key: use.size for use in self.images[first:end]} for _, _, first, end in self.spans)
        return max(sum(sizes.values()) for sizes in groups)


def _spans(visible: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """Runs of tokens that see the same images, those that see none left out; the last goes on for new tokens."""
    changes = (visible[1:] != visible[:-1]).any(1).nonzero()[:, 0] + 1
    starts = [0, *changes.tolist()]
    ends = [*starts[1:], FOREVER]
    return [
        (start, end, first, last)
        for start, end, (first, last) in zip(starts, ends, visible[starts].tolist(), strict=True)
        if first < last
    ]


def _reach_of_spans(spans: Sequence[tuple[int, int, int, int]], length: int, count: int) -> list[tuple[int, int]]:
    """For each image the first token that sees it and the last."""
    reach: list[tuple[int, int]] = []
    for image in range(count):
        seen = [(start, end) for start, end, first, last in spans if first <= image < last]
        reach.append((seen[0][0], seen[-1][1] if seen[-1][1] == FOREVER else seen[-1][1] - 1))
    return reach


def _image_key(root: Key, image: ImageLayout, tiles: torch.Tensor) -> Key:
    """A name by pixels and layout, and by the adapter that reads them."""
    layout = (image.rows, image.columns, image.whole, image.num_tokens, image.size)
    pixels = tiles.cpu().contiguous().view(torch.uint8).numpy().data if tiles.numel() else b""
    return digest(root, layout, tuple(tiles.shape), str(tiles.dtype), content_digest(pixels))
