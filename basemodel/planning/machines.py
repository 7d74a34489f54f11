"""GPUs and machines for --on and --budget: what they can do and cost, by machines.toml.

A plain --plan takes the price of this machine from train.json, `usd_per_hour`.
"""

import difflib
import functools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

from basemodel.common.errors import InputError
from basemodel.common.json_config import check_ranges, checked_config, key

TABLE = Path(__file__).with_name("machines.toml")
# What marks a variant with another rate, such as "RTX 4090 Laptop GPU".
VARIANTS = re.compile(r"\b(Ti|D|Laptop|Mobile|Max-Q|NVL|H100 PCIe|V100-PCIE)\b")


@dataclass(frozen=True)
class GPU:
    """A GPU, as machines.toml explains it."""

    name: str
    cuda: str
    memory_gib: float = key("GiB of one GPU", above=0)
    tflops: float = key("dense rate of matrix products", above=0)
    bandwidth_gbs: float = key("rate of its memory", above=0)
    link_gbs: float = key("rate between GPUs of one machine", above=0)
    source: str = ""
    bf16: bool = True
    usd_per_hour: dict[str, float] | None = None  # by number of GPUs

    def __post_init__(self) -> None:
        check_ranges(self)
        for count, price in (self.usd_per_hour or {}).items():
            if not count.isdecimal() or int(count) == 0 or price <= 0:
                given = f"{{ {count} = {price:g} }}"
                raise InputError(f"usd_per_hour is by number of GPUs, such as {{ 8 = 10.32 }}, not {given}")


@dataclass(frozen=True)
class Machine:
    """Some GPUs of one kind in one machine."""

    count: int
    gpu: GPU

    @property
    def name(self) -> str:
        return f"{self.count}x{self.gpu.name}"

    @property
    def usd_per_hour(self) -> float | None:
        """The price of the machine; None where it is unknown."""
        return (self.gpu.usd_per_hour or {}).get(str(self.count))


@functools.cache
def read_gpus(path: Path = TABLE) -> dict[str, GPU]:
    """The GPUs of a table, by name. Raises InputError, naming file, GPU and key, if it is malformed."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor TOML
        raise InputError(f"{path}: cannot be read: {error}") from None
    for name, values in table.items():
        if not isinstance(values, dict):
            raise InputError(f"{path}: '{name}' must be in the table of a GPU, such as [RTX3090]")
        table[name] = checked_config(GPU, {"name": name, **values}, f"{path}: [{name}]")
    return table


def find_machines(name: str, gpus: dict[str, GPU]) -> list[Machine]:
    """The machine called `name`, such as 8xA100-40 or A100-40 (one GPU). `all`: each GPU alone, and every
    machine with a price. Raises InputError, naming the nearest, for an unknown one."""
    if name.lower() == "all":
        counts = {gpu.name: {1, *map(int, gpu.usd_per_hour or {})} for gpu in gpus.values()}
        return [Machine(count, gpu) for gpu in gpus.values() for count in sorted(counts[gpu.name])]
    count, kind = re.fullmatch(r"(?:([1-9]\d*)x)?(.*)", name.lower()).groups()
    by_name = {gpu.name.lower(): gpu for gpu in gpus.values()}
    if kind in by_name:
        return [Machine(int(count or 1), by_name[kind])]
    nearest = difflib.get_close_matches(kind, by_name, n=3, cutoff=0.0)
    names = ", ".join(f"{count or 1}x{by_name[near].name}" for near in nearest)
    raise InputError(f"unknown machine '{name}'; the nearest are {names}; `all` lists every machine")


def gpu_of(device_name: str, memory_gib: float = 0.0) -> GPU | None:
    """The GPU that CUDA calls `device_name` and that has about `memory_gib`; None if the table has none. Only
    whole words count: an A100 is no A10, and a GB200 has another rate than a B200."""
    try:
        known = read_gpus().values()
    except InputError:  # which must not stop a training
        return None
    if VARIANTS.search(device_name):
        return None
    same = [gpu for gpu in known if re.search(rf"\b{re.escape(gpu.cuda)}\b", device_name)]
    return min(same, key=lambda gpu: abs(gpu.memory_gib - memory_gib), default=None)


def peak_flops(device_name: str) -> float | None:
    """The peak rate of a device in FLOP/s, by its name; None for an unknown one."""
    return 1e12 * gpu.tflops if (gpu := gpu_of(device_name)) else None


def device_memory_gib() -> float:
    """The memory of this process's CUDA device; 0 without one."""
    return torch.cuda.get_device_properties().total_memory / 2**30 if torch.cuda.is_available() else 0.0
