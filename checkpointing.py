"""Checkpoints: folders that are complete or absent, in safetensors and JSON, without pickle.

    checkpoints/20261121Z101500-iteration-617/
        model.safetensors        every parameter, float32
        optimizer.safetensors    every optimizer tensor, named PARAMETER.STATE
        tokenizer.json           the data set's own tokenizer, if it has one
        meta.json                progress and configs; size and SHA-256 of the other files; a digest of itself
    checkpoints/latest, best     relative links, or text files with a folder's name where there are no links;
                                 for convenience: meta.json decides what is valid

A checkpoint is written to a temporary folder, fsynced and renamed, so after a crash it is either complete or
absent. Training copies the tensors to host memory and continues while a thread writes them.
"""

import errno
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from basemodel.common.errors import InputError, RunError
from basemodel.common.files import DISK_FULL, fingerprint, free_space, link_target, make_folder, sync
from basemodel.common.json_config import read_json_object
from basemodel.common.names import LINKS, META, TOKENIZER_FILE, require_plain_name
from basemodel.common.output import warned
from basemodel.model.weights import read_file, save_tensors

MODEL_FILE, OPTIMIZER_FILE, META_FILE = "model.safetensors", "optimizer.safetensors", META
REQUIRED_META = {
    *("files", "global_step", "sequences_seen", "settled", "skipped", "seconds", "best_loss", "train_loss"),
    *("val_loss", "recent_losses", "rng", "scaler", "precision"),
    *("global_batch", "model_config", "train_config"),
}
TEMPORARY_PREFIX = ".incomplete-"
NAME = re.compile(r"\d{8}Z\d{6}-iteration-(\d+)")
# Errors of a save that may pass, on a network disk for example, and the seconds before each new try.
MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EDQUOT)
PAUSES = (1, 10, 60)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of one checkpoint folder, on the CPU."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    meta: dict[str, Any]


