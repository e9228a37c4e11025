"""What an engine counts: one object, as plain values for a server to export."""

from __future__ import annotations

import bisect
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .block_manager import BlockManager, ImagePool
from .request import Job

_BOUNDS = tuple(0.0001 * 2**i for i in range(24))  # 0.1 ms to 14 minutes


@dataclass
class Histogram:
    """Seconds in buckets, each twice as wide as the one before; `counts` has one more, for what is longer."""

    bounds: tuple[float, ...] = _BOUNDS
    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """The bound of the bucket in which this share of all values is reached; None without any."""
        left = share * self.count
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            left -= count
            if count and left <= 0:
                return bound
        return None

    def as_dict(self) -> dict[str, Any]:
        quantiles = {f"p{round(100 * share)}": self.quantile(share) for share in (0.5, 0.9, 0.99)}
        return {"count": self.count, "sum": self.total, **quantiles}


class EngineMetrics:
    """Counters since the engine began, and how full its cache is now."""

    def __init__(self, blocks: BlockManager, images: ImagePool) -> None:
        self._blocks, self._images = blocks, images
        self.started = time.monotonic()
        self.requests: Counter[str] = Counter()  # by finish reason
        self.queue_seconds, self.first_token_seconds = Histogram(), Histogram()
        self.inter_token_seconds, self.request_seconds = Histogram(), Histogram()
        self.steps = 0
        self.prompt_tokens = self.cached_tokens = 0  # of requests that were let in; cached: not computed again
        self.computed_tokens = self.generated_tokens = 0
        self.proposed_tokens = self.accepted_tokens = 0  # by speculation; proposed: that the model has checked
        self.encoded_images = self.preemptions = 0
        self.peak_blocks = self.peak_image_units = 0
        self.busy_seconds = 0.0  # in steps

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the proposed tokens that were accepted; None where none was proposed."""
        return self.accepted_tokens / self.proposed_tokens if self.proposed_tokens else None

    def admitted(self, job: Job) -> None:
        """A request begins; again, where it had to give way before."""
        if job.metrics.queue_seconds is None:
            job.metrics.queue_seconds = time.monotonic() - job.arrived
            job.metrics.cached_tokens = job.computed
            self.queue_seconds.add(job.metrics.queue_seconds)
            self.prompt_tokens += job.prompt_length
            self.cached_tokens += job.computed

    def token(self, job: Job) -> None:
        """A request got its next token."""
        now = time.monotonic()
        if job.last_token is None:
            job.metrics.first_token_seconds = now - job.arrived
            self.first_token_seconds.add(now - job.arrived)
        else:
            self.inter_token_seconds.add(now - job.last_token)
        job.last_token = now
        self.generated_tokens += 1

    def proposed(self, job: Job, count: int) -> None:
        """The model has checked so many proposed tokens of a request."""
        job.metrics.proposed_tokens += count
        self.proposed_tokens += count

    def accepted(self, job: Job) -> None:
        """One of them is in the answer."""
        job.metrics.accepted_tokens += 1
        self.accepted_tokens += 1

    def stepped(self, seconds: float, tokens: int) -> None:
        self.steps += 1
        self.busy_seconds += seconds
        self.computed_tokens += tokens
        self.peak_blocks = max(self.peak_blocks, self._blocks.num_held)
        self.peak_image_units = max(self.peak_image_units, self._images.num_held)

    def finished(self, job: Job, reason: str) -> None:
        job.metrics.total_seconds = time.monotonic() - job.arrived
        self.request_seconds.add(job.metrics.total_seconds)
        self.requests[reason] += 1

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON or a server's page of metrics."""
        times = ("queue_seconds", "first_token_seconds", "inter_token_seconds", "request_seconds")
        counts = (
            "steps", "prompt_tokens", "cached_tokens", "computed_tokens", "generated_tokens", "proposed_tokens",
            "accepted_tokens", "encoded_images", "preemptions", "peak_blocks", "peak_image_units", "busy_seconds",
        )  # fmt: skip
        return {
            "requests": dict(self.requests),
            **{name: getattr(self, name).as_dict() for name in times},
            **{name: getattr(self, name) for name in counts},
            "tokens_per_second": self.generated_tokens / self.busy_seconds if self.busy_seconds else None,
            "blocks": {"held": self._blocks.num_held, "all": self._blocks.num_blocks},
            "image_units": {"held": self._images.num_held, "all": self._images.num_units},
            "prefix_hit_rate": self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None,
            "acceptance_rate": self.acceptance_rate,
            "image_hits": self._images.hits,
            "image_misses": self._images.misses,
        }
