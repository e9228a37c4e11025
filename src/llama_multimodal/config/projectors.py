"""The projectors' configurations: how an encoder's features become vectors of the decoder's width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from .checks import require


class ProjectorConfig(Protocol):
    """What a projector's configuration has, besides being a frozen dataclass."""

    def num_tokens(self, tokens: int) -> int:
        """Tokens that it makes of an image's (or a tile's) `tokens`."""

    def check(self, vision_size: int, text_size: int, tokens: int) -> None:
        """Whether it fits between an encoder of that width and number of tokens and a decoder of that width.

        Raises:
            ConfigError: it does not; the message says which projector would.
        """


@dataclass(frozen=True)
class LinearProjector:
    """One linear layer, token by token (Llama 3.2 Vision)."""

    bias: bool = True

    def num_tokens(self, tokens: int) -> int:
        return tokens

    def check(self, vision_size: int, text_size: int, tokens: int) -> None:
        """It fits everywhere."""


@dataclass(frozen=True)
class MLPProjector:
    """Linear, GELU, linear, both as wide as the decoder (LLaVA 1.5) unless the first has a width of its own."""

    bias: bool = True
    hidden_act: Literal["gelu", "gelu_pytorch_tanh"] = "gelu"
    hidden_size: int | None = None  # width between the two; None: the decoder's

    def __post_init__(self) -> None:
        known = ("gelu", "gelu_pytorch_tanh")
        ok = self.hidden_act in known
        require(ok, f'hidden_act "{self.hidden_act}" is not implemented; supported: {", ".join(known)}', self)
        require(self.hidden_size is None or self.hidden_size > 0, "hidden_size must be at least 1", self)

    def num_tokens(self, tokens: int) -> int:
        return tokens

    def check(self, vision_size: int, text_size: int, tokens: int) -> None:
        """It fits everywhere."""


@dataclass(frozen=True)
class PixelShuffleProjector:
    """Squares of `scale_factor`² patches become one token, by one linear layer (Idefics3, SmolVLM)."""

    scale_factor: int = 2
    bias: bool = False

    def __post_init__(self) -> None:
        require(self.scale_factor > 0, "scale_factor must be at least 1", self)

    def num_tokens(self, tokens: int) -> int:
        return tokens // self.scale_factor**2

    def check(self, vision_size: int, text_size: int, tokens: int) -> None:
        side = round(tokens**0.5)
        square = "has no square of patches alone (a class token?)"
        require(side * side == tokens, f"an encoder of {tokens} tokens {square}; linear or mlp would fit", self)
        fits = [str(factor) for factor in range(2, side) if side % factor == 0]
        would = f"scale_factor {' or '.join(fits)}, linear or mlp" if fits else "linear or mlp"
        ok = side % self.scale_factor == 0
        require(ok, f"{side} × {side} patches do not divide by {self.scale_factor}; {would} would fit", self)


@dataclass(frozen=True)
class IdentityProjector:
    """None at all, for an encoder as wide as the decoder."""

    def num_tokens(self, tokens: int) -> int:
        return tokens

    def check(self, vision_size: int, text_size: int, tokens: int) -> None:
        widths = f"the encoder's features have {vision_size} channels and the decoder takes {text_size}"
        require(vision_size == text_size, f"{widths}; linear or mlp would fit", self)
