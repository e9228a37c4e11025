"""Training batches of the embedded model's world: rendered, tokenised and packed by workers, ahead of the loop.

A step's samples depend on the recipe's seed and the step alone, so a resumed run sees what an unbroken one would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...config import ModelConfig
from ...inputs import ImageLayout, ModelInputs, batch_inputs
from ...processing.prompt import encode_header, encode_message
from ...processing.tiles import fitted_size, image_tiles
from ...processing.tokenizer import Tokenizer
from ...zoo.world import Mark, Sample, sample
from ..loader import IGNORED
from .auxiliary import PATCH_HEADS, Targets, picture_targets
from .config import WorldRecipe


@dataclass(frozen=True)
class MicroBatch:
    """inputs, labels [B, T] (the next token of each answer token, else -100), and the pictures' targets."""

    inputs: ModelInputs
    labels: Tensor
    targets: Targets


@dataclass(frozen=True)
class _Prepared:
    """A conversation's token ids, its labels (answers and their `<|eot_id|>` only), the things that its tokens name."""

    tokens: list[int]
    labels: list[int]
    named: list[tuple[int, Mark]]  # position of a name's last token, or of the token before a printed character
    sample: Sample


def prepare_sample(item: Sample, tokenizer: Tokenizer, config: ModelConfig) -> _Prepared:
    """The sample as the decoder reads it."""
    eot = tokenizer.special("<|eot_id|>")
    tokens, learnt = [tokenizer.special("<|begin_of_text|>")], [False]
    named = []
    for number, turn in enumerate(item.turns):
        content: list[dict[str, object]] = [{"type": "text", "text": turn.question}]
        if number == 0 and item.image is not None:
            content.insert(0, {"type": "image", "image": item.image})
        asked = encode_message(tokenizer, {"role": "user", "content": content}, config.image_token_id)
        prompt = asked.tokens + encode_header(tokenizer, "assistant")
        answer = [*tokenizer.encode(turn.answer), eot]
        start = len(tokens) + len(asked.tokens) - 1 - len(tokenizer.encode(turn.question))
        for mention in turn.mentions:
            end = turn.question.index(mention.words) + len(mention.words)
            named.append((start + len(tokenizer.encode(turn.question[:end])) - 1, mention.mark))
        if turn.kind == "text" and len(answer) == len(item.marks) + 1:  # spelt: a token a character and the end
            named += [(len(tokens) + len(prompt) - 1 + i, mark) for i, mark in enumerate(item.marks)]
        tokens += prompt + answer
        learnt += [False] * len(prompt) + [True] * len(answer)
    if not item.turns and item.image is not None:  # a sheet: nothing is asked
        shown = {"role": "user", "content": [{"type": "image", "image": item.image}]}
        tokens += encode_message(tokenizer, shown, config.image_token_id).tokens
        learnt += [False] * (len(tokens) - len(learnt))
    labels = [tokens[i + 1] if learnt[i + 1] else IGNORED for i in range(len(tokens) - 1)] + [IGNORED]
    return _Prepared(tokens, labels, named, item)


class WorldSteps(Dataset[list[MicroBatch]]):
    """Item s is step s: this rank's share of its samples, grouped into micro-batches of similar length."""

    def __init__(
        self, recipe: WorldRecipe, config: ModelConfig, tokenizer: Tokenizer, rank: int = 0, world: int = 1
    ) -> None:
        self.recipe, self.data, self.config, self.tokenizer = recipe, recipe.data, config, tokenizer
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> list[MicroBatch]:
        count = self.count(step)
        families = ["sheet"] * (count if self._on_sheets(step) else self.data.sheets_beside)
        families += ["text"] * (0 if self._on_sheets(step) else self.data.texts_beside)
        base = self.data.seed * 1_000_000_000 + step * count
        prepared = []
        for i in range(self.rank, count, self.world):
            family = families[i] if i < len(families) else None
            item = sample(base + i, family=family, turns=self.data.turns_per_scene, small=self.data.small_pictures)
            prepared.append(prepare_sample(item, self.tokenizer, self.config))
        prepared.sort(key=lambda p: (len(p.sample.turns) > 0, len(p.tokens)))  # sheets first, for the encoder alone
        return [self._microbatch(group) for group in self._groups(prepared)]

    def count(self, step: int) -> int:
        """How many samples a step has, over all ranks."""
        if self._on_sheets(step):
            return self.data.sheets_per_step
        return self.data.samples_per_step + self.data.sheets_beside + self.data.texts_beside

    def _on_sheets(self, step: int) -> bool:
        return step < self.recipe.sheet_steps

    def _groups(self, prepared: list[_Prepared]) -> Iterator[list[_Prepared]]:
        group: list[_Prepared] = []
        for one in prepared:
            full = len(one.tokens) * (len(group) + 1) > self.data.tokens_per_microbatch
            if group and (full or bool(one.sample.turns) != bool(group[0].sample.turns)):
                yield group
                group = []
            group.append(one)
        yield group

    def _microbatch(self, group: list[_Prepared]) -> MicroBatch:
        vision = self.config.tiled
        side = vision.image_size
        tiles, layouts, patches, counts = [np.empty((0, 3, side, side), np.float32)], [], [], []
        mentions, places = [], []
        for row, one in enumerate(group):
            image = one.sample.image
            if image is None:
                continue
            cut, (rows, columns) = image_tiles(image, side, vision.max_num_tiles)
            layout = ImageLayout(rows, columns, row)
            fitted = fitted_size(*image.size, rows, columns, side)
            scale = fitted[0] / image.width, fitted[1] / image.height
            marks = [_scaled(mark, *scale) for mark in one.sample.marks]
            shown, counted = picture_targets(marks, layout, vision, counted=one.sample.family != "sheet")
            tiles.append(cut)
            layouts.append(layout)
            patches.append(shown)
            counts.append(counted)
            for position, mark in one.named:
                mentions.append((row, position))
                on_canvas = _scaled(mark, *scale)
                places.append((on_canvas.x / side, on_canvas.y / side))
        inputs = batch_inputs(
            [one.tokens for one in group],
            torch.from_numpy(np.concatenate(tiles)),
            layouts,
            image_token_id=self.config.image_token_id,
            pad_token_id=self.config.text.pad_token_id,
        )
        labels = torch.full_like(inputs.tokens, IGNORED)
        for row, one in enumerate(group):
            labels[row, : len(one.labels)] = torch.tensor(one.labels)
        targets = Targets(
            torch.cat(patches, dim=1) if patches else torch.zeros(len(PATCH_HEADS), 0, 0, dtype=torch.int64),
            torch.stack(counts) if counts else torch.zeros(0, 0, dtype=torch.int64),
            torch.tensor(mentions, dtype=torch.int64).view(-1, 2),
            torch.tensor(places, dtype=torch.float32).view(-1, 2),
        )
        return MicroBatch(inputs, labels, targets)


def _scaled(mark: Mark, x: float, y: float) -> Mark:
    """A mark in pixels of the canvas; x, y: canvas pixels for a picture pixel, which rounding makes differ a little."""
    left, top, right, bottom = mark.box
    return replace(mark, x=mark.x * x, y=mark.y * y, box=(left * x, top * y, right * x, bottom * y))
