"""What a plan is asked for, checked against a model's configuration."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, cast, get_args

from ..config import (
    CROSS_ATTENTION,
    AnyModelConfig,
    LanguageModelConfig,
    ModelConfig,
    TextConfig,
    TiledVisionConfig,
    nearest,
    spared,
)
from ..errors import ConfigError
from .parameters import block_shapes

DType = Literal["fp32", "bf16", "fp16"]
Bits = Literal["bf16", "int8", "int4", "nf4"]
Training = Literal["lora", "full"]
Optimizer = Literal["adamw", "adamw8bit"]
Device = Literal["cuda", "cpu"]

DTYPE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
PACKED_BITS: dict[str, int] = {"bf16": 16, "int8": 8, "int4": 4, "nf4": 4}
PARTS = ("vision", "projector", "self", "cross", "embedding", "lm_head")
TARGETS = ("self", "cross", "mlp", "projector", "vision")
USUAL_CONTEXT = 8192
_SCALE_BITS = 16  # of each group
_NF4_BLOCK, _NF4_SCALES = 64, 256  # values that share a scale of 8 bits, and scales that share one in fp32


@dataclass(frozen=True)
class Packed:
    """How the decoder's linear layers are packed (`quant.pack.Packing` has the same fields), or with nf4 those of the
    decoder's and the encoder's blocks (`quant.nf4.Nf4Config` as it is by default).

    format: bf16, int8, int4 or nf4. group: values of a row that share a scale in fp16; nf4 has its own. symmetric: no
    zero beside the scale. lm_head: the LM head's format; None takes `format`. keep_cross_attention: the projections of
    the gated blocks' attention stay as they are.
    """

    format: Bits
    group: int = 32
    symmetric: bool = True
    lm_head: Bits | None = None
    keep_cross_attention: bool = False

    def __post_init__(self) -> None:
        for name, value in (("pack", self.format), ("pack (LM head)", self.lm_head or self.format)):
            check_choice(name, value, get_args(Bits))
        if "nf4" in (self.format, self.lm_head) and self.lm_head is not None:
            raise ConfigError("nf4 leaves the LM head as it is; give no format for it")
        if self.group < 1:
            raise ConfigError(f"weights are packed in groups of at least 1, not {self.group}")

    @classmethod
    def recommended(cls, format: Bits, text: TextConfig) -> Packed:
        """As `load` and `quantize` pack unless they are told otherwise."""
        lm_head, keep = spared(format, text)
        return cls(format, lm_head=cast("Bits | None", lm_head), keep_cross_attention=CROSS_ATTENTION in keep)

    def num_bytes(self, values: int, *, lm_head: bool = False) -> int:
        """Of so many packed values, scales and zeros included."""
        if self.format == "nf4":
            scales = values // _NF4_BLOCK
            return values // 2 + scales + scales // _NF4_SCALES * DTYPE_BYTES["fp32"]
        bits = PACKED_BITS[(self.lm_head if lm_head else None) or self.format]
        grouped = 0 if bits == PACKED_BITS["bf16"] else _SCALE_BITS + 8 * (not self.symmetric)
        return values * bits // 8 + values // self.group * grouped // 8


@dataclass(frozen=True)
class PlanOptions:
    """What runs, and how.

    dtype: of weights that are not packed, of caches and activations
    context: tokens of a sequence, prompt and answer together; None: 8192, or all that the model has
    batch: sequences at a time; in training those of one micro-batch of one GPU
    packed: conversations that lie in one such sequence in training, each within the model's context
    prompt: tokens of a sequence that are read in one go; None: the whole context
    images: pictures of a sequence; None: one, and none for a model that reads text only
    tiles: of each picture; None: as many as the model cuts at most
    image_size: height and width of a tile in pixels, for encoders that take several; None: the usual
    pack: how the decoder's weights are packed; None: not at all
    train: None plans for answering; "lora" for adapters beside frozen weights, "full" for training every weight
    rank: of LoRA's adapters. targets: the layers that they lie beside: "self" and "cross" are the attentions of the
        decoder's two kinds of blocks, "mlp" the feed-forward layers of both, "vision" the layers of the encoder's
        blocks, and "projector" what maps its features
    gradient_checkpointing: blocks keep their input only and run again in the backward pass
    optimizer: adamw keeps two moments a parameter in fp32; adamw8bit a byte each
    freeze: parts that "full" leaves alone: vision, projector, self, cross, embedding, lm_head
    accumulate: gradients of earlier micro-batches of a step lie beside the activations
    average: a copy of what is trained follows it (an exponential moving average)
    tensor: GPUs that share the products of the blocks in training; what they keep for the backward pass counts whole
    gpus: answering divides heads, feed-forward widths and LM head (tensor parallelism); training divides weights,
        gradients and moments (fully sharded data parallelism)
    device: on "cuda" the kernels of `ops` spare some temporaries that torch's own arithmetic makes on "cpu"
    """

    dtype: DType = "bf16"
    context: int | None = None
    batch: int = 1
    packed: int = 1
    prompt: int | None = None
    images: int | None = None
    tiles: int | None = None
    image_size: tuple[int, int] | None = None
    pack: Packed | None = None
    train: Training | None = None
    rank: int = 16
    targets: tuple[str, ...] = ("self", "mlp")
    gradient_checkpointing: bool = False
    optimizer: Optimizer = "adamw"
    freeze: tuple[str, ...] = ()
    accumulate: bool = False
    average: bool = False
    tensor: int = 1
    gpus: int = 1
    device: Device = "cuda"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dtype", self.dtype, get_args(DType)),
            ("optimizer", self.optimizer, get_args(Optimizer)),
            ("device", self.device, get_args(Device)),
            *([("train", self.train, get_args(Training))] if self.train is not None else []),
        ):
            check_choice(name, value, known)
        for name in ("context", "batch", "packed", "prompt", "tiles", "rank", "tensor", "gpus"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be at least 1, not {number}")
        if self.images is not None and self.images < 0:
            raise ConfigError(f"images must be 0 or more, not {self.images}")
        if self.pack is not None and self.train == "full":
            raise ConfigError("packed weights are not trained; leave pack out, or train lora beside them")
        if self.train is None:
            for name in ("gradient_checkpointing", "accumulate", "average"):
                if getattr(self, name):
                    raise ConfigError(f"{name} is for training; give train lora or full too")
            if self.tensor > 1:
                raise ConfigError("tensor is for training; answering divides by gpus")
            if self.packed > 1:
                raise ConfigError("packed is for training; sequences to answer are given with batch")
        if self.pack is not None and self.pack.format == "nf4" and self.train != "lora":
            raise ConfigError("nf4 weights are for training adapters beside them; give train lora")
        if self.freeze and self.train != "full":
            raise ConfigError("freeze is for training in full; LoRA trains its adapters only")
        for part in self.freeze:
            check_choice("freeze", part, PARTS)
        for group in self.targets:
            check_choice("targets", group, TARGETS)
        if not self.targets:
            raise ConfigError(f"LoRA needs a target: {', '.join(TARGETS)}")
        if self.pack is not None and self.gpus * self.tensor > 1:
            raise ConfigError("packed weights are not divided among GPUs; leave pack out, or plan for one GPU")

    @property
    def width(self) -> int:
        """Bytes of a number of `dtype`."""
        return DTYPE_BYTES[self.dtype]

    @property
    def wide(self) -> int:
        """Bytes of a number that is widened for sums: fp32."""
        return DTYPE_BYTES["fp32"]

    @property
    def fused(self) -> bool:
        """Whether kernels do element by element what torch does step by step."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Workload:
    """What of the options follows from the model: numbers, each of one GPU.

    rows: sequences. context, prompt: tokens of a sequence. images, tiles: of the whole batch. split: GPUs among which a
    block's heads and widths are divided. shards: GPUs among which weights, gradients and moments are divided.
    """

    rows: int
    context: int
    prompt: int
    images: int
    tiles: int
    tile_size: tuple[int, int]
    split: int
    shards: int


