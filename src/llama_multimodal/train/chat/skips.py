"""Rows that cannot be used: said once where it happens, counted, listed in a file, and too many stop the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import DataError
from ...processing import json_lines

if TYPE_CHECKING:
    from .steps import StepExamples

FIRST_ROWS = 100  # as many are read before the share of skipped ones counts, or an epoch where that is shorter


class BadRow(Exception):
    """A row that cannot be used; caught where rows are encoded, and never seen by users.

    kind: a word or two that such rows are counted under
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Skip:
    """A row that was left out, or cut short where `kept`."""

    source: str
    where: str  # its file and line
    kind: str
    reason: str
    kept: bool = False


def summary(read: int, skipped: Sequence[Skip]) -> str:
    """How many rows were read and why some were left out: one line, with an example of the commonest kind."""
    counts = Counter(skip.kind for skip in skipped)
    kinds = ", ".join(f"{count} × {kind}" for kind, count in counts.most_common())
    example = next(skip for skip in skipped if skip.kind == counts.most_common(1)[0][0])
    return f"{len(skipped)} of {read} rows cannot be used ({kinds}); for example {example.where}: {example.reason}"


class SkipLog:
    """Counts what one process reads, and lists what it skips in `skipped.jsonl`; begun anew, or gone on with."""

    def __init__(
        self,
        path: str | Path,
        max_skipped: float,
        rows_per_epoch: int | None,
        *,
        world: int = 1,
        step: int = 0,
        read: int = 0,
    ) -> None:
        """rows_per_epoch: None for a stream. world: processes that share them. step: the one that a resumed run begins
        with. read: rows of this process until there

        Raises:
            DataError: the file holds something else.
        """
        self.path, self.max_skipped = Path(path), max_skipped
        self.epoch = None if rows_per_epoch is None else -(-rows_per_epoch // world)
        self.read, self.skips = read, self._earlier(step)
        lines = [self._line(when, skip) for when, skip in self.skips]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")

    def add(self, step: int, examples: StepExamples) -> None:
        """Raises:
        DataError: more rows than `max_skipped` allows could not be used.
        """
        self.read += examples.read
        new = [(step, skip) for skip in [*examples.skipped, *examples.cut]]
        self.skips += new
        if new:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(self._line(step, skip) for step, skip in new)
        self.check()

    def check(self) -> None:
        """Raises:
        DataError: as `add`.
        """
        lost = [skip for _, skip in self.skips if not skip.kept]
        if self.epoch is None or self.read < self.epoch:
            enough, count = self.read >= FIRST_ROWS, self.read
        else:  # the same rows come again: of an epoch that is under way, all may have come early
            enough, count = True, -(-self.read // self.epoch) * self.epoch
        if enough and len(lost) > self.max_skipped * count:
            most = "" if len(lost) == self.read else f"; at most {100 * self.max_skipped:g} % may be (max_skipped)"
            raise DataError(f"{summary(self.read, lost)}{most}. All of them are listed in {self.path}")

    def _earlier(self, step: int) -> list[tuple[int, Skip]]:
        """What a run that is resumed at `step` skipped before it."""
        if step == 0 or not self.path.exists():
            return []
        try:
            with self.path.open("rb") as file:
                rows = [json_lines.parse(line) for _, _, line in json_lines.rows(file)]
            found = [(int(row.pop("step")), Skip(**row)) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{self.path} is not a list of skipped rows; move it away") from error
        return [one for one in found if one[0] < step]

    @staticmethod
    def _line(step: int, skip: Skip) -> str:
        return json.dumps({"step": step, **asdict(skip)}, ensure_ascii=False) + "\n"
