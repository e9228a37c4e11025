"""A data set looked at before a run: what the model will read of some rows, and what can be used of many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ...errors import DataError
from ...processing.processor import Processor
from ...processing.tokenizer import StreamDecoder
from .encode import IGNORED, Example
from .skips import Skip, summary
from .steps import ChatSteps

Piece = tuple[str, bool]
"""A stretch of a conversation as the model reads it, and whether it is learnt."""


@dataclass
class Report:
    """What was found in the rows that were read."""

    shown: list[Example] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)  # tokens of each usable row
    learnt: int = 0  # tokens
    distilled: int = 0  # tokens
    tiles: int = 0
    cut: int = 0  # rows that were shortened

    @property
    def usable(self) -> int:
        return len(self.lengths)

    @property
    def read(self) -> int:
        return self.usable + len(self.skipped)

    @property
    def total(self) -> int:
        """Tokens of all usable rows."""
        return sum(self.lengths)

    def quantile(self, share: float) -> int:
        """The length that this share of the usable rows does not exceed."""
        return sorted(self.lengths)[max(0, -int(-share * self.usable // 1) - 1)]


def check(steps: ChatSteps, rows: int, limit: int, progress: Callable[[int, int], None] = lambda *_: None) -> Report:
    """Read some rows of every source, spread evenly over it.

    rows: of how many the examples are kept. limit: of how many are read; 0: of all

    Raises:
        DataError: none of them can be used.
    """
    report = Report()
    places = list(_spread(steps, limit))
    for done, place in enumerate(places, 1):
        found = steps.encode([place])
        report.skipped += found.skipped
        report.cut += len(found.cut)
        for example in found.examples:
            report.shapes[example.shape] += 1
            report.lengths.append(len(example.tokens))
            if example.distill:
                report.distilled += example.num_learnt
            else:
                report.learnt += example.num_learnt
            report.tiles += len(example.tiles)
            if len(report.shown) < rows:
                report.shown.append(example)
        progress(done, len(places))
    if not report.usable:
        raise DataError(summary(report.read, report.skipped))
    return report


def _spread(steps: ChatSteps, limit: int) -> Iterator[tuple[int, int]]:
    """(source, row) for `limit` rows, one source after the other in turn."""
    each = -(-limit // len(steps.rows)) if limit else None
    lists = []
    for rows in steps.rows:
        size = rows.size
        if size is None:  # a stream: the first ones
            lists.append(list(range(each or 1000)))
        else:
            count = min(size, each or size)
            lists.append([i * size // count for i in range(count)])
    for turn in range(max(map(len, lists))):
        yield from ((k, listed[turn]) for k, listed in enumerate(lists) if turn < len(listed))


def pieces(example: Example, processor: Processor) -> list[Piece]:
    """The conversation with its special tokens written out, cut where learning begins or ends. Tokens whose places
    a picture takes are written once, with their number."""
    assert processor.tokenizer is not None
    decoder = StreamDecoder(processor.tokenizer, skip_special=False)
    learnt = [False, *(label != IGNORED for label in example.labels[:-1])]
    image, spliced = processor.config.image_token_id, any(one.num_tokens > 1 for one in example.images)
    found: list[Piece] = []
    run = 0

    def add(text: str, learns: bool) -> None:
        if found and found[-1][1] == learns:
            found[-1] = (found[-1][0] + text, learns)
        elif text:
            found.append((text, learns))

    for i, (token, learns) in enumerate(zip(example.tokens, learnt)):
        text = decoder.push(token)
        if token == image:
            run += 1
            if spliced and example.tokens[i + 1 : i + 2] == [image]:
                continue
            text = f"<image×{run}>" if run > 1 else "<image>"
            run = 0
        add(text, learns)
    add(decoder.flush(), learnt[-1])
    return found
