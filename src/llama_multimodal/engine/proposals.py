"""Speculation: who proposes the tokens that the model checks several at a time (Leviathan et al. 2023; Chen et al.
2023).

A proposed token is accepted where it is the one that the model draws there, with the request's own settings and
generator, so whatever is proposed, the answer is the one without it. For a proposal that is certain, as one from the
prompt is, that is rejection sampling: a token is accepted with the probability that the model gives it, and what is
drawn instead follows the rest. A draft model draws with the same noise as the model will, so that both choose the same
token where they mostly agree (Daliri et al. 2024): `torch.multinomial` takes the largest probability over noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..adapters.lora import adapter_in_force
from ..config import ModelConfig
from ..errors import ConfigError
from ..models import LanguageModel
from ..ops import PagedCache
from ..sampling import sample
from .config import CachePlan, DraftModel, PromptLookup, Speculation
from .request import Job
from .runner import Runner, Segment


class Proposer(Protocol):
    """Fills `job.proposed`."""

    @property
    def nbytes(self) -> int:
        """What its own cache takes."""

    def propose(self, segments: Sequence[Segment], most: Mapping[Job, int]) -> None:
        """segments: what the step computes. most: tokens that may be proposed for each request that decodes, with
        blocks for them."""


def proposer_for(speculation: Speculation | None, model: LanguageModel, plan: CachePlan) -> Proposer | None:
    """Raises:
    ConfigError: a draft model whose vocabulary or device is not the model's.
    """
    if speculation is None:
        return None
    if isinstance(speculation, PromptLookup):
        return Lookup(speculation, model)
    return Drafts(speculation, model, plan)


class _Limits:
    """Which tokens can be proposed: those that the model can say, and none behind the answer's end."""

    def __init__(self, model: LanguageModel) -> None:
        config = model.config
        self.size, self.eos = config.text.vocab_size, config.text.eos_token_ids
        self.image = config.image_token_id if isinstance(config, ModelConfig) else None

    def add(self, proposed: list[int], token: int) -> bool:
        """Propose one more token; False where it cannot be, or is the last."""
        if token >= self.size or token == self.image:
            return False
        proposed.append(token)
        return token not in self.eos


class Lookup:
    """Prompt look-up: the tokens that followed the last occurrence of the newest ones, over and over where they reach
    the end."""

    nbytes = 0

    def __init__(self, settings: PromptLookup, model: LanguageModel) -> None:
        self.settings, self._limits = settings, _Limits(model)
        self._occurrences: WeakKeyDictionary[Job, _Occurrences] = WeakKeyDictionary()

    def propose(self, segments: Sequence[Segment], most: Mapping[Job, int]) -> None:
        sizes = range(self.settings.min_ngram, self.settings.max_ngram + 1)
        for job, count in most.items():
            job.proposed = []
            found = self._occurrences.setdefault(job, _Occurrences(sizes))
            if (start := found.last(job.tokens)) is None:
                continue
            period = len(job.tokens) - start
            for i in range(count):
                if not self._limits.add(job.proposed, job.tokens[start + i % period]):
                    break


class _Occurrences:
    """Where each n-gram of a growing list of tokens ended last."""

    def __init__(self, sizes: range) -> None:
        self._ends: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in reversed(sizes)}
        self._known = 0  # n-grams that end before this token

    def last(self, tokens: Sequence[int]) -> int | None:
        """The token behind the last earlier occurrence of the longest n-gram at the end; None where all are new."""
        for end in range(self._known, len(tokens)):
            for size, ends in self._ends.items():
                if size <= end:
                    ends[tuple(tokens[end - size : end])] = end
        self._known = len(tokens)
        for size, ends in self._ends.items():
            if (found := ends.get(tuple(tokens[-size:]))) is not None:
                return found
        return None


class Drafts:
    """A draft model reads every token that the model reads, into the same blocks of a cache of its own, and goes on
    from there one token after the other, for all requests that decode together."""

    def __init__(self, settings: DraftModel, model: LanguageModel, plan: CachePlan) -> None:
        draft = settings.model
        ours, theirs = model.config.text.vocab_size, draft.config.text.vocab_size
        if ours != theirs:
            raise ConfigError(
                f"the draft model has {theirs} tokens and the model {ours}; a draft model needs the same tokenizer"
            )
        if draft.device != model.device:
            raise ConfigError(f"the draft model is on {draft.device} and the model on {model.device}; move one of them")
        self._limits, self._context = _Limits(model), draft.config.text.max_position_embeddings
        self._runner = _TextRunner(draft, replace(plan, num_units=0), spliced=False)

    @property
    def nbytes(self) -> int:
        return self._runner.nbytes

    def propose(self, segments: Sequence[Segment], most: Mapping[Job, int]) -> None:
        for job in most:
            job.proposed, job.drafted = [], min(job.drafted, job.computed)
        logits = self._read([(job, job.drafted, min(end, self._context)) for job, _, end in segments])
        generators = {job: _same_noise(job) for job in most}
        left = dict(most)
        while left:
            for job, count in list(left.items()):
                if job not in logits:  # past the draft model's context
                    del left[job]
                    continue
                token = self._choose(job, logits[job][-1], generators[job])
                if not self._limits.add(job.proposed, token) or len(job.proposed) == count:
                    del left[job]
            ends = {job: len(job.tokens) + len(job.proposed) for job in left}
            logits = self._read([(job, end - 1, end) for job, end in ends.items() if end <= self._context])

    def _read(self, segments: Sequence[Segment]) -> dict[Job, Tensor]:
        segments = [segment for segment in segments if segment[1] < segment[2]]
        logits = self._runner.forward(segments) if segments else {}
        for job, _, end in segments:
            job.drafted = end
        return logits

    def _choose(self, job: Job, logits: Tensor, generator: torch.Generator | None) -> int:
        params, row = job.request.params, job.row
        assert row is not None
        seen = row.seen if params.repetition_penalty == 1 else row.seen.union(job.proposed)
        return sample(logits, params, seen, generator)


class _TextRunner(Runner):
    """Runs a model on a request's text alone, without adapters."""

    def _tokens(self, job: Job, first: int, end: int) -> list[int]:
        text, size = self.model.config.text, len(self.model.decoder.embedding.weight)
        return [token if token < size else text.bos_token_id for token in job.between(first, end)]

    def _image_reads(self, segments: Sequence[Segment], count: int) -> tuple[PagedCache | None, Tensor]:
        return None, torch.zeros(1, count, 2, dtype=torch.int64)

    def _adapters(self, segments: Sequence[Segment]) -> AbstractContextManager[None]:
        return adapter_in_force(self.model, None)


def _same_noise(job: Job) -> torch.Generator | None:
    """A generator that draws as the request's own will; None where nothing is drawn."""
    row = job.row
    assert row is not None
    if job.request.params.temperature == 0:
        return None
    if row.generator is None:  # draws freely: from here on by a seed of its own
        row.generator = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
    return torch.Generator().set_state(row.generator.get_state())
