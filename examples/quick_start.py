"""Ask one question about one picture: whole, and word by word as the answer comes.

python examples/quick_start.py
python examples/quick_start.py photo.jpg "What is this?" --model meta-llama/Llama-3.2-11B-Vision-Instruct
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import llama_multimodal as lmm

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", default=str(IMAGES / "shelf.png"))
    parser.add_argument("question", nargs="?", default="How many red circles are there?")
    parser.add_argument("--model", default="tiny", help="a folder, a hub id, or the embedded model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model, processor = lmm.load(args.model, device=args.device)
    content = [{"type": "image", "image": args.image}, {"type": "text", "text": args.question}]
    inputs = processor([{"role": "user", "content": content}])

    answer = lmm.generate(model, inputs, lmm.SamplingParams(max_new_tokens=64))
    print(f"{args.question} {answer.texts[0]} ({len(answer.token_ids[0])} tokens, {answer.finish_reasons[0]})")

    for event in lmm.generate(model, inputs, lmm.SamplingParams(max_new_tokens=64), stream=True):
        print(event.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
