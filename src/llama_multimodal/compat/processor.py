"""The original's processor: a prompt with image tokens, and pixels, for any Hugging Face tokenizer.

Shapes: B rows · T tokens · N pictures of all rows · S their side in pixels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

from ..assemble import PLACEHOLDER
from ..config import SiglipConfig, nearest
from ..errors import ConfigError, PromptError
from ..processing.images import ImageSource, open_image
from ..processing.preprocess import image_pixels
from ..processing.tokenizer import Tokenizer

_ALIASES = {"pixel Value": "pixel_values"}  # the original's key, with a space in it


class ProcessorOutput(dict[str, Tensor]):
    """`input_ids` and `attention_mask` [B, T] int64; `pixel_values` [N, 3, S, S] float32 where there are pictures, also
    found as `"pixel Value"`."""

    def __missing__(self, key: str) -> Tensor:
        if key in _ALIASES:
            return self[_ALIASES[key]]
        raise KeyError(f"{key}{nearest(key, self)}")

    def __getattr__(self, name: str) -> Tensor:
        if name in self:
            return self[name]
        raise AttributeError(f"no {name!r} here{nearest(name, self)}")

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(_ALIASES.get(key, key), default)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_ALIASES.get(key, key) if isinstance(key, str) else key)

    def to(self, device: torch.device | str) -> ProcessorOutput:
        """The same on another device."""
        return ProcessorOutput({key: value.to(device) for key, value in self.items()})


class MllamaImageProcessor:
    """Texts and pictures → what `MllamaForConditionalGeneration` is called with.

    Attributes:
        tokenizer: knows `<image>`. One of transformers or of the `tokenizers` library is the very one that was given,
            which gets the token if it has none; of this library's, it is another one.
        image_token_id: for `MLLAMAConfig(image_token_id=…)` where it is not the first id past the model's vocabulary
    """

    def __init__(self, tokenizer: Any, num_image_token: int, image_size: int) -> None:
        """tokenizer: of transformers, of the `tokenizers` library, or of this library
        num_image_token: how many tokens stand for a picture; any number from 1 on, since the decoder reads the picture
            itself through cross-attention
        image_size: side in pixels; the vision configuration's

        Raises:
            ConfigError: numbers below 1, or something else than a tokenizer.
        """
        for name, value in (("num_image_token", num_image_token), ("image_size", image_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        self.num_image_token, self.image_size = num_image_token, image_size
        self.tokenizer, self.image_token_id, self._encode = _with_image_token(tokenizer)
        self._preprocess = SiglipConfig(image_size=image_size, patch_size=1).preprocess()
        # Padding is masked and never read, so that any id will do where a tokenizer has none for it.
        self._pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        self._side = getattr(self.tokenizer, "padding_side", "right")

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageSource | Sequence[Any] | None = None,
        padding: bool | str = True,
    ) -> ProcessorOutput:
        """One text or several, each with its pictures.

        text: where `<image>` stands in it a picture's tokens come, or before the text where it does not stand
        images: a picture for each text, or a list of them for each; for a single text also all of its pictures
        padding: True or "longest" brings rows to one length, on the tokenizer's `padding_side`

        Raises:
            PromptError: pictures and `<image>` in a text that differ in number, or rows that need padding.
            ImageError: a picture that cannot be read.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(one, str) for one in texts):
            raise PromptError("text must be a string or a list of strings, with at least one in it")
        if padding not in (True, False, "longest"):
            raise PromptError(f'padding must be True, "longest" or False, not {padding!r}')
        pictures = _by_text(images, len(texts))
        rows = [self._encode(self._spelt(*pair, b)) for b, pair in enumerate(zip(texts, pictures))]
        width = max(len(row) for row in rows)
        if not padding and any(len(row) != width for row in rows):
            raise PromptError(f"rows have {min(map(len, rows))} to {width} tokens, which needs padding=True")
        ids = torch.full((len(rows), width), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for b, row in enumerate(rows):
            place = slice(width - len(row), width) if self._side == "left" else slice(len(row))
            ids[b, place] = torch.tensor(row, dtype=torch.int64)
            mask[b, place] = 1
        output = ProcessorOutput(input_ids=ids, attention_mask=mask)
        opened = [open_image(source) for row in pictures for source in row]
        if opened:
            pixels = np.stack([image_pixels(picture, self._preprocess) for picture in opened])
            output["pixel_values"] = torch.from_numpy(pixels)
        return output

    def _spelt(self, text: str, pictures: Sequence[Any], b: int) -> str:
        """A text with all of its pictures' tokens."""
        one, marks = PLACEHOLDER * self.num_image_token, text.count(PLACEHOLDER)
        if marks == 0:
            return one * len(pictures) + text
        if marks != len(pictures):
            raise PromptError(f"text {b} has {PLACEHOLDER} {marks} times and {len(pictures)} pictures; make them equal")
        return text.replace(PLACEHOLDER, one)


def _by_text(images: Any, count: int) -> Sequence[Sequence[Any]]:
    """The pictures of each of `count` texts."""
    if images is None:
        return [()] * count
    if not isinstance(images, list | tuple):
        images = [images]
    if any(isinstance(one, list | tuple) for one in images):
        lists = [one if isinstance(one, list | tuple) else [one] for one in images]
    else:
        lists = [images] if count == 1 else [[one] for one in images]
    if len(lists) != count:
        raise PromptError(f"{count} texts but pictures for {len(lists)}; give one for each text, or a list for each")
    return lists


def _with_image_token(tokenizer: Any) -> tuple[Any, int, Callable[[str], list[int]]]:
    """A tokenizer that knows `<image>`, the token's id, and how a text in which it stands becomes ids."""
    if isinstance(tokenizer, Tokenizer):
        ours = tokenizer if PLACEHOLDER in tokenizer.special_tokens else tokenizer.with_special(PLACEHOLDER)[0]
        return ours, ours.special(PLACEHOLDER), lambda text: [*ours.prefix, *ours.encode_with_special(text)]
    if isinstance(tokenizer, tokenizers.Tokenizer):
        if tokenizer.token_to_id(PLACEHOLDER) is None:
            tokenizer.add_special_tokens([PLACEHOLDER])
        token = tokenizer.token_to_id(PLACEHOLDER)
        assert token is not None
        return tokenizer, token, lambda text: tokenizer.encode(text).ids
    if not all(hasattr(tokenizer, name) for name in ("add_tokens", "convert_tokens_to_ids")) or not callable(tokenizer):
        known = "one of transformers, of the tokenizers library, or of llama_multimodal"
        raise ConfigError(f"{type(tokenizer).__name__} is no tokenizer; give {known}")
    tokenizer.add_tokens([PLACEHOLDER], special_tokens=True)  # none, where it is there already
    return tokenizer, tokenizer.convert_tokens_to_ids(PLACEHOLDER), lambda text: list(tokenizer(text)["input_ids"])
