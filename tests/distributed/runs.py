"""Small models, batches in which everything differs between readers, and the steps that all ways of sharing must agree
on. In fp64: what differs is then a mistake and no rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from small_model import CONFIG, IMAGE, make_inputs, random_model
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from llama_multimodal.config import (
    AnyModelConfig,
    ClipVisionConfig,
    Dinov2Config,
    LanguageModelConfig,
    LinearProjector,
    MLPProjector,
    ModelConfig,
    PixelShuffleProjector,
    SiglipConfig,
    TextConfig,
)
from llama_multimodal.distributed import (
    alike,
    clip_gradients,
    full_state,
    match_images,
    num_readers,
    parallelize,
    reader,
    shard_model,
    sum_over_readers,
    sync_gradients,
)
from llama_multimodal.distributed.fsdp import IGNORED
from llama_multimodal.inputs import ImageLayout, ModelInputs, batch_inputs
from llama_multimodal.models import LanguageModel, build_model

Batch = tuple[ModelInputs, Tensor]

_TEXT = dataclasses.replace(CONFIG.text, num_hidden_layers=3, cross_attention_layers=(), max_position_embeddings=128)
_VIT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def _spliced(vision: Any, projector: Any, text: TextConfig = _TEXT, **other: Any) -> ModelConfig:
    kind = "llama_multimodal"
    return ModelConfig(vision, text, IMAGE, projector, fusion="splice", model_type=kind, **other)


_SIGLIP = SiglipConfig(**_VIT, intermediate_size=40, pooling_head=False)
_CLIP = ClipVisionConfig(**_VIT, intermediate_size=40, with_class_token=False, layer=-2)
CONFIGS: dict[str, AnyModelConfig] = {
    "llama vision": CONFIG,
    "llama": LanguageModelConfig(dataclasses.replace(_TEXT, num_extra_embeddings=0)),
    "siglip": _spliced(_SIGLIP, PixelShuffleProjector(), dataclasses.replace(_TEXT, tie_word_embeddings=True)),
    "llava-next": _spliced(_CLIP, MLPProjector(), grid_pinpoints=((16, 32), (32, 16))),
    "dinov2": _spliced(Dinov2Config(**_VIT, swiglu=True, num_register_tokens=2, qkv_bias=False), LinearProjector()),
}
"""By name: every fusion, encoder and projector; one with tied embeddings."""


def make_model(name: str, seed: int = 0) -> LanguageModel:
    config = CONFIGS[name]
    if name == "llama vision":
        return random_model(seed, torch.float64)
    torch.manual_seed(seed)
    model = build_model(config).double()
    with torch.no_grad():
        for key, value in model.named_parameters():
            scale = "norm" in key and key.endswith("weight")
            value.copy_(scale + 0.2 * torch.randn(value.shape, dtype=torch.float64))
    return model.eval()


def make_batch(name: str, seed: int, pictures: Sequence[int]) -> Batch:
    """A row for each entry of `pictures`, the number of its tiles or 0, and labels for some of its text."""
    config = CONFIGS[name]
    generator = torch.Generator().manual_seed(seed)
    rows, layouts = [], []
    for row, tiles in enumerate(pictures if isinstance(config, ModelConfig) else [0] * len(pictures)):
        length = int(torch.randint(5, 11, (), generator=generator))
        text = torch.randint(0, 60, (length,), generator=generator).tolist()
        if tiles:
            layouts.append(_layout(config, row, tiles))
            text[2:2] = [IMAGE] * layouts[-1].num_tokens
        rows.append(text)
    if name == "llama vision":
        grids = [[(1, tiles)] if tiles else [] for tiles in pictures]
        inputs = make_inputs(rows, grids, seed=seed)
    else:
        side = config.vision.image_size if isinstance(config, ModelConfig) else 1
        shape = (sum(layout.num_tiles for layout in layouts), 3, side, side)
        pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
        inputs = batch_inputs(
            rows, pixels, layouts, image_token_id=config.image_token_id, pad_token_id=63, spliced=True
        )
    labels = torch.full_like(inputs.tokens, IGNORED)
    for row, text in enumerate(rows):
        tail = int(torch.randint(2, 5, (), generator=generator))
        labels[row, len(text) - 1 - tail : len(text) - 1] = torch.tensor(text[-tail:])
    return inputs, labels.masked_fill(labels == IMAGE, IGNORED)


def _layout(config: Any, row: int, tiles: int) -> ImageLayout:
    if config.fusion == "cross_attention":
        return ImageLayout(1, tiles, row=row)
    side = config.vision.image_size
    if config.grid_pinpoints:
        layout = ImageLayout(1, tiles, row=row, whole=True, size=(tiles * side, side))
        return dataclasses.replace(layout, num_tokens=layout.anyres_tokens(side // config.vision.patch_size))
    return ImageLayout(1, tiles, row=row, num_tokens=tiles * config.num_tokens(side, side))


def step_batches(name: str, step: int) -> list[Batch]:
    """Four micro-batches; with two readers, the second has no picture where the first has, and other numbers of
    tiles."""
    kinds: list[list[int]] = [[1, 2, 0], [0, 0], [4, 0], [1, 1]]
    return [make_batch(name, 10 * step + i, kind) for i, kind in enumerate(kinds)]


Prepare = Callable[[LanguageModel], object]


def train(
    name: str,
    mesh: DeviceMesh | None = None,
    *,
    steps: int = 3,
    prepare: Prepare = lambda model: None,
    foreach: bool = False,
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms of gradients, and the whole state after some steps. Without a mesh: by plain torch, on one process.

    With one, a rank's weights come from its own seed: those of the first count.
    """
    rank = 0 if mesh is None else mesh.get_rank()
    model = make_model(name, seed=rank)
    prepare(model)
    if mesh is not None:
        parallelize(model, mesh)
        if num_readers(mesh) > 1:
            shard_model(model, mesh)
    model.train()
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": group} for group in alike(learnt)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, foreach=foreach)
    losses, norms = [], []
    for step in range(steps):
        loss, norm = take_step(model, step_batches(name, step), optimizer, mesh)
        losses.append(loss)
        norms.append(norm)
    state = model.state_dict() if mesh is None else full_state(model)
    return losses, norms, state


