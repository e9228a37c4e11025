"""One question and its answer, batch 1, bf16: time to the first token and decoding, against transformers on the same
checkpoint, with a picture where the model reads any.

    OMP_PROC_BIND=true python benchmarks/answer.py --scratch FOLDER --output benchmarks/results

Shapes with random weights, written by transformers: SmolLM2 135M and Llama 3.2 1B on text, SmolVLM 256M with a picture
that becomes 17 squares, and Llama 3.2 Vision with 0.8 B of text. Ours is loaded as the command line does on a CPU
(`pack="auto"`: bf16), or with weights in 8 or 4 bits; transformers' stay in bf16. Before that is timed, the logits
behind the prompt are held against transformers' in fp32, both ours and theirs, and the greedy tokens are compared; but
not for Llama 3.2 Vision, which transformers computes from other layers. Random weights give logits that lie close
together: where rounding settles which is the largest, all tokens behind it differ. What memory gives is measured
beside: no answer is faster than its weights are read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import arguments, random_mllama, read_bandwidth, write
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


@dataclass(frozen=True)
class Prepared:
    """ours, theirs: answer with so many tokens, and give each to a function once it is there; pictures are prepared
    outside. errors: of the logits behind the prompt against transformers in fp32, root mean square over theirs; empty
    where it computes something else. read: bytes of weights that a token of an answer reads."""

    ours: Callable[[int, Callable[[int], None]], None]
    theirs: Callable[[int, Callable[[int], None]], None]
    errors: dict[str, float]
    read: int


def prepare(case: Case, folder: Path, pack: str) -> Prepared:
    import transformers

    model, processor = lmm.load(folder, dtype=torch.bfloat16, pack=pack)
    words = torch.randint(10, 30000, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    kind = processor.config.model_type if case.picture else "text"  # type: ignore[union-attr]
    extra: dict[str, Any] = {}
    if case.picture is None:
        inputs = processor.encode_tokens([words])
        kind_of_peer = transformers.LlamaForCausalLM
    else:
        noise = np.random.default_rng(0).integers(0, 256, (*case.picture[::-1], 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        image = IMAGE[kind]
        if kind == "mllama":
            inputs = processor.encode_tokens([[1, image, *words]], [[picture]])
            kind_of_peer = transformers.MllamaForConditionalGeneration
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
            kind_of_peer = transformers.SmolVLMForConditionalGeneration
            extra["pixel_values"] = inputs.tiles[None]

    def load_peer(dtype: torch.dtype) -> Any:
        if "pixel_values" in extra:
            extra["pixel_values"] = extra["pixel_values"].to(dtype)
        return kind_of_peer.from_pretrained(folder, dtype=dtype).eval()

    def logits(peer: Any) -> torch.Tensor:
        return peer(inputs.tokens, **extra, logits_to_keep=1).logits[0, -1].float()

    errors = {}
    with torch.inference_mode():
        exact = None if kind == "mllama" else logits(load_peer(torch.float32))
        peer = load_peer(torch.bfloat16)
        if exact is not None:
            last = model(inputs, last_token_of=[inputs.tokens.shape[1] - 1]).logits[0, -1].float()
            found = {"ours": last, "transformers": logits(peer)}
            errors = {name: float((value - exact).norm() / exact.norm()) for name, value in found.items()}
    peer.generation_config.eos_token_id = None

    def ours(count: int, put: Callable[[int], None]) -> None:
        params = lmm.SamplingParams(max_new_tokens=count, temperature=0.0)
        for event in lmm.generate(model, inputs, params, stream=True):
            put(event.token_id)

    class Streamer(transformers.generation.BaseStreamer):
        def __init__(self, put: Callable[[int], None]) -> None:
            self.give, self.prompt = put, True

        def put(self, value: torch.Tensor) -> None:
            if not self.prompt:
                self.give(int(value))
            self.prompt = False

        def end(self) -> None:
            pass

    def theirs(count: int, put: Callable[[int], None]) -> None:
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "streamer": Streamer(put)}
        peer.generate(inputs.tokens, attention_mask=torch.ones_like(inputs.tokens), **extra, **settings)

    read = [*model.decoder.layers.buffers(), *model.decoder.lm_head.buffers()]  # packed weights; of the embedding a row
    return Prepared(ours, theirs, errors, sum(weight.numel() * weight.element_size() for weight in read))


def answer(run: Callable[[int, Callable[[int], None]], None], count: int) -> tuple[list[int], float, float]:
    """The tokens, the seconds to the first, and those from there to the last."""
    tokens: list[int] = []
    times = [time.perf_counter()]

    def put(token: int) -> None:
        tokens.append(token)
        times.append(time.perf_counter())

    run(count, put)
    return tokens, times[1] - times[0], times[-1] - times[1]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=32, help="that are decoded")
    parser.add_argument("--pack", choices=("auto", "int8", "int4"), default="auto", help="our weights")
    parser.add_argument("--case", help="only those whose title contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for case in CASES:
        if args.case and args.case not in case.title:
            continue
        prepared = prepare(case, case.write(args.scratch), args.pack)
        both = {"ours": prepared.ours, "transformers": prepared.theirs}
        with torch.inference_mode():
            tokens = [answer(run, args.tokens + 1)[0] for run in both.values()]
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in both}
            for _ in range(args.repeats):
                for name, run in both.items():
                    taken[name].append(answer(run, args.tokens + 1)[1:])
            bandwidth = read_bandwidth()
        first = {name: statistics.median(row[0] for row in rows) for name, rows in taken.items()}
        decode = {name: args.tokens / statistics.median(row[1] for row in rows) for name, rows in taken.items()}
        same = sum(a == b for a, b in zip(*tokens, strict=True))
        print(f"\n{case.title}: {same} of {args.tokens + 1} greedy tokens are the same")
        for name in both:
            ratio = first["transformers"] / first[name]
            error = f"   logits off by {prepared.errors[name]:.2%}" if prepared.errors else ""
            print(
                f"  {name:14s} first token {first[name]:7.3f} s  {ratio:5.2f} x   decoding"
                f" {decode[name]:7.1f} tokens/s  {decode[name] / decode['transformers']:5.2f} x{error}"
            )
        print(f"  {bandwidth / 1e9:.1f} GB/s are read at best, {bandwidth / prepared.read:.1f} times the weights")
        results[case.title] = {
            "first_token_seconds": first,
            "decode_tokens_per_second": decode,
            "taken": taken,
            "same_tokens": same,
            "errors": prepared.errors,
            "weight_bytes": prepared.read,
            "read_bandwidth": bandwidth,
        }
    write("answer" if args.pack == "auto" else f"answer_{args.pack}", results, args.output)


if __name__ == "__main__":
    main()
