"""How much arithmetic a model's step takes by its sizes, for the share of the machine's speed that training reaches."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ...config import AnyModelConfig, ModelConfig, TiledVisionConfig
from ...inputs import ModelInputs
from .parts import part_of


@dataclass(frozen=True)
class Work:
    """Operations of a model's products, forward and backward; what is computed twice for want of memory counts once.

    Attention counts by the length of the rows. text, head, vision: weights that a token of each goes through. passes:
    2 where only what lies below needs gradients, 3 where all weights do.
    """

    config: AnyModelConfig
    text: int
    head: int
    vision: int
    text_passes: int
    vision_passes: int

    @classmethod
    def of(cls, config: AnyModelConfig, shapes: Mapping[str, Sequence[int]], trained: Collection[str]) -> Work:
        """trained: names of the parameters that learn; of an adapter's too, which weigh little themselves"""
        sizes = {"text": 0, "head": 0, "vision": 0}
        for name, shape in shapes.items():
            part = part_of(name, config.text)
            if len(shape) == 2 and part in ("self", "cross"):
                sizes["text"] += math.prod(shape)
            elif len(shape) == 2 and part in ("vision", "projector") and "embedding" not in name:
                sizes["vision"] += math.prod(shape)
        sizes["head"] = config.text.vocab_size * config.text.hidden_size
        whole = any(name in shapes and "layers." in name for name in trained)
        sees = [name for name in trained if part_of(name, config.text) in ("vision", "projector")]
        below = 1 if not sees else 3 if any(name in shapes for name in sees) else 2
        return cls(config, **sizes, text_passes=3 if whole else 2, vision_passes=below)

    def of_batch(self, inputs: ModelInputs, lengths: Sequence[int], learnt: int) -> float:
        """lengths: of the conversations, packed or not; learnt: tokens whose loss is taken"""
        decoder, seen = self._forward(inputs, lengths, learnt)
        return self.text_passes * decoder + self.vision_passes * seen

    def of_reading(self, inputs: ModelInputs, lengths: Sequence[int], learnt: int) -> float:
        """Without a backward pass."""
        return sum(self._forward(inputs, lengths, learnt))

    def _forward(self, inputs: ModelInputs, lengths: Sequence[int], learnt: int) -> tuple[float, float]:
        text = self.config.text
        tokens = sum(lengths)
        attended = (
            sum(length * length for length in lengths) * text.num_hidden_layers * text.hidden_size
        )  # causal: half
        decoder = 2 * tokens * self.text + 2 * learnt * self.head + 2 * attended
        seen = 0
        if isinstance(self.config, ModelConfig) and len(inputs.tiles):
            vision, size = self.config.vision, inputs.tiles.shape[2:]
            patches = vision.num_patches if isinstance(vision, TiledVisionConfig) else vision.num_tokens(*size)
            seen = 2 * len(inputs.tiles) * patches * self.vision
        return float(decoder), float(seen)
