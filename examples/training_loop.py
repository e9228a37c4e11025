"""A training loop of your own: AdamW, mixed precision, and a model saved as safetensors.

Ten steps on examples/questions.json are enough to learn its answers by heart. Mixed precision is autocast: bfloat16
where the GPU or the CPU multiplies in it, float16 with a GradScaler on older GPUs, plain float32 elsewhere; the weights
stay in float32.

python examples/training_loop.py
python examples/training_loop.py --data my_questions.json --steps 200 --output trained
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from custom_dataset import DATA, IGNORED, QuestionDataset
from torch.utils.data import DataLoader

import llama_multimodal as lmm
from llama_multimodal.ops.linear import cpu_multiplies
from llama_multimodal.processing.processor import Processor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What products run in; None: in the weights' own dtype."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if cpu_multiplies(torch.bfloat16) else None


def answers(model: lmm.VisionLanguageModel, processor: Processor, dataset: QuestionDataset) -> list[str]:
    """What the model says to every question of a dataset."""
    conversations = []
    for entry in dataset.entries:
        image = {"type": "image", "image": str(dataset.folder / entry["image"])}
        content = [image, {"type": "text", "text": entry["question"]}]
        conversations.append([{"role": "user", "content": content}])
    return lmm.generate(model, processor(conversations), lmm.SamplingParams(max_new_tokens=32)).texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--output", help="a folder to save the trained model in")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device(args.device)
    model, processor = lmm.load(args.model, dtype=torch.float32, device=device)
    dataset = QuestionDataset(args.data, processor)
    print(f"before: {answers(model, processor, dataset)}")

    dtype = autocast_dtype(device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    model.train()
    step = 0
    while step < args.steps:
        for inputs, labels in DataLoader(dataset, args.batch_size, shuffle=True, collate_fn=dataset.collate):
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                logits = model(inputs).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().to(device), ignore_index=IGNORED)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            print(f"step {step}: loss {loss.item():.3f}")
            if step == args.steps:
                break

    model.eval()
    print(f"after: {answers(model, processor, dataset)}")
    if args.output:
        lmm.save(model, processor, args.output)
        print(f"saved in {args.output}; ask it with --model {args.output}")


if __name__ == "__main__":
    main()