def take_step(
    model: LanguageModel, batches: list[Batch], optimizer: torch.optim.Optimizer, mesh: DeviceMesh | None
) -> tuple[float, float]:
    """One step over micro-batches; each reader takes its share of them. The mean is over tokens, wherever they are."""
    if mesh is not None:
        batches = batches[reader(mesh) :: num_readers(mesh)]
    count = torch.stack([(labels != IGNORED).sum() for _, labels in batches]).sum().double()
    count = count if mesh is None else sum_over_readers(count, mesh)
    total = torch.zeros((), dtype=torch.float64)
    for i, (inputs, labels) in enumerate(batches):
        if mesh is not None:
            inputs, labels = match_images(inputs, labels, model.config, mesh)
        sync_gradients(model, i == len(batches) - 1)
        loss = loss_of(model, inputs, labels) / count
        if loss.requires_grad:
            loss.backward()
        total += loss.detach()
    learnt = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if mesh is None:
        norm = torch.nn.utils.clip_grad_norm_(learnt, 1.0)
    else:
        norm, total = clip_gradients(learnt, 1.0, mesh), sum_over_readers(total, mesh)
    optimizer.step()
    optimizer.zero_grad()
    return float(total), float(norm)


def loss_of(model: LanguageModel, inputs: ModelInputs, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)


def assert_same_run(got: Any, wanted: Any, tolerance: float = 1e-9) -> None:
    for ours, theirs in zip(got[:2], wanted[:2], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=tolerance, atol=tolerance)
    assert got[2].keys() == wanted[2].keys()
    for key, value in wanted[2].items():
        torch.testing.assert_close(got[2][key], value.detach(), rtol=0, atol=100 * tolerance, msg=key)
