"""`plan`: how much memory a model takes, part by part, before it is there.

Everything follows from the configuration and from how this package runs; nothing is measured and no weight is read.
Python, torch's libraries and a GPU's context come on top, and so does what an allocator loses between its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config import AnyModelConfig
from . import inference, training
from .options import PlanOptions, Workload, workload
from .parameters import Parameters, count_parameters, gated_projections


@dataclass(frozen=True)
class Part:
    """One thing in memory. bytes: at its most. at_peak: when most of everything is alive, so at most `bytes`."""

    name: str
    bytes: int
    at_peak: int
    what: str  # one line


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one GPU, or of the one machine. peak: when most is alive."""

    parts: tuple[Part, ...]
    peak: str
    parameters: int
    trained_parameters: int
    options: PlanOptions
    load: Workload

    @property
    def total(self) -> int:
        """What is alive at the peak."""
        return sum(part.at_peak for part in self.parts)

    def part(self, name: str) -> Part:
        """A part by its name; an empty one where the plan has none."""
        return next((part for part in self.parts if part.name == name), Part(name, 0, 0, ""))


@dataclass
class _Sheet:
    """What is always there, and what comes and goes, phase by phase."""

    always: dict[str, int] = field(default_factory=dict)
    phases: dict[str, dict[str, int]] = field(default_factory=dict)

    def parts(self, explained: dict[str, str]) -> tuple[tuple[Part, ...], str]:
        peak = max(self.phases, key=lambda phase: sum(self.phases[phase].values()))
        parts = []
        for name, what in explained.items():
            most = self.always.get(name, 0) + max(phase.get(name, 0) for phase in self.phases.values())
            there = self.always.get(name, 0) + self.phases[peak].get(name, 0)
            if most:
                parts.append(Part(name, most, there, what))
        return tuple(parts), peak


def plan(config: AnyModelConfig, options: PlanOptions | None = None) -> MemoryPlan:
    """The memory that a model takes on each GPU for answering, or for training.

    Raises:
        ConfigError: options that do not fit the model, or a part of it that was registered from outside.
    """
    options = options or PlanOptions()
    load = workload(config, options)
    parameters = count_parameters(config)
    if options.train is None:
        sheet, explained = _inference(config, parameters, options, load), _INFERENCE
    else:
        sheet, explained = _training(config, parameters, options, load), _TRAINING
    parts, peak = sheet.parts(explained)
    count = 0 if options.train is None else training.trained(config, parameters, options).parameters
    return MemoryPlan(parts, peak, parameters.total, count, options, load)


# --- weights ---------------------------------------------------------------------------------------------------------


