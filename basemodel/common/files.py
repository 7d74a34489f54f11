"""Hashing, fsyncing, locking and atomically replacing files."""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's size and SHA-256."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync(path: Path) -> None:
    """fsync a file, or a folder where the file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file atomically: readers see the old text or the new; `durable`: even after a power cut."""
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_text(text, encoding="utf-8")
    if durable:
        sync(temporary)
    temporary.replace(path)
    if durable:
        sync(path.parent)


def lock(path: Path, patience: float = 0.0, on_wait: Callable[[], None] | None = None) -> int | None:
    """Lock a file or folder until the handle that is returned is closed, or this process ends.

    Returns None if the file system has no locks. While another process holds the lock, calls `on_wait` once
    and retries for `patience` seconds. Raises BlockingIOError if the lock is still held then.
    """
    handle, deadline = os.open(path, os.O_RDONLY), time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(handle)
                raise
        except OSError:
            os.close(handle)
            return None
        if on_wait:
            on_wait()
            on_wait = None
        time.sleep(0.2)


@contextmanager
def locked(path: Path, patience: float = 0.0, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a `lock`, which see, for as long as the context lasts."""
    handle = lock(path, patience, on_wait)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