class Saver(AbstractContextManager):
    """Saves checkpoints in a background thread, one at a time: `copy`, then `write`. Leaving its context
    waits for the save in progress."""

    def __init__(self, folder: Path, keep: int | None, log: Path, tokenizer: bytes | None = None) -> None:
        """Keep the best and the newest `keep` checkpoints in `folder`; None: all. `log` is fsynced before
        each save, so that it is never behind a checkpoint. `tokenizer` is a tokenizer.json to include."""
        self.folder, self.keep, self.log, self.tokenizer = folder, keep, log, tokenizer
        self.saved: str | None = None  # name of the last checkpoint on disk
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._job: Future[None] = Future()
        self._job.set_result(None)
        self._copied: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        self._buffers: dict[str, Tensor] = {}

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def reserve(self, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Allocate host memory for copies of the tensors, so that none is found missing hours later.

        It is one block, because pinned memory, to which CUDA copies asynchronously, comes in powers of two.
        """
        tensors = model | optimizer
        sizes = [tensor.nbytes for tensor in tensors.values()]
        layout = {"dtype": torch.uint8, "device": "cpu"}
        try:
            block = torch.empty(sum(sizes), **layout, pin_memory=any(t.is_cuda for t in tensors.values()))
        except RuntimeError:  # more than may be pinned
            block = torch.empty(sum(sizes), **layout)
        block.zero_()  # now, because the system hands out memory when it is written to
        self._buffers = {
            name: part.view(tensor.dtype).view(tensor.shape)
            for (name, tensor), part in zip(tensors.items(), block.split(sizes), strict=True)
        }

    def copy(self, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Copy the tensors to host memory. Waits for the previous save and raises its error, if any."""
        self.finish()
        if not self._buffers:
            self.reserve(model, optimizer)
        for name, tensor in (model | optimizer).items():
            self._buffers[name].copy_(tensor.detach(), non_blocking=True)
        self._copied = tuple({name: self._buffers[name] for name in part} for part in (model, optimizer))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def write(self, meta: dict[str, Any]) -> None:
        """Start writing the copies, then updating the links (`best` if `meta` says so), then pruning."""
        self._job = self._thread.submit(self._write, *self._copied, meta)

    def busy(self, seconds: float | None = None) -> bool:
        """Wait for the save in progress, at most `seconds` if given; return whether it still is."""
        return bool(wait([self._job], seconds).not_done)

    def check(self) -> None:
        """Raise the error of the last save, if it has failed."""
        if self._job.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save in progress. Raises RunError if it failed."""
        self._job.result()

    def _write(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], meta: dict[str, Any]) -> None:
        with warned("make the log durable"):
            sync(self.log)
        path = self._save(model, optimizer, meta)
        self.saved = path.name
        for name in LINKS if meta["is_best"] else ("latest",):
            with warned(f"update the link '{name}'"):
                point_link(self.folder, name, path)
        if self.keep is not None:
            with warned("delete an old checkpoint"):
                prune_checkpoints(self.folder, self.keep)

    def _save(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], meta: dict[str, Any]) -> Path:
        """Save a checkpoint, again if an error may pass. Raises RunError."""
        for pause in (*PAUSES, None):
            try:
                return save_checkpoint(self.folder, model, optimizer, meta, self.tokenizer)
            except OSError as error:
                problem = f"could not save the checkpoint of step {meta['global_step']}: {error}"
                if error.errno in DISK_FULL:
                    size = sum(tensor.nbytes for tensors in (model, optimizer) for tensor in tensors.values())
                    problem += f"; it takes {_formatted(size)}, {_formatted(free_space(self.folder))} is free"
                if pause is None or error.errno not in MAY_PASS:
                    newest = [path.name for path in list_checkpoints(self.folder)[-1:]]
                    then = f"continues from {newest[0]}" if newest else "starts from scratch"
                    raise RunError(f"{problem}; --resume {then}") from error
            tqdm.write(f"Warning: {problem}; trying again in {pause} s")
            time.sleep(pause)


def save_checkpoint(
    folder: Path,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    meta: dict[str, Any],
    tokenizer: bytes | None = None,
) -> Path:
    """Write a checkpoint of CPU tensors into `folder`, durably, and return its path.

    `meta` must have `global_step`; `tokenizer` is the content of tokenizer.json. Raises OSError if writing
    fails, for example because the disk is full, and leaves the folder as it was.
    """
    now = f"{datetime.now(UTC):%Y%m%d%H%M%S}"
    for newest in list_checkpoints(folder)[-1:]:  # comes before this one, even if the clock was ahead
        now = max(now, str(int(newest.name[:8] + newest.name[9:15]) + 1))
    path = folder / f"{now[:8]}Z{now[8:]}-iteration-{meta['global_step']}"
    temporary = folder / (TEMPORARY_PREFIX + path.name)
    try:
        make_folder(folder)
        temporary.mkdir()
        for name, tensors in ((MODEL_FILE, model), (OPTIMIZER_FILE, optimizer)):
            save_tensors(tensors, temporary / name)
        if tokenizer is not None:
            (temporary / TOKENIZER_FILE).write_bytes(tokenizer)
        for file in (written := sorted(temporary.iterdir())):
            sync(file)
        meta = meta | {"files": {file.name: fingerprint(file) for file in written}}
        text = json.dumps(meta | {"digest": _digest(meta)}, indent=1, allow_nan=False)
        (temporary / META_FILE).write_text(text, encoding="utf-8")
        sync(temporary / META_FILE)
        sync(temporary)
        temporary.rename(path)
        sync(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises InputError, naming the file, if it is damaged or incomplete."""
    meta = read_json_object(path / META_FILE)
    if missing := REQUIRED_META - meta.keys():
        raise InputError(f"{path / META_FILE}: incomplete: missing {', '.join(sorted(missing))}")
    digest = meta.pop("digest", None)
    if digest != _digest(meta):
        raise InputError(f"{path / META_FILE}: damaged (its digest does not match)")
    for name in (MODEL_FILE, OPTIMIZER_FILE, *(meta["files"].keys() & {TOKENIZER_FILE})):
        try:
            actual = fingerprint(path / name)
        except OSError:
            raise InputError(f"{path / name}: missing or unreadable") from None
        if actual != meta["files"].get(name):
            raise InputError(f"{path / name}: damaged (its size or SHA-256 differs from meta.json)")
    model, optimizer = (read_file(path / name) for name in (MODEL_FILE, OPTIMIZER_FILE))
    return Checkpoint(path, model, optimizer, meta)


def newest_checkpoint(
    folder: Path, say: Callable[[str], None], *, only_best: bool = False
) -> Checkpoint | None:
    """The newest valid checkpoint in `folder`, or None; each invalid one is reported to `say`. With
    `only_best`, the newest that was the best when it was saved."""
    for path in reversed(list_checkpoints(folder)):
        try:
            if not only_best or read_json_object(path / META_FILE).get("is_best"):
                return load_checkpoint(path)
        except InputError as error:
            say(f"Skipping {path.name}: {error}")
    return None


def named_checkpoint(folder: Path, name: str, say: Callable[[str], None]) -> Checkpoint:
    """The checkpoint that a user named: `latest`, `best` or a folder's name. A broken link is reported to
    `say`, and stands for the newest valid checkpoint or the newest that was the best. Raises InputError."""
    if name not in LINKS:
        return load_checkpoint(require_named(folder, name))
    try:
        target = link_target(folder / name)
        if target is None or target in LINKS:
            raise InputError(f"{folder / name}: does not point to a checkpoint")
        return load_checkpoint(require_named(folder, target))
    except InputError as error:
        say(f"Skipping {name}: {error}")
    checkpoint = newest_checkpoint(folder, say, only_best=name == "best")
    if checkpoint is None:
        raise InputError(f"{folder}: no valid checkpoint; start without '{name}'")
    return checkpoint


def require_named(folder: Path, name: str) -> Path:
    """The path of the checkpoint that a user named. Raises InputError if `folder` does not have it. The names
    of the two links always pass."""
    require_plain_name(name, "checkpoint")
    if name in LINKS:
        return folder / name
    if (folder / name).is_symlink():
        raise InputError(f"{folder / name}: is a link; name the checkpoint folder itself")
    if not (folder / name).is_dir():
        available = ", ".join(path.name for path in list_checkpoints(folder)) or "none"
        raise InputError(f"{folder / name}: no such checkpoint; available: {available}")
    return folder / name


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, ignoring links and anything else."""
    checkpoints = [
        path
        for path in folder.glob("*-iteration-*")
        if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(checkpoints, key=lambda path: (path.name.split("-")[0], int(NAME.fullmatch(path.name)[1])))


def point_link(folder: Path, name: str, target: Path) -> None:
    """Point the relative link `folder/name` to `target`, atomically."""
    if (folder / name).is_dir() and not (folder / name).is_symlink():  # copied by a tool that follows links
        (folder / name).rename(folder / f"{name}-copy-{int(time.time())}")
    temporary = folder / f"{TEMPORARY_PREFIX}{name}"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target.name)
    except OSError:  # exFAT, Google Drive and others have no links
        temporary.write_text(target.name, encoding="utf-8")
    temporary.replace(folder / name)
    sync(folder)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep`, the last one saved as best, and the target of `best`."""
    paths = list_checkpoints(folder)
    keepers = {*paths[-keep:], *[path for path in paths if _was_best(path)][-1:]}
    keepers.add(folder / (link_target(folder / "best") or ""))
    for path in paths:
        if path not in keepers:
            # Renamed first: a half-deleted checkpoint must not look valid. What stays goes at the next start.
            shutil.rmtree(path.rename(folder / (TEMPORARY_PREFIX + path.name)), ignore_errors=True)


def _was_best(path: Path) -> bool:
    try:
        return bool(read_json_object(path / META_FILE).get("is_best"))
    except InputError:
        return False


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves left in a locked run's checkpoints/, and nothing else."""
    for path in folder.glob(TEMPORARY_PREFIX + "*"):
        name = path.name.removeprefix(TEMPORARY_PREFIX)
        if name in LINKS and (path.is_symlink() or path.is_file()):
            path.unlink()
        elif path.is_dir() and not path.is_symlink() and NAME.fullmatch(name):
            shutil.rmtree(path, ignore_errors=True)


def try_saving(folder: Path) -> None:
    """Raise InputError if `folder` cannot hold checkpoints, by saving an empty one there and deleting it."""
    trial = folder / f"{TEMPORARY_PREFIX}trial"
    try:
        shutil.rmtree(trial, ignore_errors=True)
        save_checkpoint(trial, {}, {}, {"global_step": 0})
    except OSError as error:
        raise InputError(f"{folder}: cannot hold checkpoints: {error}") from None
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def require_space(folder: Path, to_come: int, keep: int | None, size: int) -> None:
    """Raise InputError unless the disk has room for `to_come` checkpoints of `size` bytes. With `keep`, at
    most `keep` + 2 exist at a time: the newest, the best, and the one being written."""
    existing = len(list_checkpoints(folder))
    checkpoints = to_come if keep is None else max(1, min(to_come, keep + 2 - existing))
    needed, free = checkpoints * size, free_space(folder)
    if needed > free:
        raise InputError(
            f"{folder}: {checkpoints} checkpoints take {_formatted(needed)}, but only {_formatted(free)} is "
            "free; free some space, or set keep_checkpoints or a larger checkpoint_interval in train.json"
        )


def _formatted(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named PARAMETER.STATE, independent of the order of parameters."""
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Load what `optimizer_tensors` returned. Raises InputError for a tensor that belongs to no parameter. A
    parameter whose state comes from another kind of optimizer starts with fresh state."""
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        saved.setdefault(name, {})[kind] = tensor
    for name, parameter in model.named_parameters():
        own_state, state = saved.pop(name, {}), optimizer.state[parameter]
        for key in state if own_state.keys() == state.keys() else ():
            state[key].copy_(own_state[key])  # in place, because Muon's are views
    if saved:
        first = next(key for key in tensors if key.rpartition(".")[0] in saved)
        raise InputError(f"the optimizer has no parameter for '{first}'; it is configured differently")


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
