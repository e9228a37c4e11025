"""Ask several questions about one picture, which goes through the vision encoder once.

python examples/visual_question_answering.py
python examples/visual_question_answering.py photo.jpg "What is this?" "Where was it taken?" --model FOLDER
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import llama_multimodal as lmm

IMAGES = Path(__file__).parent / "images"
QUESTIONS = ["How many red circles are there?", "What shape is the green object?", "Is there a purple triangle?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", default=str(IMAGES / "shelf.png"))
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model, processor = lmm.load(args.model, device=args.device)
    read = None  # what the decoder reads of the picture: the same whatever is asked
    for question in args.questions:
        content = [{"type": "image", "image": args.image}, {"type": "text", "text": question}]
        inputs = processor([{"role": "user", "content": content}])
        started = time.perf_counter()
        if read is None:
            with torch.inference_mode():
                read = model.read_images(inputs)
        answer = lmm.generate(model, inputs, lmm.SamplingParams(max_new_tokens=64), images=read)
        print(f"{question} {answer.texts[0]} ({time.perf_counter() - started:.2f} s)")


if __name__ == "__main__":
    main()
