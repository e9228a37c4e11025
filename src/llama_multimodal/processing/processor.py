"""From conversations and pictures to `ModelInputs`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..config import AnyModelConfig, LanguageModelConfig
from ..errors import PromptError
from ..inputs import ImageLayout, ModelInputs, batch_inputs
from .images import ImageSource, open_image
from .prompt import Message, Prompt, encode_dialog, text_messages
from .template import TEMPLATE_FILES, ChatTemplate
from .tiles import cut_pixels, grid_of, normalise
from .tokenizer import TOKENIZER_FILES, StreamDecoder, Tokenizer


class Processor:
    """Prepares what a model reads. Only text needs a tokenizer; `encode_tokens` works without one."""

    def __init__(
        self, config: AnyModelConfig, tokenizer: Tokenizer | None = None, template: ChatTemplate | None = None
    ) -> None:
        """template: how a conversation is written; None takes Llama 3's own format."""
        self.config, self.tokenizer, self.template = config, tokenizer, template

    def __call__(self, conversation: Sequence[Message] | Sequence[Sequence[Message]]) -> ModelInputs:
        """One conversation, or a list of them as a batch, each ready for the assistant's next message.

        Raises:
            PromptError: a malformed conversation, a prompt longer than the context, or no tokenizer.
            ImageError: a picture that cannot be read.
        """
        if isinstance(conversation, str | Mapping) or not isinstance(conversation, Sequence):
            raise PromptError('a conversation is a list of messages such as {"role": "user", "content": "Hello"}')
        one = len(conversation) == 0 or isinstance(conversation[0], Mapping)
        conversations: Sequence[Any] = [conversation] if one else conversation
        prompts = [self._prompt(messages) for messages in conversations]
        return self.encode_tokens([prompt.tokens for prompt in prompts], [prompt.images for prompt in prompts])

    def encode_tokens(
        self, rows: Sequence[Sequence[int]], images: Sequence[Sequence[ImageSource]] | None = None
    ) -> ModelInputs:
        """Rows of token ids, and for each row the pictures of its image tokens, in order. Nothing is added.

        Returns:
            tokens [B, T] padded on the right; tiles [M, 3, S, S] float32 of all pictures, M = 0 for text only.

        Raises:
            PromptError: no rows, an empty or too long row, an id outside the vocabulary, or image tokens and pictures
                that differ in number.
            ImageError: a picture that cannot be read.
        """
        if images is None:
            images = [[] for _ in rows]
        if len(rows) == 0:
            raise PromptError("there are no rows of tokens; give at least one")
        if len(images) != len(rows):
            raise PromptError(f"{len(rows)} rows of tokens but {len(images)} lists of images; give one list a row")
        for b, row_images in enumerate(images):
            if isinstance(row_images, str | bytes) or not isinstance(row_images, Sequence):
                raise PromptError(f"the images of row {b} must be a list, one for each of its image tokens")
        checked = [self._check(row, b) for b, row in enumerate(rows)]
        if isinstance(self.config, LanguageModelConfig):
            if any(images):
                raise PromptError("this model reads text only; leave the images out, or take a vision model")
            return self._batch(checked, torch.empty(0, 3, 0, 0), [])
        opened = [(b, open_image(source)) for b, row in enumerate(images) for source in row]
        vision = self.config.vision
        layouts = [
            ImageLayout(*grid_of(picture, vision.image_size, vision.max_num_tiles), row=b) for b, picture in opened
        ]
        total = sum(layout.num_tiles for layout in layouts)
        tiles = np.empty((total, 3, vision.image_size, vision.image_size), np.float32)
        first = 0
        for (_, picture), layout in zip(opened, layouts):
            pixels = cut_pixels(picture, layout.rows, layout.columns, vision.image_size)
            normalise(pixels, out=tiles[first : first + layout.num_tiles])
            first += layout.num_tiles
        return self._batch(checked, torch.from_numpy(tiles), layouts)

    def _batch(self, rows: Sequence[Sequence[int]], tiles: torch.Tensor, layouts: Sequence[ImageLayout]) -> ModelInputs:
        return batch_inputs(
            rows,
            tiles,
            layouts,
            image_token_id=self.config.image_token_id,
            pad_token_id=self.config.text.pad_token_id,
            decoder=None if self.tokenizer is None else self.stream_decoder,
        )

    def _prompt(self, messages: Any) -> Prompt:
        tokenizer = self._need_tokenizer()
        if isinstance(self.config, LanguageModelConfig):
            if self.template is not None:
                return Prompt(self.template.encode(tokenizer, text_messages(messages)))
            if "<|start_header_id|>" not in tokenizer.special_tokens:
                raise PromptError(
                    f"this checkpoint has no chat template ({', '.join(TEMPLATE_FILES)}): a base model continues text,"
                    " so pass encode_tokens the ids of yours, or take the model's instruct variant"
                )
        return encode_dialog(tokenizer, messages, self.config.image_token_id)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens.

        Raises:
            PromptError: there is no tokenizer.
        """
        return self._need_tokenizer().decode(ids)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes tokens as they come and gives whole characters."""
        return StreamDecoder(self._need_tokenizer())

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise PromptError(
                f"this checkpoint has neither {' nor '.join(TOKENIZER_FILES)}, and text needs one: put the model's own"
                " next to its weights, or pass token ids to encode_tokens"
            )
        return self.tokenizer

    def _check(self, row: Sequence[int], b: int) -> list[int]:
        """A row as plain integers that the model has embeddings for, no longer than its context."""
        text = self.config.text
        if len(row) > text.max_position_embeddings:
            raise PromptError(
                f"row {b} has {len(row)} tokens, and the model's context is {text.max_position_embeddings};"
                " shorten the prompt or drop earlier turns"
            )
        try:
            ids = [operator.index(token) for token in row]
        except TypeError:
            raise PromptError(f"row {b} must hold whole numbers, the ids of its tokens") from None
        for token in ids:
            if not (0 <= token < text.vocab_size or token == self.config.image_token_id):
                image = "" if self.config.image_token_id is None else f", and {self.config.image_token_id} for an image"
                raise PromptError(
                    f"row {b}: token id {token} is outside the vocabulary (0 to {text.vocab_size - 1}{image});"
                    " was it made by another model's tokenizer?"
                )
        return ids
