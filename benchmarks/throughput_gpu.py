"""`throughput.py --gpu` and `--roofline`: the whole 11B shape with random weights on one GPU, beside the least that the
card needs by its published rates.

    python benchmarks/throughput.py --gpu --output benchmarks/results     at most 8 minutes
    python benchmarks/throughput.py --roofline                            computes the table alone, on any machine

Measured: the time to the first token with one picture of four tiles, and to each token behind it, of one request, in
bf16 and in int4; tokens a second of 1 to 64 requests that decode together, half of which look at a picture of one
tile, in bf16. Weights and pixels are random, and are made on the card; no answer ends before its length.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers import write

import llama_multimodal as lmm
from llama_multimodal.config import (
    LLAMA_3_2_11B_VISION,
    LLAMA_3_2_90B_VISION,
    ModelConfig,
    TextConfig,
    TiledVisionConfig,
)
from llama_multimodal.engine import plan_cache
from llama_multimodal.inputs import ImageLayout, ModelInputs, batch_inputs
from llama_multimodal.models import build_model
from llama_multimodal.planning import Packed, PlanOptions, plan
from llama_multimodal.planning.gpus import GPUS, Gpu, gpu_named
from llama_multimodal.planning.roofline import decode_floor, first_token_seconds
from llama_multimodal.quant.pack import pack, recommended

PROMPT, TILES = 64, 4  # tokens of text, and tiles of the picture, of the request whose first token is timed
TOY = ModelConfig(
    vision=TiledVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_global_layers=1, num_attention_heads=2,
        image_size=28, intermediate_layers_indices=(0, 1),
    ),
    text=TextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, cross_attention_layers=(1,), num_attention_heads=2,
        num_key_value_heads=1, vocab_size=256, max_position_embeddings=1024,
    ),
    image_token_id=256,
)  # fmt: skip
SHAPES = {"11b": LLAMA_3_2_11B_VISION, "toy": TOY}
SHOWN = ("H100 80 GB", "A100 80 GB", "RTX 4090 24 GB")


def packing(weights: Any, text: TextConfig) -> Packed | None:
    """As the floors take it; None for bf16 weights, which are not packed on a GPU."""
    return None if weights == "bf16" else Packed.recommended(weights, text)


class TimeIsUp(Exception):
    """What is left does not fit into the time."""


# --- the table -------------------------------------------------------------------------------------------------------


def roofline() -> str:
    """Computed: milliseconds a token and tokens a second of one request, and to the first token with a picture."""
    lines = [
        "| card | model | weights | GB of weights and cache a token | ms a token | tokens/s | ms to the first token |",
        "|---|---|---|---|---|---|---|",
    ]
    for gpu in (gpu for gpu in GPUS if gpu.name in SHOWN):
        for model, config in (("11B", LLAMA_3_2_11B_VISION), ("90B", LLAMA_3_2_90B_VISION)):
            for weights in ("bf16", "int8", "int4"):
                packed = packing(weights, config.text)
                floor = decode_floor(config, packed, context=1024, tiles=TILES)
                first = first_token_seconds(config, gpu, packed, prompt=PROMPT, tiles=TILES)
                seconds = floor.seconds(gpu)
                options = PlanOptions(context=1024, prompt=PROMPT, tiles=TILES, pack=packed)
                fits = " ¹" if gpu.fits(plan(config, options).total) == "no" else ""
                lines.append(
                    f"| {gpu.name} | {model} | {weights}{fits} | {floor.bytes / 1e9:.1f} | {1e3 * seconds:.1f} |"
                    f" {1 / seconds:.0f} | {1e3 * first:.0f} |"
                )
    return "\n".join(lines)


# --- measuring -------------------------------------------------------------------------------------------------------


class Bench:
    """One model on one device; every figure with its floor, where the card's rates are known."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.began = time.perf_counter()
        self.card: Gpu | None = None
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            self.card = gpu_named(properties.name, properties.total_memory / 2**30)
        config = SHAPES[args.shape]
        self.config = replace(config, text=replace(config.text, eos_token_ids=()))
        self.results: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        try:
            with self.part("building"):
                self.model = self.build()
            self.one("bf16")
            self.many()
            with self.part("packing"):
                pack(self.model, recommended("int4", self.config.text) if self.args.shape == "11b" else "int4")
            self.one("int4")
        except TimeIsUp as why:
            self.results["left_out"] = str(why)
            print(f"stopped: {why}")
        return self.results

    def build(self) -> Any:
        """Random weights in bf16, made where they stay; every gate half open."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:
                model = build_model(self.config)
        finally:
            torch.set_default_dtype(before)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name.endswith("gate"):
                    value.fill_(0.5)
        return model.eval().requires_grad_(False)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Timed, and not begun once less than a minute is left."""
        if time.perf_counter() - self.began > self.args.seconds - min(60, self.args.seconds / 8):
            raise TimeIsUp(f"{name} and what comes behind it does not fit into {self.args.seconds} s")
        started = time.perf_counter()
        yield
        self.synchronize()
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def inputs(self, seed: int, prompt: int, tiles: int) -> ModelInputs:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(3, self.config.text.vocab_size, (prompt,), generator=generator).tolist()
        side, image = self.config.vision.image_size, self.config.image_token_id
        pixels = torch.randn(tiles, 3, side, side, generator=generator)
        layouts = [ImageLayout(2, tiles // 2) if tiles > 1 else ImageLayout(1, 1)] if tiles else []
        row = [1, *([image] if tiles else []), *words]
        return batch_inputs([row], pixels, layouts, image_token_id=image, pad_token_id=0)

    def engine(self, rows: int) -> lmm.Engine:
        context = PROMPT + self.args.tokens + 2
        blocks = rows * -(-context // 16)
        sizes = plan_cache(self.config, lmm.EngineConfig(cache_memory="1024GiB"), torch.bfloat16, self.device)
        pictures = (TILES + rows // 2 + 1) * sizes.unit_bytes
        memory = (blocks + rows) * sizes.block_bytes + pictures
        config = lmm.EngineConfig(
            max_requests=rows, cache_memory=memory, image_share=pictures / memory, prefix_cache=False
        )
        engine = lmm.Engine(self.model, None, config)
        engine.warm_up()
        return engine

    def one(self, weights: str) -> None:
        """One request that looks at a picture."""
        with self.part(f"{weights}, one request"):
            engine = self.engine(1)
            first, later = [], []
            for repeat in range(self.args.repeats + 1):  # the first warms up
                request = lmm.Request(
                    inputs=self.inputs(repeat, PROMPT, TILES),
                    params=lmm.SamplingParams(max_new_tokens=self.args.tokens),
                )
                times = [time.perf_counter()]
                for event in engine.stream([request]):
                    if event.error is not None:
                        raise event.error
                    self.synchronize()
                    times.append(time.perf_counter())
                if repeat:
                    first.append(times[1] - times[0])
                    later.append((times[-1] - times[1]) / (len(times) - 2))
        packed, context = packing(weights, self.config.text), PROMPT + self.args.tokens // 2
        floors = {}
        if self.card is not None:
            floors["token"] = decode_floor(self.config, packed, context=context, tiles=TILES).seconds(self.card)
            floors["first"] = first_token_seconds(self.config, self.card, packed, prompt=PROMPT, tiles=TILES)
        self.say(f"{weights}, to the first token", statistics.median(first), floors.get("first"))
        self.say(f"{weights}, each token behind it", statistics.median(later), floors.get("token"))

    def many(self) -> None:
        """Steps in which every row decodes."""
        for rows in self.args.batch_sizes:
            with self.part(f"bf16, {rows} requests"):
                engine = self.engine(rows)
                params = lmm.SamplingParams(max_new_tokens=self.args.tokens)
                requests = [lmm.Request(inputs=self.inputs(row, PROMPT, row % 2), params=params) for row in range(rows)]
                jobs = [engine.add(request) for request in requests]
                while any(job.remaining > 1 or not job.tokens for job in jobs):
                    engine.step()
                counted, times = 0, []
                while all(job.answer is None for job in jobs):
                    started = time.perf_counter()
                    engine.step()
                    self.synchronize()
                    times.append(time.perf_counter() - started)
                    counted += rows
                engine.close()
                for job in jobs:
                    if job.answer is not None and job.answer.error is not None:
                        raise job.answer.error
            floor = None
            if self.card is not None:
                floor = decode_floor(self.config, rows=rows, context=PROMPT + self.args.tokens // 2, tiles=0)
                seeing = decode_floor(self.config, rows=rows // 2, tiles=1, context=0)
                blind = decode_floor(self.config, rows=rows // 2, tiles=0, context=0)
                more = replace(floor, bytes=floor.bytes + seeing.bytes - blind.bytes) if rows > 1 else floor
                floor = more.seconds(self.card)
            self.say(f"bf16, {rows} at a time, a step", statistics.median(times), floor, rows)

    def say(self, name: str, seconds: float, floor: float | None, tokens: int = 1) -> None:
        row = {"seconds": seconds, "tokens_per_second": tokens / seconds, "floor_seconds": floor}
        self.results[name] = row
        beside = (
            "no published rates for this device"
            if floor is None
            else f"floor {1e3 * floor:8.2f} ms, {seconds / floor:5.2f} x"
        )
        print(f"  {name:34s} {1e3 * seconds:8.2f} ms  {tokens / seconds:8.1f} tokens/s   {beside}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--gpu", action="store_true", help="measure on this machine's GPU")
    what.add_argument("--roofline", action="store_true", help="compute the table of floors")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="11b", help="toy tries the program out")
    parser.add_argument("--device", default="cuda", help="cpu with the toy shape alone")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=480, help="what does not fit into them is left out")
    parser.add_argument("--output", type=Path, help="folder for the JSON result")
    args = parser.parse_args(arguments)
    if args.roofline:
        print(roofline())
        return
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.exit(2, "there is no CUDA GPU here; --shape toy --device cpu tries the program out\n")
    if args.device == "cpu" and args.shape != "toy":
        parser.exit(2, "on a CPU only --shape toy is tried out\n")
    bench = Bench(args)
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu"
    print(f"{args.shape} on {name}, random weights")
    results = bench.run()
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    write("throughput_gpu", {"gpu": name, "settings": settings, "rows": results}, args.output)
