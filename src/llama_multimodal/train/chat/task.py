"""Fine-tuning on conversations as a task: the mean cross-entropy of all answer tokens of a step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...adapters.layers import Lora, LowRank
from ...adapters.lora import use_adapter
from ...adapters.peft_format import save_adapter
from ...errors import TrainingError
from ...loading import save
from ...models import LanguageModel, VisionLanguageModel
from ...models.mllama_vision import TiledVisionEncoder
from ...processing.processor import Processor
from ...weights.checkpoint import parameter_shapes
from ..loader import ahead
from ..optim import build_optimizers, scheduled
from ..parallel import Group
from ..task import Task, sums, trained
from ..tile_tables import share_between_ratios, share_gradients
from .batches import ChatBatches, MicroBatch, alike, micro_batches
from .evaluation import Evaluation
from .flops import Work
from .in_parts import add_method, give_memory, load_parts, reshard, unread
from .model import check_processor, device_of, load_base, make_trainable, product_dtype, summed_drift, summed_loss
from .parts import part_of
from .recipe import RELIEF, ChatRecipe
from .skips import SkipLog
from .steps import ChatSteps

_LOSS = "summed_answer_loss"


class ChatTask(Task[MicroBatch]):
    """A base model, an adapter or all of its weights, and the recipe's conversations."""

    num_sums = 2  # the loss, and how far the predictions of what is distilled are from the base's
    relief = RELIEF

    def __init__(self, recipe: ChatRecipe, group: Group) -> None:
        self.recipe: ChatRecipe = recipe
        self.group = group
        self.device = device_of(recipe)
        self.dtype = product_dtype(recipe, self.device)
        self.model, self.processor, self.stored = self._built()
        self.averaged = self.model
        self.modules = self.model
        if group.sharded:
            add_method(self.model, _LOSS, self._loss_of)
        self.work_of = Work.of(self.model.config, parameter_shapes(self.model.config), trained(self.model))

    @cached_property
    def dataset(self) -> ChatBatches:
        recipe, group = self.recipe, self.group
        steps = ChatSteps(recipe.data, self.processor, recipe.batch.rows, group.rank, group.size)
        steps.require_usable()
        return ChatBatches(steps, recipe.batch, self.model.config)

    @cached_property
    def evaluation(self) -> Evaluation | None:
        return Evaluation.of(self.recipe, self.processor, self.group)

    def open_data(self) -> None:
        _ = self.dataset, self.evaluation

    def _built(self) -> tuple[LanguageModel, Processor, torch.dtype]:
        """What is trained, or this process's part of it; and the dtype of the checkpoint."""
        recipe = self.recipe
        if self.group.cuts:
            model, processor, stored = load_parts(recipe, self.group, self.device)
        else:
            model, processor = load_base(recipe, self.device)
            stored = model.dtype
            torch.manual_seed(recipe.seed)
            model = make_trainable(model, recipe, self.dtype)
            if self.device.type == "meta":  # of what it is to export, and no more
                whole = recipe.method == "full"
                for part in [model] if whole else [pair for pair in model.modules() if isinstance(pair, LowRank)]:
                    give_memory(part, torch.device("cpu"))
        if (vision := _tiled(model)) is not None:
            share_between_ratios(vision)
        return model.train(), check_processor(processor, recipe.model), stored

    def optimizers(self) -> list[torch.optim.Optimizer]:
        text = self.model.config.text
        return build_optimizers(trained(self.model), self.recipe.optim, lambda name: part_of(name, text))

    def learning_rate(self, step: int) -> float:
        return scheduled(self.recipe.optim.learning_rate, step, self.recipe.steps, self.recipe.optim)

    def batches(self, first: int) -> Iterator[list[MicroBatch]]:
        data, rank = self.recipe.data, self.group.rank
        file = Path(self.recipe.output) / (f"skipped-{rank}.jsonl" if rank else "skipped.jsonl")
        if not self.group.speaks:
            file = Path(os.devnull)
        read = first * len(range(rank, self.recipe.batch.rows, self.group.size))
        log = SkipLog(file, data.max_skipped, self.dataset.steps.rows_per_epoch, step=first, read=read)
        for step, found in enumerate(ahead(self.dataset, first, self.recipe.steps, data.workers), start=first):
            log.add(step, found)
            yield alike(found.micro, self.model.config, self.group)

    def totals(self, micro: Sequence[MicroBatch]) -> Tensor:
        counted = [(int(m.answers.sum()), int(m.distilled.sum())) for m in micro]
        return torch.tensor([sum(counts) for counts in zip(*counted, strict=True)] or [0, 0], dtype=torch.float64)

    def check(self, totals: Sequence[float], micro: Sequence[MicroBatch], step: int) -> None:
        if totals[0] == 0:
            rows = ", ".join(row for m in micro for row in m.rows[:3]) or "all of them were skipped"
            raise TrainingError(
                f"step {step + 1} has no token to learn: every label of its rows is masked ({rows});"
                " each conversation needs an assistant's message"
            )

    def loss(self, micro: MicroBatch, totals: Sequence[float], step: int) -> tuple[Tensor | None, Tensor]:
        learnt, drift = self.summed(micro)
        total = learnt + self.recipe.distillation.weight * drift
        return total / totals[0], sums(total, drift)

    def summed(self, micro: MicroBatch) -> Tensor:
        """[2]: the cross-entropy of a micro-batch's learnt tokens, added up, and how far the predictions of the
        distilled ones are from the base's."""
        if not self.group.sharded:
            return self._loss_of(self.model, micro)
        summed: Tensor = getattr(self.model, _LOSS)(micro)  # it reads the head's weight
        return summed

    def _loss_of(self, model: LanguageModel, micro: MicroBatch) -> Tensor:
        before = None
        if micro.base is not None:
            with torch.no_grad(), use_adapter(model, None):
                before = model.hidden(micro.base.inputs)[micro.base.answers.to(self.device)]
        with self._product():
            hidden = model.hidden(micro.inputs)
        learnt = micro.learnt
        total = summed_loss(model, hidden[learnt.to(self.device)], micro.labels[learnt].to(self.device), self.dtype)
        drift = torch.zeros_like(total)
        if before is not None:
            now = hidden[micro.distilled.to(self.device)]
            drift = summed_drift(model, now, before, self.recipe.distillation.temperature)
        return torch.stack((total + unread(model) if micro.before_pictures else total, drift))

    def _product(self) -> AbstractContextManager[object]:
        """Weights that are held in float32 multiply in the recipe's dtype; a frozen base has it already, and sharded
        weights are gathered in it."""
        if self.recipe.method != "full" or self.dtype == torch.float32 or self.group.sharded:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def measures(self, sums: Sequence[float], totals: Sequence[float], step: int) -> dict[str, float]:
        found = {"loss": sums[0] / totals[0], "learnt_tokens": totals[0]}
        return found | {"drift": sums[1] / totals[1]} if totals[1] else found

    def work(self, micro: Sequence[MicroBatch], step: int) -> dict[str, float]:
        work, base = self.work_of, [m.base for m in micro if m.base is not None]
        return {
            "tokens": sum(sum(m.lengths) for m in micro),
            "images": sum(m.num_images for m in micro),
            "flops": sum(work.of_batch(m.inputs, m.lengths, int(m.answers.sum())) for m in micro)
            + sum(work.of_reading(m.inputs, m.lengths, int(m.answers.sum())) for m in base),
        }

    def rows(self, micro: MicroBatch) -> list[str]:
        return list(micro.rows)

    def evaluates(self, step: int) -> bool:
        every = self.recipe.evaluate.every
        return self.evaluation is not None and ((step + 1) % every == 0 or step + 1 == self.recipe.steps)

    def evaluate(self, step: int) -> dict[str, float]:
        assert self.evaluation is not None
        batches = list(micro_batches(self.evaluation.examples, self.recipe.batch, self.model.config))
        batches = alike(batches, self.model.config, self.group)
        with self._as_it_answers():
            pairs = [(float(self.summed(m)[0]), float(m.answers.sum())) for m in batches]
            scores = self.evaluation.answers(self.model, step + 1)
        lost, count = self.group.sum(torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).sum(0))
        return {"eval_loss": lost / max(count, 1.0), **scores}

    @contextmanager
    def _as_it_answers(self) -> Iterator[None]:
        """The model without dropout, and all of it in the dtype of its products, as it will be saved and loaded; in
        which sharded weights are gathered anyway."""
        ours = trained(self.model) if self.recipe.method == "full" and not self.group.sharded else {}
        kept = {name: parameter.data for name, parameter in ours.items()}
        self.model.eval()
        for module in self.model.modules():
            if isinstance(module, Lora):
                module.forget()
        try:
            for parameter in ours.values():
                parameter.data = parameter.data.to(self.dtype)
            with torch.no_grad():
                yield
        finally:
            for name, parameter in ours.items():
                parameter.data = kept[name]
            reshard(self.model)
            self.model.train()

    def share_gradients(self) -> None:
        if not self.group.sharded:
            return
        reshard(self.model)  # a step in which nothing needed gradients has left them gathered
        if (vision := _tiled(self.model)) is not None:
            share_gradients(vision)

    def export(self, folder: Path, weights: Mapping[str, Tensor] | None) -> Path:
        with torch.no_grad():
            for name, parameter in trained(self.model).items() if weights is not None else ():
                parameter.copy_((weights or {})[name])
        self.model.eval()
        if self.recipe.method != "full":
            save_adapter(self.model, folder / "adapter", base_model=self.recipe.model)
            return folder / "adapter"
        save(self.model.to(self.stored), self.processor, folder / "model")
        return folder / "model"


def _tiled(model: LanguageModel) -> TiledVisionEncoder | None:
    """Llama 3.2 Vision's encoder, where the model has it."""
    vision = model.vision if isinstance(model, VisionLanguageModel) else None
    return vision if isinstance(vision, TiledVisionEncoder) else None
