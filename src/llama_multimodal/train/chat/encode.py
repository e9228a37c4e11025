"""From a row of a file to tokens, labels and pixels, through the checkpoint's own processor.

Shapes: B rows · T tokens · M tiles · S side of a tile
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...config import AnyModelConfig, ModelConfig
from ...errors import ConfigError, ImageError, PromptError, UserError
from ...inputs import ImageLayout, ModelInputs, batch_inputs, join_tiles
from ...processing.processor import Processor, TrainingRow
from ..loader import IGNORED
from .config import ChatData, SourceConfig
from .shapes import conversation
from .skips import BadRow
from .sources import Row


@dataclass(frozen=True)
class Example:
    """One conversation. `labels[i]` is the token after `tokens[i]` where it is learnt, else -100."""

    tokens: list[int]
    labels: list[int]
    tiles: Tensor  # [M, 3, S, S]; M = 0 without pictures
    images: tuple[ImageLayout, ...]
    where: str  # the row's file and line
    shape: str  # that the row was recognised by
    cut: int = 0  # tokens that were cut off its end
    distill: bool = False  # its labels only say where the base's predictions are to stay

    @property
    def num_learnt(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class ChatBatch:
    """inputs, and labels [B, T]: the next token of each answer token, else -100."""

    inputs: ModelInputs
    labels: Tensor

    @property
    def answers(self) -> Tensor:
        """Where answer tokens are: [B, T]."""
        return self.labels != IGNORED


def max_length(data: ChatData, config: AnyModelConfig) -> int:
    """Most tokens of a conversation.

    Raises:
        ConfigError: more than the model's context.
    """
    context = config.text.max_position_embeddings
    if data.max_length is not None and data.max_length > context:
        raise ConfigError(f"data: max_length is {data.max_length}, and the model's context is {context}; lower it")
    return data.max_length or context


def encode_row(
    row: Row,
    where: str,
    source: SourceConfig,
    processor: Processor,
    *,
    longest: int,
    truncate: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Example:
    """longest: tokens. truncate: cut a longer conversation rather than refuse it, and before a picture that does not
    fit as a whole. dtype: of the tiles; rounding here is what the model would do

    Raises:
        BadRow: it cannot be learnt from.
    """
    found = conversation(row.table, source, row.find)
    try:
        made = processor.encode_for_training(found.messages)
    except ImageError as error:
        raise BadRow("picture", str(error)) from error
    except PromptError as error:
        raise BadRow("refused", str(error)) from error
    cut = 0
    if len(made.tokens) > longest:
        if not truncate:
            raise BadRow("too long", f"{len(made.tokens)} tokens, and at most {longest} are taken")
        shorter = _shortened(made, longest, processor.config)
        made, cut = shorter, len(made.tokens) - len(shorter.tokens)
    follows = zip(made.tokens[1:], made.learnt[1:])
    labels = [*(token if learnt else IGNORED for token, learnt in follows), IGNORED]
    if all(label == IGNORED for label in labels):
        reason = f"no answer is left of the first {longest} tokens" if cut else "no token of it is learnt"
        raise BadRow("too long" if cut else "no answer", reason)
    return Example(made.tokens, labels, made.tiles.to(dtype), made.images, where, found.shape, cut, source.distill)


def _shortened(row: TrainingRow, longest: int, config: AnyModelConfig) -> TrainingRow:
    """The row's first tokens, with the pictures that lie wholly among them."""
    counts, tiles = [image.num_tokens for image in row.images], [image.num_tiles for image in row.images]
    places = [i for i, token in enumerate(row.tokens) if token == config.image_token_id]
    kept, first = 0, 0
    for count in counts:
        if places[first + count - 1] >= longest:
            longest = min(longest, places[first])
            break
        kept, first = kept + 1, first + count
    return TrainingRow(
        row.tokens[:longest], row.learnt[:longest], row.tiles[: sum(tiles[:kept])].clone(), row.images[:kept]
    )


def microbatch(examples: Sequence[Example], config: AnyModelConfig) -> ChatBatch:
    """Examples as rows of one batch, padded on the right.

    Raises:
        UserError: there are none.
    """
    if not examples:
        raise UserError("a batch needs at least one example")
    tiles, layouts = join_tiles(
        [(example.tiles, [replace(image, row=row) for image in example.images]) for row, example in enumerate(examples)]
    )
    inputs = batch_inputs(
        [example.tokens for example in examples],
        tiles,
        layouts,
        image_token_id=config.image_token_id,
        pad_token_id=config.text.pad_token_id,
        spliced=isinstance(config, ModelConfig) and config.fusion == "splice",
    )
    labels = torch.full_like(inputs.tokens, IGNORED)
    for row, example in enumerate(examples):
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return ChatBatch(inputs, labels)
