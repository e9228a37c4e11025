"""What an adapter is: how large, where, and how it is added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..config.checks import require

AdapterDtype = Literal["float32", "model"]


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al. 2021): every chosen weight W [N, K] gets `alpha / rank · B·A` with A [rank, K] and B [N, rank].

    targets: one or several of the presets in `targets.PRESETS`, or globs over this project's module paths: "q_proj",
        "decoder.layers.*.mlp", "decoder.layers.3". A glob means a path or its end, and all that lies beneath.
    dropout: of the layers' inputs, on the adapter's way only and while training only
    rslora: divide alpha by √rank instead (Kalajdzievski 2023)
    dora: learn the length of each row of W + B·A apart from its direction (Liu et al. 2024)
    rank_pattern, alpha_pattern: other values for some of the targets, by glob; the first that matches counts
    dtype: of A and B: "float32", or "model" for the model's own. Products run in the layer's dtype.

    Raises:
        ConfigError: a value out of range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ("self", "mlp")
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dtype: AdapterDtype = "float32"

    def __post_init__(self) -> None:
        ranks, alphas = {"": self.rank, **self.rank_pattern}, {"": self.alpha, **self.alpha_pattern}
        whole = all(type(rank) is int and rank >= 1 for rank in ranks.values())
        require(whole, f"ranks must be whole numbers of at least 1, not {[*ranks.values()]}", self)
        finite = all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in alphas.values())
        require(finite, f"alpha must be finite, not {[*alphas.values()]}", self)
        require(0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, not {self.dropout}", self)
        require(all(self.patterns), 'targets must name at least one preset or glob, such as "self"', self)
        known = get_args(AdapterDtype)
        require(self.dtype in known, f'dtype "{self.dtype}" is not one of {", ".join(known)}', self)

    @property
    def patterns(self) -> tuple[str, ...]:
        """`targets` as a tuple; one empty pattern where there are none."""
        return ((self.targets,) if isinstance(self.targets, str) else tuple(self.targets)) or ("",)

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)
