"""A dataset of your own: a JSON file of pictures, questions and answers, and batches of it for training.

The file is a list of {"image": path, "question": text, "answer": text}; paths are relative to it. Only the answer and
the token that ends it are learnt: labels are -100 elsewhere, and each is the *next* token's id.

python examples/custom_dataset.py
python examples/custom_dataset.py --data my_questions.json --batch-size 8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import llama_multimodal as lmm
from llama_multimodal.inputs import ModelInputs
from llama_multimodal.processing.processor import Processor
from llama_multimodal.processing.prompt import encode_dialog

DATA = Path(__file__).parent / "questions.json"
IGNORED = -100

Item = tuple[list[int], list[int], str]
"""Token ids, labels, and the picture's path."""


class QuestionDataset(Dataset[Item]):
    """Conversations as ids in Llama 3's chat format; pictures are opened when a batch is made."""

    def __init__(self, file: str | Path, processor: Processor) -> None:
        self.folder = Path(file).parent
        self.entries = json.loads(Path(file).read_text(encoding="utf-8"))
        for number, entry in enumerate(self.entries):
            missing = {"image", "question", "answer"} - entry.keys()
            if missing:
                raise ValueError(f"{file}: entry {number} has no {', '.join(sorted(missing))}")
        self.processor = processor

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Item:
        entry, tokenizer = self.entries[index], self.processor.tokenizer
        image = str(self.folder / entry["image"])
        content = [{"type": "image", "image": image}, {"type": "text", "text": entry["question"]}]
        prompt = encode_dialog(tokenizer, [{"role": "user", "content": content}], self.processor.config.image_token_id)
        answer = [*tokenizer.encode(entry["answer"]), tokenizer.special("<|eot_id|>")]
        labels = [IGNORED] * (len(prompt.tokens) - 1) + answer + [IGNORED]
        return prompt.tokens + answer, labels, image

    def collate(self, items: list[Item]) -> tuple[ModelInputs, Tensor]:
        """Inputs of a batch, and its labels [B, T]."""
        rows, labels, images = zip(*items)
        inputs = self.processor.encode_tokens(rows, [[image] for image in images])
        padded = torch.full(inputs.tokens.shape, IGNORED)
        for b, row in enumerate(labels):
            padded[b, : len(row)] = torch.tensor(row)
        return inputs, padded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--model", default="tiny")
    args = parser.parse_args()

    model, processor = lmm.load(args.model, dtype=torch.float32)
    dataset = QuestionDataset(args.data, processor)
    for inputs, labels in DataLoader(dataset, args.batch_size, collate_fn=dataset.collate):
        with torch.inference_mode():
            logits = model(inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        learnt = [processor.decode(row[row != IGNORED].tolist()) for row in labels]
        shapes = f"tokens {list(inputs.tokens.shape)}, tiles {list(inputs.tiles.shape)}"
        print(f"{shapes}, learnt {learnt}, loss {loss:.3f}")


if __name__ == "__main__":
    main()
