"""Many requests at a time: tokens a second of the engine, against one request after the other and against transformers'
batched generate on the same weights.

    OMP_PROC_BIND=true python benchmarks/throughput.py --scratch FOLDER --output benchmarks/results

Half of the requests look at a picture of one to four tiles; prompts and answers differ in length, and every answer has
its whole length: the end token is switched off. transformers gets the requests with pictures and those without in
batches of their own, padded on the left, sorted by the length of the answer, and the best of several batch sizes; a
batch goes on until its longest answer is done, and what the others say behind their own length is not counted.

`--gpu` and `--roofline` are programs of their own: see throughput_gpu.py.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peers import arguments, random_mllama, timed, write
from PIL import Image

import llama_multimodal as lmm
from llama_multimodal.models import VisionLanguageModel
from llama_multimodal.processing.processor import Processor

IMAGE, BOS, PAD = 32000, 1, 0
GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2))


@dataclass(frozen=True)
class Asked:
    """tokens: of the prompt, with IMAGE where the picture stands; length: of the answer."""

    tokens: tuple[int, ...]
    picture: Image.Image | None
    length: int


def workload(args: argparse.Namespace) -> list[Asked]:
    rng = random.Random(0)
    pixels = np.random.default_rng(0)
    asked = []
    for number in range(args.requests):
        words = [rng.randrange(3, IMAGE) for _ in range(rng.randint(args.prompt // 4, args.prompt))]
        picture = None
        if number % 2 == 0:
            rows, columns = GRIDS[number // 2 % len(GRIDS)]
            size = (rows * args.tile, columns * args.tile, 3)
            picture = Image.fromarray(pixels.integers(0, 256, size, dtype=np.uint8))
        tokens = (BOS, *((IMAGE,) if picture else ()), *words)
        asked.append(Asked(tokens, picture, rng.randint(args.tokens // 4, args.tokens)))
    return asked


def params(one: Asked) -> lmm.SamplingParams:
    return lmm.SamplingParams(max_new_tokens=one.length)


def prepared(processor: Processor, one: Asked) -> Any:
    return processor.encode_tokens([one.tokens], [[one.picture] if one.picture else []])


def with_engine(model: VisionLanguageModel, processor: Processor, config: lmm.EngineConfig) -> Any:
    engine = lmm.Engine(model, processor, config)

    def run(asked: Sequence[Asked]) -> list[list[int]]:
        engine.clear_cache()  # no answer is known from the run before
        requests = [lmm.Request(inputs=prepared(processor, one), params=params(one)) for one in asked]
        answers = engine.generate(requests)
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return [answer.token_ids for answer in answers]

    return engine, run


def one_at_a_time(model: VisionLanguageModel, processor: Processor, asked: Sequence[Asked]) -> list[list[int]]:
    return [lmm.generate(model, prepared(processor, one), params(one)).token_ids[0] for one in asked]


def batched(peer: Any, pictures: Any, asked: Sequence[Asked], size: int) -> list[list[int]]:
    """transformers, in batches of at most `size` requests."""
    found: dict[int, list[int]] = {}
    for kind in (True, False):
        order = [i for i, one in enumerate(asked) if (one.picture is not None) == kind]
        order.sort(key=lambda i: asked[i].length)
        for first in range(0, len(order), size):
            some = order[first : first + size]
            for i, tokens in zip(some, _batch(peer, pictures, [asked[i] for i in some]), strict=True):
                found[i] = tokens[: asked[i].length]
    return [found[i] for i in range(len(asked))]


def _batch(peer: Any, pictures: Any, asked: Sequence[Asked]) -> list[list[int]]:
    width = max(len(one.tokens) for one in asked)
    ids = torch.tensor([[PAD] * (width - len(one.tokens)) + list(one.tokens) for one in asked])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if asked[0].picture is not None:
        inputs |= pictures(images=[[one.picture] for one in asked], return_tensors="pt")
        tiles = [len(row[0]) if isinstance(row[0], list) else int(row[0]) for row in inputs.pop("num_tiles")]
        inputs["pixel_values"] = inputs["pixel_values"].to(peer.dtype)
        mask = torch.zeros(len(asked), width, 1, 4, dtype=torch.int64)
        for row, (one, count) in enumerate(zip(asked, tiles, strict=True)):
            mask[row, width - len(one.tokens) + 1 :, :, :count] = 1
        inputs["cross_attention_mask"] = mask
    count = max(one.length for one in asked)
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": PAD}
    out: list[list[int]] = peer.generate(**inputs, **settings)[:, width:].tolist()
    return out


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> str:
    same = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(ours, theirs, strict=True)]
    return f"{sum(same)} of {sum(map(len, ours))} tokens"


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=1)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=256, help="most tokens of a prompt; a quarter at least")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of an answer; a quarter at least")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=15, help="of text, gated ones among them")
    parser.add_argument("--vision-layers", type=int, default=14)
    parser.add_argument("--tile", type=int, default=448)
    parser.add_argument("--memory", default="4GiB", help="of the engine's cache")
    parser.add_argument("--pack", choices=("none", "auto", "int8", "int4"), default="auto", help="our weights")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[8, 16], help="of transformers")
    parser.add_argument("--overlap", action="store_true", help="encode pictures in a thread beside decoding as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from transformers import MllamaForConditionalGeneration, MllamaImageProcessor

    shape = {"text_hidden": args.hidden, "text_layers": args.layers, "vision_layers": args.vision_layers}
    folder = random_mllama(args.scratch, **shape, tile=args.tile)
    pack = None if args.pack == "none" else args.pack
    model, processor = lmm.load(folder, dtype=torch.bfloat16, pack=pack)
    assert isinstance(model, VisionLanguageModel)
    model.config = replace(model.config, text=replace(model.config.text, eos_token_ids=()))
    peer = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    pictures = MllamaImageProcessor(size={"height": args.tile, "width": args.tile}, max_image_tiles=4)
    asked = workload(args)
    config = lmm.EngineConfig(max_requests=args.requests, cache_memory=args.memory)
    engine, run = with_engine(model, processor, config)
    candidates: dict[str, Callable[[Sequence[Asked]], list[list[int]]]] = {"engine": run}
    if args.overlap:
        beside = with_engine(model, processor, replace(config, overlap_images=True))
        candidates["engine, pictures beside"] = beside[1]
    candidates["one at a time"] = lambda asked: one_at_a_time(model, processor, asked)
    for size in args.batch_sizes:
        candidates[f"transformers, {size} at a time"] = lambda asked, size=size: batched(peer, pictures, asked, size)
    said: dict[str, list[list[int]]] = {}
    runs = {name: lambda name=name: said.update({name: candidates[name](asked)}) for name in candidates}
    with torch.inference_mode():
        for candidate in candidates.values():
            candidate([replace(one, length=4) for one in asked[:4]])  # warms up
        measured = timed(runs, args.repeats)
    print(f"the engine's tokens are those of one at a time: {agreement(said['engine'], said['one at a time'])}")
    count = sum(one.length for one in asked)
    rates = {name: count / row["seconds"] for name, row in measured.items()}
    best = max((rate for name, rate in rates.items() if name.startswith("transformers")), default=math.nan)
    print(f"{len(asked)} requests, {count} tokens of answers, {sum(len(one.tokens) for one in asked)} of prompts")
    for name, rate in rates.items():
        ratios = f"{rate / rates['one at a time']:6.2f} x one at a time {rate / best:6.2f} x the best of transformers"
        print(f"  {name:28s} {rate:8.1f} tokens/s {ratios}")
    settings = {name: value for name, value in vars(args).items() if name not in ("scratch", "output")}
    figures = {"tokens_per_second": rates, "seconds": measured, "engine": engine.metrics.as_dict()}
    write("throughput", {"settings": settings, **figures}, args.output)


if __name__ == "__main__":
    if {"--gpu", "--roofline"} & set(sys.argv):
        import throughput_gpu

        throughput_gpu.main()
    else:
        main()
