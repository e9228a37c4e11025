"""A step's conversations as micro-batches: alike in length, or packed several to a row.

Shapes: B rows · T tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ...config import AnyModelConfig, ModelConfig
from ...distributed import match_images
from ...inputs import ModelInputs
from ..loader import IGNORED
from ..parallel import Group
from .encode import ChatBatch, Example, microbatch
from .recipe import BatchConfig
from .steps import ChatSteps, StepExamples


@dataclass(frozen=True)
class Batch(ChatBatch):
    """lengths: tokens of each conversation, packed or not."""

    lengths: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatch(Batch):
    """What goes through the model together.

    rows: where each row's conversations come from. held: [B, T], the labels that only say where the base's predictions
    are to stay. base: the conversations that have such labels once more, which the base reads; it has the same answers
    in the same order. Of sharded weights (`alike`), blank: pictures among the inputs that nobody asked for, which come
    last; before_pictures: whether it has none, and others of the step have.
    """

    rows: tuple[str, ...]
    held: Tensor
    base: Batch | None = None
    blank: int = 0
    before_pictures: bool = False

    @property
    def num_images(self) -> int:
        return len(self.inputs.images) - self.blank

    @property
    def learnt(self) -> Tensor:
        """[B, T]"""
        return self.answers & ~self.held

    @property
    def distilled(self) -> Tensor:
        """[B, T]"""
        return self.answers & self.held


@dataclass(frozen=True)
class ChatStep(StepExamples):
    """One process's share of a step, its examples as micro-batches."""

    micro: list[MicroBatch]
    tried: int  # rows

    @property
    def read(self) -> int:
        return self.tried


class ChatBatches(Dataset[ChatStep]):
    """Item s is step s."""

    def __init__(self, steps: ChatSteps, batch: BatchConfig, config: AnyModelConfig) -> None:
        self.steps, self.batch, self.config = steps, batch, config

    def __getitem__(self, step: int) -> ChatStep:
        found = self.steps[step]
        micro = list(micro_batches(found.examples, self.batch, self.config))
        return ChatStep([], found.skipped, found.cut, micro, found.read)


def micro_batches(examples: Sequence[Example], batch: BatchConfig, config: AnyModelConfig) -> Iterator[MicroBatch]:
    """Micro-batches of conversations of like length, or of packed ones; pictures of one size share a batch."""
    ordered = sorted(examples, key=lambda e: (tuple(e.tiles.shape[2:]) if len(e.tiles) else (), len(e.tokens)))
    join = _in_one_row if batch.packing else _a_row_each
    for group in _packed(ordered, batch) if batch.packing else padded_groups(ordered, batch):
        made, held = join(group, config), torch.tensor([one.distill for one in group])
        of_tokens = held.repeat_interleave(torch.tensor(made.lengths))[None] if batch.packing else held[:, None]
        kept = [one for one in group if one.distill]
        yield MicroBatch(
            made.inputs,
            made.labels,
            made.lengths,
            rows=(", ".join(e.where for e in group),) if batch.packing else tuple(e.where for e in group),
            held=of_tokens.expand(made.labels.shape),
            base=join(kept, config) if kept else None,
        )


def padded_groups(ordered: Sequence[Example], batch: BatchConfig) -> Iterator[list[Example]]:
    """Neighbours that fit one batch of a row each."""
    group: list[Example] = []
    for one in ordered:
        too_many = len(one.tokens) * (len(group) + 1) > batch.tokens or len(group) == batch.rows_at_once
        if group and (too_many or not _share_a_size(group, one)):
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _packed(ordered: Sequence[Example], batch: BatchConfig) -> list[list[Example]]:
    """Rows of at most `batch.tokens`: the longest conversations first, each into the first row with room for it."""
    rows: list[list[Example]] = []
    for one in reversed(ordered):
        for row in rows:
            fits = sum(len(other.tokens) for other in row) + len(one.tokens) <= batch.tokens
            if fits and len(row) != batch.rows_at_once and _share_a_size(row, one):
                row.append(one)
                break
        else:
            rows.append([one])
    return rows


