"""Run one of `CASES` on the CPU and print what it took and what was planned, as JSON: python measure.py CASE

Each in a process of its own: what an allocator keeps of an earlier run would hide what the next one takes. A small
model runs first, so that threads and libraries are there before.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llama_multimodal import ops
from llama_multimodal.config import (
    AnyModelConfig,
    LanguageModelConfig,
    MLPProjector,
    ModelConfig,
    SiglipConfig,
    TextConfig,
    TiledVisionConfig,
)
from llama_multimodal.generate import generate
from llama_multimodal.inputs import ImageLayout, ModelInputs, batch_inputs
from llama_multimodal.loading import DTYPES
from llama_multimodal.models import LanguageModel, build_model
from llama_multimodal.planning import Packed, PlanOptions, plan
from llama_multimodal.quant.pack import Packing, pack
from llama_multimodal.sampling import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from peers import PeakMemory

TEXT = TextConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, cross_attention_layers=(), max_position_embeddings=4096, rope_scaling=None,
    num_extra_embeddings=0, bos_token_id=0, eos_token_ids=(), pad_token_id=0,
)  # fmt: skip
LANGUAGE = LanguageModelConfig(TEXT)
TILED = ModelConfig(
    vision=TiledVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_global_layers=1, num_attention_heads=4,
        image_size=336, intermediate_layers_indices=(0, 1, 2),
    ),
    text=replace(TEXT, cross_attention_layers=(1, 3), num_extra_embeddings=8),
    image_token_id=8192,
)  # fmt: skip
SPLICED = ModelConfig(
    vision=SiglipConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4, image_size=336,
        patch_size=14, pooling_head=False,
    ),
    text=replace(TEXT, num_extra_embeddings=1),
    projector=MLPProjector(), fusion="splice", image_token_id=8192, model_type="llama_multimodal",
)  # fmt: skip


CASES: dict[str, tuple[AnyModelConfig, PlanOptions]] = {
    "text": (LANGUAGE, PlanOptions("fp32", context=512, prompt=510, batch=3, device="cpu")),
    "text, int8": (
        LANGUAGE, PlanOptions("fp32", context=512, prompt=510, batch=3, pack=Packed("int8"), device="cpu")
    ),
    "text, bf16": (LANGUAGE, PlanOptions("bf16", context=1024, prompt=1022, batch=6, device="cpu")),
    "pictures": (TILED, PlanOptions("fp32", context=256, prompt=254, batch=2, device="cpu")),
    "one tile": (TILED, PlanOptions("fp32", context=256, prompt=254, batch=4, tiles=1, device="cpu")),
    "spliced pictures": (SPLICED, PlanOptions("fp32", context=640, prompt=638, batch=2, device="cpu")),
    "training": (LANGUAGE, PlanOptions("fp32", context=256, batch=2, train="full", device="cpu")),
    "training, short": (LANGUAGE, PlanOptions("fp32", context=32, train="full", device="cpu")),
    "training, checkpointed": (
        LANGUAGE,
        PlanOptions("fp32", context=256, batch=4, train="full", gradient_checkpointing=True, device="cpu"),
    ),
    "training with pictures": (TILED, PlanOptions("fp32", context=128, tiles=1, train="full", device="cpu")),
}  # fmt: skip


def filled(config: AnyModelConfig, options: PlanOptions) -> LanguageModel:
    """A model whose weights are all in memory."""
    with torch.device("meta"):
        model = build_model(config).to(DTYPES[options.dtype])
    model = model.to_empty(device="cpu")
    if config.text.tie_word_embeddings:
        model.decoder.tie_lm_head()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(0.0 if "tile_" in name else 0.01)  # unused tiles carry nothing in any released checkpoint
    return model


def inputs_of(config: AnyModelConfig, options: PlanOptions) -> ModelInputs:
    """Rows of as many tokens as the plan's prompts have, with their pictures at the beginning."""
    load = plan(config, options).load
    spliced = isinstance(config, ModelConfig) and config.fusion == "splice"
    image = config.image_token_id if load.images else None
    places = config.num_tokens(*load.tile_size) if isinstance(config, ModelConfig) and spliced else 1
    of_row, of_picture = load.images // load.rows, load.tiles // max(1, load.images)
    row = [image or 0] * (places * of_row) + [1] * (load.prompt - places * of_row)
    grid = (2, 2) if of_picture == 4 else (1, of_picture)
    layouts = [ImageLayout(*grid, row=b, num_tokens=places) for b in range(load.rows) for _ in range(of_row)]
    tiles = torch.full((load.tiles, 3, *load.tile_size), 0.5)
    return batch_inputs([row] * load.rows, tiles, layouts, image_token_id=image, pad_token_id=0, spliced=spliced)


def answer(config: AnyModelConfig, options: PlanOptions) -> None:
    """Prompts and two tokens behind them."""
    model = filled(config, options).eval()
    if options.pack is not None:
        pack(model, Packing(options.pack.format, options.pack.group))
    inputs = inputs_of(config, options)
    generate(model, inputs, SamplingParams(max_new_tokens=plan(config, options).load.context - max(inputs.lengths)))


def train(config: AnyModelConfig, options: PlanOptions) -> None:
    """Two steps, of which the second has the optimizer's moments from the beginning."""
    model = filled(config, options).train()
    inputs = inputs_of(config, options)
    labels = inputs.tokens.flatten().clamp(max=config.text.vocab_size - 1)
    head, model.decoder.lm_head = model.decoder.lm_head, nn.Identity()  # its product is the loss's affair
    modules = nn.ModuleList([model, head])
    if options.gradient_checkpointing:
        for block in model.decoder.layers:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    optimizer = torch.optim.AdamW(modules.parameters(), fused=True)
    for _ in range(2):
        states = model(inputs).logits  # [B, T, E]
        loss = ops.linear_cross_entropy(states.flatten(0, 1), head.weight, labels)
        del states
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run(config: AnyModelConfig, options: PlanOptions) -> None:
    (answer if options.train is None else train)(config, options)


def small(config: AnyModelConfig) -> AnyModelConfig:
    """The same kind of model, too small to count."""
    text = replace(config.text, hidden_size=64, intermediate_size=64, vocab_size=128, num_attention_heads=2,
                   num_key_value_heads=1)  # fmt: skip
    if isinstance(config, LanguageModelConfig):
        return LanguageModelConfig(text)
    vision = replace(config.vision, hidden_size=64, intermediate_size=64, num_attention_heads=2, image_size=28)
    return replace(config, vision=vision, text=text, image_token_id=128)


def main(name: str) -> dict[str, float]:
    """MiB that a case was planned to take and took."""
    config, options = CASES[name]
    run(small(config), replace(options, context=32, prompt=None if options.train else 30, pack=None))
    gc.collect()
    with PeakMemory() as memory:
        run(config, options)
    made = plan(config, options)
    return {
        "weights": made.part("weights").bytes / 2**20,
        "planned": made.total / 2**20,
        "measured": memory.extra,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
