"""GGUF files of Llama decoders: the tensors of one file, and where the decoder's parameters lie in it.

Quantized tensors come out as fp32, one at a time, by the `gguf` package's own arithmetic.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LanguageModelConfig
from ..errors import CheckpointError, MissingExtraError
from .gguf_config import config_from_gguf
from .gguf_header import StoredTensor, read_header
from .io import FileReader, TensorInfo
from .rules import Rename, Rule, interleave, renames

__all__ = ["GGUFFile", "config_from_gguf", "gguf_rules", "read_gguf_config"]

PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""ggml's types that are numbers as torch has them."""

ROPE_FACTORS = "rope_freqs.weight"
_PIECE = 1 << 16  # elements dequantized at a time: the package's temporaries then stay in the cache


class GGUFFile:
    """One open GGUF file. Tensors stay valid as long as something refers to them.

    Attributes:
        metadata: by key, strings as `str`, arrays as lists.
        entries: shape and dtype by name, without `rope_freqs.weight`; the dtype of a quantized tensor is fp32.
        rope_factors: what the rotary frequencies are divided by, fp32 [D/2], where the file has `rope_freqs.weight`.
    """

    def __init__(self, path: str | Path) -> None:
        """Read and check the header.

        Raises:
            CheckpointError: not a GGUF file, damaged, truncated, one part of several, or with a type of tensor that is
                not read.
            MissingExtraError: the package `gguf` is not installed.
        """
        self.path = path = Path(path)
        self._types = _ggml_types()
        try:
            if not path.is_file():
                raise CheckpointError(f"{path} is {'not a file' if path.exists() else 'missing'}")
            if path.stat().st_size == 0:
                raise CheckpointError(f"{path} is empty; download it again")
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._reader = FileReader(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        header = read_header(path, memoryview(self._map))
        self.metadata: Mapping[str, Any] = header.metadata
        parts = self.metadata.get("split.count", 1)
        if parts not in (0, 1):
            raise CheckpointError(f"{path} is one of {parts} parts; join them with llama-gguf-split --merge first")
        self._tensors = header.tensors
        self._check_places()
        self.entries = {
            name: TensorInfo(t.shape, PLAIN.get(t.kind, torch.float32)) for name, t in self._tensors.items()
        }
        self.rope_factors: Tensor | None = None
        if ROPE_FACTORS in self.entries:
            self.rope_factors = self.tensor(ROPE_FACTORS).float().flatten()
            del self.entries[ROPE_FACTORS]

    def _check_places(self) -> None:
        """Every tensor has a type that is read, whole blocks, and bytes of its own within the file."""
        unread = sorted(
            {t.kind for t in self._tensors.values() if t.kind not in PLAIN and not self._types.reads(t.kind)}
        )
        if unread:
            names = ", ".join(map(self._types.name, unread))
            readable = ", ".join([*map(self._types.name, PLAIN), *self._types.readable()])
            raise CheckpointError(
                f"{self.path} has tensors of the type {names}, which is not read; read are {readable}"
            )
        size, last, before = len(self._map), 0, ""
        for name, tensor in sorted(self._tensors.items(), key=lambda item: item[1].offset):
            block = self._types.block(tensor.kind)[0]
            if tensor.shape[-1] % block:
                raise CheckpointError(
                    f"{self.path} is damaged: {name!r} has rows of {tensor.shape[-1]}, no multiple of the {block} in a"
                    f" block of {self._types.name(tensor.kind)}"
                )
            if tensor.offset < last:
                raise CheckpointError(f"{self.path} is damaged: {name!r} overlaps {before!r}; download it again")
            last, before = tensor.offset + self._num_bytes(tensor), name
            if last > size:
                raise CheckpointError(
                    f"{self.path} is truncated: {name!r} ends at byte {last}, and there are {size}; download it again"
                )

    def _num_bytes(self, tensor: StoredTensor, numel: int | None = None) -> int:
        """Bytes of a tensor, or of `numel` of its elements."""
        block, block_bytes = self._types.block(tensor.kind)
        return (math.prod(tensor.shape) if numel is None else numel) // block * block_bytes

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} lacks the tensor {name!r}")
        return self._tensors[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor: in the file's pages where it is stored as plain numbers, else dequantized.

        Raises:
            CheckpointError: there is none of this name.
        """
        stored = self._stored(name)
        if stored.kind not in PLAIN:
            self.copy_into(name, out := torch.empty(stored.shape))
            return out
        dtype = PLAIN[stored.kind]
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=self._num_bytes(stored), offset=stored.offset)
        if raw.data_ptr() % dtype.itemsize:  # a file may choose an alignment of 1
            raw = raw.clone()
        return raw.view(dtype).view(stored.shape)

    def copy_into(self, name: str, out: Tensor) -> None:
        """Copy a tensor into `out`, which has as many elements, and any strides, dtype and device.

        Raises:
            CheckpointError: there is none of this name.
        """
        stored = self._stored(name)
        assert out.numel() == math.prod(stored.shape), (name, out.shape, stored.shape)
        if stored.kind in PLAIN:
            self._reader.copy_into(stored.offset, PLAIN[stored.kind], out)
            return
        if out.is_contiguous():
            out = out.view(stored.shape)
        row = out[0].numel()
        whole_blocks = row % self._types.block(stored.kind)[0] == 0
        start = 0
        for piece in out.split(max(1, _PIECE // row)) if whole_blocks else [out]:
            piece.copy_(self._dequantized(stored, start, piece.numel()).view(piece.shape))
            start += piece.numel()

    def _dequantized(self, stored: StoredTensor, start: int, count: int) -> Tensor:
        """`count` elements from `start` on, both whole blocks; fp32, flat."""
        offset = stored.offset + self._num_bytes(stored, start)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=self._num_bytes(stored, count), offset=offset)
        return self._types.dequantize(stored.kind, raw)


def read_gguf_config(file: GGUFFile) -> LanguageModelConfig:
    """The configuration of a file, from its metadata and from what its tensors tell.

    Raises:
        ConfigError: another architecture, or values that are missing, damaged or not implemented.
    """
    return config_from_gguf(file.metadata, tied="output.weight" not in file.entries, rope_factors=file.rope_factors)


# --- places of the parameters ----------------------------------------------------------------------------------------

_BLOCK = {
    "input_norm.weight": "attn_norm.weight",
    "attention.qkv.v_proj.weight": "attn_v.weight",
    "attention.o_proj.weight": "attn_output.weight",
    "post_attention_norm.weight": "ffn_norm.weight",
    "mlp.gate_up.gate_proj.weight": "ffn_gate.weight",
    "mlp.gate_up.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def gguf_rules(config: LanguageModelConfig) -> list[Rule]:
    """Every parameter's place in a GGUF file of the architecture `llama`; a tied LM head has none of its own."""
    return list(_gguf_rules(config))


def _gguf_rules(config: LanguageModelConfig) -> Iterator[Rule]:
    text = config.text
    yield Rename("decoder.embedding.weight", ("token_embd.weight",))
    for i in range(text.num_hidden_layers):
        ours, theirs = f"decoder.layers.{i}", f"blk.{i}"
        yield from renames(ours, theirs, _BLOCK)
        # llama.cpp turns neighbours, as Meta does.
        for name, heads in (("q", text.num_attention_heads), ("k", text.num_key_value_heads)):
            place = (f"{theirs}.attn_{name}.weight",)
            yield Rename(f"{ours}.attention.qkv.{name}_proj.weight", place, interleave(heads), reshaped=True)
    yield Rename("decoder.norm.weight", ("output_norm.weight",))
    if not text.tie_word_embeddings:
        yield Rename("decoder.lm_head.weight", ("output.weight",))


# --- the package -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Types:
    """ggml's types by number, as the package knows them."""

    kinds: Callable[[int], Any]  # number → the package's type, ValueError for an unknown one
    sizes: Mapping[Any, tuple[int, int]]
    dequantize_array: Callable[[Any, Any], Any]

    def name(self, kind: int) -> str:
        try:
            return self.kinds(kind).name
        except ValueError:
            return f"number {kind}"

    def block(self, kind: int) -> tuple[int, int]:
        """Elements and bytes of a block."""
        return self.sizes[self.kinds(kind)]

    def reads(self, kind: int) -> bool:
        """Whether the package dequantizes a type; it tells by doing so."""
        try:
            self.dequantize(kind, torch.zeros(self.block(kind)[1], dtype=torch.uint8))
        except (ValueError, KeyError, NotImplementedError):
            return False
        return True

    def readable(self) -> list[str]:
        return [kind.name for kind in self.sizes if kind.value not in PLAIN and self.reads(kind.value)]

    def dequantize(self, kind: int, raw: Tensor) -> Tensor:
        """uint8, whole blocks → fp32, both flat."""
        return torch.from_numpy(self.dequantize_array(raw.numpy(), self.kinds(kind)))


def _ggml_types() -> _Types:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "reading a GGUF file") from error
    return _Types(gguf.GGMLQuantizationType, gguf.GGML_QUANT_SIZES, gguf.dequantize)
