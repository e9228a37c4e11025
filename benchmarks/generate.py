"""Text generation on the CPU, batch 1: prefill and decoding, plain and packed, against transformers on equal weights.

    OMP_PROC_BIND=true python benchmarks/generate.py --output benchmarks/results

The decoder has the shape of Llama 3.2 1B (1.24 G parameters a token, the LM head among them) and random weights; every
candidate continues the same prompt greedily, in turn. A packed model is `quant.pack`'s; "int4" keeps its LM head in
int8.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import Measured, interleaved, write

import llama_multimodal as lmm
from llama_multimodal.config import ModelConfig, RopeScaling, TextConfig, TiledVisionConfig
from llama_multimodal.models import VisionLanguageModel
from llama_multimodal.processing.processor import Processor
from llama_multimodal.quant.pack import pack
from llama_multimodal.weights.mllama import HF_RELEASED, hf_rules

PREFIX = HF_RELEASED.text.removesuffix(".model") + "."


def configuration(layers: int, hidden: int, vocabulary: int) -> ModelConfig:
    """Llama 3.2 1B by default; the vision encoder is never called."""
    text = TextConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, cross_attention_layers=(),
        rope_scaling=RopeScaling(factor=32.0), bos_token_id=0, eos_token_ids=(), pad_token_id=0,
    )  # fmt: skip
    return ModelConfig(
        TiledVisionConfig(32, 32, 1, 1, 1, image_size=28, intermediate_layers_indices=()), text, vocabulary
    )


def random_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in VisionLanguageModel(config).state_dict().items()}
    torch.manual_seed(0)
    return {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if "norm" in name
        else torch.randn(shape, dtype=torch.bfloat16) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }


def ours(config: ModelConfig, weights: dict[str, torch.Tensor]) -> VisionLanguageModel:
    """A model on these very tensors."""
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def theirs(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Any:
    """transformers' Llama on the same tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = config.text
    assert text.rope_scaling is not None
    scaling = {"rope_type": "llama3", "rope_theta": text.rope_theta, "factor": text.rope_scaling.factor}
    scaling |= {"low_freq_factor": text.rope_scaling.low_freq_factor}
    scaling |= {"high_freq_factor": text.rope_scaling.high_freq_factor}
    scaling |= {"original_max_position_embeddings": text.rope_scaling.original_max_position_embeddings}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers, num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads, max_position_embeddings=text.max_position_embeddings,
            rms_norm_eps=text.rms_norm_eps, rope_parameters=scaling, bos_token_id=0, eos_token_id=None, pad_token_id=0,
        )
    ).to(torch.bfloat16)  # fmt: skip
    state = {
        rule.theirs[0].removeprefix(PREFIX): weights[rule.ours]
        for rule in hf_rules(config)
        if rule.theirs[0].startswith(PREFIX)
    }
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][: text.vocab_size]
    model.load_state_dict(state, assign=True)
    return model.eval()


def runs(
    models: dict[str, VisionLanguageModel], peer: Any, processor: Processor, prompt: list[int], count: int
) -> dict[str, Callable[[], list[int]]]:
    """What continues the prompt by `count` tokens and returns them, by name."""

    def run_ours(model: VisionLanguageModel) -> list[int]:
        inputs = processor.encode_tokens([prompt])
        return lmm.generate(model, inputs, lmm.SamplingParams(max_new_tokens=count, temperature=0.0)).token_ids[0]

    def run_theirs() -> list[int]:
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        out: list[int] = peer.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        return out

    found: dict[str, Callable[[], list[int]]] = {name: functools.partial(run_ours, m) for name, m in models.items()}
    return {**found, "transformers bf16": run_theirs}


def show(title: str, rates: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, rate in rates.items():
        print(f"  {name:20s} {rate:8.1f} tokens/s   {rate / rates['transformers bf16']:5.2f} x transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="that are decoded")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--output", type=Path, help="folder for the JSON result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = configuration(args.layers, args.hidden, args.vocabulary)
    weights = random_weights(config)
    models = {
        "bf16": ours(config, weights),
        "bf16 packed": pack(ours(config, weights), "bf16"),
        "int8": pack(ours(config, weights), "int8"),
        "int4": pack(ours(config, weights), "int4", lm_head="int8"),
    }
    peer, processor = theirs(config, weights), Processor(config, None)
    del weights
    long = torch.randint(0, args.vocabulary, (args.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    short = long[:16]
    one, many = (runs(models, peer, processor, short, count) for count in (1, args.tokens + 1))
    chosen = {name: run() for name, run in many.items()}
    same = sum(a == b for a, b in zip(chosen["bf16"], chosen["transformers bf16"]))
    print(f"{same} of {len(chosen['bf16'])} greedy tokens are transformers'")
    with torch.inference_mode():
        first: Measured = interleaved(one, args.repeats)
        whole = interleaved(many, args.repeats)
        prefill = interleaved(runs(models, peer, processor, long, 1), max(3, args.repeats // 2))
    decode = {name: args.tokens / (whole[name]["seconds"] - first[name]["seconds"]) for name in whole}
    show(f"decoding, {args.tokens} tokens", decode)
    filled = {name: args.prompt / row["seconds"] for name, row in prefill.items()}
    show(f"prefill, {args.prompt} tokens", filled)
    shape = {"layers": args.layers, "hidden": args.hidden, "vocabulary": args.vocabulary}
    results = {"shape": shape, "decode_tokens_per_second": decode, "prefill_tokens_per_second": filled}
    write("generate", {**results, "seconds": {"first": first, "whole": whole, "prefill": prefill}}, args.output)


if __name__ == "__main__":
    main()
