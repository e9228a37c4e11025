"""What the engine's shared cache saves: the time to the first token of eight turns about one picture, and of a prompt
whose beginning another request had before.

    OMP_PROC_BIND=true python benchmarks/sharing.py --scratch FOLDER --output benchmarks/results

The same engine answers with `prefix_cache` on and off, each from an empty cache, in turn.
"""

from __future__ import annotations

import random
import statistics
from typing import Any

import numpy as np
import torch
from peers import arguments, random_mllama, write
from PIL import Image

import llama_multimodal as lmm

IMAGE, BOS = 32000, 1
TURNS, QUESTION, ANSWER = 8, 32, 8  # tokens of a question, and of an answer
PREFIX, ENDING = 1024, 32


def first_token(engine: lmm.Engine, processor: Any, tokens: list[int], picture: Image.Image | None) -> float:
    """Seconds until it was chosen."""
    inputs = processor.encode_tokens([tokens], [[picture] if picture else []])
    params = lmm.SamplingParams(max_new_tokens=ANSWER)
    answer = engine.generate([lmm.Request(inputs=inputs, params=params)])[0]
    if answer.error is not None:
        raise answer.error
    assert answer.metrics.first_token_seconds is not None
    tokens += answer.token_ids
    return answer.metrics.first_token_seconds


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=15, help="of text, gated ones among them")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = random_mllama(args.scratch, text_hidden=args.hidden, text_layers=args.layers, vision_layers=14, tile=448)
    model, processor = lmm.load(folder, dtype=torch.bfloat16, pack="auto")
    rng = random.Random(0)
    noise = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)

    def words(count: int) -> list[int]:
        return [rng.randrange(3, IMAGE) for _ in range(count)]

    configs = {"shared": True, "not shared": False}
    engines = {
        name: lmm.Engine(model, processor, lmm.EngineConfig(cache_memory="1GiB", prefix_cache=shared))
        for name, shared in configs.items()
    }
    turns: dict[str, list[list[float]]] = {name: [] for name in engines}
    hits: dict[str, list[float]] = {name: [] for name in engines}
    encoded = dict.fromkeys(engines, 0)
    for _ in range(args.repeats + 1):  # the first warms up
        asked, prefix, endings = [words(QUESTION) for _ in range(TURNS)], words(PREFIX), [words(ENDING), words(ENDING)]
        for name, engine in engines.items():
            engine.clear_cache()
            before = engine.metrics.encoded_images
            tokens = [BOS, IMAGE]
            seconds = []
            for question in asked:
                tokens += question
                seconds.append(first_token(engine, processor, tokens, picture))
            turns[name].append(seconds)
            encoded[name] = engine.metrics.encoded_images - before
            first_token(engine, processor, [BOS, *prefix, *endings[0]], None)
            hits[name].append(first_token(engine, processor, [BOS, *prefix, *endings[1]], None))
    by_turn = {name: [statistics.median(column) for column in zip(*rows[1:])] for name, rows in turns.items()}
    print(f"{TURNS} turns about one picture, {QUESTION} tokens a question: seconds to the first token")
    for name, row in by_turn.items():
        print(f"  {name:11s} {'  '.join(f'{value:.3f}' for value in row)}   pictures encoded: {encoded[name]}")
    hit = {name: statistics.median(seconds[1:]) for name, seconds in hits.items()}
    print(f"a prompt of {PREFIX + ENDING} tokens, {PREFIX} of them known")
    print(
        f"  shared {hit['shared']:.3f} s, not shared {hit['not shared']:.3f} s:"
        f" {hit['not shared'] / hit['shared']:.1f} x"
    )
    write("sharing", {"turns": by_turn, "encoded": encoded, "known_beginning": hit}, args.output)


if __name__ == "__main__":
    main()
