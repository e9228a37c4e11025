"""Small random models of both fusions and of text alone, prompts for them, and what `generate` answers alone."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from small_model import CONFIG, IMAGE, Letters, random_model

from llama_multimodal import LoraConfig, SamplingParams, apply_lora, generate, use_adapter
from llama_multimodal.config import ClipVisionConfig, LanguageModelConfig, MLPProjector, ModelConfig
from llama_multimodal.engine import Engine
from llama_multimodal.generate import GenerationOutput
from llama_multimodal.inputs import ImageLayout, ModelInputs, batch_inputs
from llama_multimodal.models import LanguageModel, build_model

CONTEXT = 64
KIND = "cross_attention"
TABLE = [f"{chr(97 + i % 5)}{chr(97 + i // 5)}" for i in range(64)]  # pairs of letters, few of them: stop strings occur
GRIDS = [(1, 1), (1, 2), (2, 2), (2, 1)]  # picture i is cut like GRIDS[i % 4]
_TEXT_ALONE = replace(CONFIG.text, cross_attention_layers=(), num_hidden_layers=3)
CONFIGS = {
    "cross_attention": CONFIG,
    "splice": ModelConfig(
        vision=ClipVisionConfig(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=28,
            patch_size=14, with_class_token=False,
        ),
        text=_TEXT_ALONE, image_token_id=IMAGE, projector=MLPProjector(), fusion="splice",
        model_type="llama_multimodal",
    ),
    "text": LanguageModelConfig(_TEXT_ALONE),
    "long": LanguageModelConfig(
        replace(
            _TEXT_ALONE, num_hidden_layers=1, hidden_size=8, num_attention_heads=1, num_key_value_heads=1,
            max_position_embeddings=32768,
        )
    ),
}  # fmt: skip
TOKENS_PER_TILE = 4  # of the spliced model


ADAPTERS = ("first", "second")


@functools.cache
def model(kind: str, dtype: torch.dtype = torch.float32, adapted: bool = False) -> LanguageModel:
    """adapted: with two adapters that change its answers, "first" in force"""
    if adapted:
        made = copy.deepcopy(model(kind, dtype))
        for name in ADAPTERS:
            apply_lora(made, LoraConfig(rank=3, targets=("self", "mlp", *(["cross"] if kind == KIND else []))), name)
        torch.manual_seed(0)
        with torch.no_grad():
            for key, parameter in made.named_parameters():
                if "lora" in key:
                    parameter.copy_(0.3 * torch.randn(parameter.shape))
        return made.eval()
    config = CONFIGS[kind]
    if kind == KIND:
        return random_model(dtype=dtype, config=config)
    torch.manual_seed(0)
    made = build_model(config).to(torch.float64)
    with torch.no_grad():
        for name, value in made.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            wide = value.ndim == 2 and "embedding" not in name
            scale = 0.2 if norm else 2 * value.shape[-1] ** -0.5 if wide else 2.0 if value.ndim == 2 else 0.3
            value.copy_(norm + scale * torch.randn(value.shape, dtype=torch.float64))
    return made.to(dtype).eval()


@functools.cache
def stranger(context: int = CONTEXT) -> LanguageModel:
    """A smaller model of the same vocabulary that knows nothing of the others: a bad draft."""
    text = replace(CONFIGS["long"].text, max_position_embeddings=context)
    torch.manual_seed(1)
    made = build_model(LanguageModelConfig(text))
    with torch.no_grad():
        made.decoder.lm_head.weight.mul_(20)
    return made.eval()


def picture(number: int) -> torch.Tensor:
    rows, columns = GRIDS[number % len(GRIDS)]
    generator = torch.Generator().manual_seed(number)
    return torch.randn(rows * columns, 3, 28, 28, generator=generator, dtype=torch.float64).float()


def prompt(kind: str, tokens: Sequence[int], pictures: Sequence[int] = ()) -> ModelInputs:
    """Token ids, where IMAGE stands for the next of the pictures, as one row."""
    spliced = kind == "splice"
    row: list[int] = []
    left = iter(pictures)
    layouts = []
    for token in tokens:
        if token != IMAGE:
            row.append(token)
            continue
        height, width = GRIDS[next(left) % len(GRIDS)]
        count = TOKENS_PER_TILE * height * width if spliced else 1
        layouts.append(ImageLayout(height, width, num_tokens=count))
        row += [IMAGE] * count
    tiles = torch.cat([torch.zeros(0, 3, 28, 28), *map(picture, pictures)])
    image = None if kind in ("text", "long") else IMAGE
    decoder = functools.partial(Letters, TABLE)
    return batch_inputs([row], tiles, layouts, image_token_id=image, pad_token_id=63, spliced=spliced, decoder=decoder)


@functools.cache
def alone(
    kind: str,
    tokens: tuple[int, ...],
    pictures: tuple[int, ...],
    params: SamplingParams,
    dtype: torch.dtype,
    adapter: str | None = None,
) -> GenerationOutput:
    """What the plain loop answers. adapter: of the adapted model, "" without one; None is the model that has none"""
    asked = prompt(kind, tokens, pictures)
    if adapter is None:
        return generate(model(kind, dtype), asked, params)
    with use_adapter(model(kind, dtype, True), adapter or None):
        return generate(model(kind, dtype, True), asked, params)


def check_accounts(engine: Engine) -> None:
    """Every block and unit has as many references as holders, and lies in one place. Nothing is left of proposals."""
    blocks, images = engine.blocks, engine.images
    held = Counter(block for job in engine.scheduler.running for block in job.blocks)
    assert [held[b] for b in range(blocks.num_blocks)] == blocks._references
    for job in engine.scheduler.running:
        assert job.proposed == [] and job.computed < len(job.tokens)
        assert len(job.blocks) == blocks.blocks_for(job.computed) and job.drafted <= job.computed
    free = [*blocks._empty, *blocks._kept]
    assert sorted([*held, *free]) == list(range(blocks.num_blocks))
    assert {key: b for b, key in enumerate(blocks._keys) if key is not None} == blocks._by_key
    assert all(blocks._keys[b] is not None for b in blocks._kept) and not any(blocks._keys[b] for b in blocks._empty)
    uses = [use for job in engine.scheduler.running for use in job.images if use.entry is not None]
    flying = [entry for _, entries in engine._flights for entry in entries]
    holders = Counter([*(use.entry for use in uses), *flying])
    assert all(entry.references == count for entry, count in holders.items())
    places = [unit for entry in (*holders, *images._kept.values()) for unit in entry.units]
    assert sorted([*places, *images._free]) == list(range(images.num_units))
    assert not any(job.blocks or any(use.entry for use in job.images) for job in engine.scheduler.waiting)


def check_whole(engine: Engine) -> None:
    """Nothing is held any more."""
    check_accounts(engine)
    assert engine.blocks.num_held == 0 and engine.images.num_held == 0
    assert not engine.has_work
