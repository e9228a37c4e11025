"""Which tokens the next step computes.

Every request has a rank that never changes: its place in the queue, moved forward by its priority a bounded number of
places. Whoever lacks memory takes it from requests of worse rank, which start again later from what is left of them in
the cache. So the request of the best rank always goes on, and everyone's turn comes.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from .block_manager import BlockManager, ImageEntry, ImagePool
from .config import EngineConfig
from .metrics import EngineMetrics
from .request import ImageUse, Job


@dataclass
class Step:
    """segments: tokens [first, end) of each request. images: to be encoded before them, by one that uses each.
    preempted: requests that gave their memory to others."""

    segments: dict[Job, tuple[int, int]] = field(default_factory=dict)
    images: dict[ImageEntry, ImageUse] = field(default_factory=dict)
    preempted: set[Job] = field(default_factory=set)
    num_tokens: int = 0


class Scheduler:
    """Holds the requests and gives out the cache."""

    def __init__(self, config: EngineConfig, blocks: BlockManager, images: ImagePool, metrics: EngineMetrics) -> None:
        self.config, self.blocks, self.images, self.metrics = config, blocks, images, metrics
        self.waiting: list[Job] = []  # both by rank
        self.running: list[Job] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, job: Job) -> None:
        bisect.insort(self.waiting, job, key=_rank)

    def schedule(self) -> Step:
        """Decoding requests first, one token each; prompts share what is left of the step's tokens, in chunks."""
        step = Step()
        for job in self.running:
            self.roll_back(job)  # where the last step was cut off
        for job in list(self.running):
            if job.running and job.remaining == 1:
                self._advance(job, step)
        admitting = True
        for job in heapq.merge(list(self.running), list(self.waiting), key=_rank):
            if step.num_tokens >= self.config.max_tokens_in_batch:
                break
            if not job.running:  # the first that has to wait lets nobody pass
                ready = job.row is not None and job not in step.preempted
                admitting = admitting and ready and self._admit(job, step)
            if job.running and job not in step.segments:
                self._advance(job, step)
        step.images = {entry: use for entry, use in step.images.items() if entry.references > 0}
        return step

    def reserve(self, step: Step) -> dict[Job, int]:
        """How many tokens may be proposed for each request that decodes, with blocks for them: what is left of the
        step's tokens and of the blocks that nobody holds, in the order of ranks. Nobody gives way for proposals."""
        assert self.config.speculation is not None
        size = self.blocks.block_size
        most: dict[Job, int] = {}
        for job, (_, end) in step.segments.items():
            if job.answer is not None or job.remaining != 1:
                continue
            room = (len(job.blocks) + self.blocks.num_free) * size - end
            left = self.config.max_tokens_in_batch - step.num_tokens
            count = min(self.config.speculation.num_tokens, job.trust, job.most_proposals, left, room)
            if count < 1:
                continue
            more = self.blocks.allocate(max(0, self.blocks.blocks_for(end + count) - len(job.blocks)))
            assert more is not None
            job.blocks += more
            step.num_tokens += count
            most[job] = count
        return most

    def computed(self, job: Job, end: int) -> None:
        """Tokens up to `end` are in the cache: full blocks get their names, images that were read are let go of."""
        size = self.blocks.block_size
        if self.config.prefix_cache:
            keys = job.block_keys(end // size, size)
            for block, key in zip(job.blocks[job.named : end // size], keys[job.named :]):
                self.blocks.name(block, key)
            job.named = len(keys)
        job.computed = end
        for use in job.images:
            if use.last < end:
                self._let_go(use)

    def accepted(self, job: Job) -> None:
        """The token that has joined the request's was proposed: it is in the cache. Its block gets a name a step later,
        when a draft model has read the token too."""
        job.computed += 1

    def roll_back(self, job: Job) -> None:
        """Forget what was proposed and not accepted, and let go of the blocks behind the last token in the cache."""
        job.proposed, job.drafted = [], min(job.drafted, job.computed)
        kept = self.blocks.blocks_for(job.computed)
        self.blocks.release(job.blocks[kept:])
        del job.blocks[kept:]

    def restart(self, jobs: Iterable[Job]) -> None:
        """Nothing is in the cache any more: these requests wait for their turn and begin again."""
        self.waiting, self.running = sorted(jobs, key=_rank), []
        for job in self.waiting:
            job.restart()

    def remove(self, job: Job) -> None:
        """A request has ended, wherever it was."""
        (self.running if job.running else self.waiting).remove(job)
        job.running = False
        self._release(job)

    def _admit(self, job: Job, step: Step) -> bool:
        """Let a waiting request begin, if its prompt fits beside those of better rank."""
        while len(self.running) >= self.config.max_requests:
            if not self._take_from_worse(job, step):
                return False
        size = self.blocks.block_size
        found: list[int] = []
        if self.config.prefix_cache:  # one token at least is computed: the next one's logits are its
            found = self.blocks.take_named(job.block_keys((len(job.tokens) - 1) // size, size))
        while self.blocks.num_free < self.blocks.blocks_for(len(job.tokens)) - len(found):
            if not self._take_from_worse(job, step):
                self.blocks.release(found)
                return False
        self.waiting.remove(job)
        bisect.insort(self.running, job, key=_rank)
        job.running = True
        job.blocks, job.named = found, len(found)
        job.computed = job.drafted = len(found) * size
        self.metrics.admitted(job)
        return True

    def _advance(self, job: Job, step: Step) -> None:
        """Give a running request its next tokens, as many as the step, its images and the blocks allow."""
        first = job.computed
        end = first + min(job.remaining, self.config.max_tokens_in_batch - step.num_tokens)
        end = self._acquire_images(job, first, end, step)
        missing = self.blocks.blocks_for(end) - len(job.blocks)
        if end > first and missing > 0:
            while (more := self.blocks.allocate(missing)) is None:
                if not self._take_from_worse(job, step):
                    room = (len(job.blocks) + self.blocks.num_free) * self.blocks.block_size
                    end = max(first, min(end, room))
                    missing = self.blocks.blocks_for(end) - len(job.blocks)
            job.blocks += more
        if end > first:
            step.segments[job] = (first, end)
            step.num_tokens += end - first

    def _acquire_images(self, job: Job, first: int, end: int, step: Step) -> int:
        """Hold the images that tokens [first, end) read; where they must end because one is not there yet."""
        for use in job.seen_in(first, end):
            while use.entry is None:
                use.entry = self.images.acquire(use.key, use.size)
                if use.entry is None and not self._take_from_worse(job, step, images=True):
                    return max(first, use.first)
            if use.entry.ready:
                continue
            if use.entry not in step.images:
                tiles = sum(len(other.tiles) for other in step.images.values()) + len(use.tiles)
                if use.entry.started or (step.images and tiles > self.config.max_tiles_in_batch):
                    return max(first, use.first)
                step.images[use.entry] = use
            if self.config.overlap_images:  # it is not there before the next step
                return max(first, use.first)
        return end

    def _take_from_worse(self, job: Job, step: Step, *, images: bool = False) -> bool:
        """Send the running request of the worst rank back to the queue, if it is worse than the job's.

        images: it must hold some
        """
        for victim in reversed(self.running):
            if _rank(victim) <= _rank(job):
                return False
            if not images or any(use.entry for use in victim.images):
                break
        else:
            return False
        self.running.remove(victim)
        victim.running = False
        first, end = step.segments.pop(victim, (0, 0))
        step.num_tokens -= end - first
        step.preempted.add(victim)
        self._release(victim)
        victim.metrics.preemptions += 1
        self.metrics.preemptions += 1
        bisect.insort(self.waiting, victim, key=_rank)
        return True

    def _release(self, job: Job) -> None:
        self.blocks.release(job.blocks)
        job.blocks, job.computed, job.proposed = [], 0, []
        for use in job.images:
            self._let_go(use)

    def _let_go(self, use: ImageUse) -> None:
        if use.entry is not None:
            self.images.release(use.entry)
            use.entry = None


def _rank(job: Job) -> tuple[int, int]:
    return job.rank
