"""Linear layers with low-rank additions, several named ones beside each other.

Shapes: B rows · K inputs · N outputs · R rank · S sum of the ranks of several adapters
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigError
from ..models.layers import PackedLinear
from ..ops import PackedProduct
from ..quant.nf4 import Nf4Linear
from .config import LoraConfig

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Rows:
    """An adapter for each row of a batch: `names[index[b]]`, and none where the index is -1.

    kept: what layers make of their adapters, by path, where that is done once for all calls; see `lora.fixed_rows`.
    """

    names: tuple[str, ...]
    index: Tensor  # int64 [B], or [B, T] for each token
    kept: dict[str, Joined] | None = None


Choice = str | Rows | None
"""Which adapter adds to the layers: a name, one for each row, or none."""


@dataclass(eq=False)
class AdapterSet:
    """The named adapters of one model, in the order they came, and which of them is in force.

    choice: outside of `use_adapter` it is `default`, the first that came. merged: the layers whose weights hold an
    adapter now, see `lora.merge_lora`. changes: how many adapters came, went, were merged or unmerged. numbers: which
    change brought each, by name: one of the same name that comes later has another.
    """

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    choice: Choice = None
    default: str | None = None
    user: int | None = None  # the thread inside `use_adapter`
    merged: list[Any] = field(default_factory=list)
    changes: int = 0
    numbers: dict[str, int] = field(default_factory=dict)


class BaseLayer(Protocol):
    """The layer that is added to."""

    @property
    def bias(self) -> Tensor | None: ...

    def tensors(self) -> list[Tensor]:
        """Those that hold its weight."""

    def dense(self) -> Tensor:
        """Its weight [N, K] as plain numbers."""

    def times(self, x: Tensor) -> Tensor:
        """`x · weightᵀ`, [..., K] → [..., N]"""


def draw(A: Tensor) -> Tensor:
    """Initial values of an adapter's A, whose B is zero: at first nothing is added."""
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # as a linear layer's weight is drawn


