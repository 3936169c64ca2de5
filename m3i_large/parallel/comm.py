"""Process start-up and the collectives that the objective, the metrics and the checkpoints use."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_large.parallel.slurm import slurm_environment


@dataclass(frozen=True)
class Rank:
    """Where this process stands: its rank, the number of ranks and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start_distributed(*, timeout_s: float = 1800.0) -> Rank:
    """Joins the process group (NCCL on GPUs, gloo on CPUs); a process started on its own is a world of one.

    Ranks come from the environment: of deepspeed, torchrun or whoever sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
    and MASTER_PORT, or of `srun` with one task per GPU (`slurm_environment`).

    On CPU machines DeepSpeed would compile a shared-memory collective at the first start (40 s, and a failure where
    there is no C++ compiler); gloo serves as well here, so that operator is declared absent.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    # torch 2.14 renamed two collectives that DeepSpeed 0.19 still calls by their old names, once per step.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if get_accelerator().device_name() == "cpu":
        # deepspeed.ops creates this dictionary on first access, in a module-level __getattr__.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(slurm_environment(os.environ))
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        os.environ.update(alone)
    device_name = get_accelerator().device_name(int(os.environ.get("LOCAL_RANK", "0")))
    device = torch.device("cpu" if get_accelerator().device_name() == "cpu" else device_name)
    if device.type != "cpu":
        get_accelerator().set_device(device.index)
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)
    return Rank(rank=dist.get_rank(), world=dist.get_world_size(), device=device)


def local_ranks() -> int:
    """How many ranks the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def stop_distributed() -> None:
    """Leaves the process group; without it a rank aborts at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _AllGather(torch.autograd.Function):
    """Concatenation over ranks whose backward sums the gradient over ranks and hands each rank its slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def _gather(x: Tensor) -> Tensor:
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(out, x.contiguous())
    return torch.cat(out)


class ProcessGroupCollectives:
    """The objective's collectives (see objective/collectives.py) over the default process group."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank.rank
        self.world = rank.world

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenates x (n, ...) of all ranks along dim 0 in rank order; differentiable for floating x."""
        if x.is_floating_point() and x.requires_grad:
            return _AllGather.apply(x)
        return _gather(x)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sums x over ranks into a new tensor without a graph."""
        total = x.detach().clone()
        dist.all_reduce(total)
        return total


def gather_objects(value: Any, rank: Rank) -> list[Any]:
    """Small Python objects of every rank, in rank order, on every rank."""
    if rank.world == 1:
        return [value]
    values: list[Any] = [None] * rank.world
    dist.all_gather_object(values, value)
    return values


def gather_on_first(value: Any, rank: Rank) -> list[Any]:
    """Python objects of every rank, in rank order, on the first rank; nothing on the others."""
    if rank.world == 1:
        return [value]
    values: list[Any] = [None] * rank.world if rank.is_first else []
    dist.gather_object(value, values if rank.is_first else None)
    return values


def from_first(value: Any, rank: Rank) -> Any:
    """The first rank's Python object on every rank; what the others pass counts for nothing."""
    if rank.world == 1:
        return value
    values = [value if rank.is_first else None]
    dist.broadcast_object_list(values, src=0, device=rank.device if rank.device.type == "cuda" else None)
    return values[0]


def highest(values: Sequence[int], rank: Rank) -> list[int]:
    """The largest of every value over all ranks, on every rank."""
    most = torch.tensor(values, device=rank.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.tolist()


def barrier() -> None:
    """Waits for every rank."""
    dist.barrier()
