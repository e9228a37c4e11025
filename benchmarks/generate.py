"""Text generation on the CPU, batch 1: prefill and decoding against transformers and llama.cpp on equal weights.

    OMP_PROC_BIND=true python benchmarks/generate.py --output benchmarks/results
    OMP_PROC_BIND=true python benchmarks/generate.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The decoder has the shape of a published text model (by default Llama 3.2 1B: 1.24 G parameters a token, the LM head
among them, which is the embedding's table) and random weights; every candidate continues the same prompt greedily, in
turn. A packed model is `quant.pack`'s; "a8" stands for activations in 8 bits as well, which llama.cpp always has with
these formats. "int4" has its LM head in int8, and so does Q4_0, whose usual files have it in Q6_K or Q8_0. llama.cpp
takes part where llama-cpp-python and gguf are installed, after its logits on a small model were found to be ours; it
reads GGUF files in --scratch, 4.5 GB for the 1B.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ggml import quantize
from gguf_model import as_stored, head_of, write_gguf
from llamacpp import LlamaCpp, missing
from peers import Measured, interleaved, write

import llama_multimodal as lmm
from llama_multimodal.config import LanguageModelConfig, RopeScaling, config_to_hf
from llama_multimodal.models import LanguageModel, build_model
from llama_multimodal.ops import Format
from llama_multimodal.processing.processor import Processor
from llama_multimodal.quant.pack import Packing, pack, use_int8_activations
from llama_multimodal.weights.llama import llama_rules
from llama_multimodal.zoo.configs import CONFIGS, find_config

ROUNDING = 0.04
"""What llama.cpp's logits may be off by on a small model, for its activations in bf16 or 8 bits."""
TRANSFORMERS = "transformers bf16"
LLAMA_CPP = {"bf16": "llama.cpp BF16", "int8": "llama.cpp Q8_0", "int4": "llama.cpp Q4_0"}
"""The format of the same width as each of ours."""
LM_HEAD: dict[str, Format] = {"int4": "int8"}
"""The LM head's format where it is another one than the model's."""


def published(name: str) -> LanguageModelConfig:
    """A text model's configuration from the table of known checkpoints; no token ends an answer.

    Raises:
        SystemExit: it is not there.
    """
    config = find_config(name)
    if not isinstance(config, LanguageModelConfig):
        known = ", ".join(name for name, config in CONFIGS.items() if isinstance(config, LanguageModelConfig))
        raise SystemExit(f"{name} is no text model of the table; there are {known}")
    return LanguageModelConfig(replace(config.text, eos_token_ids=()))


def random_weights(config: LanguageModelConfig) -> dict[str, torch.Tensor]:
    """By their names in Hugging Face's Llama; a tied LM head has none of its own."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_model(config).named_parameters()}
    return {
        rule.theirs[0]: torch.ones(shapes[rule.ours], dtype=torch.bfloat16)
        if "norm" in rule.ours
        else torch.randn(shapes[rule.ours], dtype=torch.bfloat16) * shapes[rule.ours][-1] ** -0.5
        for rule in llama_rules(config)
    }


def ours(config: LanguageModelConfig, weights: dict[str, torch.Tensor]) -> LanguageModel:
    """A model on these very tensors."""
    with torch.device("meta"):
        model = build_model(config)
    state = {rule.ours: weights[rule.theirs[0]] for rule in llama_rules(config)}
    model.load_state_dict(state, strict=not config.text.tie_word_embeddings, assign=True)
    if config.text.tie_word_embeddings:
        model.decoder.tie_lm_head()
    return model.eval()


def theirs(config: LanguageModelConfig, weights: dict[str, torch.Tensor]) -> Any:
    """transformers' Llama on the same tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = config_to_hf(config) | {"eos_token_id": None}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(weights, strict=not config.text.tie_word_embeddings, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are not among the weights
    return model.eval()


@contextmanager
def scratch_folder(folder: Path | None) -> Iterator[Path]:
    """The folder, or a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def llama_cpp(
    config: LanguageModelConfig, weights: dict[str, torch.Tensor], scratch: Path, threads: int, context: int
) -> dict[str, LlamaCpp]:
    """llama.cpp's models of the same tensors, by name."""
    found = {}
    for format, name in LLAMA_CPP.items():
        file = scratch / f"{format}.gguf"
        file.unlink(missing_ok=True)  # another model may still be mapped to what it holds
        write_gguf(file, config.text, weights, format, quantize, LM_HEAD.get(format))
        found[name] = LlamaCpp(file, threads, context)
    return found


def narrow(config: LanguageModelConfig) -> LanguageModelConfig:
    """Two small blocks, the rest as it is."""
    scaling = config.text.rope_scaling
    if isinstance(scaling, RopeScaling):  # frequencies that differ from the plain ones within a few tokens
        scaling = replace(scaling, original_max_position_embeddings=64)
    return LanguageModelConfig(
        replace(
            config.text, num_hidden_layers=2, hidden_size=256, intermediate_size=1024, num_attention_heads=4,
            num_key_value_heads=1, vocab_size=512, bos_token_id=0, pad_token_id=0, rope_scaling=scaling,
        )
    )  # fmt: skip