class LowRank(nn.Module):
    """One adapter of one layer: `scale · B·A`, and with DoRA a length for every row of the sum."""

    def __init__(
        self,
        shape: tuple[int, int],
        config: LoraConfig,
        rank: int,
        alpha: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.scale = rank, alpha, config.scale(rank, alpha)
        self.dropout = config.dropout
        self.A = nn.Parameter(torch.empty(rank, shape[1], device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(shape[0], rank, device=device, dtype=dtype))
        self.magnitude: nn.Parameter | None = None
        draw(self.A)

    @torch.no_grad()
    def add_magnitude(self, base: BaseLayer) -> None:
        """DoRA: at first as long as the rows of the base's weight are."""
        self.magnitude = nn.Parameter(self.lengths(base, self.B.dtype).to(self.B.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N] in x's dtype."""
        low = ops.linear(x, (self.A * self.scale).to(x.dtype))  # [..., R]
        return ops.linear(low, self.B.to(x.dtype))

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """`out + self(x)`, rounded once; out: [..., N], whose dtype is x's."""
        low = ops.linear(x, (self.A * self.scale).to(x.dtype))  # [..., R]
        return self.plus_product(out, low, self.B)

    # In parts, for several adapters of a layer that are computed together: their A and B lie side by side.

    def held(self) -> tuple[Tensor, Tensor]:
        """A and B, or the parts of them that this process computes with."""
        return self.A, self.B

    def lower(self, x: Tensor, A: Tensor) -> Tensor:
        """`x · Aᵀ`; A: such as `held` gives, [S, K], in x's dtype → [..., S]"""
        return ops.linear(x, A)

    def plus_product(self, out: Tensor, low: Tensor, B: Tensor) -> Tensor:
        """`out + low · Bᵀ`, rounded once; low: [..., S]; out: [..., N], of the same dtype; B: such as `held` gives."""
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), B.to(low.dtype).t()).view(out.shape)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """What is added to the weight, [N, K]."""
        return (self.B.to(dtype) * self.scale) @ self.A.to(dtype)

    def lengths(self, base: BaseLayer, dtype: torch.dtype) -> Tensor:
        """Of the rows of the base's weight and the addition, [N]. The paper takes them as constants in the gradient."""
        with torch.no_grad():
            dtype = torch.promote_types(dtype, torch.float32)
            return torch.linalg.vector_norm(base.dense().to(dtype) + self.delta(dtype), dim=1)

    def stretch(self, base: BaseLayer, dtype: torch.dtype) -> Tensor:
        """DoRA's factor of every output, [N]."""
        assert self.magnitude is not None
        return self.magnitude.to(dtype) / self.lengths(base, dtype).to(dtype)


class Lora(nn.ModuleDict):
    """The adapters of one linear layer, `LowRank` by name."""

    def __init__(self, adapters: AdapterSet, shape: tuple[int, int], path: str, reads_images: bool) -> None:
        super().__init__()
        self.adapters, self.shape, self.path, self.reads_images = adapters, shape, path, reads_images
        self._kept: dict[Any, tuple[Any, Any]] = {}

    def forget(self) -> None:
        """Drop what is kept between calls, where weights change unseen: gathered ones look as they did before."""
        self._kept.clear()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.forget()

    def _apply(self, *args: Any, **kwargs: Any) -> Lora:
        self.forget()
        return super()._apply(*args, **kwargs)

    def __getitem__(self, name: str) -> LowRank:
        found = super().__getitem__(name)
        assert isinstance(found, LowRank)
        return found

    @property
    def active(self) -> bool:
        """Whether something is added."""
        choice = self.adapters.choice
        names = choice.names if isinstance(choice, Rows) else (choice,)
        return any(name is not None and name in self for name in names)

    def forward(self, x: Tensor, out: Tensor, base: BaseLayer) -> Tensor:
        """What the layer gives with the adapters in force; x: [..., K], out: the base's [..., N] → [..., N]"""
        choice = self.adapters.choice
        if isinstance(choice, Rows):
            return self._by_row(x, out, base, choice)
        if choice is None or choice not in self:
            return out
        pair = self[choice]
        dropped = F.dropout(x, pair.dropout, self.training)
        if pair.magnitude is None:
            return pair.add_to(out, dropped)
        added = pair(dropped)
        product = _without_bias(out, base)
        if pair.dropout and self.training:  # the paper's own code drops inputs of everything but the plain layer
            product = base.times(dropped)
        factor = self._stretch(pair, base, torch.promote_types(x.dtype, pair.A.dtype))
        return (out + (factor - 1) * product + factor * added).to(out.dtype)

    def _by_row(self, x: Tensor, out: Tensor, base: BaseLayer, rows: Rows) -> Tensor:
        """Every row with its own: x times all of A at once, and zero wherever a row's adapter is another."""
        if not self.active:
            return out
        if self.reads_images:
            raise ConfigError(
                f"{self.path} reads images, which are not a row each; read them row by row, each inside"
                " use_adapter(model, name) with model.read_images, or leave such layers out of the adapters"
            )
        lead = rows.index.shape
        if lead != x.shape[: len(lead)]:
            raise ConfigError(f"adapters are given for {list(lead)} rows, and the batch has {list(x.shape[:-1])}")
        if self.training and any(self[name].dropout for name in rows.names if name in self):
            raise ConfigError("an adapter for each row is for answering; call model.eval(), or train one at a time")
        joined = self._join(rows, base, x.dtype)
        place = rows.index.reshape(*lead, *(1,) * (x.ndim - len(lead)))  # [B, …, 1]
        pair = next(self[name] for name in rows.names if name in self)  # which is cut as all of them are
        low = pair.lower(x, joined.A)  # [..., S]
        low = torch.where(place == joined.owner, low, 0)
        if joined.factors is None:
            return pair.plus_product(out, low, joined.B)
        added = ops.linear(low, joined.B)
        factor = joined.factors[place.squeeze(-1)]  # [..., N]; -1 is the last
        return (out + (factor - 1) * _without_bias(out, base) + factor * added).to(out.dtype)

    def _stretch(self, pair: LowRank, base: BaseLayer, dtype: torch.dtype) -> Tensor:
        """`LowRank.stretch`, which reads the whole weight."""
        tensors = (*pair.parameters(), *base.tensors())
        return self._keep((id(pair), dtype), tensors, lambda: pair.stretch(base, dtype))

    def _join(self, rows: Rows, base: BaseLayer, dtype: torch.dtype) -> Joined:
        names = rows.names
        if rows.kept is not None:
            if self.path not in rows.kept:
                rows.kept[self.path] = self._join_now(names, base, dtype)
            return rows.kept[self.path]
        pairs = [self[name] for name in names if name in self]
        tensors: list[Tensor] = [parameter for pair in pairs for parameter in pair.parameters()]
        if any(pair.magnitude is not None for pair in pairs):
            tensors += base.tensors()
        return self._keep(Joined, (*tensors,), lambda: self._join_now(names, base, dtype), names, dtype)

    def _keep(self, key: Any, tensors: tuple[Tensor, ...], make: Callable[[], T], *more: Any) -> T:
        """What `make` gives, kept between calls for as long as no tensor is written to; where a gradient may be
        wanted it is made each time."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
            return make()
        state = (more, [(tensor.data_ptr(), tensor._version) for tensor in tensors])
        if key not in self._kept or self._kept[key][0] != state:
            self._kept[key] = state, make()
        return self._kept[key][1]

    def _join_now(self, names: Sequence[str], base: BaseLayer, dtype: torch.dtype) -> Joined:
        pairs = [(i, self[name]) for i, name in enumerate(names) if name in self]
        device, wide = pairs[0][1].A.device, dtype
        for _, pair in pairs:
            wide = torch.promote_types(wide, pair.A.dtype)
        owner = torch.tensor([i for i, pair in pairs for _ in range(pair.rank)], device=device)
        factors = None
        if any(pair.magnitude is not None for _, pair in pairs):
            ones = torch.ones(self.shape[0], device=device, dtype=wide)
            by_name = {i: pair.stretch(base, wide) for i, pair in pairs if pair.magnitude is not None}
            factors = torch.stack([by_name.get(i, ones) for i in range(len(names))] + [ones])
        return Joined(
            torch.cat([(pair.held()[0] * pair.scale).to(dtype) for _, pair in pairs]),
            torch.cat([pair.held()[1].to(dtype) for _, pair in pairs], dim=1),
            owner,
            factors,
        )


@dataclass(frozen=True, eq=False)
class Joined:
    """Several adapters of one layer side by side, A and B in the dtype of the layer's input."""

    A: Tensor  # [S, K], times its scale
    B: Tensor  # [N, S]
    owner: Tensor  # [S], which adapter each column of the low-rank product belongs to
    factors: Tensor | None  # DoRA's [adapters + 1, N], 1 for the others and for none


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def _without_bias(out: Tensor, base: BaseLayer) -> Tensor:
    return out if base.bias is None else out - base.bias


class LoraLinear(nn.Module):
    """A linear layer, plain or packed, with adapters."""

    def __init__(self, base: nn.Module, lora: Lora) -> None:
        super().__init__()
        self.base, self.lora = base, lora

    @property
    def bias(self) -> Tensor | None:
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def product(self) -> PackedProduct | None:
        """A packed layer's, while nothing is added to it."""
        return None if self.lora.active else getattr(self.base, "product", None)

    def tensors(self) -> list[Tensor]:
        return _tensors(self.base)

    def dense(self) -> Tensor:
        return dense(self.base)

    def times(self, x: Tensor) -> Tensor:
        return _without_bias(self.base(x), self)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x, self.base(x), self)

    def gelu(self, x: Tensor, approximate: ops.Approximation = "none") -> Tensor:
        """The layer and the GELU behind it."""
        if self.lora.active:
            return F.gelu(self(x), approximate=approximate)
        base: Any = self.base  # plain, in 4 bits, or a process's part
        return base.gelu(x, approximate)