def weights(config: AnyModelConfig, parameters: Parameters, options: PlanOptions, split: int = 1) -> int:
    """Bytes of a model's weights in their dtype, the decoder's packed where asked for.

    split: GPUs that share the matrices of the blocks and the projector
    """
    shared = parameters.matrices + parameters.vision_matrices + parameters.projector
    if options.pack is not None and options.pack.format == "nf4":
        small = parameters.matrices + parameters.vision_matrices
        return (parameters.total - small) * options.width + options.pack.num_bytes(small)
    if options.pack is None:
        return (parameters.total - shared + shared // split) * options.width
    head = parameters.lm_head
    if not head and not _shares_table(options):  # packed, it is a table of its own
        head = config.text.vocab_size * config.text.hidden_size
    matrices = parameters.matrices
    if options.pack.keep_cross_attention:
        matrices -= len(config.text.cross_attention_layers) * gated_projections(config.text)
    whole = parameters.total - matrices - parameters.lm_head
    packed = options.pack.num_bytes(matrices) + options.pack.num_bytes(head, lm_head=True)
    return whole * options.width + packed


def _shares_table(options: PlanOptions) -> bool:
    """Whether an LM head that is the embedding's table stays so when it is packed: on a GPU, where bf16 is not laid
    out anew."""
    assert options.pack is not None
    head = options.pack.lm_head or options.pack.format
    return head == options.dtype == "bf16" and options.device == "cuda"


def _pixels(options: PlanOptions, load: Workload) -> int:
    return inference.given_pixels(load) if options.device == "cpu" else 0


# --- answering -------------------------------------------------------------------------------------------------------

_INFERENCE = {
    "weights": "the model",
    "self-attention cache": "keys and values of every token of the context, for each self-attention layer",
    "cross-attention cache": "keys and values of the pictures' tokens, for each gated layer",
    "image embeddings": "what takes the place of the pictures' tokens in the prompt",
    "pixels": "the pictures' tiles in fp32, as they are given to the model",
    "vision activations": "one block of the encoder and the states that it hands on, or the projector",
    "text activations": "one block of the decoder over the whole prompts",
    "logits": "of one token a sequence",
}


def _inference(config: AnyModelConfig, parameters: Parameters, options: PlanOptions, load: Workload) -> _Sheet:
    text, given = config.text, (config, options, load)
    always = {
        "weights": weights(config, parameters, options, load.split),
        "self-attention cache": inference.self_cache(text, options, load),
        "pixels": _pixels(options, load),
    }
    cross = {"cross-attention cache": inference.cross_cache(*given)}
    embedded = {"image embeddings": inference.image_embeddings(*given)}
    phases = {
        "reading the prompt": {
            **cross, **embedded, "text activations": inference.prefill_peak(text, options, load),
        },
        "a step of the answer": {**cross, "logits": inference.decode_peak(text, options, load)},
    }  # fmt: skip
    if load.tiles:
        phases = {
            "encoding the pictures": {"vision activations": inference.vision_peak(*given)},
            "handing the pictures on": {
                **cross, **embedded, "vision activations": inference.projection_peak(*given),
            },
            **phases,
        }  # fmt: skip
    return _Sheet(always, phases)


# --- training --------------------------------------------------------------------------------------------------------

_TRAINING = {
    "weights": "the model; what is trained of it in fp32",
    "adapters": "LoRA's two matrices beside each of the layers it is for, in fp32",
    "copies": "of trained weights, in the dtype of the products",
    "gathered weights": "two blocks, embedding and LM head, whole while they are used, and their gradients",
    "averaged weights": "a copy of what is trained, in fp32",
    "optimizer": "two moments of each trained parameter",
    "gradients": "of each trained parameter, in fp32",
    "pixels": "the pictures' tiles in fp32, as they are given to the model",
    "vision activations": "what the encoder and the projector keep for the backward pass",
    "text activations": "what the decoder's blocks keep for the backward pass, and one that runs backward",
    "loss": "the last norm, a chunk of logits, and a trained LM head's gradient",
}


def _training(config: AnyModelConfig, parameters: Parameters, options: PlanOptions, load: Workload) -> _Sheet:
    shards = load.shards
    learnt = training.trained(config, parameters, options)
    base = weights(config, parameters, options)
    parts = weights(config, parameters, options, options.tensor)
    always = {"weights": parts, "optimizer": learnt.moments}
    if options.average:
        always["averaged weights"] = learnt.weights
    if options.train == "lora":
        always["adapters"] = learnt.weights
    else:
        always["weights"] = base + learnt.weights - learnt.parameters * options.width
        always = {name: size * parts // base for name, size in always.items()}
    always = {name: size // shards for name, size in always.items()}
    always["pixels"] = _pixels(options, load)
    if shards > 1:
        always["gathered weights"] = training.gathered(parameters, config.text, options)
    saved, backward = training.text_saved(config, options, load)
    pictures = training.vision_saved(config, options, load)
    loss = training.loss_peak(config, learnt, options, load)
    last = saved // config.text.num_hidden_layers  # of the decoder's block that runs backward last
    head, decoder = learnt.head_gradient // shards, learnt.decoder_gradients // shards
    earlier = learnt.gradients if options.accumulate else 0  # whole on each GPU, until they are exchanged
    phases = {
        "the loss": {"vision activations": pictures, "text activations": saved, "loss": loss, "gradients": earlier},
        "the start of the backward pass": {
            "vision activations": pictures, "text activations": saved + backward, "gradients": max(earlier, head),
        },
        "the backward pass between decoder and encoder": {
            "vision activations": pictures, "text activations": backward + last, "gradients": max(earlier, decoder),
        },
        "the end of the backward pass": {"gradients": max(earlier, learnt.gradients // shards)},
    }  # fmt: skip
    if load.tiles and (options.train == "lora" or "vision" in options.freeze):
        peak = inference.vision_peak(config, options, load)
        phases["encoding the pictures"] = {"vision activations": peak, "gradients": earlier}
    for phase in phases.values():  # sharded, they are gathered block by block
        phase["copies"] = learnt.copies if shards == 1 else 0
    return _Sheet(always, phases)
