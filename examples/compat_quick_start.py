"""The calls of the README that this project grew from, on a tiny model of random weights: a loss, and noise as answer.

docs/compat.md says what each of them is in the library itself.

python examples/compat_quick_start.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from llama_multimodal.compat import MLLAMAConfig, MllamaForConditionalGeneration, MllamaImageProcessor
from llama_multimodal.loading import locate
from llama_multimodal.processing.tokenizer import Tokenizer

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default=str(IMAGES / "shelf.png"))
    parser.add_argument("--text", default="<image>How many red circles are there?")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = Tokenizer.load(locate("tiny"))  # or AutoTokenizer.from_pretrained(…)
    processor = MllamaImageProcessor(tokenizer=tokenizer, num_image_token=4, image_size=32)
    vision_config = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_channels": 3, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    text_config = {
        "vocab_size": processor.image_token_id + 1, "hidden_size": 64, "n_heads": 4, "n_kv_heads": 2, "n_layers": 4,
        "hidden_dim": 128, "max_position_embeddings": 256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    config = MLLAMAConfig(
        vision_config=vision_config,
        text_config=text_config,
        projection_dim=64,
        image2text_projection_bias=True,
        image_token_id=processor.image_token_id,
    )
    model = MllamaForConditionalGeneration(config)

    inputs = processor(text=[args.text], images=[Image.open(args.image)], padding=True)
    print({key: list(value.shape) for key, value in inputs.items()})
    outputs = model(
        input_ids=inputs["input_ids"],
        pixel_values=inputs["pixel Value"],
        attention_mask=inputs["attention_mask"],
        labels=inputs["input_ids"],
    )
    print(f"logits {list(outputs['logits'].shape)}, loss {outputs['loss'].item():.3f}")
    outputs["loss"].backward()

    ids = model.generate(
        input_ids=inputs["input_ids"],
        pixel_values=inputs["pixel_values"],
        max_new_tokens=args.max_new_tokens,
        temperature=0.7,
        do_sample=True,
        top_p=0.9,
    )
    new = ids[0, inputs["input_ids"].shape[1] :]
    print(f"{len(new)} new tokens: {processor.tokenizer.decode(new)!r}")


if __name__ == "__main__":
    main()
