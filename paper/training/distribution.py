"""Several processes that train one model, as ``torchrun`` starts them: gloo on the CPU, NCCL on CUDA."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

from translution.paper.training.settings import Parallel, TrainingError


@dataclass(frozen=True, slots=True)
class Part:
    """Which share of every batch this process computes: the ``rank``-th of ``size``."""

    rank: int = 0
    size: int = 1

    def of(self, batch_size: int) -> slice:
        """Its samples of a batch, as many as every other's.

        Raises:
            TrainingError: the batch can't be divided evenly.
        """
        if batch_size % self.size:
            raise TrainingError(
                f"batch_size={batch_size} with {self.size} processes",
                "batch_size is a multiple of the number of processes",
                "Change batch_size, or --nproc-per-node of torchrun",
            )
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def batches(self, count: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Its share of ``count`` samples to evaluate: numbers int64 [b] and weights float64 [b].

        Every process gets as many batches of the same size; what fills them up has weight 0.
        """
        share = -(-count // self.size)
        first, end = self.rank * share, (self.rank + 1) * share
        for start in range(first, end, batch_size):
            numbers = torch.arange(start, min(start + batch_size, end))
            yield numbers.clamp(max=count - 1), (numbers < count).double()


@contextmanager
def processes(device: str) -> Iterator[Part]:
    """This process' part among those that torchrun started; the only one where it was not torchrun.

    Once in the life of a process: gloo does not find its peers a second time. Where something still refers to the group
    afterwards, a model or the caches of sharded parameters, gloo's threads may abort an interpreter that ends in the
    usual way (``terminate called without an active exception``); ``os._exit`` is what ends such a program.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or distributed.is_initialized():
        yield this_part()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield this_part()
    finally:
        distributed.destroy_process_group()


def this_part() -> Part:
    """Of the process group; the only one where there is none."""
    if not distributed.is_initialized():
        return Part()
    return Part(distributed.get_rank(), distributed.get_world_size())


def distribute(model: nn.Module, parallel: Parallel) -> nn.Module:
    """What to call instead of ``model``, whose parameters ``sharded`` replaces by shards; itself in one process.

    Sharded are the members of its ``nn.ModuleList``s one by one, which are gathered only while they compute, and the
    rest together.
    """
    if this_part().size == 1:
        return model
    if parallel == "data":
        return nn.parallel.DistributedDataParallel(model)
    mesh = distributed.device_mesh.init_device_mesh(next(model.parameters()).device.type, (this_part().size,))
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    return cast(nn.Module, fully_shard(model, mesh=mesh))


def mean_over_processes(value: Tensor) -> float:
    """Of a number that every process has."""
    found = value.detach().double()
    if this_part().size > 1:
        distributed.all_reduce(found)
        found /= this_part().size
    return float(found)


def ratios(totals: Mapping[str, tuple[float, float]], device: str) -> dict[str, float]:
    """Sums over processes of sums and counts, divided: the same everywhere."""
    sums = torch.tensor(list(totals.values()), dtype=torch.float64, device=device)
    if this_part().size > 1:
        distributed.all_reduce(sums)
    return {name: float(total / count) for name, (total, count) in zip(totals, sums.unbind(), strict=True)}


def wait_for_all() -> None:
    """Return when every process is here."""
    if this_part().size > 1:
        distributed.barrier()