class LoraProjections(nn.Module):
    """Several linear layers that are packed as one product, each with adapters of its own."""

    def __init__(self, base: PackedLinear) -> None:
        super().__init__()
        self.base = base
        self.lora = nn.ModuleDict()  # see `loras`

    @property
    def product(self) -> PackedProduct | None:
        return None if any(lora.active for _, lora in self.loras()) else self.base.product

    def loras(self) -> list[tuple[str, Lora]]:
        """By the layer's name."""
        return [(name, lora) for name, lora in self.lora.items() if isinstance(lora, Lora)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        assert self.base.parts is not None
        outs = self.base(x)
        return tuple(
            self.lora[name](x, out, Part(self.base, name)) if name in self.lora else out
            for name, out in zip(self.base.parts, outs, strict=True)
        )


@dataclass(frozen=True, eq=False)
class Part:
    """One of the layers that are packed together."""

    packed: PackedLinear
    name: str
    bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return _tensors(self.packed)

    def dense(self) -> Tensor:
        return ops.unpack_weight(self.packed.weights()[f"{self.name}.weight"])

    def times(self, x: Tensor) -> Tensor:
        assert self.packed.parts is not None
        return self.packed(x)[list(self.packed.parts).index(self.name)]


def dense(layer: nn.Module) -> Tensor:
    """The weight [N, K] of a linear layer as plain numbers."""
    if isinstance(layer, PackedLinear):
        return ops.unpack_weight(layer.weight)
    if isinstance(layer, Nf4Linear):
        return layer.dense()
    assert isinstance(layer.weight, Tensor)
    return layer.weight
