"""Scores and how certain they are."""

from __future__ import annotations

import math
from collections.abc import Sequence


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


def anls(answer: str, truths: Sequence[str], least: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one answer (Biten et al. 2019), to the truth that is nearest.

    1 for an equal string, less by the share of characters that differ; 0 below `least`. Case and white space at the
    ends do not count.
    """
    given = answer.strip().lower()
    best = 0.0
    for truth in truths:
        wanted = truth.strip().lower()
        longest = max(len(given), len(wanted))
        best = max(best, 1.0 - edit_distance(given, wanted) / longest if longest else 1.0)
    return best if best >= least else 0.0


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of characters that make b of a."""
    previous = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        current = [i]
        for j, right in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (left != right)))
        previous = current
    return previous[-1]
