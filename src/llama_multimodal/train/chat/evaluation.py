"""Held-out conversations while training goes on: their loss, and whether the model's answers are theirs."""

from __future__ import annotations

import dataclasses
import json
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
        asked = self.examples[:count]
        for i in range(self.group.most(len(asked)) if self.group.sharded else len(asked)):
            mine = asked[i] if i < len(asked) else None
            together, row = self._together(mine)
            prompts = [split_answer(example)[0] for example in together]
            found = generate(model, microbatch(prompts, model.config).inputs, params)
            if mine is None:
                continue
            truth = split_answer(mine)[1]
            answer, right = self.processor.decode(found.token_ids[row]), self.processor.decode(truth)
            scores += torch.tensor([1.0, float(exact_match(answer, right)), anls(answer, [right])], dtype=torch.float64)
            written.append({"where": mine.where, "answer": answer, "truth": right})
        if self.group.leads and written:
            file = Path(self.recipe.output) / FOLDER / f"step-{step:08d}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in written)
            file.write_text("".join(lines), encoding="utf-8")
        total, exact, similar = self.group.sum(scores)
        return {"eval_exact_match": exact / total, "eval_anls": similar / total} if total else {}

    def _together(self, mine: Example | None) -> tuple[list[Example], int]:
        """What is answered at once, and which of them is this reader's. Sharded weights are gathered by all for every
        token: there all answer the same, one row of each reader, and so end at the same token."""
        if not self.group.sharded:
            return [mine] if mine is not None else [], 0
        found = self.group.gather(mine)
        row = sum(one is not None for one in found[: self.group.rank])
        return [one for one in found if one is not None], row


def split_answer(example: Example) -> tuple[Example, list[int]]:
    """A conversation up to its last answer, and that answer's tokens."""
    learnt = [i for i, label in enumerate(example.labels) if label != IGNORED]
    first = next(i for i in reversed(learnt) if i - 1 not in learnt)
    prompt = example.tokens[: first + 1]
    return dataclasses.replace(example, tokens=prompt, labels=[IGNORED] * len(prompt)), example.labels[
        first : learnt[-1] + 1
    ]
