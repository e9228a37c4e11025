"""The training loop: render, forward, backward, step; resumable at every saved step."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..loading import load, locate
from ..models import VisionLanguageModel
from ..models.mllama_vision import TiledVisionEncoder
from ..ops.linear import cpu_multiplies
from ..processing.tokenizer import Tokenizer
from ..zoo.tokenizer import build_tokenizer
from ..zoo.world import corpus
from .auxiliary import AuxiliaryHeads, middle_block
from .checkpoint import load_state, save_state
from .config import OptimConfig, Recipe
from .data import IGNORED, MicroBatch, WorldSteps, batches
from .initial import initialise, share_between_ratios
from .muon import Muon

_INITIAL_STEPS = 4  # whose pictures the patch embedding starts from


@dataclass(frozen=True)
class Progress:
    """What one step did. Losses are means over what was counted in the step."""

    step: int
    answer_loss: float
    auxiliary_loss: float
    token_accuracy: float
    samples_per_second: float


def prepare(recipe: Recipe) -> tuple[ModelConfig, Tokenizer, Path]:
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


def learning_rate(step: int, recipe: Recipe) -> float:
    optim = recipe.optim
    peak = optim.learning_rate
    if step >= recipe.vision_steps and optim.decoder_learning_rate is not None:
        peak = optim.decoder_learning_rate
    warm = min(1.0, (step + 1) / optim.warmup_steps)
    decay = min(1.0, (recipe.steps - step) / max(1, optim.decay_steps))
    return peak * warm * decay


def train(recipe: Recipe, report: Callable[[Progress], None]) -> Path:
    """Run a recipe to its last step, from its last saved step if there is one; returns the run's folder."""
    prepare(recipe)  # the tokenizer is made once, before the processes start
    if recipe.processes == 1:
        _run(0, recipe, report, None)
    else:
        context = torch.multiprocessing.get_context("spawn")
        progress = context.SimpleQueue()
        meeting = Path(recipe.output) / "rendezvous"
        meeting.unlink(missing_ok=True)
        workers = torch.multiprocessing.spawn(
            _worker, args=(recipe, progress, str(meeting.resolve())), nprocs=recipe.processes, join=False
        )
        try:
            while not workers.join(timeout=0.2):
                while not progress.empty():
                    report(progress.get())
        finally:
            for process in workers.processes:
                process.terminate()
        while not progress.empty():
            report(progress.get())
    return Path(recipe.output)


def _worker(rank: int, recipe: Recipe, progress: Any, meeting: str) -> None:
    """One process of a data-parallel run."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=recipe.processes)
    try:
        _run(rank, recipe, progress.put, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _run(rank: int, recipe: Recipe, report: Callable[[Progress], None], group: Any) -> None:
    """The loop of one process; rank 0 logs, reports and saves."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    config, tokenizer, _ = prepare(recipe)
    folder = Path(recipe.output)
    model, heads = VisionLanguageModel(config), AuxiliaryHeads(config)
    state_file, first = folder / "state.pt", 0
    state = load_state(state_file)
    if state is None and recipe.start_from is not None:
        _copy_weights(recipe.start_from, model)
    elif state is None:
        pictures = WorldSteps(recipe, config, tokenizer)
        initialise(model, torch.cat([m.inputs.tiles for step in range(_INITIAL_STEPS) for m in pictures[step]]))
    assert isinstance(model.vision, TiledVisionEncoder)
    share_between_ratios(model.vision)
    modules = nn.ModuleDict({"model": model, "heads": heads})
    optimizers = _optimizers(modules, recipe.optim)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    if state is not None:
        modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        average, first = state["average"], state["step"]
    dataset = WorldSteps(recipe, config, tokenizer, rank, recipe.processes)
    started = time.perf_counter()
    for step, micro in enumerate(batches(dataset, first, recipe.data.workers), start=first):
        for settings in (group for optimizer in optimizers for group in optimizer.param_groups):
            settings["lr"] = learning_rate(step, recipe)
        answer, auxiliary, accuracy = _step(model, heads, micro, step < recipe.vision_steps, recipe, group)
        nn.utils.clip_grad_norm_(modules.parameters(), recipe.optim.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
        modules.zero_grad(set_to_none=True)
        if rank > 0:
            continue
        _update_average(average, model, min(recipe.optim.ema_decay, (step + 1) / (step + 10)))
        now = time.perf_counter()
        progress = Progress(step + 1, answer, auxiliary, accuracy, dataset.count(step) / (now - started))
        started = now
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(dataclasses.asdict(progress)) + "\n")
        report(progress)
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            state = {"modules": modules.state_dict(), "average": average, "step": step + 1}
            save_state(state_file, {**state, "optimizers": [optimizer.state_dict() for optimizer in optimizers]})


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


