"""Inputs that the golden files were made from, by numpy alone: the script that makes them and the tests import it.

Every image is a formula in integers, so that a golden file holds a size and a seed rather than pixels.
"""

from __future__ import annotations

import numpy as np

IMAGE = -1
"""Stands for ``<|image|>`` in a token list of a case; `tokens` replaces it by the model's own id."""


def image(width: int, height: int, seed: int) -> np.ndarray:
    """A [height, width, 3] uint8 image: three slow ramps, a moiré that no resize leaves alone, and hard edges."""
    x = np.arange(width, dtype=np.uint32)[None, :, None]
    y = np.arange(height, dtype=np.uint32)[:, None, None]
    c = np.arange(3, dtype=np.uint32)[None, None, :]
    ramp = x * (3 + seed % 5 + c) + y * (7 + seed % 3 - c) + seed * 37 + c * 85
    moire = ((x * x + y * (x + 3 * c + 1)) >> 4) * 11
    edge = (((x >> 4) ^ (y >> 3)) & 1) * (50 + 60 * c)
    return ((ramp + moire + edge) & 255).astype(np.uint8)


def tokens(row: list[int], image_token_id: int) -> list[int]:
    """A row of a case with `IMAGE` replaced by the id that the reference uses at run time: ``vocab_size``, the first
    row of its learnable embedding (128256 in the released models)."""
    return [image_token_id if t == IMAGE else t for t in row]


def _words(count: int, seed: int, vocab: int) -> list[int]:
    """`count` token ids from a small linear congruential generator (its high bits: the low ones repeat soon)."""
    out, state = [], seed * 7919 + 1
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        out.append((state >> 12) % vocab)
    return out


def cases(vocab: int, tile: int) -> dict[str, dict]:
    """The logits cases of one model: ``{name: {"rows": [[id | IMAGE, …], …], "images": [[(w, h, seed), …], …]}}``.

    `keep`, where it is there, is the number of last positions whose logits are stored (all by default).
    `prompt`, where it is there, is the length of the prompt: the tokens after it are decoded one at a time.
    """

    def w(count: int, seed: int) -> list[int]:
        return _words(count, seed, vocab)

    def im(columns: float, rows: float, seed: int) -> tuple[int, int, int]:
        """An image of a size that the canvas rule gives this many tiles."""
        return max(1, round(columns * tile)), max(1, round(rows * tile)), seed

    one = im(0.9, 0.7, 1)
    layouts = {  # name: rows x columns of tiles, as Meta writes an aspect ratio
        "one_tile": one,
        "tiles_1x2": im(1.9, 0.8, 2),
        "tiles_1x3": im(2.8, 0.9, 3),
        "tiles_1x4": im(3.7, 0.6, 4),
        "tiles_2x1": im(0.8, 1.9, 5),
        "tiles_2x2": im(1.9, 1.7, 6),
        "tiles_3x1": im(0.7, 2.9, 7),
        "tiles_4x1": im(0.9, 3.8, 8),
    }
    out: dict[str, dict] = {
        name: {"rows": [[*w(1, i), IMAGE, *w(6, 20 + i)]], "images": [[size]]}
        for i, (name, size) in enumerate(layouts.items())
    }
    wide, tall, big = layouts["tiles_1x2"], layouts["tiles_2x1"], layouts["tiles_2x2"]
    out |= {
        "image_first": {"rows": [[IMAGE, *w(5, 40)]], "images": [[tall]]},
        "image_last": {"rows": [[*w(5, 41), IMAGE]], "images": [[wide]]},
        "text_before_image": {"rows": [[*w(7, 42), IMAGE, *w(4, 43)]], "images": [[layouts["tiles_1x3"]]]},
        "two_images": {"rows": [[*w(2, 44), IMAGE, *w(4, 45), IMAGE, *w(4, 46)]], "images": [[tall, one]]},
        "adjacent_images": {"rows": [[*w(1, 47), IMAGE, IMAGE, *w(5, 48)]], "images": [[big, wide]]},
        "adjacent_then_third": {
            "rows": [[*w(2, 49), IMAGE, IMAGE, *w(4, 50), IMAGE, *w(3, 51)]],
            "images": [[one, tall, layouts["tiles_3x1"]]],
        },
        "three_adjacent_at_end": {"rows": [[*w(3, 52), IMAGE, IMAGE, IMAGE]], "images": [[one, wide, tall]]},
        "mixed_batch": {
            "rows": [
                w(9, 53),
                [*w(3, 54), IMAGE, *w(3, 55)],
                [*w(1, 56), IMAGE, *w(4, 57), IMAGE, *w(5, 58)],
                [IMAGE, IMAGE, *w(2, 59)],
            ],
            "images": [[], [layouts["tiles_1x4"]], [one, big], [tall, one]],
        },
        "text_only": {"rows": [w(9, 60), w(4, 61)], "images": [[], []]},
        "decode_one_image": {"rows": [[*w(3, 62), IMAGE, *w(10, 63)]], "images": [[tall]], "prompt": 8},
        "decode_two_images": {
            "rows": [[*w(1, 64), IMAGE, *w(3, 65), IMAGE, *w(8, 66)]],
            "images": [[wide, tall]],
            "prompt": 9,
        },
        "long": {"rows": [[*w(40, 67), IMAGE, *w(659, 68)]], "images": [[one]], "keep": 4},
    }
    return out


def transform_sizes() -> list[tuple[int, int]]:
    """The 500 (width, height) pairs of the preprocessing file: log-uniform in 1…1500, so extreme ratios occur."""
    rng = np.random.default_rng(20240925)
    size = np.exp(rng.uniform(0, np.log(1500.999), (500, 2))).astype(int)
    size[:12] = [
        (1, 1), (1, 1500), (1500, 1), (560, 560), (448, 448), (561, 560),
        (1120, 1120), (1500, 1500), (560, 1120), (1121, 280), (447, 1343), (3, 1000),
    ]  # fmt: skip
    return [(int(w), int(h)) for w, h in size]


LARGE_SIZES = [
    (2240, 560), (2241, 560), (3000, 2000), (2000, 3000), (4000, 30), (30, 4000), (5000, 3),
    (1, 4000), (2, 3000), (3999, 1333), (3333, 3332), (4096, 1024), (1024, 4096), (1680, 561),
]  # fmt: skip
"""Sizes beyond 1500, which must shrink. Where a side would shrink to nothing, the file has the reference's error."""
