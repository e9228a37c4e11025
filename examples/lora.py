"""LoRA: give a frozen model a few trainable numbers, train them, save them alone, load them, and merge them into it.

python examples/lora.py
python examples/lora.py --data my_questions.json --targets all-linear --rank 32 --steps 200 --output my-adapter
"""

from __future__ import annotations

import argparse
import copy
import tempfile

import torch
import torch.nn.functional as F
from custom_dataset import DATA, IGNORED, QuestionDataset

import llama_multimodal as lmm
from llama_multimodal.adapters.lora import count_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(DATA), help="see examples/custom_dataset.py")
    parser.add_argument("--targets", nargs="+", default=["self", "cross", "mlp"], help="presets, or globs: *.q_proj")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--output", help="a folder for the adapter, in PEFT's format; without it, it is thrown away")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    model, processor = lmm.load(args.model, dtype=torch.float32, device=args.device)
    plain = copy.deepcopy(model)
    dataset = QuestionDataset(args.data, processor)
    inputs, labels = dataset.collate([dataset[i] for i in range(len(dataset))])
    labels = labels.to(args.device)

    def loss_of(model: lmm.VisionLanguageModel) -> torch.Tensor:
        logits = model(inputs).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    lmm.apply_lora(model, lmm.LoraConfig(args.rank, args.alpha, args.dropout, targets=tuple(args.targets)))
    print(count_parameters(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    model.train()
    for step in range(1, args.steps + 1):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")

    model.eval()
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        folder = args.output or f"{scratch}/adapter"
        lmm.save_adapter(model, folder, base_model=args.model)
        trained = loss_of(model)
        with lmm.use_adapter(model, None):
            print(f"with the adapter: loss {trained:.4f}, without: {loss_of(model):.4f}")
        lmm.load_adapter(plain, folder)
        print(f"loaded into the plain model: loss {loss_of(plain):.4f}")
    lmm.merge_lora(plain)  # a plain model again, and as fast; lmm.save(plain, processor, folder) would write it
    with torch.inference_mode():
        print(f"merged: loss {loss_of(plain):.4f}")


if __name__ == "__main__":
    main()
