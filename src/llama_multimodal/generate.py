"""The plain generation loop: prefill, then one token a step. Every faster path is held against it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch

from .cache import ReadImages, SelfAttentionCache, SplicedImages
from .errors import PromptError
from .inputs import ModelInputs, TextDecoder
from .models import LanguageModel
from .sampling import SamplingParams, sample


@dataclass(frozen=True)
class GenerationOutput:
    """One entry a row. `token_ids` are all tokens the model chose, the end token included; `texts` leave out special
    tokens and stop strings, and are None without a tokenizer; a finish reason is "stop" or "length"."""

    token_ids: list[list[int]]
    texts: list[str] | None
    finish_reasons: list[str]


@dataclass(frozen=True)
class GenerationEvent:
    """One token of one row as it is chosen. `text` is what can be shown since the row's last event."""

    row: int
    token_id: int
    text: str
    finish_reason: str | None


@overload
def generate(
    model: LanguageModel,
    inputs: ModelInputs,
    params: SamplingParams | None = None,
    *,
    stream: Literal[False] = ...,
    images: ReadImages | None = ...,
) -> GenerationOutput: ...
@overload
def generate(
    model: LanguageModel,
    inputs: ModelInputs,
    params: SamplingParams | None = None,
    *,
    stream: Literal[True],
    images: ReadImages | None = ...,
) -> Iterator[GenerationEvent]: ...


def generate(
    model: LanguageModel,
    inputs: ModelInputs,
    params: SamplingParams | None = None,
    *,
    stream: bool = False,
    images: ReadImages | None = None,
) -> GenerationOutput | Iterator[GenerationEvent]:
    """Continue every row of a batch; rows may differ in length and in number of images.

    Returns the whole answers, or with `stream` an iterator of events.

    images: `model.read_images(inputs)`, for callers who ask more than once about the same images.

    Raises:
        PromptError: a prompt that leaves no room in the context, or stop strings without a tokenizer.
    """
    params = params or SamplingParams()
    context = model.config.text.max_position_embeddings
    if inputs.num_rows == 0 or max(inputs.lengths) >= context:
        raise PromptError(f"the prompt must leave room for an answer in the context of {context} tokens; shorten it")
    if params.stop and inputs.decoder is None:
        raise PromptError("stop strings need a tokenizer, and this checkpoint has none; use the end tokens instead")
    rows = [AnswerRow(params, inputs, b, model.config.text.eos_token_ids, context) for b in range(inputs.num_rows)]
    events = _events(model, inputs, rows, params, images)
    if stream:
        return events
    for _ in events:
        pass
    texts = None if inputs.decoder is None else [row.text for row in rows]
    return GenerationOutput([row.answer for row in rows], texts, [row.finish_reason or "length" for row in rows])


@torch.inference_mode()
def _events(
    model: LanguageModel,
    inputs: ModelInputs,
    rows: list[AnswerRow],
    params: SamplingParams,
    images: ReadImages | None,
) -> Iterator[GenerationEvent]:
    config = model.config.text
    capacity = min(max(inputs.lengths) + params.max_new_tokens, config.max_position_embeddings)
    self_cache = SelfAttentionCache.allocate(
        config, len(rows), capacity, model.dtype, model.device, num_kv_heads=model.decoder.num_kv_heads
    )
    if images is None:
        images = model.read_images(inputs)
    last = [length - 1 for length in inputs.lengths]
    # What the last prompt token saw is what every new token sees.
    visible = inputs.visible[torch.arange(len(rows)), torch.tensor(last)][:, None]
    logits = model(inputs, images=images, self_cache=self_cache, last_token_of=last).logits[:, -1]
    if isinstance(images, SplicedImages):
        images = None  # they are in the cache of the text now
    while True:
        for b, row in enumerate(rows):
            if row.finish_reason is None:
                yield row.take(b, sample(logits[b], params, row.seen, row.generator))
        if all(row.finish_reason for row in rows):
            return
        # A finished row goes on with its last token at its last place; nobody reads the result.
        step = replace(
            inputs,
            tokens=torch.tensor([[row.answer[-1]] for row in rows]),
            positions=torch.tensor([[row.length - 1] for row in rows]),
            visible=visible,
            tiles=inputs.tiles[:0],
            images=(),
        )
        logits = model(step, images=images, self_cache=self_cache).logits[:, -1]


class AnswerRow:
    """One answer in the making."""

    def __init__(
        self, params: SamplingParams, inputs: ModelInputs, row: int, eos_token_ids: tuple[int, ...], context: int
    ) -> None:
        prompt = inputs.tokens[row, : inputs.lengths[row]].tolist()
        self.params, self.eos, self.context = params, eos_token_ids, context
        self.length = len(prompt)
        self.seen = set(prompt)
        self.answer: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.decoder: TextDecoder | None = None if inputs.decoder is None else inputs.decoder()
        self.generator: torch.Generator | None = None
        if params.seed is not None:
            self.generator = torch.Generator().manual_seed(params.seed)
        self._stopped_by_string = False
        self._shown = 0  # characters of `text` that events have given out

    def take(self, b: int, token: int) -> GenerationEvent:
        """Add a token, see whether the answer ends with it, and give out the text that is certain."""
        self.answer.append(token)
        self.seen.add(token)
        self.length += 1
        if token in self.eos:
            self.finish_reason = "stop"
        elif self.decoder is not None:
            self.text += self.decoder.push(token)
        if self.finish_reason is None and self._cut_at_stop_string():
            self.finish_reason = "stop"
        if self.finish_reason is None and (
            len(self.answer) == self.params.max_new_tokens or self.length == self.context
        ):
            self.finish_reason = "length"
        if self.finish_reason and self.decoder is not None:
            self.text += "" if self._stopped_by_string else self.decoder.flush()
        certain = len(self.text) if self.finish_reason else len(self.text) - self._held_back()
        shown, self._shown = self.text[self._shown : certain], max(self._shown, certain)
        return GenerationEvent(b, token, shown, self.finish_reason)

    def _cut_at_stop_string(self) -> bool:
        places = [place for stop in self.params.stop if (place := self.text.find(stop)) >= 0]
        if places:
            self.text = self.text[: min(places)]
            self._stopped_by_string = True
        return bool(places)

    def _held_back(self) -> int:
        """How many characters at the end may yet turn out to begin a stop string."""
        longest = 0
        for stop in self.params.stop:
            for size in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
