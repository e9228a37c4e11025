"""From conversations and pictures to `ModelInputs`."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import (
    AnyModelConfig,
    LanguageModelConfig,
    ModelConfig,
    Preprocess,
    TiledVisionConfig,
    preprocess_to_hf,
)
from ..errors import ConfigError, PromptError
from ..inputs import ImageLayout, ModelInputs, batch_inputs
from .images import ImageSource, open_image
from .pictures import prepare_pictures
from .preprocess import PREPROCESS_FILES
from .prompt import Message, Prompt, chat_messages, encode_answered, encode_dialog, learns
from .splitting import image_prompt
from .template import TEMPLATE_FILES, ChatTemplate
from .tokenizer import TOKENIZER_FILES, StreamDecoder, Tokenizer


@dataclass(frozen=True)
class TrainingRow:
    """One conversation for training: its tokens with all places of its pictures, and which of them are learnt."""

    tokens: list[int]
    learnt: list[bool]
    tiles: torch.Tensor  # [M, 3, S, S] float32
    images: tuple[ImageLayout, ...]


class Processor:
    """Prepares what a model reads. Only text needs a tokenizer; `encode_tokens` works without one."""

    def __init__(
        self,
        config: AnyModelConfig,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        preprocess: Preprocess | None = None,
    ) -> None:
        """template: how a conversation is written; None takes Llama 3's own format.
        preprocess: how a picture becomes pixels; None takes what is usual for the model's encoder.

        Raises:
            ConfigError: pictures are cut into squares of another size than the encoder's.
        """
        self.config, self.tokenizer, self.template = config, tokenizer, template
        if isinstance(config, ModelConfig):
            preprocess = preprocess or config.preprocess()
            side, wanted = preprocess.tile_size, config.vision.image_size
            if side not in (None, wanted):
                cut = f"{PREPROCESS_FILES[0]} cuts pictures into squares of {side} pixels"
                raise ConfigError(f"{cut}, and the model's encoder is for {wanted}")
        self.preprocess = preprocess

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
        """Rows of token ids, and for each row the pictures of its image tokens, in order.

        Where pictures take several tokens' places, a row has one image token a picture, which is spelt out here, or
        all of them already. Nothing else is added.

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
        assert self.preprocess is not None
        opened = [(b, open_image(source)) for b, row in enumerate(images) for source in row]
        tiles, layouts = prepare_pictures(opened, self.config, self.preprocess)
        for b, row in enumerate(checked):
            checked[b] = self._spell_out(row, [layout for layout in layouts if layout.row == b])
            self._check_length(checked[b], b)
        return self._batch(checked, tiles, layouts)

    def encode_for_training(self, messages: Sequence[Message]) -> TrainingRow:
        """A whole conversation, written as `__call__` writes it, and which of its tokens training learns: what the
        assistant says in every message of its own but those with `"learn": False`, and what ends it.

        Its length is not checked.

        Raises:
            PromptError: a malformed conversation, no tokenizer, or a chat template that does not tell turns apart.
            ImageError: a picture that cannot be read.
        """
        prompt, learnt = self._answered(messages)
        row = self._check_ids(prompt.tokens, "the conversation")
        if self.preprocess is None or isinstance(self.config, LanguageModelConfig):
            return TrainingRow(row, learnt, torch.empty(0, 3, 0, 0), ())
        opened = [(0, open_image(source)) for source in prompt.images]
        tiles, layouts = prepare_pictures(opened, self.config, self.preprocess)
        left = iter([self._picture(layout) for layout in layouts])
        tokens: list[int] = []
        spelt: list[bool] = []
        for token, learn in zip(row, learnt):
            written = next(left) if token == self.config.image_token_id else [token]
            tokens += written
            spelt += [learn and token != self.config.image_token_id] * len(written)
        return TrainingRow(tokens, spelt, tiles, tuple(layouts))

    def _spell_out(self, row: list[int], layouts: Sequence[ImageLayout]) -> list[int]:
        """A row with all tokens of its pictures, from one with a single image token for each."""
        image = self.config.image_token_id
        assert image is not None
        places = [i for i, token in enumerate(row) if token == image]
        if len(places) != len(layouts):  # spelt out already, or `batch_inputs` objects
            return row
        pictures = [self._picture(layout) for layout in layouts]
        begins = [i - picture.index(image) for i, picture in zip(places, pictures)]
        if all(row[max(i, 0) : i + len(picture)] == picture for i, picture in zip(begins, pictures)):
            return row  # also spelt out already, in pictures of one image token each
        left = iter(pictures)
        return [i for token in row for i in (next(left) if token == image else (token,))]

    def _picture(self, layout: ImageLayout) -> list[int]:
        """The tokens of one picture: its image tokens, and in Idefics3's way what tells its squares apart."""
        assert self.preprocess is not None and self.config.image_token_id is not None
        if self.preprocess.layout != "split":
            return [self.config.image_token_id] * layout.num_tokens
        text = image_prompt(layout.rows, layout.columns, layout.num_tokens // layout.num_tiles)
        return self._need_tokenizer().encode_with_special(text)

    def _batch(self, rows: Sequence[Sequence[int]], tiles: torch.Tensor, layouts: Sequence[ImageLayout]) -> ModelInputs:
        return batch_inputs(
            rows,
            tiles,
            layouts,
            image_token_id=self.config.image_token_id,
            pad_token_id=self.config.text.pad_token_id,
            spliced=isinstance(self.config, ModelConfig) and self.config.fusion == "splice",
            decoder=None if self.tokenizer is None else self.stream_decoder,
        )

    def _prompt(self, messages: Any) -> Prompt:
        """The conversation, ready for an answer."""
        tokenizer, image = self._need_format(), self.config.image_token_id
        if self.template is None:
            return encode_dialog(tokenizer, messages, image)
        written, images = chat_messages(messages, images=image is not None)
        tokens = self.template.encode(tokenizer, written, self._image_token(images))
        return Prompt(self._begun(tokens, images), images)

    def _answered(self, messages: Any) -> tuple[Prompt, list[bool]]:
        """The whole conversation, and which of its tokens training learns."""
        tokenizer, image = self._need_format(), self.config.image_token_id
        if self.template is None:
            return encode_answered(tokenizer, messages, image)
        written, images = chat_messages(messages, images=image is not None)
        learnt = [learns(message) for message in messages]
        end = tokenizer.special_tokens.get(self.template.tokens.get("eos_token", ""))
        if end is None and self.config.text.eos_token_ids:
            end = self.config.text.eos_token_ids[0]
        tokens, said = self.template.encode_answered(tokenizer, written, learnt, self._image_token(images), end)
        begun = self._begun(tokens, images)
        return Prompt(begun, images), [False] * (len(begun) - len(tokens)) + said

    def _need_format(self) -> Tokenizer:
        """The tokenizer of a model that has a way to write conversations."""
        tokenizer = self._need_tokenizer()
        if self.template is not None:
            return tokenizer
        if "<|start_header_id|>" not in tokenizer.special_tokens:
            raise PromptError(
                f"this checkpoint has no chat template ({', '.join(TEMPLATE_FILES)}): a base model continues text,"
                " so pass encode_tokens the ids of yours, or take the model's instruct variant"
            )
        return tokenizer

    def _image_token(self, images: Sequence[Any]) -> str | None:
        """How the tokenizer calls the token that stands for a picture."""
        image = self.config.image_token_id
        names = [name for name, i in self._need_tokenizer().special_tokens.items() if i == image]
        if image is not None and not names and images:
            raise PromptError(f"the tokenizer has no special token with the id {image}, which stands for an image")
        return names[0] if names else None

    def _begun(self, tokens: list[int], images: Sequence[Any]) -> list[int]:
        """What a chat template wrote, checked, with what belongs before it."""
        image = self.config.image_token_id
        if image is None:
            return tokens
        if (count := tokens.count(image)) != len(images):
            raise PromptError(
                f"the model's chat template wrote {count} image tokens for {len(images)} images; pictures may not go"
                " with this role, or with this kind of message"
            )
        # As transformers does for models that read images: what the tokenizer's file begins with, unless it is there.
        prefix = self._need_tokenizer().prefix
        return tokens if tokens[: len(prefix)] == prefix else [*prefix, *tokens]

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads it from into a folder: tokenizer, chat template, preprocessing; as far as it has
        them. Tiles of Llama 3.2 Vision follow from the model's own configuration."""
        folder = Path(folder)
        if self.tokenizer is not None:
            self.tokenizer.save(folder / TOKENIZER_FILES[0])
        if self.template is not None:
            self.template.save(folder)
        tiled = isinstance(self.config, ModelConfig) and isinstance(self.config.vision, TiledVisionConfig)
        if self.preprocess is not None and not tiled:
            text = json.dumps(preprocess_to_hf(self.preprocess), indent=2)
            (folder / PREPROCESS_FILES[0]).write_text(text + "\n", encoding="utf-8")

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
        self._check_length(row, b)
        return self._check_ids(row, f"row {b}")

    def _check_ids(self, row: Sequence[int], where: str) -> list[int]:
        text = self.config.text
        try:
            ids = [operator.index(token) for token in row]
        except TypeError:
            raise PromptError(f"{where} must hold whole numbers, the ids of its tokens") from None
        for token in ids:
            if not (0 <= token < text.vocab_size or token == self.config.image_token_id):
                image = "" if self.config.image_token_id is None else f", and {self.config.image_token_id} for an image"
                raise PromptError(
                    f"{where}: token id {token} is outside the vocabulary (0 to {text.vocab_size - 1}{image});"
                    " was it made by another model's tokenizer?"
                )
        return ids

    def _check_length(self, row: Sequence[int], b: int) -> None:
        context = self.config.text.max_position_embeddings
        if len(row) > context:
            raise PromptError(
                f"row {b} has {len(row)} tokens, and the model's context is {context};"
                " shorten the prompt or drop earlier turns"
            )