def averaged_model(recipe: Recipe) -> tuple[VisionLanguageModel, Tokenizer, Path]:
    """The averaged weights of a run as a model, its tokenizer, and the tokenizer's file."""
    state = load_state(Path(recipe.output) / "state.pt")
    if state is None:
        raise CheckpointError(f"{recipe.output} holds no saved run; train it first")
    config, tokenizer, file = prepare(recipe)
    model = VisionLanguageModel(config).eval()
    model.load_state_dict(state["average"])
    return model, tokenizer, file


def _optimizers(modules: nn.Module, optim: OptimConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for the rest, of which only matrices decay."""
    blocks: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in modules.named_parameters():
        group = kept if parameter.ndim != 2 else blocks if "layers." in name else decayed
        group.append(parameter)
    settings: dict[str, Any] = {"lr": optim.learning_rate, "weight_decay": optim.weight_decay}
    others: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return [
        Muon(blocks, **settings),
        torch.optim.AdamW(others, betas=(optim.beta1, optim.beta2), fused=True, **settings),
    ]


def _step(
    model: VisionLanguageModel,
    heads: AuxiliaryHeads,
    micro: list[MicroBatch],
    vision_only: bool,
    recipe: Recipe,
    group: Any = None,
) -> tuple[float, float, float]:
    """Accumulate the gradients of one step over every process; mean answer loss, auxiliary loss and accuracy."""
    learnable = torch.stack([(m.labels != IGNORED).sum() for m in micro]).sum(0, keepdim=True)
    weights = torch.stack([m.targets.weights() for m in micro]).sum(0)
    answers, *totals = _summed(torch.cat((learnable.double(), weights)), group)
    answers = max(answers, 1.0)
    answer_sum = auxiliary_sum = right = 0.0
    narrow = recipe.dtype == "bfloat16" and cpu_multiplies(torch.bfloat16)
    product = torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow)
    middle: list[Tensor] = []
    hook = middle_block(model).register_forward_hook(lambda block, given, state: middle.append(state))
    for batch in micro:
        losses: list[Tensor] = []
        learnt = batch.labels != IGNORED
        asked = not vision_only and bool(learnt.any())
        with product:
            if batch.inputs.images:
                features = model.vision(batch.inputs.tiles, batch.inputs.images, deduplicate=True)
            if asked:
                read = None
                if batch.inputs.images:
                    read = model.read_images(batch.inputs, features=features)
                logits = model(batch.inputs, images=read).logits
        if batch.inputs.images:
            auxiliary = heads(features.float(), batch.inputs.images, batch.targets, totals)
            losses.append(recipe.auxiliary_weight * auxiliary)
            auxiliary_sum += float(auxiliary.detach())
        if asked:
            chosen, labels = logits[learnt].float(), batch.labels[learnt]
            loss = F.cross_entropy(chosen, labels, reduction="sum")
            losses.append(loss / answers)
            answer_sum += float(loss.detach())
            if len(batch.targets.mentions):
                found = heads.places(middle.pop().float(), batch.targets, totals)
                losses.append(recipe.auxiliary_weight * found)
                auxiliary_sum += float(found.detach())
            middle.clear()
            right += int((chosen.argmax(-1) == labels).sum())
        if losses:
            torch.stack(losses).sum().backward()
    hook.remove()
    if group is not None:
        _sum_gradients([*model.parameters(), *heads.parameters()], group)
    answer_sum, auxiliary_sum, right = _summed(torch.tensor([answer_sum, auxiliary_sum, right]).double(), group)
    return answer_sum / answers, auxiliary_sum, right / answers


def _summed(values: Tensor, group: Any) -> list[float]:
    if group is not None:
        dist.all_reduce(values, group=group)
    return values.tolist()


def _sum_gradients(parameters: list[nn.Parameter], group: Any) -> None:
    """Add every process's gradients in one exchange; a process without a picture adds zeros."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat, group=group)
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = gradient.view_as(parameter)


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
