"""Exact match of a model on held-out questions of the embedded model's world, by kind of question.

Every question is asked alone, in a conversation of its own, and answered greedily.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from ..engine import Engine, EngineConfig, Request
from ..models import VisionLanguageModel
from ..processing.processor import Processor
from ..sampling import SamplingParams
from ..zoo.world import KINDS, sample
from .metrics import exact_match, wilson_interval

# What the embedded model is asked to reach, per cent of exact matches; kinds that a target covers are pooled.
TARGETS = {
    "count": (95, ("count_all", "count_color", "count_shape", "count_both")),
    "color and shape": (98, ("color", "shape")),
    "existence": (97, ("existence",)),
    "relation": (95, ("relation",)),
    "printed text": (85, ("text",)),
    "charts": (80, ("chart_highest", "chart_lowest", "chart_value")),
}
_QUESTIONS_PER_PICTURE = 3  # more would make the questions of a kind depend on few pictures


@dataclass
class Failure:
    """A question that was answered wrongly; `seed` renders its picture again."""

    seed: int
    question: str
    truth: str
    answer: str


@dataclass
class Score:
    """Exact matches among questions of one kind."""

    right: int = 0
    total: int = 0
    failures: list[Failure] = field(default_factory=list)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.total)


@dataclass
class Report:
    """Scores by kind of question."""

    scores: dict[str, Score]

    def pooled(self) -> dict[str, tuple[Score, int]]:
        """Scores of the pooled kinds, each with its target in per cent."""
        table = {}
        for name, (target, kinds) in TARGETS.items():
            parts = [self.scores[kind] for kind in kinds if kind in self.scores]
            table[name] = (Score(sum(p.right for p in parts), sum(p.total for p in parts)), target)
        return table

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        kinds = {kind: {**asdict(score), "interval": score.interval} for kind, score in self.scores.items()}
        pooled = {
            name: {"right": s.right, "total": s.total, "interval": s.interval, "target": target}
            for name, (s, target) in self.pooled().items()
        }
        return {"kinds": kinds, "pooled": pooled}


@dataclass(frozen=True)
class _Question:
    kind: str
    seed: int
    image: Image.Image | None
    question: str
    truth: str


def evaluate(
    model: VisionLanguageModel,
    processor: Processor,
    *,
    per_kind: int = 200,
    first_seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Ask `per_kind` held-out questions of every kind, `batch_size` at a time.

    progress: called with (questions answered, questions in all).
    """
    questions = list(_questions(per_kind, first_seed))
    params = SamplingParams(max_new_tokens=64)
    engine = Engine(model, processor, EngineConfig(max_requests=batch_size))
    answers: dict[int, str] = {}
    for event in engine.stream([Request(_conversation(asked), params) for asked in questions]):
        if event.error is not None:
            raise event.error
        if event.answer is not None:
            answers[event.index] = event.answer.text
            if progress:
                progress(len(answers), len(questions))
    scores: dict[str, Score] = defaultdict(Score)
    for number, asked in enumerate(questions):
        score = scores[asked.kind]
        score.total += 1
        if exact_match(answers[number], asked.truth):
            score.right += 1
        else:
            score.failures.append(Failure(asked.seed, asked.question, asked.truth, answers[number]))
    return Report({kind: scores[kind] for kind in KINDS if kind in scores})


def _questions(per_kind: int, first_seed: int) -> Iterator[_Question]:
    """Held-out questions, at most a few about one picture, until every kind has its number."""
    missing = dict.fromkeys(KINDS, per_kind)
    seed = first_seed
    while any(missing.values()):
        drawn = sample(seed, split="heldout")
        wanted = [turn for turn in drawn.turns if missing[turn.kind]]
        # The rarest kinds first: otherwise the common ones fill every picture's share.
        wanted.sort(key=lambda turn: -missing[turn.kind])
        for turn in wanted[:_QUESTIONS_PER_PICTURE]:
            if missing[turn.kind]:
                missing[turn.kind] -= 1
                yield _Question(turn.kind, seed, drawn.image, turn.question, turn.answer)
        seed += 1


def _conversation(asked: _Question) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": asked.question}]
    if asked.image is not None:
        content.insert(0, {"type": "image", "image": asked.image})
    return [{"role": "user", "content": content}]
