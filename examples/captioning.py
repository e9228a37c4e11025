"""Describe a picture several times: the likeliest description, and some that are drawn.

A higher temperature draws less likely words, a lower top-p leaves the unlikely ones out, and a seed repeats a draw.

python examples/captioning.py
python examples/captioning.py photo.jpg --captions 5 --temperature 1.2 --top-p 0.95
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
    parser.add_argument("--prompt", default="Describe the picture.")
    parser.add_argument("--captions", type=int, default=3, help="how many are drawn")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others count on")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model, processor = lmm.load(args.model, device=args.device)
    content = [{"type": "image", "image": args.image}, {"type": "text", "text": args.prompt}]
    inputs = processor([{"role": "user", "content": content}])
    with torch.inference_mode():
        read = model.read_images(inputs)

    greedy = lmm.generate(model, inputs, lmm.SamplingParams(max_new_tokens=96), images=read)
    print(f"greedy: {greedy.texts[0]}")
    for seed in range(args.seed, args.seed + args.captions):
        params = lmm.SamplingParams(96, temperature=args.temperature, top_p=args.top_p, seed=seed)
        print(f"seed {seed}: {lmm.generate(model, inputs, params, images=read).texts[0]}")


if __name__ == "__main__":
    main()
