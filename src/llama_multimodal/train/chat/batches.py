"""A step's conversations as micro-batches: alike in length, or packed several to a row.

Shapes: B rows · T tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...config import AnyModelConfig, ModelConfig
from ...distributed import match_images
from ...inputs import ModelInputs
from ..loader import IGNORED
from ..parallel import Group
from .encode import Example, microbatch
from .recipe import BatchConfig
from .steps import ChatSteps, StepExamples


@dataclass(frozen=True)
class MicroBatch:
    """inputs, and labels [B, T]: the next token of each answer token, else -100.

    rows: where each row's conversations come from. lengths: tokens of each conversation. distill: the labels only say
    where the base's predictions are to stay. Of sharded weights (`alike`), blank: pictures among the inputs that nobody
    asked for, which come last; before_pictures: whether it has none, and others of the step have.
    """

    inputs: ModelInputs
    labels: Tensor
    rows: tuple[str, ...]
    lengths: tuple[int, ...]
    distill: bool = False
    blank: int = 0
    before_pictures: bool = False

    @property
    def num_images(self) -> int:
        return len(self.inputs.images) - self.blank


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
    """Micro-batches of conversations of like length, or of packed ones; pictures of one size share a batch, and what
    is learnt and what is distilled do not."""
    ordered = sorted(examples, key=lambda e: (tuple(e.tiles.shape[2:]) if len(e.tiles) else (), len(e.tokens)))
    for distill in (False, True):
        some = [one for one in ordered if one.distill == distill]
        for group in _packed(some, batch) if batch.packing else _padded(some, batch):
            made = _packed_batch(group, config) if batch.packing else _padded_batch(group, config)
            yield replace(made, distill=distill)


def _padded(ordered: Sequence[Example], batch: BatchConfig) -> Iterator[list[Example]]:
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


def _padded_batch(group: Sequence[Example], config: AnyModelConfig) -> MicroBatch:
    made = microbatch(group, config)
    return MicroBatch(made.inputs, made.labels, tuple(e.where for e in group), tuple(len(e.tokens) for e in group))


def _packed_batch(group: Sequence[Example], config: AnyModelConfig) -> MicroBatch:
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
    return MicroBatch(inputs, labels, (", ".join(e.where for e in group),), lengths)


def alike(micro: Sequence[MicroBatch], config: AnyModelConfig, group: Group) -> list[MicroBatch]:
    """What a reader of sharded weights goes through: as many micro-batches as any other, with pictures wherever another
    has some, since all gather the weights of a block together. From what is added nothing is learnt.
    """
    if not group.sharded or group.mesh is None:
        return list(micro)
    made = []
    for distill in (False, True):  # a distilled one is read twice, so all read one of them together
        some = sorted((one for one in micro if one.distill == distill), key=lambda one: len(one.inputs.images) > 0)
        nothing = replace(_nothing(config), distill=distill)
        for one in [*[nothing] * (group.most(len(some)) - len(some)), *some]:
            inputs, labels = match_images(one.inputs, one.labels, config, group.mesh)
            blank = len(inputs.images) - len(one.inputs.images)
            made.append(replace(one, inputs=inputs, labels=labels, blank=blank))
    # Those with pictures last: beside each other's, and what is learnt from pictures alone has its gradients exchanged
    # with a step's last micro-batch too.
    made.sort(key=lambda one: len(one.inputs.images) > 0)
    seen = any(one.inputs.images for one in made)
    return [replace(one, before_pictures=seen and not one.inputs.images) for one in made]


def _nothing(config: AnyModelConfig) -> MicroBatch:
    side = config.vision.image_size if isinstance(config, ModelConfig) else 1
    made = microbatch(
        [Example([config.text.bos_token_id], [IGNORED], torch.zeros(0, 3, side, side), (), "", "")], config
    )
    return MicroBatch(made.inputs, made.labels, (), ())
