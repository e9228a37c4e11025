"""What a training step reads: a fixed slice of the order, so that a resumed run sees what an unbroken one would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from ...errors import ConfigError, DataError
from ...processing.processor import Processor
from .config import ChatData, DatasetSource
from .encode import Example, encode_row, max_length
from .order import Order
from .skips import FIRST_ROWS, BadRow, Skip, summary
from .sources import Rows, open_source


@dataclass(frozen=True)
class StepExamples:
    """One process's share of a step."""

    examples: list[Example]
    skipped: list[Skip]  # rows that are absent
    cut: list[Skip]  # rows among the examples that were shortened

    @property
    def read(self) -> int:
        return len(self.examples) + len(self.skipped)


class ChatSteps(Dataset[StepExamples]):
    """Item s is step s, of which this process takes its share; for a `DataLoader` with `batch_size=None`.

    Of training rows there are steps without end; of evaluation rows, in the order of their files, as many as it takes.
    """

    def __init__(
        self,
        data: ChatData,
        processor: Processor,
        samples_per_step: int,
        rank: int = 0,
        world: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        evaluation: bool = False,
    ) -> None:
        """samples_per_step: rows of a step, over all processes. dtype: the one that the model takes pixels in

        Raises:
            ConfigError: fewer rows than processes, a length beyond the model's context, nothing to evaluate on.
            DataError: a source is not there, is damaged, or has no rows.
        """
        if samples_per_step < world:
            raise ConfigError(f"a step has {samples_per_step} samples for {world} processes; each needs at least one")
        self.data, self.processor, self.samples_per_step = data, processor, samples_per_step
        self.rank, self.world, self.dtype = rank, world, dtype
        self.longest = max_length(data, processor.config)
        self.sources = data.evaluation if evaluation and data.evaluation else data.sources
        if evaluation and not (data.evaluation or data.holdout):
            raise ConfigError("data: there is nothing to evaluate on; set holdout, or list sources under evaluation")
        if evaluation and any(isinstance(source, DatasetSource) and source.streaming for source in self.sources):
            raise ConfigError("data: evaluation reads every row once, which a stream does not end; leave out streaming")
        self.rows: list[Rows] = [open_source(source, data.seed) for source in self.sources]
        sizes, weights = [rows.size for rows in self.rows], [source.weight for source in self.sources]
        self.order = Order(sizes, weights, data.seed, data.holdout)
        self._listed: list[tuple[int, int]] | None = None
        if evaluation:
            every = [(k, row) for k, size in enumerate(sizes) for row in range(size or 0)]
            self._listed = every if data.evaluation else self.order.held_out()
            if not self._listed:
                raise ConfigError("data: holdout keeps no row back; there are too few, so list evaluation sources")

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows that all sources have together, without those held out; None where one is a stream."""
        return self.order.rows_per_epoch if self._listed is None else len(self._listed)

    @property
    def num_steps(self) -> int | None:
        """Steps of an epoch; the last one reaches into the next epoch, or where evaluation ends, has fewer rows."""
        return None if self.rows_per_epoch is None else -(-self.rows_per_epoch // self.samples_per_step)

    def __getitem__(self, step: int) -> StepExamples:
        end = (step + 1) * self.samples_per_step
        if self._listed is not None:
            end = min(end, len(self._listed))
        places = [self._place(i) for i in range(step * self.samples_per_step, end)]
        if self._listed is None:
            # Each process has its part of every source: one's rows take longer than another's, and all wait for the
            # slowest. The sort is stable, so a stream is still read in its order.
            places.sort(key=lambda place: place[0])
        return self.encode(places[self.rank :: self.world])

    def encode(self, places: Sequence[tuple[int, int]]) -> StepExamples:
        """Rows by (source, row)."""
        examples, skipped, cut = [], [], []
        for source, row in places:
            name = self.sources[source].place
            try:
                example = self._example(source, row)
            except BadRow as error:
                reason = " ".join(str(error).split())
                skipped.append(Skip(name, self.rows[source].where(row), error.kind, reason))
                continue
            examples.append(example)
            if example.cut:
                cut.append(Skip(name, example.where, "cut", f"{example.cut} tokens are cut off its end", kept=True))
        return StepExamples(examples, skipped, cut)

    def require_usable(self) -> None:
        """Raises:
        DataError: none of the first rows can be used; it says why.
        """
        skipped: list[Skip] = []
        for position in range(min(FIRST_ROWS, self.rows_per_epoch or FIRST_ROWS)):
            found = self.encode([self._place(position)])
            if found.examples:
                return
            skipped += found.skipped
        raise DataError(summary(len(skipped), skipped))

    def _place(self, position: int) -> tuple[int, int]:
        if self._listed is not None:
            return self._listed[position]
        source, _, row = self.order(position)
        return source, row

    def _example(self, source: int, index: int) -> Example:
        rows = self.rows[source]
        row = rows.read(index)
        return encode_row(
            row, rows.where(index), self.sources[source], self.processor,
            longest=self.longest, truncate=self.data.too_long == "truncate", dtype=self.dtype,
        )  # fmt: skip
