"""Training in several processes, as torchrun starts them: one step, seen by all of them.

Gradients are averaged by DistributedDataParallel, batch norms take their statistics over the whole batch, and the few
numbers that all must know of a step travel in one message. Without torchrun there is one process, and nothing of this.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from liftbyimage.predict import chosen_device


@dataclass(frozen=True)
class Processes:
    """All processes of a run, seen from one of them, number `rank` of `world`, which computes on `device`."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one writes files and talks."""
        return self.rank == 0

    def add_up(self, values: Sequence[float]) -> list[float]:
        """The sums of `values` over all processes."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """The first process's value."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def parallel(self, module: nn.Module, idle_parameters: bool) -> nn.Module:
        """`module` with gradients averaged over processes; `idle_parameters`: some parameters never get one."""
        if self.world == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=idle_parameters)

    def local(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Gradients stay in this process, to be averaged with those of a later part of the step."""
        return nullcontext() if self.world == 1 else module.no_sync()

    def synchronise_batch_norm(self, module: nn.Module) -> None:
        """Every batch norm in `module` takes its statistics over all processes; names of weights stay."""
        if self.world > 1 and self.device.type == "cpu":
            for child in module.modules():
                if type(child) is nn.BatchNorm2d:
                    child.__class__ = SynchronisedBatchNorm2d
        elif self.world > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(module)


@contextmanager
def processes(device: str, precision: str = "float32") -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone. A process group that exists already is used and left.

    Args:
        device: "auto" (the GPU where there is one), "cpu" or "cuda"; under torchrun every process of a machine takes
            the GPU of its local rank.
        precision: what the device must be able to compute in.

    Raises:
        ValueError: no such device here, or one that cannot compute in that precision.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = chosen_device("train", device, precision)
    if world > 1 and chosen.type == "cuda" and chosen.index is None:
        chosen = chosen_device("train", f"cuda:{os.environ['LOCAL_RANK']}", precision)
    if world == 1:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield Processes(dist.get_rank(), world, chosen)
    finally:
        if ours:
            dist.destroy_process_group()


class _Total(torch.autograd.Function):
    """The sum of a tensor over all processes. Its gradient is that of the sum of all processes' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the batches [B, C, H, W] of all processes, on the CPU, where `torch.nn.SyncBatchNorm` does not
    run: outputs, gradients and running statistics are those of one process with all samples. B may be 0 in some.

    The mean comes first and the squared deviations from it second: one pass over x and x² would lose digits.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        count = values.new_full((1,), values.numel() // values.shape[1])
        total = _Total.apply(torch.cat([values.sum((0, 2, 3)), count]))
        count, mean = total[-1].detach(), total[:-1] / total[-1].detach()  # [], [C]
        centred = values - mean[:, None, None]
        variance = _Total.apply(centred.square().sum((0, 2, 3))) / count  # [C]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)
