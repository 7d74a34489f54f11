"""Files that are hashed, fsynced and replaced atomically."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's size and SHA-256."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file atomically: readers see the old text or the new; `durable`: after a power cut too."""
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_text(text, encoding="utf-8")
    if durable:
        sync(temporary)
    temporary.replace(path)
    if durable:
        sync(path.parent)
