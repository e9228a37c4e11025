"""Random streams: NumPy's for whole samples, the standard library's (faster for single draws) below it."""

from __future__ import annotations

import random

import numpy as np


def plain(rng: np.random.Generator) -> random.Random:
    """A standard generator whose seed is drawn from `rng`."""
    return random.Random(int(rng.integers(1 << 62)))
