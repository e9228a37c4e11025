"""Scores and how certain they are."""

from __future__ import annotations

import math


def exact_match(answer: str, truth: str) -> bool:
    """Equal up to white space at the ends."""
    return answer.strip() == truth.strip()


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The interval a proportion lies in with 95 % confidence (Wilson 1927); both ends in [0, 1].

    Unlike the textbook `p ± z·σ` it is sensible for a score of 100 % and for few questions.
    """
    if total == 0:
        return 0.0, 1.0
    share = right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
