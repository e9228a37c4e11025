"""Answer several conversations at once. They may differ in length and in number of pictures; none changes another.

python examples/batch.py
python examples/batch.py a.jpg b.jpg c.jpg --question "What is this?" --model FOLDER
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import llama_multimodal as lmm

IMAGES = Path(__file__).parent / "images"
PAIRS = [
    ("shelf.png", "How many red circles are there?"),
    ("chart.png", "Which bar is the tallest?"),
    ("shelf.png", "Where is the blue star compared with the green hexagon?"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help="pictures; without any, those of the examples")
    parser.add_argument("--question", default="Describe the picture.", help="what is asked about each of them")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model, processor = lmm.load(args.model, device=args.device)
    pairs = [(image, args.question) for image in args.images] or [(str(IMAGES / name), asked) for name, asked in PAIRS]
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in pairs
    ]
    inputs = processor(conversations)
    print(f"{inputs.num_rows} rows of {', '.join(map(str, inputs.lengths))} tokens, {len(inputs.tiles)} tiles")

    started = time.perf_counter()
    answers = lmm.generate(model, inputs, lmm.SamplingParams(max_new_tokens=64))
    seconds = time.perf_counter() - started
    for (image, question), text in zip(pairs, answers.texts):
        print(f"{Path(image).name}: {question} {text}")
    print(f"{sum(map(len, answers.token_ids))} tokens in {seconds:.2f} s")


if __name__ == "__main__":
    main()
