"""Hashing, fsyncing, locking and atomically replacing files, on whatever file system there is."""

import codecs
import errno
import fcntl
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from basemodel.common.errors import InputError
from basemodel.common.names import LINKS
from basemodel.common.output import warned

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's size and SHA-256."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def refuse_stand_in(path: Path) -> None:
    """Raise InputError if a file is in fact a Git LFS pointer, an HTML page or an array in .npy."""
    with path.open("rb") as file:
        start = file.read(200).removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        what, fix = "a Git LFS pointer", "fetch the file with: git lfs pull"
    elif start.startswith((b"<!doctype html", b"<html")):
        what, fix = "an HTML page", "download it again, or take the text out of it"
    elif start.startswith(b"\x93numpy"):
        what, fix = "a NumPy array with a header", "write the numbers alone, with tofile()"
    else:
        return
    raise InputError(f"{path}: is {what}, not the file itself; {fix}")


def sync(path: Path) -> None:
    """fsync a file, or a folder where the file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
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


def free_space(folder: Path) -> float:
    """Free bytes on the disk of a folder, which need not exist yet; infinity if the disk does not tell."""
    usage = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))
    return usage.free if usage.total else math.inf


def link_target(link: Path) -> str | None:
    """The name that `latest` or `best` holds, as a link or as a text file; None if there is neither."""
    if link.is_symlink():
        return str(link.readlink())
    return link.read_text(encoding="utf-8", errors="replace").strip() if link.is_file() else None


def followed(path: Path) -> Path:
    """A path, also one through a `latest` or `best` that is a text file."""
    link = next((each for each in (path, *path.parents) if each.name in LINKS and each.is_file()), None)
    return link.parent / link_target(link) / path.relative_to(link) if link else path


def work_folder(target: Path) -> Path:
    """Where to put together the contents of folder `target`, which is absent or empty: beside it, for
    `publish` to rename, or inside, if it is a mount point or anything else that a rename cannot replace."""
    beside = target.resolve().with_name(f"{target.resolve().name}.incomplete")
    if not target.exists():
        return beside
    try:
        (trial := beside.with_suffix(".trial")).mkdir(exist_ok=True)
        trial.replace(target.resolve())
        return beside
    except OSError:
        shutil.rmtree(trial, ignore_errors=True)
        return target / ".incomplete"


def publish(finished: Path, target: Path, last: str) -> None:
    """Make the files in folder `finished`, in `work_folder(target)`, those of `target`, all or none, durably.

    Where a rename cannot do that, they move one by one, those whose names start with `last` at the end:
    without them, nobody takes the others for the whole.
    """
    target = target.resolve()
    for path in (*finished.iterdir(), finished, finished.parent):
        sync(path)
    if target not in finished.resolve().parents:
        finished.replace(target)
        with warned("fsync a folder"):
            sync(target.parent)
        return
    names = sorted((path.name for path in finished.iterdir()), key=lambda name: name.startswith(last))
    try:
        for name in names:
            (finished / name).rename(target / name)
            sync(target)
    except OSError:
        for name in names:
            (target / name).unlink(missing_ok=True)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder, and its parents if they are missing, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def contents(folder: Path) -> list[Path]:
    """What a folder contains, but for lost+found and work in progress, such as files of a `publish` that was
    killed; nothing if it is not a folder."""
    in_progress = not folder.is_dir() or (folder / ".incomplete/finished").is_dir()
    paths = () if in_progress else folder.iterdir()
    return sorted(path for path in paths if not path.name.startswith((".incomplete", "lost+found")))


def lock(path: Path, patience: float = 0.0, on_wait: Callable[[], None] | None = None) -> int | None:
    """Lock a file or folder until the handle that is returned is closed, or this process ends.

    Returns None if that cannot be done, as without locks. While another process holds the lock, calls
    `on_wait` once and retries for `patience` seconds. Raises BlockingIOError if it is still held then.
    """
    deadline = time.monotonic() + patience
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
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