def check_llama_cpp(config: LanguageModelConfig, scratch: Path, threads: int) -> None:
    """Raise where llama.cpp's logits on a small model are not ours in fp32 on its rounded weights."""
    config = narrow(config)
    weights, tokens = random_weights(config), list(range(100))
    inputs = Processor(config, None).encode_tokens([tokens])
    peers = llama_cpp(config, weights, scratch, threads, len(tokens))
    for format, name in LLAMA_CPP.items():
        stored = dict.fromkeys(weights, format) | {head_of(weights): LM_HEAD.get(format, format)}
        rounded = {
            key: as_stored(value, stored[key], quantize) if value.ndim == 2 else value for key, value in weights.items()
        }
        with torch.inference_mode():
            expected = ours(config, {key: value.float() for key, value in rounded.items()})(inputs).logits[0, -1]
            error = float((torch.from_numpy(peers[name].logits(tokens)) - expected).norm() / expected.norm())
        print(f"{name}: logits on a small model {error:.1%} from ours")
        if not error <= ROUNDING:
            raise RuntimeError(f"{name} computes another model: its logits may be {ROUNDING:.0%} off")


def runs(
    models: dict[str, LanguageModel],
    peer: Any,
    llama_cpp_peers: dict[str, LlamaCpp],
    processor: Processor,
    prompt: list[int],
    count: int,
) -> dict[str, Callable[[], list[int]]]:
    """What continues the prompt by `count` tokens and returns them, by name."""

    def run_ours(model: LanguageModel) -> list[int]:
        inputs = processor.encode_tokens([prompt])
        return lmm.generate(model, inputs, lmm.SamplingParams(max_new_tokens=count, temperature=0.0)).token_ids[0]

    def run_theirs() -> list[int]:
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        out: list[int] = peer.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        return out

    found: dict[str, Callable[[], list[int]]] = {name: functools.partial(run_ours, m) for name, m in models.items()}
    found[TRANSFORMERS] = run_theirs
    return found | {name: functools.partial(p.generate, prompt, count) for name, p in llama_cpp_peers.items()}


def show(title: str, rates: dict[str, float]) -> None:
    """Each rate, and its ratio to transformers' and to that of llama.cpp's format of the same width."""
    print(f"\n{title}")
    for name, rate in rates.items():
        line = f"  {name:20s} {rate:8.1f} tokens/s   {rate / rates[TRANSFORMERS]:5.2f} x transformers"
        same_width = next((peer for format, peer in LLAMA_CPP.items() if format in name), "")
        if same_width in rates:
            line += f"   {rate / rates[same_width]:5.2f} x {same_width}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="that are decoded")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--model", default="meta-llama/Llama-3.2-1B-Instruct", help="whose shape it is")
    parser.add_argument("--scratch", type=Path, help="folder for the GGUF files (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="folder for the JSON result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with scratch_folder(args.scratch) as scratch:
        measure(args, scratch)


def measure(args: argparse.Namespace, scratch: Path) -> None:
    config = published(args.model)
    weights = random_weights(config)
    models = {
        "bf16": ours(config, weights),
        "bf16 packed": pack(ours(config, weights), "bf16"),
        "int8": pack(ours(config, weights), "int8"),
        "int4": pack(ours(config, weights), Packing("int4", lm_head=LM_HEAD["int4"])),
    }
    models |= {f"{name} a8": use_int8_activations(copy.deepcopy(models[name])) for name in ("int8", "int4")}
    peer, processor = theirs(config, weights), Processor(config, None)
    others: dict[str, LlamaCpp] = {}
    if packages := missing():
        print(f"llama.cpp is left out: {' and '.join(packages)} not installed")
    else:
        check_llama_cpp(config, scratch, args.threads)
        others = llama_cpp(config, weights, scratch, args.threads, max(args.prompt, 16 + args.tokens) + 1)
    del weights
    long = torch.randint(0, config.text.vocab_size, (args.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    short = long[:16]
    one, many = (runs(models, peer, others, processor, short, count) for count in (1, args.tokens + 1))
    chosen = {name: run() for name, run in many.items()}
    for name in (TRANSFORMERS, *others):
        same = sum(a == b for a, b in zip(chosen["bf16"], chosen[name]))
        print(f"{same} of {len(chosen['bf16'])} of our greedy tokens in bf16 are those of {name}")
    with torch.inference_mode():
        first: Measured = interleaved(one, args.repeats)
        whole = interleaved(many, args.repeats)
        prefill = interleaved(runs(models, peer, others, processor, long, 1), max(3, args.repeats // 2))
    decode = {name: args.tokens / (whole[name]["seconds"] - first[name]["seconds"]) for name in whole}
    show(f"decoding, {args.tokens} tokens", decode)
    filled = {name: args.prompt / row["seconds"] for name, row in prefill.items()}
    show(f"prefill, {args.prompt} tokens", filled)
    results = {"model": args.model, "decode_tokens_per_second": decode, "prefill_tokens_per_second": filled}
    write("generate", {**results, "seconds": {"first": first, "whole": whole, "prefill": prefill}}, args.output)


if __name__ == "__main__":
    main()
