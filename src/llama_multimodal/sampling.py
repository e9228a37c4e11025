"""From logits to a token: the settings of a request, and the pipeline that applies them.

Order: repetition penalty → temperature → top-k → top-p → min-p → draw. Temperature 0 takes the largest logit.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PromptError


@dataclass(frozen=True)
class SamplingParams:
    """How to answer. The defaults are greedy.

    temperature: 0 is greedy. top_k: 0 keeps all. top_p, min_p: 1 and 0 keep all. repetition_penalty: above 1 makes
    tokens of the prompt and the answer less likely (Keskar et al. 2019). stop: strings that end the answer and are
    not part of it. seed: equal seeds give equal answers, whatever else is in the batch; None draws freely.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, valid, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "from 0 to under 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("stop", all(self.stop), "made of strings that are not empty"),
        ):
            if not valid:
                raise PromptError(f"{name} must be {wanted}, not {getattr(self, name)}")

    @property
    def takes_largest(self) -> bool:
        """Whether the token is that of the largest logit, as the model puts it out."""
        return self.temperature == 0 and self.repetition_penalty == 1.0


def adjusted_logits(logits: Tensor, params: SamplingParams, seen: Collection[int]) -> Tensor:
    """Apply every setting to one row's logits: [vocab] → fp32 [vocab], -inf where a token is ruled out.

    seen: ids of the prompt and the answer so far; ids past the LM head (images) are passed over.
    """
    logits = logits.float()
    if params.repetition_penalty != 1.0:
        index = torch.tensor([i for i in seen if i < logits.shape[0]], dtype=torch.int64, device=logits.device)
        old = logits[index]
        scaled = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
        logits = logits.index_copy(0, index, scaled)
    if params.temperature == 0:
        return logits
    logits = logits / max(params.temperature, 1e-6)  # a smaller one would divide past fp32, and is greedy already
    if 0 < params.top_k < logits.shape[0]:
        kept = logits.topk(params.top_k)
        logits = torch.full_like(logits, float("-inf")).index_copy(0, kept.indices, kept.values)
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # the first token is always kept
        logits = logits.index_fill(0, order[before >= params.top_p], float("-inf"))
    if params.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), float("-inf"))
    return logits


def sample(logits: Tensor, params: SamplingParams, seen: Collection[int], generator: torch.Generator | None) -> int:
    """One token for one row; logits [vocab]. Drawn on the CPU, so that a seed means the same on every device."""
    logits = adjusted_logits(logits, params, seen)
    if params.temperature == 0:
        return int(logits.max(-1).indices)
    return int(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator))
