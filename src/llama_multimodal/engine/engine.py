"""Continuous batching: requests join and leave between any two steps. A step is schedule → run → postprocess."""

from __future__ import annotations

import contextvars
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import PromptError
from ..inputs import ModelInputs
from ..models import LanguageModel
from ..sampling import sample
from .block_manager import BlockManager, ImageEntry, ImagePool
from .config import EngineConfig, is_static, plan_cache
from .metrics import EngineMetrics
from .proposals import proposer_for
from .request import Answer, Event, FinishReason, ImageSizes, ImageUse, Job, Request
from .runner import Runner, Segment
from .scheduler import Scheduler, Step
from .threads import release_threads

Prepare = Callable[[Any], ModelInputs]
"""A processor: from messages to what the model reads."""


class Engine:
    """Answers many requests at a time, each as `generate` answers it alone.

    One thread uses it at a time; `AsyncEngine` is for servers.
    """

    def __init__(
        self, model: LanguageModel, processor: Prepare | None = None, config: EngineConfig | None = None
    ) -> None:
        """processor: may be left out where every request brings its `inputs`.

        Raises:
            ConfigError: the cache's memory is too little for the model, or a draft model does not fit it.
        """
        self.model, self.processor, self.config = model, processor, config or EngineConfig()
        spliced = isinstance(model.config, ModelConfig) and model.config.fusion == "splice"
        self._spliced_token = model.config.image_token_id if spliced else None
        heads = model.decoder.num_kv_heads
        self.plan = plan_cache(model.config, self.config, model.dtype, model.device, num_kv_heads=heads)
        self.blocks = BlockManager(self.plan.num_blocks, self.plan.block_size)
        self.images = ImagePool(self.plan.num_units)
        self.metrics = EngineMetrics(self.blocks, self.images)
        self.scheduler = Scheduler(self.config, self.blocks, self.images, self.metrics)
        rows = self.config.most_rows if is_static(self.config, model.device) else 0
        dtype, compiled = self.config.cache_dtype, self.config.compile
        self.runner = Runner(model, self.plan, spliced=spliced, cache_dtype=dtype, static_rows=rows, compiled=compiled)
        self._image_sizes = None
        if isinstance(model.config, ModelConfig) and not spliced:
            self._image_sizes = ImageSizes(model.config.num_tokens, self.plan.unit_tokens)
        self.proposer = proposer_for(self.config.speculation, model, self.plan)
        self._numbers = itertools.count()
        self._jobs: set[Job] = set()  # that have no answer yet
        self._torn = False
        self._flights: list[tuple[Future[list[list[Tensor] | Exception]], list[ImageEntry]]] = []
        self._beside = ThreadPoolExecutor(1, "images") if self.config.overlap_images else None
        cuda = model.device.type == "cuda" and self._beside is not None
        self._stream = torch.cuda.Stream(model.device) if cuda else None

    # --- what callers use --------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """All answers, in the order asked. A request that fails has its `error`; nothing is raised for it."""
        answers: dict[int, Answer] = {}
        with closing(self.stream(requests)) as events:
            for event in events:
                if event.answer is not None:
                    answers[event.index] = event.answer
        return [answers[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Generator[Event, None, None]:
        """Each token as it is chosen, of all requests. Whoever stops reading cancels what is left."""
        jobs = [self.add(request, index) for index, request in enumerate(requests)]
        try:
            while True:
                done = all(job.answer is not None for job in jobs)
                for job in jobs:
                    while job.events:
                        yield job.events.popleft()
                if done:
                    return
                self.step()
        finally:
            for job in jobs:
                self.cancel(job)

    def add(self, request: Request, index: int = 0) -> Job:
        """Queue a request; `step` works on it. Its tokens come in `job.events`, at its end there is `job.answer`."""
        self._mend()
        job = Job(next(self._numbers), request, index, self.config.patience)
        with self._books():
            self._jobs.add(job)
            self.scheduler.add(job)
        return job

    def cancel(self, job: Job) -> None:
        """End a request, wherever it is; what it had is its answer. One that has ended stays as it is."""
        self._mend()
        self._end(job, "cancelled")

    @property
    def nbytes(self) -> int:
        """What the cache takes, a draft model's among it."""
        return self.runner.nbytes + (0 if self.proposer is None else self.proposer.nbytes)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def clear_cache(self) -> None:
        """Forget every prefix and every image, as after a change of the weights. Requests go on, from the beginning."""
        self._torn = True
        self._mend()
        if self.runner.static is not None:
            self.runner.static.forget()

    def warm_up(self) -> None:
        """Record decoding steps of fixed shapes before requests come; without it each is when it is first needed."""
        if self.runner.static is not None:
            self.runner.static.warm_up()

    def close(self) -> None:
        """Cancel what is left and end the thread that encodes images."""
        for job in list(self._jobs):
            self.cancel(job)
        if self._beside is not None:
            self._beside.shutdown()

    # --- a step ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """Compute the next tokens of as many requests as fit."""
        self._mend()
        started = time.monotonic()
        self._prepare_waiting()
        self._land(wait=False)
        with self._books():
            step = self.scheduler.schedule()
        self._encode(step)
        segments = [(job, *span) for job, span in step.segments.items() if job.answer is None]
        if segments and self.proposer is not None:
            segments = self._speculate(step, segments)
        if segments:
            computed = self._run(segments)
            largest = _largest(computed)
            for job, _, end in segments:
                with self._books():
                    self._take(job, end, computed.get(job), largest.get(job))
        elif self._flights:
            self._land(wait=True)
        elif self.scheduler.has_work and not step.images:
            raise RuntimeError("the scheduler has requests and gives none a token")
        self.metrics.stepped(time.monotonic() - started, sum(end - first for _, first, end in segments))

    def _prepare_waiting(self) -> None:
        """Tokens and pixels of the requests that may begin in this step."""
        tokens = 0
        for job in self.scheduler.waiting[: self.config.max_requests]:
            if job.row is None:
                try:
                    self._prepare(job)
                except Exception as error:
                    self._end(job, "error", error)
            tokens += job.remaining
            if tokens >= self.config.max_tokens_in_batch:
                return

    def _prepare(self, job: Job) -> None:
        """Raises:
        UserError: the request cannot be answered, or never fits in the cache.
        """
        request, text = job.request, self.model.config.text
        adapter = self.runner.adapter_of(request.adapter)
        inputs = request.inputs
        if inputs is None:
            if request.messages is None:
                raise PromptError("a request has neither messages nor inputs; give one of them")
            if self.processor is None:
                raise PromptError("this engine has no processor; give one, or requests with their inputs")
            inputs = self.processor(request.messages)
        context, sizes, token = text.max_position_embeddings, self._image_sizes, self._spliced_token
        job.prepare(inputs, text.eos_token_ids, context, images=sizes, spliced_token=token, adapter=adapter)
        last = min(job.prompt_length + request.params.max_new_tokens, context) - 1
        if self.blocks.blocks_for(last) > self.blocks.num_blocks:
            room = self.blocks.num_blocks * self.blocks.block_size
            raise PromptError(
                f"{job.prompt_length} tokens and an answer of {request.params.max_new_tokens} never fit in the cache of"
                f" {room}; lower max_new_tokens, shorten the prompt, or give the engine more cache_memory"
            )
        if (units := job.most_units_at_once()) > self.images.num_units:
            raise PromptError(
                f"images of {units} units are looked at together and never fit in the cache of {self.images.num_units};"
                " use fewer or smaller images, or give the engine more cache_memory or a larger image_share"
            )

    def _speculate(self, step: Step, segments: list[Segment]) -> list[Segment]:
        """The segments with proposed tokens behind them. Where the whole batch fails, each is tried alone."""
        assert self.proposer is not None
        with self._books():
            most = self.scheduler.reserve(step)
        try:
            self.proposer.propose(segments, most)
        except Exception:
            for segment in segments:
                try:
                    self.proposer.propose([segment], {job: n for job, n in most.items() if job is segment[0]})
                except Exception as error:
                    self._end(segment[0], "error", error)
        return [(job, first, end + len(job.proposed)) for job, first, end in segments if job.answer is None]

    def _run(self, segments: list[Segment]) -> dict[Job, Tensor]:
        """The logits [tokens, vocab] of each request whose last token is among the segments: of that one and of the
        proposed ones behind it. Where the whole batch fails, each request is tried alone, and those that fail end and
        leave the segments."""
        try:
            return self.runner.forward(segments)
        except Exception:
            found: dict[Job, Tensor] = {}
            for segment in list(segments):
                try:
                    found |= self.runner.forward([segment])
                except Exception as error:
                    segments.remove(segment)
                    self._end(segment[0], "error", error)
            return found

    def _take(self, job: Job, end: int, logits: Tensor | None, largest: list[int] | None) -> None:
        """Note what was computed, and choose the next tokens where the logits [tokens, vocab] are there: one, and one
        more for each proposed token that is the one chosen. largest: see `_largest`."""
        proposed = job.proposed
        self.scheduler.computed(job, end - len(proposed))
        if logits is None:
            return
        self.metrics.proposed(job, len(proposed))
        before = len(job.tokens)
        for place, (row, guess) in enumerate(zip(logits, (*proposed, None), strict=True)):
            if not self._choose(job, row, guess, None if largest is None else largest[place]):
                break
        if job.answer is None:
            if proposed:  # twice as many as were accepted and one more: what is rarely right costs little
                job.trust = 2 * (len(job.tokens) - before) - 1
            self.scheduler.roll_back(job)

    def _choose(self, job: Job, logits: Tensor, proposed: int | None, largest: int | None) -> bool:
        """Choose a request's next token: the one of its largest logit where that is given, or by its logits [vocab].
        Whether it is the one that was proposed there, and the answer goes on."""
        row = job.row
        assert row is not None
        try:
            if job.constraint is not None:
                logits = job.constraint.allow(logits)
            token = sample(logits, job.request.params, row.seen, row.generator) if largest is None else largest
            event = row.take(job.index, token)
            if job.constraint is not None and event.finish_reason is None:
                job.constraint.take([token])
        except Exception as error:
            self._end(job, "error", error)
            return False
        job.tokens.append(token)
        self.metrics.token(job)
        if token == proposed:
            self.scheduler.accepted(job)
            self.metrics.accepted(job)
        if event.finish_reason:
            self._end(job, "stop" if event.finish_reason == "stop" else "length", token=token, text=event.text)
            return False
        job.events.append(Event(job.index, token, event.text))
        return token == proposed

    def _end(
        self,
        job: Job,
        reason: FinishReason,
        error: Exception | None = None,
        *,
        token: int | None = None,
        text: str = "",
    ) -> None:
        """A request's answer is as it is now; token, text: its last event's. Nothing where it has ended already."""
        if job.answer is not None:
            return
        with self._books():
            self.scheduler.remove(job)
            self.metrics.finished(job, reason)
            whole, tokens = ("", []) if job.row is None else (job.row.text, list(job.row.answer))
            job.answer = Answer(whole, tokens, reason, error, job.metrics)
            job.events.append(Event(job.index, token, text, reason, error, job.answer))
            self._jobs.discard(job)

    # --- images ------------------------------------------------------------------------------------------------------

    def _encode(self, step: Step) -> None:
        """Bring the step's images into the cache, or begin to in the other thread."""
        if not step.images:
            return
        entries, uses = list(step.images), list(step.images.values())
        if self._beside is None or self.runner.has_adapters:  # one thread at a time chooses an adapter
            self._store(entries, self._features(uses))
            return
        with self._books():
            for entry in entries:
                entry.started = True
                entry.references += 1  # its place is not given away while it is on its way
            run = contextvars.copy_context().run
            self._flights.append((self._beside.submit(run, self._features_beside, uses), entries))

    def _features_beside(self, uses: Sequence[ImageUse]) -> list[list[Tensor] | Exception]:
        """`_features`, in the other thread; between pictures its helpers leave the cores to this one's."""
        found = self._features(uses)
        release_threads()
        return found

    def _features(self, uses: Sequence[ImageUse]) -> list[list[Tensor] | Exception]:
        """What the cache keeps of each image, or why there is nothing. One that fails does not stop the others."""
        with torch.cuda.stream(self._stream):  # does nothing without one
            found: list[list[Tensor] | Exception] = []
            try:
                found += self.runner.encode(uses)
            except Exception:
                for use in uses:
                    try:
                        found += self.runner.encode([use])
                    except Exception as error:
                        found.append(error)
            if self._stream is not None:
                self._stream.synchronize()
        return found

    def _land(self, *, wait: bool) -> None:
        """Store what the other thread has encoded; with `wait` at least one batch of it."""
        while self._flights and (wait or self._flights[0][0].done()):
            future, entries = self._flights[0]
            features = future.result()
            with self._books():
                self._flights.pop(0)
                self._store(entries, features)
                for entry in entries:
                    self.images.release(entry)
            wait = False

    def _store(self, entries: Sequence[ImageEntry], features: Sequence[list[Tensor] | Exception]) -> None:
        failed = {}
        for entry, found in zip(entries, features, strict=True):
            if isinstance(found, Exception):
                failed[entry] = found
                self.images.fail(entry, found)
                continue
            if self._stream is not None:
                for tensor in found:
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
            self.runner.store(entry.units, found)
            entry.ready = True
            self.metrics.encoded_images += 1
        for job in list(self.scheduler.running) if failed else ():
            causes = [failed[use.entry] for use in job.images if use.entry in failed]
            if causes:
                self._end(job, "error", causes[0])

    # --- interruptions -----------------------------------------------------------------------------------------------

    @contextmanager
    def _books(self) -> Iterator[None]:
        """Around what must not be left half done: an interruption inside is noticed by `_mend`."""
        before, self._torn = self._torn, True
        yield
        self._torn = before

    def _mend(self) -> None:
        """Begin with an empty cache where bookkeeping was cut off (Ctrl-C); requests go on from what they have said."""
        if not self._torn:
            return
        for future, _ in self._flights:
            future.exception()
        self._flights = []
        self.blocks.clear()
        self.images.clear()
        self.scheduler.restart(job for job in self._jobs if job.answer is None)
        self._torn = False
        for job in self.scheduler.waiting.copy():
            if job.row is not None and job.row.finish_reason is not None:
                self._end(job, "stop" if job.row.finish_reason == "stop" else "length")


def _largest(logits: dict[Job, Tensor]) -> dict[Job, list[int]]:
    """The tokens of the largest logits, of those requests that take these whatever they have said: of all together, so
    that a GPU is waited for once."""
    jobs = [job for job in logits if job.constraint is None and job.request.params.takes_largest]
    if not jobs:
        return {}
    tokens = iter(torch.cat([logits[job] for job in jobs]).max(-1).indices.tolist())
    return {job: list(itertools.islice(tokens, len(logits[job]))) for job in jobs}
