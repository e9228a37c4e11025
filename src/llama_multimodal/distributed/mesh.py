"""The processes of a run and what each is there for: a mesh of replicas × shards × tensor parts.

`torchrun` starts the processes, on one machine or on many, and says in the environment who is who.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor

from ..errors import ConfigError, DeviceError

DATA, SHARD, TENSOR = AXES = ("data", "shard", "tensor")
"""Names of the mesh's axes, the last one's processes next to each other: they talk most."""

Params = ParamSpec("Params")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ParallelConfig:
    """How many processes each way of sharing the work has. Their product is the number of processes.

    data and shard both read data of their own. A run that may restart with fewer machines leaves `shard` at 0.

    Raises:
        ConfigError: a size below 1 (`shard`: below 0).
    """

    data: int = 1  # whole copies of what `shard` and `tensor` share out
    shard: int = 0  # processes that share the weights, gradients and optimizer state; 0: all that the others leave
    tensor: int = 1  # processes that share every product of the blocks

    def __post_init__(self) -> None:
        for name, least in (("data", 1), ("shard", 0), ("tensor", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"ParallelConfig: {name} must be at least {least}, not {getattr(self, name)}")

    def sizes(self, processes: int) -> tuple[int, int, int]:
        """data, shard and tensor among so many processes.

        Raises:
            ConfigError: they do not multiply to that.
        """
        shard = self.shard or processes // (self.data * self.tensor)
        if self.data * shard * self.tensor != processes or shard == 0:
            shards = f"shard {self.shard}" if self.shard else "any number of shards"
            raise ConfigError(
                f"data {self.data} × {shards} × tensor {self.tensor} do not make the {processes} processes of this"
                " run; change a size, or torchrun's --nproc-per-node and --nnodes"
            )
        return self.data, shard, self.tensor


def make_mesh(config: ParallelConfig, device: str | None = None) -> DeviceMesh:
    """The mesh [data, shard, tensor] of the processes that torchrun started; a process of its own is a mesh of one.

    Joins the process group if that has not been done: gloo for CPU tensors, nccl besides where the device is "cuda".

    device: "cpu" or "cuda"; None takes CUDA where there is one

    Raises:
        ConfigError: the sizes do not multiply to the number of processes; or torchrun restarted them and shares one
            store between all attempts, in which they would find the addresses of those before them.
        DeviceError: no such device, or fewer GPUs than processes on this machine.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise DeviceError(f'processes share the work on "cpu" or "cuda", not on "{kind}"')
    config.sizes(dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1)))
    if kind == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= there:
            raise DeviceError(f"process {local} of this machine has no GPU, there are {there}; start fewer processes")
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        backend = "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"
        if "RANK" in os.environ:
            _check_restart()
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(kind, config.sizes(dist.get_world_size()), mesh_dim_names=AXES)


def _check_restart() -> None:
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if again and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            "restarted processes would find the addresses of those before them; start torchrun with --standalone or"
            " --rdzv-backend c10d, and set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )


def worker(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorator of what every process runs: torchrun's report then has the error of the process that failed first,
    not of those that waited for it; after a good end the process group is left."""

    @functools.wraps(function)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        with warnings.catch_warnings():
            # Nothing here writes into what a block returns.
            warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view", UserWarning)
            result = function(*args, **kwargs)
        if dist.is_initialized():
            dist.destroy_process_group()
        return result

    return cast(Callable[Params, Result], record(run))


# --- who reads which data ---------------------------------------------------------------------------------------------


def num_readers(mesh: DeviceMesh) -> int:
    """How many processes, or groups of tensor-parallel ones, read data of their own."""
    return mesh[DATA].size() * mesh[SHARD].size()


def reader(mesh: DeviceMesh) -> int:
    """Which of the readers this process is; those that share one tensor group are the same reader."""
    return mesh.get_local_rank(DATA) * mesh[SHARD].size() + mesh.get_local_rank(SHARD)


def sum_over_readers(values: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of every reader's values, as numbers of tokens and summed losses; `values` is overwritten."""
    return _reduced(values, mesh, (DATA, SHARD), dist.ReduceOp.SUM)


def max_over_readers(values: Tensor, mesh: DeviceMesh) -> Tensor:
    """The largest of every reader's values; `values` is overwritten."""
    return _reduced(values, mesh, (DATA, SHARD), dist.ReduceOp.MAX)


def sum_over_pieces(values: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over the processes that hold one copy of the weights among them; `values` is overwritten."""
    return _reduced(values, mesh, (SHARD, TENSOR), dist.ReduceOp.SUM)


def _reduced(values: Tensor, mesh: DeviceMesh, axes: Iterable[str], how: dist.ReduceOp.RedOpType) -> Tensor:
    for axis in axes:
        if mesh[axis].size() > 1:
            dist.all_reduce(values, how, group=mesh.get_group(axis))
    return values


def local_part(value: Tensor) -> Tensor:
    """What this process holds of a tensor that may be cut."""
    return value.to_local() if isinstance(value, DTensor) else value


@torch.no_grad()
def fill_parameter(parameter: Tensor, whole: Tensor) -> None:
    """Give a parameter the values of `whole`; of one that is cut, this process's part of them. Nobody is asked."""
    piece = whole
    if isinstance(parameter, DTensor):
        # The last axis was cut first: tensor parts are sharded, never shards divided into tensor parts.
        axes = list(zip(range(parameter.device_mesh.ndim), parameter.placements, strict=True))
        for axis, place in reversed(axes):
            if (dim := getattr(place, "dim", None)) is not None:
                piece = _chunk(piece, parameter.device_mesh.size(axis), parameter.device_mesh.get_local_rank(axis), dim)
    local_part(parameter).copy_(piece)


def _chunk(value: Tensor, count: int, index: int, dim: int) -> Tensor:
    """As FSDP2 cuts: the last parts may be smaller, or have nothing."""
    pieces = value.chunk(count, dim)
    return pieces[index] if index < len(pieces) else value.narrow(dim, 0, 0)


@torch.no_grad()
def broadcast_parameters(parameters: Iterable[Tensor], mesh: DeviceMesh, axes: Iterable[str]) -> None:
    """Give every process along the axes the values of the first: fresh weights may come from different seeds."""
    for axis in axes:
        if mesh[axis].size() == 1:
            continue
        group = mesh.get_group(axis)
        for parameter in parameters:
            value = local_part(parameter)
            if not value.is_meta:
                dist.broadcast(value, group_src=0, group=group)
