"""The processes that train together, and how they agree."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from config import InputError, RunError, require

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes that train together, one per device, and which of them this one is.

    torchrun starts a process for each device of each node and says in the environment which is which: `rank`
    counts over all nodes, `local_rank` within one. Without a launcher the world is this process alone.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    # For Python objects, on the CPU; patient, for one process may wait long on another.
    control: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """What a person calls the device."""
        cuda = self.device.type == "cuda"
        return (
            torch.cuda.get_device_name(self.device) if cuda else f"{self.device.type} ({platform.machine()})"
        )

    def gather(self, value: Result) -> list[Result]:
        """Every process's `value` (any small object), by rank, on every process."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, task: Callable[[], Result], *, on: bool = True) -> Result | None:
        """Run `task` on the processes where `on` holds, while the others wait; return what it returned here.

        If it raises InputError or RunError on one process, all processes raise that error.
        """
        result, problem = None, None
        if on:
            try:
                result = task()
            except (InputError, RunError) as error:
                problem = error
        for found in self.gather(problem):
            if found is not None:
                raise found
        return result

    def from_first(self, value: Result) -> Result:
        """The first process's `value` on every process."""
        if self.control is None:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self.control)
        return holder[0]

    def tensors_from_first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first process's CPU tensors by name on every process; only its disk has to hold them."""
        if self.control is None:
            return tensors
        for name, shape, dtype in self.from_first([(n, t.shape, t.dtype) for n, t in tensors.items()]):
            if name not in tensors:
                tensors[name] = torch.empty(shape, dtype=dtype)
            dist.broadcast(tensors[name], src=0, group=self.control)
        return tensors

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a device tensor over all processes, in place. Waits for nothing on a GPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def join_world() -> World:
    """Find this process's device and join the others. Raises InputError if there are too few devices."""
    rank, local_rank, size, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    )
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        device = torch.device("cpu")
        if local_size > 1:  # torchrun sets one thread per process, however many cores there are
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    else:
        count = torch.accelerator.device_count()
        require(
            local_size <= count,
            f"{local_size} processes on a node with {count} devices; --nproc_per_node={count}",
        )
        device = torch.device(accelerator.type, local_rank)
        torch.accelerator.set_device_index(local_rank)
    if size == 1:
        return World(rank, local_rank, size, local_size, device, control=None)
    dist.init_process_group(
        dist.get_default_backend_for_device(device), device_id=None if device.type == "cpu" else device
    )
    control = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    return World(rank, local_rank, size, local_size, device, control)
