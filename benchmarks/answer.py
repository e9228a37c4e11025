"""One question and its answer, batch 1, bf16: time to the first token and decoding, against transformers on the same
checkpoint, with a picture where the model reads any.

    OMP_PROC_BIND=true python benchmarks/answer.py --scratch /var/tmp/bench --output benchmarks/results

Shapes with random weights, written by transformers: SmolLM2 135M and Llama 3.2 1B on text, SmolVLM 256M with a picture
that becomes 17 squares, and Llama 3.2 Vision with 0.8 B of text. Ours is loaded as the command line does on a CPU
(`pack="auto"`). The greedy tokens of both are compared first, but for Llama 3.2 Vision, which transformers computes
from other layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import arguments, interleaved, random_mllama, write
from PIL import Image

import llama_multimodal as lmm

PROMPT = 128  # tokens of text
IMAGE = {"smolvlm": 49190, "mllama": 32000}


@dataclass(frozen=True)
class Case:
    """title: of the results. write: makes the checkpoint. picture: (width, height) in pixels"""

    title: str
    write: Callable[[Path], Path]
    picture: tuple[int, int] | None = None


def random_llama(folder: Path, name: str, **sizes: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = folder / f"random-{name}"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True}
        _save(LlamaForCausalLM(LlamaConfig(**settings, **sizes)), folder)
    return folder


SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip


def random_smolvlm(folder: Path) -> Path:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    folder = folder / "random-smolvlm-256m"
    if (folder / "config.json").exists():
        return folder
    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 512, "patch_size": 16,
    }  # fmt: skip
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    text = {"model_type": "llama", **SMOLLM2, **special, "vocab_size": 49280}
    config = SmolVLMConfig(
        vision_config=vision, text_config=text, scale_factor=4, image_token_id=IMAGE["smolvlm"], **special
    )
    torch.manual_seed(0)
    _save(SmolVLMForConditionalGeneration(config), folder)
    return folder


def _save(model: Any, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)


CASES = [
    Case("SmolLM2 135M, text", lambda folder: random_llama(folder, "smollm2-135m", **SMOLLM2)),
    Case("Llama 3.2 1B, text", lambda folder: random_llama(folder, "llama-1b", **LLAMA_1B)),
    Case("SmolVLM 256M, a picture of 17 squares", random_smolvlm, (800, 800)),
    Case(
        "Llama 3.2 Vision 0.8 B, a picture of one tile",
        lambda folder: random_mllama(folder, text_hidden=2048, text_layers=15, vision_layers=14, tile=448),
        (448, 448),
    ),
]


def prepare(case: Case, folder: Path) -> tuple[Callable[[int], list[int]], Callable[[int], list[int]]]:
    """What answers with so many tokens, ours and theirs; pictures are prepared outside of what is timed."""
    import transformers

    model, processor = lmm.load(folder, dtype=torch.bfloat16, pack="auto")
    words = torch.randint(10, 30000, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    kind = processor.config.model_type if case.picture else "text"  # type: ignore[union-attr]
    extra: dict[str, Any] = {}
    if case.picture is None:
        inputs = processor.encode_tokens([words])
        peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        noise = np.random.default_rng(0).integers(0, 256, (*case.picture[::-1], 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        image = IMAGE[kind]
        if kind == "mllama":
            inputs = processor.encode_tokens([[1, image, *words]], [[picture]])
            peer = transformers.MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
            pixels = transformers.MllamaImageProcessor(size={"height": 448, "width": 448}, max_image_tiles=4)
            extra = dict(pixels(images=[[picture]], return_tensors="pt"))
            extra.pop("num_tiles", None)
            mask = torch.zeros(1, inputs.tokens.shape[1], 1, 4, dtype=torch.int64)
            mask[:, 1:, :, : len(inputs.tiles)] = 1
            extra["cross_attention_mask"] = mask
        else:
            # Spelt out by hand: the checkpoint has no tokenizer, and what goes around a square does not matter here.
            row = [1, *[image] * (17 * 64), *words]
            inputs = processor.encode_tokens([row], [[picture]])
            peer = transformers.SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
            extra["pixel_values"] = inputs.tiles[None]
        extra["pixel_values"] = extra["pixel_values"].to(torch.bfloat16)
    peer.eval()
    peer.generation_config.eos_token_id = None

    def ours(count: int) -> list[int]:
        params = lmm.SamplingParams(max_new_tokens=count, temperature=0.0)
        return lmm.generate(model, inputs, params).token_ids[0]

    def theirs(count: int) -> list[int]:
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        out = peer.generate(inputs.tokens, attention_mask=torch.ones_like(inputs.tokens), **extra, **settings)
        return out[0, inputs.tokens.shape[1] :].tolist()

    return ours, theirs


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=32, help="that are decoded")
    parser.add_argument("--case", help="only those whose title contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for case in CASES:
        if args.case and args.case not in case.title:
            continue
        ours, theirs = prepare(case, case.write(args.scratch))
        both = {"ours": ours, "transformers": theirs}
        with torch.inference_mode():
            a, b = (run(args.tokens + 1) for run in both.values())
            first = interleaved({name: lambda run=run: run(1) for name, run in both.items()}, args.repeats)
            whole = interleaved(
                {name: lambda run=run: run(args.tokens + 1) for name, run in both.items()}, args.repeats
            )
        decode = {name: args.tokens / (whole[name]["seconds"] - first[name]["seconds"]) for name in both}
        print(f"\n{case.title}: {sum(x == y for x, y in zip(a, b))} of {len(a)} greedy tokens are the same")
        for name in both:
            ratio = first["transformers"]["seconds"] / first[name]["seconds"]
            print(
                f"  {name:14s} first token {first[name]['seconds']:7.3f} s  {ratio:5.2f} x   decoding"
                f" {decode[name]:7.1f} tokens/s  {decode[name] / decode['transformers']:5.2f} x"
            )
        results[case.title] = {"first_token": first, "whole": whole, "decode_tokens_per_second": decode}
    write("answer", results, args.output)


if __name__ == "__main__":
    main()
