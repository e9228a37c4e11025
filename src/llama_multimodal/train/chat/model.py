"""The model of a fine-tuning run: a base, what of it learns, and in which dtypes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ... import ops
from ...adapters.layers import LoraLinear
from ...adapters.lora import apply_lora
from ...errors import ConfigError
from ...loading import load, pick_device
from ...models import LanguageModel
from ...models.layers import Linear
from ...ops.linear import cpu_multiplies
from ...processing.processor import Processor
from ...quant.nf4 import Nf4Config, quantize_nf4
from ..launch import local_rank
from ..recompute import recompute_blocks
from .parts import freeze
from .recipe import ChatRecipe

_AT_ONCE = 1024  # tokens whose logits a head of another kind gives at a time
_COMPARED_AT_ONCE = 256  # tokens whose logits exist twice


def device_of(recipe: ChatRecipe) -> torch.device:
    """Where a process of the run computes.

    Raises:
        DeviceError: the recipe's device is not there.
    """
    if recipe.device != "auto":
        return pick_device(recipe.device)
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def load_base(recipe: ChatRecipe, device: torch.device) -> tuple[LanguageModel, Processor]:
    """The base model: as its checkpoint has it where all of it may learn, else in the dtype that it computes in."""
    if recipe.method == "full":
        return load(recipe.model, device=device)
    packs = recipe.method == "qlora"
    # Through the machine's memory: a GPU for which the 4-bit weights are right may not hold the plain ones.
    model, processor = load(recipe.model, dtype=recipe.dtype, device="cpu" if packs else device)
    if packs:
        quantize_nf4(model, Nf4Config(compute_dtype=recipe.dtype), device)
    return model, processor


def make_trainable(model: LanguageModel, recipe: ChatRecipe, frozen: torch.dtype) -> LanguageModel:
    """Choose what learns; it is held in float32 while the rest stays in the dtype of products. Works without weights
    too.

    frozen: the dtype of what `full` leaves alone

    Raises:
        ConfigError: a target or a part that this model does not have.
    """
    if recipe.method == "full":
        freeze(model, recipe.freeze)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)
    else:
        apply_lora(model, recipe.lora)
    if recipe.recompute:
        recompute_blocks(model)
    return model


def product_dtype(recipe: ChatRecipe, device: torch.device) -> torch.dtype:
    """The dtype of products: the recipe's, unless this CPU would only emulate it."""
    kind: torch.dtype = getattr(torch, recipe.dtype)
    return torch.float32 if device.type == "cpu" and kind == torch.bfloat16 and not cpu_multiplies(kind) else kind


def summed_loss(model: LanguageModel, hidden: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The cross-entropy of tokens [T, E] with labels [T], added up; without the logits of all of them at once."""
    head = model.decoder.lm_head
    if type(head) is Linear:
        weight = head.weight[: model.config.text.vocab_size]
        return ops.linear_cross_entropy(hidden.to(dtype), weight.to(dtype), labels, reduction="sum")
    total = hidden.new_zeros((), dtype=torch.float32)
    for some, wanted in zip(hidden.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True):  # packed, or with an adapter
        logits = head(some)[:, : model.config.text.vocab_size].float()
        total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return total


def summed_drift(model: LanguageModel, hidden: Tensor, before: Tensor, temperature: float) -> Tensor:
    """T² · KL(before ‖ now) of the predictions at temperature T, added up over tokens.

    hidden, before: [T, E], what the head reads with the adapter, and without any. Logits are made again in the backward
    pass, so that those of a few tokens exist at a time.
    """
    head, vocab = model.decoder.lm_head, model.config.text.vocab_size
    plain = head.base if isinstance(head, LoraLinear) else head

    def of(now: Tensor, was: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = (plain(was)[:, :vocab].float() / temperature).log_softmax(-1)
        found = (head(now)[:, :vocab].float() / temperature).log_softmax(-1)
        return F.kl_div(found, wanted, log_target=True, reduction="sum") * temperature**2

    total = hidden.new_zeros((), dtype=torch.float32)
    for now, was in zip(hidden.split(_COMPARED_AT_ONCE), before.split(_COMPARED_AT_ONCE), strict=True):
        total = total + checkpoint(of, now, was, use_reentrant=False)
    return total


def check_processor(processor: Processor, model: str) -> Processor:
    """Raises:
    ConfigError: the base model has no tokenizer.
    """
    if processor.tokenizer is None:
        raise ConfigError(
            f"{model} has no tokenizer, and conversations need one; put the model's own next to its weights"
        )
    return processor
