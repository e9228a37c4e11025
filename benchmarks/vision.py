"""The vision pass and the time to the first token, against transformers on the same weights, bf16.

    OMP_PROC_BIND=true python benchmarks/vision.py --scratch FOLDER --output benchmarks/results

Also says where our time goes, by module.
"""

from __future__ import annotations

import numpy as np
import torch
from peers import arguments, interleaved, random_mllama, show, write
from PIL import Image
from torch.profiler import profile

import llama_multimodal as lmm


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    from transformers import MllamaForConditionalGeneration, MllamaImageProcessor

    folder = random_mllama(args.scratch, text_hidden=2048, text_layers=15, vision_layers=14, tile=448)
    model, processor = lmm.load(folder, dtype=torch.bfloat16)
    peer = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    peer_processor = MllamaImageProcessor(size={"height": 448, "width": 448}, max_image_tiles=4)
    results = {}
    for title, size in (("one tile", (448, 448)), ("four tiles", (896, 896))):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        tokens = [1, 32000, *range(100, 130)]
        inputs = processor.encode_tokens([tokens], [[image]])
        theirs = peer_processor(images=[[image]], return_tensors="pt")
        theirs["pixel_values"] = theirs["pixel_values"].to(torch.bfloat16)
        theirs.pop("num_tiles", None)
        tiles = len(inputs.tiles)
        cross_mask = torch.zeros(1, len(tokens), 1, 4, dtype=torch.int64)
        cross_mask[:, 1:, :, :tiles] = 1
        ids = torch.tensor([tokens])

        def ours_first_token(inputs: object = inputs, last: int = len(tokens) - 1) -> None:
            model(inputs, last_token_of=[last])

        def their_first_token(theirs: dict = theirs, ids: torch.Tensor = ids, mask: torch.Tensor = cross_mask) -> None:
            peer(input_ids=ids, cross_attention_mask=mask, logits_to_keep=1, **theirs)

        with torch.inference_mode():
            vision = interleaved(
                {
                    "ours": lambda inputs=inputs: model.encode_images(inputs),
                    "transformers": lambda theirs=theirs: peer.model.vision_model(**theirs),
                },
                args.repeats,
            )
            first = interleaved({"ours": ours_first_token, "transformers": their_first_token}, args.repeats)
            show(f"vision pass, {title} of 448", vision)
            show(f"time to first token, {title} of 448", first)
            with profile() as profiler:
                model.encode_images(inputs)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=40))
        results[title] = {"vision": vision, "first_token": first}
    write("vision", results, args.output)


if __name__ == "__main__":
    main()
