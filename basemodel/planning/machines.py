"""GPUs and the machines that hold them: what they can do and cost, by machines.toml and a user's own file."""

import dataclasses
import difflib
import functools
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from basemodel.common.errors import InputError

TABLE = Path(__file__).with_name("machines.toml")
OWN_TABLE = Path("~/.config/base-model/machines.toml")
# What marks a variant with another rate, such as "RTX 4090 Laptop GPU".
VARIANTS = re.compile(r"\b(Ti|D|Laptop|Mobile|Max-Q|NVL|H100 PCIe|V100-PCIE)\b")


@dataclass(frozen=True)
class GPU:
    """A GPU, as machines.toml explains it."""

    name: str
    cuda: str
    memory_gib: float
    tflops: float
    bandwidth_gbs: float
    link_gbs: float
    bf16: bool = True
    usd_per_hour: dict[int, float] = field(default_factory=dict)  # by number of GPUs
    source: str = ""


@dataclass(frozen=True)
class Machine:
    """Some GPUs of one kind in one machine."""

    count: int
    gpu: GPU

    @property
    def name(self) -> str:
        """As one types it: 8xA100-40."""
        return f"{self.count}x{self.gpu.name}"

    @property
    def usd_per_hour(self) -> float | None:
        """The price of the machine; None where it is not known."""
        return self.gpu.usd_per_hour.get(self.count)


def read_gpus(own: Path | None = None) -> dict[str, GPU]:
    """The GPUs of the project's table by name, with what the file `own` adds or overrides; without one, what
    OWN_TABLE does, if it exists.

    Raises InputError, naming file, GPU and key, if a file is missing or malformed.
    """
    if own is None and OWN_TABLE.expanduser().exists():
        own = OWN_TABLE.expanduser()
    known = _read_table(TABLE)
    for name, values in (_read_table(own) if own else {}).items():
        before = known.get(name, {})
        prices = before.get("usd_per_hour", {}) | values.get("usd_per_hour", {})
        known[name] = before | values | ({"usd_per_hour": prices} if prices else {})
        needed = [f.name for f in dataclasses.fields(GPU) if f.default is dataclasses.MISSING][1:-1]
        if missing := [key for key in needed if key not in known[name]]:
            raise InputError(
                f"{own}: [{name}] lacks {', '.join(missing)}; only a GPU of {TABLE.name} needs less"
            )
    return {name: GPU(name, **values) for name, values in known.items()}


def _read_table(path: Path) -> dict[str, dict[str, Any]]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    for name, values in table.items():
        where = f"{path}: [{name}]"
        if not isinstance(values, dict):
            raise InputError(f"{path}: '{name}' stands outside a GPU's table, such as [RTX3090]")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name.lower() == "all":
            raise InputError(f"{where}: a GPU's name is letters, digits, '.', '_' and '-', and not 'all'")
        for key, value in values.items():
            values[key] = _checked(where, key, value)
    return table


def _checked(where: str, key: str, value: Any) -> Any:
    """A value of a GPU's table; prices by number of GPUs. Raises InputError if it is malformed."""
    kinds = {f.name: f.type for f in dataclasses.fields(GPU) if f.name != "name"}
    if key not in kinds:
        nearest = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)[0]
        raise InputError(f"{where}: unknown key '{key}'; did you mean '{nearest}'?")
    if key == "usd_per_hour":
        prices = value.items() if isinstance(value, dict) else [("", value)]
        if not all(count.isdecimal() and int(count) > 0 and _is_positive(price) for count, price in prices):
            raise InputError(
                f"{where}: {key} must be dollars by number of GPUs, such as {{ 1 = 0.5, 8 = 4 }}"
            )
        return {int(count): float(price) for count, price in prices}
    if kinds[key] is float and not _is_positive(value):
        raise InputError(f"{where}: {key} must be a number above 0, not {value!r}")
    if kinds[key] is not float and not isinstance(value, kinds[key]):
        wanted = {str: "a text", bool: "true or false"}[kinds[key]]
        raise InputError(f"{where}: {key} must be {wanted}, not {value!r}")
    return value


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def find_machines(words: str, gpus: dict[str, GPU]) -> list[Machine]:
    """The machines that a user means: `all`, or one, such as 8xA100-40, H100 or "1 x RTX 3090".

    All are those with a price, and each GPU alone. Raises InputError, naming the nearest, for an unknown one.
    """
    if words.lower() == "all":
        return [Machine(count, gpu) for gpu in gpus.values() for count in sorted({1, *gpu.usd_per_hour})]
    number, kind = re.fullmatch(r"\s*(?:(\d+)\s*[x*]\s*)?(.*)", words, re.IGNORECASE).groups()
    found = [gpu for gpu in gpus.values() if _plain(kind) in (_plain(gpu.name), _plain(gpu.cuda))]
    found = found or [
        gpu for gpu in gpus.values() if _plain(kind) and _plain(gpu.name).startswith(_plain(kind))
    ]
    if len(found) == 1 and number != "0":
        return [Machine(int(number or 1), found[0])]
    if not found:
        near = difflib.get_close_matches(_plain(kind), map(_plain, gpus), n=3, cutoff=0.4)
        found = [gpu for gpu in gpus.values() if _plain(gpu.name) in near] or list(gpus.values())
    names = " or ".join(f"{number if number not in (None, '0') else 1}x{gpu.name}" for gpu in found)
    raise InputError(f"unknown machine '{words}'; try {names}, or all; {OWN_TABLE} adds others")


def _plain(name: str) -> str:
    return re.sub("nvidia|[^a-z0-9]", "", name.lower())


def is_device(gpu: GPU, device_name: str) -> bool:
    """Whether CUDA's name of a device is that of `gpu`; its memory may be that of another version.

    Only whole words count: an A100 is no A10, and a GB200 has another rate than a B200.
    """
    return not VARIANTS.search(device_name) and bool(re.search(rf"\b{re.escape(gpu.cuda)}\b", device_name))


@functools.cache
def _known() -> tuple[GPU, ...]:
    try:
        return tuple(read_gpus().values())
    except InputError:  # of the user's table, which is no reason to stop a training
        return tuple(GPU(name, **values) for name, values in _read_table(TABLE).items())


def gpu_of(device_name: str, memory: float = 0.0) -> GPU | None:
    """The GPU of the tables that CUDA calls `device_name` and that has about `memory` GiB; None if there is
    none."""
    found = [gpu for gpu in _known() if is_device(gpu, device_name)]
    return min(found, key=lambda gpu: abs(gpu.memory_gib - memory), default=None)


def peak_flops(device_name: str) -> float | None:
    """The peak rate of a device in FLOP/s, by its name; None for an unknown one."""
    gpu = gpu_of(device_name)
    return 1e12 * gpu.tflops if gpu else None


def current_device_name() -> str:
    """The name of this process's CUDA device; empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def device_memory_gib() -> float:
    """The memory of this process's CUDA device; 0 without one."""
    return torch.cuda.get_device_properties().total_memory / 2**30 if torch.cuda.is_available() else 0.0