def workload(config: AnyModelConfig, options: PlanOptions) -> Workload:
    """Fit the options to a model.

    Raises:
        ConfigError: they do not fit it; the message says what would.
    """
    text = config.text
    longest = text.max_position_embeddings * options.packed
    context = options.context or min(USUAL_CONTEXT, longest)
    if context > longest:
        raise ConfigError(f"the model's context is {longest} tokens, and {context} are asked for; lower the context")
    prompt = options.prompt or context
    if prompt > context:
        raise ConfigError(f"a prompt of {prompt} tokens does not fit a context of {context}; lower it")
    pictures, tiles, size = _pictures(config, options)
    if isinstance(config, ModelConfig) and config.fusion == "splice":
        tokens = pictures * image_tokens(config, tiles, size)
        if tokens > prompt:
            raise ConfigError(
                f"{pictures} pictures of {tiles} tiles take {tokens} tokens of a prompt of {prompt}; give a longer"
                " context, or fewer pictures or tiles"
            )
    split = options.gpus if options.train is None else 1
    shards = options.gpus if options.train else 1
    _check_split(config, split * options.tensor)
    if options.train == "full" and text.tie_word_embeddings and len({"embedding", "lm_head"} & {*options.freeze}) == 1:
        raise ConfigError("the model's LM head is its embedding; freeze both of them or neither")
    if options.pack is not None and options.pack.format in ("int8", "int4"):
        group = options.pack.group
        if wrong := [inputs for inputs, _ in block_shapes(text) if inputs % group]:
            raise ConfigError(f"{wrong[0]} inputs of a layer do not divide into groups of {group}; take another group")
    count = options.batch * pictures
    return Workload(options.batch, context, prompt, count, count * tiles, size, split, shards)


