"""The processes that train together, as `torchrun` starts them; alone, a group of one.

Gradients are averaged by DistributedDataParallel (nccl between GPUs, gloo between CPUs), numbers are summed here. An error on
one process ends it, which closes its connections: the others fail in their next sum instead of waiting.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..machine import default_device


@dataclass(frozen=True)
class Group:
    """This process among those that train together."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints: only one does."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in float64; the same result on every one."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def from_main(self, *values: float) -> list[float]:
        """The values of the main process, on every one."""
        return self.sum(*(value if self.is_main else 0.0 for value in values))

    def wait(self) -> None:
        """Return once every process has come here."""
        self.sum(0.0)

    def parallel(self, model: Any) -> Any:
        """The model, with gradients averaged over the processes in backward."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    @contextmanager
    def local_gradients(self, model: nn.Module, is_local: bool) -> Iterator[None]:
        """With `is_local`, a backward adds to this process's gradients alone, to be averaged by a later one."""
        if is_local and isinstance(model, DistributedDataParallel):
            with model.no_sync():
                yield
        else:
            yield


@contextmanager
def process_group(device: str) -> Iterator[Group]:
    """Join the processes that torchrun started, one a GPU where there are any.

    Args:
        device: "auto", "cpu", "cuda" (the GPU of this process's LOCAL_RANK) or "cuda:N".

    Raises:
        ValueError: the device is not there.
    """
    name = default_device() if device == "auto" else device
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"cpu|cuda:\d+", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    chosen = torch.device(name)
    if chosen.type == "cuda" and chosen.index >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield Group(chosen)
        return
    # numbers are summed on the CPU, without waiting for the GPU's queue
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    yield Group(chosen, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: others may not come to it