def _share_a_size(group: Sequence[Example], one: Example) -> bool:
    """Whether pictures can lie in one tensor."""
    sizes = {tuple(e.tiles.shape[2:]) for e in (*group, one) if len(e.tiles)}
    return len(sizes) < 2


def _a_row_each(group: Sequence[Example], config: AnyModelConfig) -> Batch:
    made = microbatch(group, config)
    return Batch(made.inputs, made.labels, tuple(len(e.tokens) for e in group))


def _in_one_row(group: Sequence[Example], config: AnyModelConfig) -> Batch:
    """One row of several conversations: each has positions of its own, reads itself, and sees its own pictures."""
    alone = [microbatch([one], config) for one in group]
    tiles = [part.inputs.tiles for part in alone if len(part.inputs.tiles)] or [alone[0].inputs.tiles]
    visible, images = [], 0
    for part in alone:
        visible.append(part.inputs.visible + images)  # an empty range stays empty
        images += len(part.inputs.images)
    lengths = tuple(part.inputs.lengths[0] for part in alone)
    inputs = ModelInputs(
        tokens=torch.cat([part.inputs.tokens for part in alone], dim=1),
        positions=torch.cat([part.inputs.positions for part in alone], dim=1),
        lengths=(sum(lengths),),
        tiles=torch.cat(tiles),
        images=tuple(image for part in alone for image in part.inputs.images),
        visible=torch.cat(visible, dim=1),
        segments=torch.repeat_interleave(torch.arange(len(group)), torch.tensor(lengths))[None],
    )
    labels = torch.cat([part.labels for part in alone], dim=1)
    return Batch(inputs, labels, lengths)


def alike(micro: Sequence[MicroBatch], config: AnyModelConfig, group: Group) -> list[MicroBatch]:
    """What a reader of sharded weights goes through: as many micro-batches as any other, with pictures wherever another
    has some, since all gather the weights of a block together. From what is added nothing is learnt.
    """
    if not group.sharded or group.mesh is None:
        return list(micro)
    made = []
    for read_twice in (False, True):  # by all together
        some = sorted(
            (one for one in micro if (one.base is not None) == read_twice), key=lambda one: _pictures(one) > 0
        )
        nothing = _nothing(config, read_twice)
        for one in [*[nothing] * (group.most(len(some)) - len(some)), *some]:
            matched = _matched(one, config, group)
            pad = [matched.labels.shape[i] - one.labels.shape[i] for i in (1, 0)]
            made.append(
                replace(
                    one,
                    inputs=matched.inputs,
                    labels=matched.labels,
                    held=F.pad(one.held, (0, pad[0], 0, pad[1])),
                    base=None if one.base is None else _matched(one.base, config, group),
                    blank=_pictures(matched) - _pictures(one),
                )
            )
    # Those with pictures last: beside each other's, and what is learnt from pictures alone has its gradients exchanged
    # with a step's last micro-batch too.
    made.sort(key=lambda one: _pictures(one) > 0)
    seen = any(_pictures(one) for one in made)
    return [replace(one, before_pictures=seen and not _pictures(one)) for one in made]


def _pictures(batch: Batch) -> int:
    return len(batch.inputs.images)


def _matched(batch: Batch, config: AnyModelConfig, group: Group) -> Batch:
    """With the pictures that others' batches have."""
    assert group.mesh is not None
    inputs, labels = match_images(batch.inputs, batch.labels, config, group.mesh)
    return Batch(inputs, labels, batch.lengths)


def _nothing(config: AnyModelConfig, read_twice: bool) -> MicroBatch:
    side = config.vision.image_size if isinstance(config, ModelConfig) else 1
    made = _a_row_each(
        [Example([config.text.bos_token_id], [IGNORED], torch.zeros(0, 3, side, side), (), "", "")], config
    )
    held = torch.zeros_like(made.labels, dtype=torch.bool)
    return MicroBatch(made.inputs, made.labels, (), rows=(), held=held, base=made if read_twice else None)