def _pictures(config: AnyModelConfig, options: PlanOptions) -> tuple[int, int, tuple[int, int]]:
    """Of a sequence: pictures, tiles of each, and a tile's height and width."""
    if isinstance(config, LanguageModelConfig):
        if {"vision", "projector"} & set(options.targets):
            raise ConfigError("the model reads text only; leave vision and projector out of the targets")
        if options.images or options.tiles or options.image_size:
            raise ConfigError("the model reads text only; leave images, tiles and image size out")
        return 0, 0, (0, 0)
    most = max_tiles(config)
    tiles = options.tiles or most
    if tiles > most:
        raise ConfigError(f"the model cuts a picture into at most {most} tiles, not {tiles}")
    side = config.vision.image_size
    size = options.image_size or (side, side)
    if isinstance(config.vision, TiledVisionConfig) and size != (side, side):
        raise ConfigError(f"the model's tiles have {side} × {side} pixels, not {size[0]} × {size[1]}; leave it out")
    config.num_tokens(*size)  # says which sizes the encoder takes
    return 1 if options.images is None else options.images, tiles, size


def max_tiles(config: ModelConfig) -> int:
    """The most tiles, the whole picture among them, that the model's own preprocessing cuts a picture into."""
    if isinstance(config.vision, TiledVisionConfig):
        return config.vision.max_num_tiles
    preprocess = config.preprocess()
    side = preprocess.tile_size or 1
    if preprocess.layout == "anyres":
        return 1 + max(height * width for height, width in preprocess.grid_pinpoints) // side**2
    if preprocess.layout == "split" and preprocess.longest_edge is not None:
        return 1 + (-(-preprocess.longest_edge // side)) ** 2
    return 1


def image_tokens(config: ModelConfig, tiles: int, size: tuple[int, int]) -> int:
    """Places that a picture takes among the tokens of a spliced model; at most, where it depends on its shape."""
    each = config.num_tokens(*size)
    if not config.grid_pinpoints or tiles == 1:
        return tiles * each
    side = round(each**0.5)
    return tiles * each + (tiles - 1) * side  # a newline behind each row of a grid: most in a column of crops


def _check_split(config: AnyModelConfig, split: int) -> None:
    text = config.text
    numbers = {
        "query heads": text.num_attention_heads,
        "key heads": text.num_key_value_heads,
        "feed-forward width": text.intermediate_size,
    }
    if isinstance(config, ModelConfig):
        for name, field in (("vision heads", "num_attention_heads"), ("vision width", "intermediate_size")):
            numbers[name] = getattr(config.vision, field, split)
    wrong = [f"{count} {name}" for name, count in numbers.items() if count % split]
    if wrong:
        fits = [n for n in range(1, min(numbers.values()) + 1) if not any(count % n for count in numbers.values())]
        raise ConfigError(
            f"{split} GPUs do not divide the model's {' and '.join(wrong)}; take {' or '.join(map(str, fits))}"
        )


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """Raises:
    ConfigError: the value is not one of those known.
    """
    if value not in known:
        raise ConfigError(f'{name} is one of {", ".join(known)}, not "{value}"{nearest(value, known)}')
