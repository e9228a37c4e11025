"""One process of a run among the others: which rows it reads, and what all add up.

Losses are divided by counts of the *whole* step, so gradients are added up, never averaged, and any number of processes
takes the same step. Processes that share the products of a block read the same rows: together they are one reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..distributed import (
    gradient_norm,
    max_over_readers,
    num_readers,
    reader,
    scale_gradients,
    sum_over_readers,
    sync_gradients,
)
from ..distributed.mesh import DATA, SHARD, TENSOR, broadcast_parameters, local_part
from ..errors import UserError

_AT_ONCE = 1 << 24  # gradients that are exchanged at a time: few messages, and little memory beside the gradients


@dataclass(frozen=True)
class Group:
    """This process among those of its run.

    rank, size: which reader it is, or is part of, and how many there are. mesh: None for a process alone.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Group:
        return cls(reader(mesh), num_readers(mesh), mesh)

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports."""
        return self.mesh is None or self.mesh.get_rank() == 0

    @property
    def speaks(self) -> bool:
        """Whether this process writes what its reader has to say, of those that are one reader."""
        return self.mesh is None or self.mesh.get_local_rank(TENSOR) == 0

    @property
    def sharded(self) -> bool:
        """Whether weights are gathered block by block, so that all must call the same blocks in the same order."""
        return self.mesh is not None and self.mesh[SHARD].size() > 1

    @property
    def cuts(self) -> bool:
        """Whether the model is in parts, by weights or by products."""
        return self.mesh is not None and (self.sharded or self.mesh[TENSOR].size() > 1)

    def fail(self, error: UserError) -> NoReturn:
        """Stop over what all processes found alike: the first says it, the others end without a word."""
        if self.leads:
            raise error
        raise SystemExit(2)

    # --- what all add up ---------------------------------------------------------------------------------------------

    def sum(self, values: Tensor) -> list[float]:
        """Numbers added up over all readers; they come to the CPU here."""
        if self.mesh is not None:
            sum_over_readers(values, self.mesh)
        return values.tolist()

    def most(self, value: int) -> int:
        """The largest of all readers' numbers."""
        if self.mesh is None:
            return value
        return int(max_over_readers(torch.tensor(value), self.mesh))

    def gather(self, value: Any, of_all: bool = False) -> list[Any]:
        """Every reader's value, in their order; or every process's, where readers share a model's parts."""
        if self.mesh is None:
            return [value]
        values = [None] * self.mesh.size()
        dist.all_gather_object(values, value)
        if of_all:
            return values
        return values[self.mesh.get_local_rank(TENSOR) :: self.mesh[TENSOR].size()]

    # --- gradients ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, modules: nn.Module) -> None:
        """Start from the first process's trained weights; what is sharded does already."""
        if self.mesh is None or self.sharded:
            return
        learnt = [parameter for parameter in modules.parameters() if parameter.requires_grad]
        broadcast_parameters([p.data for p in learnt], self.mesh, (DATA,))
        broadcast_parameters([p.data for p in learnt if not isinstance(p, DTensor)], self.mesh, (TENSOR,))

    def before_backward(self, modules: nn.Module, last: bool) -> None:
        """last: whether this is a step's last micro-batch, after which sharded gradients are exchanged, once."""
        if self.sharded:
            sync_gradients(modules, last)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add every reader's gradients; where one has none, and another has, it adds zeros. Sharded ones were added up
        on their way."""
        if self.mesh is None or self.size == 1 or self.sharded:
            return
        parameters = list(parameters)
        counts = self.sum(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64))
        for parameter, count in zip(parameters, counts, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(p for p in parameters if p.grad is not None):
            parts = [local_part(p.grad) for p in bucket if p.grad is not None]
            flat = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(flat, group=self.mesh.get_group(DATA))
            for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(summed.view_as(part))

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Over all parameters, wherever their parts are."""
        if self.mesh is None or not self.cuts:
            return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return gradient_norm(parameters, self.mesh)

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float, norm: Tensor) -> None:
        """Scale gradients of this norm down to `max_norm`."""
        if self.cuts:
            scale_gradients(parameters, max_norm, norm)
        else:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) + parameter.numel() > _AT_ONCE
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
