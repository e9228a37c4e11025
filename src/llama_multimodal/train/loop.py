"""The training loop: render, forward, backward, step; resumable at every saved step."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..models import VisionLanguageModel
from ..processing.tokenizer import Tokenizer
from ..zoo.tokenizer import build_tokenizer
from ..zoo.world import corpus
from .auxiliary import AuxiliaryHeads
from .checkpoint import load_state, save_state
from .config import OptimConfig, Recipe
from .data import IGNORED, MicroBatch, WorldSteps, batches

_OPEN_GATE = 1.0  # tanh(1) = 0.76: a fresh model reads its pictures from the first step


@dataclass(frozen=True)
class Progress:
    """What one step did. Losses are means over what was counted in the step."""

    step: int
    answer_loss: float
    auxiliary_loss: float
    token_accuracy: float
    samples_per_second: float


def prepare(recipe: Recipe) -> tuple[ModelConfig, Tokenizer, Path]:
    """The model's configuration with its tokenizer's ids, the tokenizer, and where its file lies."""
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tokenizer.json"
    if not file.exists():
        build_tokenizer(corpus(60_000, recipe.seed), recipe.vocabulary_words).save(str(file))
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


def initialise(model: VisionLanguageModel) -> None:
    """Fresh weights: small normal matrices, residual branches scaled by depth, open gates."""
    depth = model.config.text.num_hidden_layers
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            nn.init.constant_(parameter, _OPEN_GATE)
        elif parameter.ndim == 2 and "embedding" not in name:
            std = parameter.shape[1] ** -0.5
            residual = name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight"))
            nn.init.normal_(parameter, std=std / (2 * depth) ** 0.5 if residual else std)
    nn.init.normal_(model.vision.patch_embedding.weight, std=model.vision.patch_embedding.in_features**-0.5)
    nn.init.normal_(model.decoder.embedding.weight, std=0.5)
    vision = model.vision
    for table in (vision.tile_position_embedding, vision.pre_tile_embedding, vision.post_tile_embedding):
        used = torch.zeros(table.shape[:2])
        for ratio_id, (rows, columns) in enumerate(model.config.vision.aspect_ratios, start=1):
            used[ratio_id, : rows * columns] = 1
        used = used.reshape(*used.shape, *[1] * (table.ndim - 2))
        # Unused tiles carry no embedding in Meta's layout; without a gradient they stay at zero.
        table.register_hook(lambda gradient, used=used: gradient * used)


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    warm = min(1.0, (step + 1) / optim.warmup_steps)
    decay = min(1.0, (steps - step) / max(1, optim.decay_steps))
    return optim.learning_rate * warm * decay


def train(recipe: Recipe, report: Callable[[Progress], None]) -> Path:
    """Run a recipe to its last step, from its last saved step if there is one; returns the run's folder."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    config, tokenizer, _ = prepare(recipe)
    folder = Path(recipe.output)
    model, heads = VisionLanguageModel(config), AuxiliaryHeads(config.vision)
    initialise(model)
    modules = nn.ModuleDict({"model": model, "heads": heads})
    optimizer = _optimizer(modules, recipe.optim)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    state_file, first = folder / "state.pt", 0
    state = load_state(state_file)
    if state is not None:
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
    dataset = WorldSteps(recipe.data, config, tokenizer, recipe.steps)
    started = time.perf_counter()
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as log:
        for step, micro in enumerate(batches(dataset, first, recipe.data.workers), start=first):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe.steps, recipe.optim)
            answer, auxiliary, accuracy = _step(model, heads, micro, step < recipe.vision_steps, recipe)
            nn.utils.clip_grad_norm_(modules.parameters(), recipe.optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _update_average(average, model, min(recipe.optim.ema_decay, (step + 1) / (step + 10)))
            now = time.perf_counter()
            progress = Progress(step + 1, answer, auxiliary, accuracy, recipe.data.samples_per_step / (now - started))
            started = now
            log.write(json.dumps(dataclasses.asdict(progress)) + "\n")
            report(progress)
            if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
                log.flush()
                save_state(
                    state_file,
                    {
                        "modules": modules.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "average": average,
                        "step": step + 1,
                    },
                )
    return folder


def averaged_model(recipe: Recipe) -> tuple[VisionLanguageModel, Tokenizer, Path]:
    """The averaged weights of a run as a model, its tokenizer, and the tokenizer's file."""
    config, tokenizer, file = prepare(recipe)
    model = VisionLanguageModel(config).eval()
    state = load_state(Path(recipe.output) / "state.pt")
    if state is None:
        from ..errors import CheckpointError

        raise CheckpointError(f"{recipe.output} holds no saved run; train it first")
    model.load_state_dict(state["average"])
    return model, tokenizer, file


def _optimizer(modules: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Matrices decay; norms, biases, gates and embeddings of places do not."""
    decayed, kept = [], []
    for parameter in modules.parameters():
        (decayed if parameter.ndim == 2 else kept).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), fused=True)


def _step(
    model: VisionLanguageModel, heads: AuxiliaryHeads, micro: list[MicroBatch], vision_only: bool, recipe: Recipe
) -> tuple[float, float, float]:
    """Accumulate the gradients of one step; mean answer loss, auxiliary loss and token accuracy."""
    answers = max(1, sum(int((m.labels != IGNORED).sum()) for m in micro))
    pictures = max(1, sum(len(m.inputs.images) for m in micro))
    answer_sum = auxiliary_sum = right = 0.0
    for batch in micro:
        share = len(batch.inputs.images) / pictures
        losses: list[Tensor] = []
        cross_cache = None
        if batch.inputs.images:
            features = model.vision(batch.inputs.tiles, batch.inputs.images, deduplicate=True)
            auxiliary = heads(features, batch.inputs.images, batch.targets)
            losses.append(recipe.auxiliary_weight * share * auxiliary)
            auxiliary_sum += share * float(auxiliary.detach())
        if not vision_only:
            if batch.inputs.images:
                cross_cache = model.cross_attention_cache(batch.inputs, features=features)
            logits = model(batch.inputs, cross_cache=cross_cache).logits
            learnt = batch.labels != IGNORED
            chosen, labels = logits[learnt], batch.labels[learnt]
            loss = F.cross_entropy(chosen, labels, reduction="sum")
            losses.append(loss / answers)
            answer_sum += float(loss.detach())
            right += int((chosen.argmax(-1) == labels).sum())
        if losses:
            torch.stack(losses).sum().backward()
    return answer_sum / answers, auxiliary_sum, right / answers


@torch.no_grad()
def _update_average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, value in model.named_parameters():
        average[name].lerp_(value, 1 - decay)


def lines(folder: Path) -> Iterator[Progress]:
    """A run's metrics, one entry a step; a step that was run twice after a resume counts once, the later time."""
    seen: dict[int, Progress] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        progress = Progress(**json.loads(line))
        seen[progress.step] = progress
    yield from (seen[step] for step in sorted(seen))
