"""The embedded model's training as a task: answers, and what auxiliary heads are asked of the encoder's state."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import ModelConfig
from ...errors import ConfigError
from ...loading import load, locate
from ...models import VisionLanguageModel
from ...models.mllama_vision import TiledVisionEncoder
from ...ops.linear import cpu_multiplies
from ...processing.tokenizer import Tokenizer
from ...weights.save import save_checkpoint
from ...zoo.tokenizer import build_tokenizer
from ...zoo.world import corpus
from .. import checkpoint
from ..loader import IGNORED, ahead
from ..optim import build_optimizers, scheduled
from ..parallel import Group
from ..task import Task, sums, trained
from ..tile_tables import share_between_ratios
from .auxiliary import AuxiliaryHeads, middle_block
from .config import WorldRecipe
from .data import MicroBatch, WorldSteps
from .initial import initialise

_INITIAL_STEPS = 4  # whose pictures the patch embedding starts from


def prepare(recipe: WorldRecipe) -> tuple[ModelConfig, Tokenizer, Path]:
    """The model's configuration with its tokenizer's ids, the tokenizer, and where its file lies.

    A run that starts from a model takes its tokenizer, or the embeddings would belong to other words.
    """
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tokenizer.json"
    if not file.exists() and recipe.start_from is not None:
        shutil.copyfile(locate(recipe.start_from) / "tokenizer.json", file)
    elif not file.exists():
        build_tokenizer(corpus(recipe.vocabulary_samples, recipe.seed), recipe.vocabulary_words).save(str(file))
    tokenizer = Tokenizer.from_json(file)
    image = tokenizer.special("<|image|>")
    text = dataclasses.replace(
        recipe.text,
        vocab_size=image,
        bos_token_id=tokenizer.special("<|begin_of_text|>"),
        eos_token_ids=tuple(tokenizer.special(f"<|{name}|>") for name in ("end_of_text", "eom_id", "eot_id")),
        pad_token_id=tokenizer.special("<|finetune_right_pad_id|>"),
    )
    return ModelConfig(recipe.vision, text, image), tokenizer, file


def learning_rate(step: int, recipe: WorldRecipe) -> float:
    optim, peak = recipe.optim, recipe.optim.learning_rate
    if step >= recipe.vision_steps and optim.decoder_learning_rate is not None:
        peak = optim.decoder_learning_rate
    return scheduled(peak, step, recipe.steps, optim)


class WorldTask(Task[MicroBatch]):
    """A fresh model (or one that a run starts from) and its auxiliary heads, on rendered pictures; on the CPU."""

    num_sums = 3
    relief = "lower data.tokens_per_microbatch"

    def __init__(self, recipe: WorldRecipe, group: Group) -> None:
        self.recipe: WorldRecipe = recipe
        self.device = torch.device("cpu")
        self.config, self.tokenizer, self.tokenizer_file = prepare(recipe)
        self.model, self.heads = VisionLanguageModel(self.config), AuxiliaryHeads(self.config)
        self.modules = nn.ModuleDict({"model": self.model, "heads": self.heads})
        self.averaged = self.model
        self.dataset = WorldSteps(recipe, self.config, self.tokenizer, group.rank, group.size)
        if not checkpoint.saved_steps(recipe.checkpoints):
            self._begin()
        assert isinstance(self.model.vision, TiledVisionEncoder)
        share_between_ratios(self.model.vision)
        narrow = recipe.dtype == "bfloat16" and cpu_multiplies(torch.bfloat16)
        self.product = torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow)

    def _begin(self) -> None:
        if self.recipe.start_from is not None:
            _copy_weights(self.recipe.start_from, self.model)
            return
        pictures = WorldSteps(self.recipe, self.config, self.tokenizer)
        initialise(self.model, torch.cat([m.inputs.tiles for step in range(_INITIAL_STEPS) for m in pictures[step]]))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(trained(self.modules), self.recipe.optim)

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.recipe)

    def batches(self, first: int) -> Iterator[list[MicroBatch]]:
        return ahead(self.dataset, first, len(self.dataset), self.recipe.data.workers)

    def totals(self, micro: Sequence[MicroBatch]) -> Tensor:
        learnable = torch.stack([(m.labels != IGNORED).sum() for m in micro]).sum(0, keepdim=True)
        return torch.cat((learnable.double(), torch.stack([m.targets.weights() for m in micro]).sum(0)))

    def loss(self, micro: MicroBatch, totals: Sequence[float], step: int) -> tuple[Tensor | None, Tensor]:
        model, heads, inputs = self.model, self.heads, micro.inputs
        answers, weight = max(totals[0], 1.0), self.recipe.auxiliary_weight
        losses: list[Tensor] = []
        answer_loss = auxiliary_loss = right = torch.zeros((), dtype=torch.float64)
        learnt = micro.labels != IGNORED
        asked = step >= self.recipe.vision_steps and bool(learnt.any())
        middle: list[Tensor] = []
        hook = middle_block(model).register_forward_hook(lambda block, given, state: middle.append(state))
        with self.product:
            if inputs.images:
                features = model.vision(inputs.tiles, inputs.images, deduplicate=True)
            if asked:
                read = model.read_images(inputs, features=features) if inputs.images else None
                logits = model(inputs, images=read).logits
        hook.remove()
        if inputs.images:
            auxiliary = heads(features.float(), inputs.images, micro.targets, totals[1:])
            losses.append(weight * auxiliary)
            auxiliary_loss = auxiliary.detach().double()
        if asked:
            chosen, labels = logits[learnt].float(), micro.labels[learnt]
            answer_loss = F.cross_entropy(chosen, labels, reduction="sum")
            losses.append(answer_loss / answers)
            if len(micro.targets.mentions):
                found = heads.places(middle.pop().float(), micro.targets, totals[1:])
                losses.append(weight * found)
                auxiliary_loss = auxiliary_loss + found.detach().double()
            right = (chosen.argmax(-1) == labels).sum()
        return torch.stack(losses).sum() if losses else None, sums(answer_loss, auxiliary_loss, right)

    def measures(self, sums: Sequence[float], totals: Sequence[float], step: int) -> dict[str, float]:
        answers = max(totals[0], 1.0)
        return {"answer_loss": sums[0] / answers, "auxiliary_loss": sums[1], "token_accuracy": sums[2] / answers}

    def work(self, micro: Sequence[MicroBatch], step: int) -> dict[str, float]:
        return {"samples": sum(m.inputs.num_rows for m in micro)}

    def rows(self, micro: MicroBatch) -> list[str]:
        return [f"{i + 1} of {micro.inputs.num_rows}" for i in range(micro.inputs.num_rows)]

    def export(self, folder: Path, weights: Mapping[str, Tensor] | None) -> Path:
        if weights is not None:
            self.model.load_state_dict(weights)
        target = folder / "model"
        save_checkpoint(self.model.to(torch.bfloat16), target, tokenizer_from=self.tokenizer_file.parent)
        return target


def _copy_weights(source: str, model: VisionLanguageModel) -> None:
    """Start from a saved model's weights.

    Raises:
        ConfigError: its shape is not the recipe's.
    """
    started, _ = load(source, dtype=torch.float32)
    if not isinstance(started, VisionLanguageModel):
        raise ConfigError(f"start_from: {source} reads text only, and the recipe's model has a vision encoder")
    for section in ("vision", "text"):
        ours, theirs = (dataclasses.asdict(getattr(m.config, section)) for m in (model, started))
        if differing := [key for key in ours if ours[key] != theirs[key]]:
            raise ConfigError(
                f"start_from: {source} differs from the recipe in {section}.{differing[0]}"
                f" ({theirs[differing[0]]}, not {ours[differing[0]]}); make them equal or leave start_from out"
            )
    model.load_state_dict(started.state_dict())
