"""Four-bit NormalFloat weights through bitsandbytes, to train adapters over them: QLoRA (Dettmers et al. 2023).

Each block of 64 values shares a scale, and its values are one of 16 quantiles of a normal distribution. With double
quantization the scales are 8-bit numbers themselves, 256 to a block: 4.127 bits a value instead of 4.5.

Shapes: N outputs · K inputs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.checks import path_matches, require
from ..errors import ConfigError, MissingExtraError
from ..models import LanguageModel
from ..models.layers import Linear
from ..ops import Approximation

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTE = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


_BUFFERS = ("values", "scales", "code", "nested_scales", "nested_code", "nested_offset")
NESTED_BLOCK = 256  # scales that share one


@dataclass(frozen=True)
class Nf4Config:
    """How linear layers become NF4.

    block_size: values that share a scale. double_quant: 8-bit scales. keep: globs over module paths, a path's end or
    all beneath it, of layers that stay as they are; norms, gates and embeddings always do. compute_dtype: in which
    products run; what goes in and comes out has the model's dtype.

    Raises:
        ConfigError: a value out of range.
    """

    block_size: int = 64
    double_quant: bool = True
    keep: tuple[str, ...] = ("projector", "lm_head")
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        sizes = ", ".join(map(str, _BLOCK_SIZES))
        require(self.block_size in _BLOCK_SIZES, f"block_size must be one of {sizes}, not {self.block_size}", self)
        known = ", ".join(COMPUTE)
        require(self.compute_dtype in COMPUTE, f'compute_dtype "{self.compute_dtype}" is not one of {known}', self)


@dataclass(frozen=True)
class Nf4Weight:
    """A weight [N, K] in NF4.

    values: uint8 [N·K / 2, 1]. scales: a block's, fp32, or uint8 with double quantization, which has the three others;
    code, nested_code: what a value of 4 and one of 8 bits stands for
    """

    shape: tuple[int, int]
    block_size: int
    values: Tensor
    scales: Tensor
    code: Tensor
    nested_scales: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None

    def to(self, device: torch.device) -> Nf4Weight:
        tensors = {name: getattr(self, name) for name in _BUFFERS}
        moved = {name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **moved)

    @classmethod
    def of(cls, weight: Tensor, block_size: int, double_quant: bool) -> Nf4Weight:
        """weight: [N, K]"""
        values, state = _bitsandbytes().functional.quantize_4bit(
            weight.detach().contiguous(), blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
        )
        nested = (state.state2.absmax, state.state2.code, state.offset) if double_quant else (None, None, None)
        return cls((weight.shape[0], weight.shape[1]), block_size, values, state.absmax, state.code, *nested)


class Nf4Linear(nn.Module):
    """A linear layer whose weight is NF4; gradients pass through it to its input."""

    product = None
    values: Tensor
    scales: Tensor
    code: Tensor
    nested_scales: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, weight: Nf4Weight, bias: nn.Parameter | None, compute_dtype: torch.dtype) -> None:
        """bias: [N], kept as it is; compute_dtype: in which products run"""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.block_size, self.compute_dtype, self.bias = weight.block_size, compute_dtype, bias
        for name in _BUFFERS:
            self.register_buffer(name, getattr(weight, name))
        self._states: dict[torch.dtype, Any] = {}

    @property
    def weight(self) -> Nf4Weight:
        tensors = (getattr(self, name) for name in _BUFFERS)
        return Nf4Weight((self.out_features, self.in_features), self.block_size, *tensors)

    def forward(self, x: Tensor) -> Tensor:
        state = self._state(self.compute_dtype)
        out = _bitsandbytes().matmul_4bit(x.to(self.compute_dtype), self.values.t(), quant_state=state).to(x.dtype)
        return out if self.bias is None else out + self.bias

    def gelu(self, x: Tensor, approximate: Approximation = "none") -> Tensor:
        """The layer and the GELU behind it."""
        return F.gelu(self(x), approximate=approximate)

    def dense(self) -> Tensor:
        """The weight that it stands for, fp32 [N, K]."""
        return _bitsandbytes().functional.dequantize_4bit(self.values, self._state(torch.float32))

    def _state(self, dtype: torch.dtype) -> Any:
        """bitsandbytes' record of the scales, for products in a dtype. Kept between calls."""
        if dtype not in self._states:
            record = _bitsandbytes().functional.QuantState
            nested = None
            if self.nested_scales is not None:
                nested = record(
                    absmax=self.nested_scales, code=self.nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32
                )
            self._states[dtype] = record(
                absmax=self.scales,
                shape=torch.Size((self.out_features, self.in_features)),
                code=self.code,
                blocksize=self.block_size,
                quant_type="nf4",
                dtype=dtype,
                offset=self.nested_offset,
                state2=nested,
            )
        return self._states[dtype]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nf4Linear:
        """Moves; scales keep their dtype when the model is converted to another."""
        self._states = {}
        moved = {name: tensor.to(fn(tensor).device) for name, tensor in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, tensor in moved.items():
            setattr(self, name, tensor)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, nf4 in blocks of {self.block_size}"


@torch.no_grad()
def quantize_nf4(
    model: LanguageModel, config: Nf4Config | None = None, device: torch.device | None = None
) -> LanguageModel:
    """Make the model's linear layers NF4 in place, one at a time, vision encoder included; returns the model.

    device: where the model goes on the way, so that its plain weights are never all there; None: where it is

    Adapters are added afterwards: `apply_lora`. On the CPU a product costs more than a plain one; it is the memory
    that is saved.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ConfigError: no layer is left to quantize, or the model has no weights.
    """
    config = config or Nf4Config()
    _bitsandbytes()
    if model.device.type == "meta":
        raise ConfigError("this model was built without weights, so there is nothing to quantize")
    layers = [
        path
        for path, layer in model.named_modules()
        if type(layer) in (Linear, nn.Linear) and not path.endswith("patch_embedding")
        if not any(path_matches(path, pattern) for pattern in config.keep)
    ]
    if not layers:
        raise ConfigError("no linear layer is left to quantize: all are kept, packed or NF4 already")
    for path in layers:
        weight = model.get_parameter(f"{path}.weight").to(device)
        packed = Nf4Weight.of(weight, config.block_size, config.double_quant)
        put_nf4(model, path, packed, COMPUTE[config.compute_dtype])
    return model if device is None else model.to(device)


def put_nf4(model: LanguageModel, path: str, weight: Nf4Weight, compute_dtype: torch.dtype) -> None:
    """Replace a linear layer by an NF4 weight of its shape; its bias stays."""
    parent, _, name = path.rpartition(".")
    bias = getattr(model.get_submodule(path), "bias", None)
    setattr(model.get_submodule(parent), name, Nf4Linear(weight, bias, compute_dtype))


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtraError("qlora", "NF4") from error
    return bitsandbytes
