"""Held-out conversations while training goes on: their loss, and whether the model's answers are theirs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ...errors import DataError
from ...eval.metrics import anls, exact_match
from ...generate import generate
from ...models import LanguageModel
from ...processing.processor import Processor
from ...sampling import SamplingParams
from ..loader import IGNORED
from ..parallel import Group
from .batches import padded_groups
from .encode import Example, microbatch
from .in_parts import prepare_answers
from .recipe import ChatRecipe
from .steps import ChatSteps

FOLDER = "samples"
"""In the run's folder: what the model answered at each evaluation."""


class Evaluation:
    """This process's share of the rows that are asked."""

    def __init__(self, recipe: ChatRecipe, processor: Processor, group: Group) -> None:
        self.recipe, self.processor, self.group = recipe, processor, group
        rows = ChatSteps(
            recipe.data, processor, max(recipe.evaluate.rows, group.size), group.rank, group.size, evaluation=True
        )
        self.examples: list[Example] = [dataclasses.replace(one, distill=False) for one in rows[0].examples]
        if not any(group.gather(len(self.examples))):
            raise DataError("data: none of the rows to evaluate on can be used")

    @classmethod
    def of(cls, recipe: ChatRecipe, processor: Processor, group: Group) -> Evaluation | None:
        """None where it is not asked for."""
        return cls(recipe, processor, group) if recipe.evaluate.every else None

    def answers(self, model: LanguageModel, step: int) -> dict[str, float]:
        """Let the model answer in the place of the last answer of some rows, greedily; scores over all processes."""
        count = -(-self.recipe.evaluate.answers // self.group.size)
        params = SamplingParams(max_new_tokens=self.recipe.evaluate.max_new_tokens)
        written, scores = [], torch.zeros(3, dtype=torch.float64)
        if self.group.sharded:
            prepare_answers(model)
        for together, mine in self._turns(self.examples[:count]):
            prompts, truths = zip(*map(split_answer, together), strict=True)
            found = generate(model, microbatch(prompts, model.config).inputs, params)
            for row in mine:
                answer, right = self.processor.decode(found.token_ids[row]), self.processor.decode(truths[row])
                similar = anls(answer, [right])
                scores += torch.tensor([1.0, float(exact_match(answer, right)), similar], dtype=torch.float64)
                written.append({"where": together[row].where, "answer": answer, "truth": right})
        if self.group.leads and written:
            file = Path(self.recipe.output) / FOLDER / f"step-{step:08d}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in written)
            file.write_text("".join(lines), encoding="utf-8")
        total, exact, similar = self.group.sum(scores)
        return {"eval_exact_match": exact / total, "eval_anls": similar / total} if total else {}

    def _turns(self, asked: Sequence[Example]) -> Iterator[tuple[list[Example], Sequence[int]]]:
        """What is answered at once, and which rows of it are this reader's. Sharded weights are gathered by all for
        every token: there all answer the same, one row of each reader, and so end at the same token."""
        if not self.group.sharded:
            for some in padded_groups(asked, self.recipe.batch):
                yield some, range(len(some))
            return
        for i in range(self.group.most(len(asked))):
            found = self.group.gather(asked[i] if i < len(asked) else None)
            before = sum(one is not None for one in found[: self.group.rank])
            yield [one for one in found if one is not None], [before] if i < len(asked) else []


def split_answer(example: Example) -> tuple[Example, list[int]]:
    """A conversation up to its last answer, and that answer's tokens."""
    learnt = [i for i, label in enumerate(example.labels) if label != IGNORED]
    first = next(i for i in reversed(learnt) if i - 1 not in learnt)
    prompt = example.tokens[: first + 1]
    return dataclasses.replace(example, tokens=prompt, labels=[IGNORED] * len(prompt)), example.labels[
        first : learnt[-1] + 1
    ]
