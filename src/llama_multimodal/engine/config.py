"""How an engine is set up, and how its memory is shared out."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

import torch

from ..config import AnyModelConfig, ModelConfig, TiledVisionConfig
from ..config.checks import require
from ..errors import ConfigError
from ..models import LanguageModel
from ..ops import CACHE_DTYPES, SCALE_BYTES

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TEXT_PER_PICTURE = 1024  # tokens; what the cache is shared out for, where pictures have keys and values of their own
_TILES_PER_PICTURE = 4  # where the model's configuration does not say
_PICTURES_PER_REQUEST = 8  # that one may look at together, where nothing bounds the memory
_CPU_SHARE, _GPU_SHARE = 0.5, 0.8  # of the memory that is free, where nothing is asked for


@dataclass(frozen=True)
class PromptLookup:
    """Propose what came before: the tokens that followed the last occurrence of the newest ones (Saxena 2023).

    num_tokens: that are proposed for a request in a step, at most. max_ngram, min_ngram: newest tokens that must have
    occurred together; the longest that has occurred decides.
    """

    num_tokens: int = 8
    max_ngram: int = 4
    min_ngram: int = 2

    def __post_init__(self) -> None:
        require(self.num_tokens >= 1, f"num_tokens must be at least 1, not {self.num_tokens}", self)
        fits = 1 <= self.min_ngram <= self.max_ngram
        require(fits, f"min_ngram must be from 1 to max_ngram, {self.max_ngram}, not {self.min_ngram}", self)


@dataclass(frozen=True)
class DraftModel:
    """Propose what a smaller model with the same tokenizer says, from the text alone and without adapters.

    num_tokens: that are proposed for a request in a step, at most.
    """

    model: LanguageModel = field(repr=False)
    num_tokens: int = 4

    def __post_init__(self) -> None:
        require(self.num_tokens >= 1, f"num_tokens must be at least 1, not {self.num_tokens}", self)
        given = f"model must be a loaded language model, as `load` gives, not {type(self.model).__name__}"
        require(isinstance(self.model, LanguageModel), given, self)


Speculation = PromptLookup | DraftModel
"""How tokens are proposed, which the model then checks several at a time."""


@dataclass(frozen=True)
class EngineConfig:
    """cache_memory: bytes, or text such as "4GiB", for keys, values and images; None takes what `max_requests` of the
    whole context need, but at most half of a CPU's free memory or 80 % of a GPU's.

    max_tokens_in_batch: of one step, all rows together; a longer prompt is read in chunks.
    max_requests: that are worked on at a time. max_tiles_in_batch: that are encoded in a step, but at least a picture.
    image_share: of the cache's memory; None goes by the model.
    cache_dtype: "int8" or "fp8" keeps keys and values, those of images too, in 8 bits with a scale for each token and
    head; None in the model's dtype. Embeddings of spliced images stay in that.
    static_decode: whether steps in which every request decodes have one of a few shapes, see `graphs`; None does so on
    a CUDA device, where they are captured as graphs.
    compile: have torch.compile make one graph of each of those steps; then they have fixed shapes on a CPU too.
    patience: by how many places in the queue one step of priority moves a request forward, and no further.
    prefix_cache: whether equal beginnings of prompts are computed once.
    overlap_images: encode pictures in a thread beside the decoding of others.
    speculation: `PromptLookup()` or `DraftModel(model)`: propose tokens, and check several in one step. The answers
        are those without it.
    """

    max_tokens_in_batch: int = 4096
    max_requests: int = 32
    max_tiles_in_batch: int = 16
    cache_memory: int | str | None = None
    block_size: int = 16
    image_share: float | None = None
    cache_dtype: str | None = None
    static_decode: bool | None = None
    compile: bool = False
    patience: int = 64
    prefix_cache: bool = True
    overlap_images: bool = False
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens_in_batch", "max_requests", "max_tiles_in_batch", "block_size", "patience"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}", self)
        batch, rows = self.max_tokens_in_batch, self.max_requests
        require(batch >= rows, f"max_tokens_in_batch must be at least max_requests, {rows}, not {batch}", self)
        share = self.image_share
        require(share is None or 0 <= share < 1, f"image_share must be from 0 to under 1, not {share}", self)
        dtype, known = self.cache_dtype, tuple(CACHE_DTYPES)
        either = " or ".join(f'"{name}"' for name in known)
        require(dtype is None or dtype in known, f"cache_dtype must be {either}, or left out, not {dtype!r}", self)
        static, guess = self.static_decode, self.speculation
        require(
            static is None or isinstance(static, bool),
            f"static_decode must be True, False or None, not {static!r}",
            self,
        )
        require(isinstance(self.compile, bool), f"compile must be True or False, not {self.compile!r}", self)
        fixed = not self.compile or static is not False
        require(fixed, "compile=True is for steps of fixed shapes; leave static_decode=False out", self)
        known_guess = guess is None or isinstance(guess, PromptLookup | DraftModel)
        require(known_guess, f"speculation must be PromptLookup(), DraftModel(model) or left out, not {guess!r}", self)
        if self.cache_memory is not None:
            parse_bytes(self.cache_memory)

    @property
    def most_rows(self) -> int:
        """Of one token each in a step where every request decodes, with all that may be proposed."""
        proposed = 0 if self.speculation is None else self.speculation.num_tokens
        return min(self.max_requests * (1 + proposed), self.max_tokens_in_batch)


def parse_bytes(size: int | str) -> int:
    """ "4GiB", "512 MB" or a number as bytes.

    Raises:
        ConfigError: it is none of them.
    """
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if (
        match is None
        or match[2].upper() not in _UNITS
        or not (found := int(float(match[1]) * _UNITS[match[2].upper()]))
    ):
        raise ConfigError(f'cache_memory must be bytes or text such as "4GiB", not {size!r}')
    return found


def row_buckets(most: int) -> tuple[int, ...]:
    """The numbers of rows that a step of fixed shapes may have: powers of two, and `most`."""
    return (*(1 << i for i in range((most - 1).bit_length())), most)


@dataclass(frozen=True)
class CachePlan:
    """num_blocks: of `block_size` tokens of text. block_bytes: of a block, a draft model's keys and values among them.
    num_units: of images, `unit_tokens` of them each. padding_blocks: behind the others, which only padding rows of
    steps of fixed shapes write to."""

    block_size: int
    num_blocks: int
    block_bytes: int
    num_units: int
    unit_tokens: int
    unit_bytes: int
    padding_blocks: int = 0

    @property
    def nbytes(self) -> int:
        return (self.num_blocks + self.padding_blocks) * self.block_bytes + self.num_units * self.unit_bytes


def plan_cache(
    config: AnyModelConfig,
    engine: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_kv_heads: int | None = None,
) -> CachePlan:
    """How many blocks and units fit in the cache's memory.

    num_kv_heads: of this process, where several share the heads; None: the configuration's

    Raises:
        ConfigError: not even a block of text and a picture fit.
    """
    text, size = config.text, dtype.itemsize
    head = text.head_dim * size if engine.cache_dtype is None else text.head_dim + SCALE_BYTES
    each = 2 * (num_kv_heads or text.num_key_value_heads) * head  # a token's key and value in one layer
    token_bytes = each * len(text.self_attention_layers)
    if isinstance(engine.speculation, DraftModel):
        token_bytes += _draft_token_bytes(engine.speculation.model)
    block_bytes, context = token_bytes * engine.block_size, text.max_position_embeddings
    padding = _padding_blocks(engine) if is_static(engine, device) else 0
    unit_tokens, unit_bytes, picture_units, request_units, share = 1, 0, 0, 0, 0.0
    if isinstance(config, ModelConfig):
        tokens = config.num_tokens(config.vision.image_size, config.vision.image_size)
        if config.fusion == "cross_attention":
            unit_tokens, unit_bytes = tokens, each * len(text.cross_attention_layers) * tokens
            tiled = isinstance(config.vision, TiledVisionConfig)
            picture_units = config.tiled.max_num_tiles if tiled else _TILES_PER_PICTURE
            request_units = _PICTURES_PER_REQUEST * picture_units
            share = picture_units * unit_bytes / (picture_units * unit_bytes + _TEXT_PER_PICTURE * token_bytes)
        else:  # an embedding for each token of text that there is room for
            unit_bytes, picture_units, request_units = text.hidden_size * size, tokens, context
            share = unit_bytes / (unit_bytes + token_bytes)
        share = share if engine.image_share is None else engine.image_share
    if engine.cache_memory is None:
        blocks = engine.max_requests * -(-context // engine.block_size) + padding
        units = engine.max_requests * request_units
        memory = _free_share(device)
        if blocks * block_bytes + units * unit_bytes <= memory:
            return CachePlan(engine.block_size, blocks - padding, block_bytes, units, unit_tokens, unit_bytes, padding)
    else:
        memory = parse_bytes(engine.cache_memory)
    units = 0
    if unit_bytes and share:
        units = max(int(memory * share) // unit_bytes, picture_units)  # a whole picture in any case
    blocks = (memory - units * unit_bytes) // block_bytes - padding
    if blocks < 1:
        least = (1 + padding) * block_bytes + units * unit_bytes
        raise ConfigError(f"a cache_memory of {memory} bytes is too little for this model; give at least {least}")
    return CachePlan(engine.block_size, blocks, block_bytes, units, unit_tokens, unit_bytes, padding)


def is_static(engine: EngineConfig, device: torch.device) -> bool:
    """Whether decoding steps have fixed shapes."""
    return device.type == "cuda" or engine.compile if engine.static_decode is None else engine.static_decode


def _padding_blocks(engine: EngineConfig) -> int:
    """Blocks with a slot for each padding row of a step; all rows are, where a shape is recorded beforehand."""
    return -(-engine.most_rows // engine.block_size)


def _draft_token_bytes(draft: LanguageModel) -> int:
    """A token's keys and values in all layers of a draft model."""
    text = draft.config.text
    return 2 * text.num_key_value_heads * text.head_dim * draft.dtype.itemsize * len(text.self_attention_layers)


def _free_share(device: torch.device) -> int:
    """What an engine takes of a device's memory where nobody says how much, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            lines = dict(line.split(":", 1) for line in file)
        free = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return int(free * _CPU_SHARE)
