"""Device and host memory: measuring it, freeing it, and recognizing when it has run out."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from basemodel.common.errors import RunError

WSL_DEVICE = Path("/dev/dxg")


def let_segments_expand() -> None:
    """Have CUDA's allocator waste less memory between its blocks, unless the user has set it up. It must not
    have begun; WSL2 cannot do this (pytorch issue 192330)."""
    if not WSL_DEVICE.exists() and not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, make glibc keep large freed blocks for the next step: without the page faults of allocating
    them again it is nearly twice as fast. Memory left over from compilation is returned first."""
    libc = ctypes.CDLL(None)
    if device.type == "cpu" and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets its own mapping
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: on CUDA since `release_memory`, on a CPU since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def release_memory(device: torch.device) -> None:
    """Return free memory to the device or the system and, where possible, reset the peak."""
    gc.collect()  # tracebacks of failed attempts are cycles that keep activations
    keep_freed_memory(device)
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def allocation_retries(device: torch.device) -> int:
    """How often CUDA's allocator was out of memory at first and freed what it had kept; 0 elsewhere."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if device.type == "cuda" else 0


def headroom(device: torch.device) -> float:
    """GiB that were free at the peak on CUDA; on a CPU, GiB free now, for all processes together."""
    if device.type != "cuda":
        return _free_host_memory() / 2**30
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()) / 2**30


def _free_host_memory() -> int:
    """Free bytes, by Linux's count and the container's limit; without either, the machine's total memory."""
    free = 1024 * _kilobytes("/proc/meminfo", "MemAvailable")
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()).isdigit():
        free = min(free, int(limit) - int((group / "memory.current").read_text()))
    return free or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def limit_host_memory(processes: int) -> None:
    """Limit this process to its share of the memory that is free now: without a limit, Linux does not refuse
    an allocation but kills the process that made it."""
    in_use = 1024 * _kilobytes("/proc/self/status", "VmData")
    limit = in_use + int(0.95 * _free_host_memory() / processes)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _kilobytes(path: str, key: str) -> int:
    """A value from one of Linux's /proc files; 0 if there is none."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(key + ":")), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means out of memory, on a device or on the CPU."""
    phrases = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")
    on_cpu = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or on_cpu


@contextmanager
def memory_errors_explained(hint: str) -> Iterator[None]:
    """Turn out-of-memory errors into a RunError that says what to do."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise RunError(f"memory ran out; {hint}") from error
        raise
