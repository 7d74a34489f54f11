"""The processes that train together: how they communicate, stop together, and notice that one has died."""

import hashlib
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from basemodel.common.command_line import available_cpus
from basemodel.common.errors import InputError, RunError
from basemodel.model import memory
from basemodel.model.devices import current_accelerator, require_kernels

Result = TypeVar("Result")

START_SECONDS = 600.0  # how long processes wait for one another to start
DIED_OR_HUNG = (
    "another training process died or hung; restart with --resume, or let torchrun restart the run with "
    "--max-restarts=3"
)
LAUNCH_ADVICE = "launch with torchrun, or `unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE` for one process"


@dataclass(frozen=True)
class World:
    """The processes that train together, one per device, and this process's place among them.

    torchrun starts a process per device on each node and tells it, in the environment, its `rank` among all
    processes and its `local_rank` on the node. Without a launcher the world is this process alone.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    # Two CPU groups for Python objects: one with the step timeout, one for slow tasks such as downloads.
    control: dist.ProcessGroup | None
    patient: dist.ProcessGroup | None = None
    timeout: float = 600.0  # seconds that processes wait for one another in a step

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and logs for all."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} ({platform.machine()})"

    def all_gather(self, value: Result, *, patiently: bool = False) -> list[Result]:
        """Every process's `value` (any small object), by rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient if patiently else self.control)
        return values

    def launchers(self) -> tuple[str, ...]:
        """The names of the torchrun launchers of this run, one per node, each unique to its launch."""
        # torchrun provides none, and the run id is often "none". But each launcher creates a folder with a
        # random name, where its processes report errors: FOLDER/attempt_0/0/error.json
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        names = {"/".join(Path(path).parts[-5:-3]) for path in self.all_gather(file) if path}
        return tuple(sorted(names))

    def agree(self, task: Callable[[], Result], *, on: bool = True) -> Result | None:
        """Run `task` on the processes where `on` is true while the others wait; return its result there. If
        it raises InputError or RunError on one process, all processes raise that error."""
        result, problem = None, None
        if on:
            try:
                result = task()
            except (InputError, RunError) as error:
                problem = error
        for error in self.all_gather(problem, patiently=True):
            if error is not None:
                raise error
        return result

    def broadcast(self, value: Result) -> Result:
        """Broadcast the first process's `value`."""
        if self.control is None:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self.control)
        return holder[0]

    def broadcast_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Broadcast the first process's CPU tensors by name; the others need no copy on disk."""
        if self.control is None:
            return tensors
        for name, shape, dtype in self.broadcast([(n, t.shape, t.dtype) for n, t in tensors.items()]):
            if name not in tensors:
                tensors[name] = torch.empty(shape, dtype=dtype)
            dist.broadcast(tensors[name], src=0, group=self.control)
        return tensors

    def any(self, flag: object) -> bool:
        """Whether `flag` is true on any process. Communicates on the CPU while the device keeps working."""
        if self.control is None:
            return bool(flag)
        flags = torch.tensor(bool(flag), dtype=torch.int32)
        dist.all_reduce(flags, group=self.control)
        return flags.item() > 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a device tensor over all processes, in place, without host synchronization. Not for gradients,
        which DDP all-reduces."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share_of(self, count: int) -> slice:
        """Which of `count` items are this process's."""
        size = -(-count // self.size)
        return slice(self.rank * size, (self.rank + 1) * size)

    def gather_shares(self, share: Tensor, count: int) -> Callable[[], Tensor]:
        """Start to gather the shares, along the first dimension, of all processes in `count` items. Returns a
        function that waits and returns them."""
        if self.size == 1:
            return lambda: share
        size = -(-count // self.size)
        padded = torch.cat([share, share.new_zeros(size - len(share), *share.shape[1:])])
        gathered = share.new_empty(self.size * size, *share.shape[1:])
        work = dist.all_gather(list(gathered.chunk(self.size)), padded, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return gathered[:count]

        return wait


@contextmanager
def joined_world(collective_timeout: float) -> Iterator[World]:
    """Join the process group, then leave it; collectives time out after `collective_timeout` seconds. A
    collective in which another process has died or hung raises RunError."""
    with lost_processes_explained():
        yield join_world(timedelta(seconds=collective_timeout))
        if dist.is_initialized():
            dist.destroy_process_group()


def join_world(timeout: timedelta = timedelta(minutes=10)) -> World:
    """Choose this process's device and join the process group; collectives time out after `timeout`. Raises
    InputError for too few devices, a GPU that PyTorch cannot use, and wrong environment variables."""
    rank, local_rank, size, local_size = place_in_the_world()
    accelerator = current_accelerator()
    if accelerator is None:
        device = torch.device("cpu")
        if local_size > 1:  # torchrun sets one thread per process, regardless of the cores
            torch.set_num_threads(max(1, available_cpus() // local_size))
    else:
        count = torch.accelerator.device_count()
        if local_size > count:
            raise InputError(f"{local_size} processes for {count} devices; use --nproc_per_node={count}")
        if local_rank >= count:
            raise InputError(f"LOCAL_RANK is {local_rank} on a node with {count} devices; {LAUNCH_ADVICE}")
        device = torch.device(accelerator.type, local_rank)
        memory.let_segments_expand()
        torch.accelerator.set_device_index(local_rank)
        require_kernels(device)
    if size == 1:
        return World(rank, local_rank, size, local_size, device, control=None)
    # NCCL's own timeout aborts the process without a message, so the watchdog must come first.
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=store_of_these_processes(rank, size),
        rank=rank,
        world_size=size,
        timeout=timeout if device.type == "cpu" else timeout + timedelta(seconds=START_SECONDS),
        device_id=None if device.type == "cpu" else device,
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    return World(rank, local_rank, size, local_size, device, control, patient, timeout.total_seconds())


def place_in_the_world() -> tuple[int, int, int, int]:
    """RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE; the defaults are those of a single process. Raises
    InputError for values that no launcher would set, as left behind by a shell or a scheduler."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    values = {name: os.environ.get(name, default) for name, default in defaults.items()}
    if not all(value.isdecimal() for value in values.values()):
        listed = ", ".join(f"{name}={value}" for name, value in values.items())
        raise InputError(f"{listed}: not whole numbers; {LAUNCH_ADVICE}")
    rank, local_rank, size, local_size = map(int, values.values())
    if rank >= size:
        raise InputError(f"RANK is {rank}, too large for a WORLD_SIZE of {size}; {LAUNCH_ADVICE}")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if size > 1 else ():
        if not os.environ.get(name):
            raise InputError(f"WORLD_SIZE is {size}, but {name} is not set; {LAUNCH_ADVICE}")
    return rank, local_rank, size, local_size


def store_of_these_processes(rank: int, size: int) -> dist.Store:
    """The rendezvous store, with a key prefix that only this generation of processes uses.

    When torchrun restarts processes, its store still has the addresses of the dead ones, and new processes
    would wait for them forever (pytorch issues 135712 and 167288). So each process publishes a random id, the
    first one publishes the list of all ids until every process has seen its own in it, and a hash of that
    list becomes the prefix. Raises RunError if not all processes have started within START_SECONDS.
    """
    deadline, own_id = time.monotonic() + START_SECONDS, uuid.uuid4().hex
    with suppress(dist.DistError):
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))
        store.set(f"member/{rank}", own_id)
        while (remaining := deadline - time.monotonic()) > 0.01:
            store.set_timeout(timedelta(seconds=remaining))
            if rank == 0:
                store.wait([f"member/{other}" for other in range(size)])  # one timeout for all of them
                store.set("members", " ".join(store.get(f"member/{other}").decode() for other in range(size)))
            members = store.get("members").decode()
            if own_id in members.split():
                generation = hashlib.sha256(members.encode()).hexdigest()
                store.set(f"{generation}/present/{rank}", "")
                if store.check([f"{generation}/present/{other}" for other in range(size)]):
                    return dist.PrefixStore(generation, store)
            time.sleep(0.01)
    raise RunError(f"process {rank} of {size} waited {START_SECONDS:.0f} s for the others to start")


@contextmanager
def lost_processes_explained() -> Iterator[None]:
    """Turn the errors of collectives in which a process has died or hung into a RunError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RunError(DIED_OR_HUNG) from error
        raise
