"""Files that are whole or not there, and on the disk when they are said to be."""

import hashlib
import os
from pathlib import Path
from typing import Any


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's size and SHA-256."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync(path: Path) -> None:
    """Have the system write a file's or a folder's contents to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a file in one step: a reader finds the old text or the new; `durable`: after a power cut too."""
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_text(text, encoding="utf-8")
    if durable:
        sync(temporary)
    temporary.replace(path)
    if durable:
        sync(path.parent)
