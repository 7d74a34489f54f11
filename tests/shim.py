"""The library of faults.c: building it, and what a process that has preloaded it can do with it."""

import atexit
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")


@cache
def library_file() -> Path | None:
    """The library, compiled once for this process; None where there is no Linux or no compiler."""
    if sys.platform != "linux":
        return None
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    options = ["-shared", "-fPIC", "-O1", "-U_FORTIFY_SOURCE", "-o", folder / "faults.so", SOURCE, "-ldl"]
    try:
        subprocess.run(["cc", *options], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return folder / "faults.so"


def environment(library: Path) -> dict[str, str]:
    """What a process needs in its environment to begin with the library."""
    others = os.environ.get("LD_PRELOAD")
    return {"LD_PRELOAD": f"{library}:{others}" if others else str(library)}


def is_preloaded() -> bool:
    """Whether this process began with the library."""
    return hasattr(ctypes.CDLL(None), "arm")


def library() -> ctypes.CDLL:
    """The functions of faults.c, which this process must have preloaded."""
    found = ctypes.CDLL(None)
    found.count.restype = ctypes.c_long
    found.arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    return found


@dataclass(frozen=True)
class Call:
    """A call that the library has recorded, or a mark."""

    name: str
    path: str
    other: str  # a rename's new path, a symbolic link's target
    inode: int
    offset: int
    data: bytes
    error: int  # above 0: made by the library; below 0: the system's

    @property
    def only_reads(self) -> bool:
        return self.name in ("open", "read", "opendir", "flock", "statvfs")


def read_calls(log: Path) -> list[Call]:
    """What the library has recorded in a file."""
    rest, calls = log.read_bytes(), []
    while rest:
        line, _, rest = rest.partition(b"\n")
        name, path, other, *numbers = line.decode().split("\t")
        inode, offset, size, error = map(int, numbers)
        calls.append(Call(name, path, other, inode, offset, rest[:size], error))
        rest = rest[size:]
    return calls
