"""Checkpoints: folders that are whole or not there, in safetensors and JSON alone.

    checkpoints/20261121Z101500-iteration-617/
        model.safetensors        every parameter, float32
        optimizer.safetensors    every optimiser tensor, named PARAMETER.STATE
        meta.json                where the run stood, and the size and SHA-256 of the two files
    checkpoints/latest, best     relative links, hints for people; what is good is decided by meta.json

A checkpoint is written under a temporary name and gets its own by one rename, when all of it is on the disk.
So a reader finds the old one or the new one, never a half.
"""

import base64
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from config import InputError, TrainConfig, read_json_object, require, require_plain_name
from gpt import GPTConfig

MODEL_FILE, OPTIMIZER_FILE, META_FILE = "model.safetensors", "optimizer.safetensors", "meta.json"
REQUIRED_META = {"files", "global_step", "global_batch", "model_config", "train_config", "rng", "scaler"}
TEMPORARY_PREFIX = ".incomplete-"
NAME = re.compile(r"\d{8}Z\d{6}-iteration-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint folder holds, on the CPU."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    meta: dict[str, Any]


def save_checkpoint(
    folder: Path, model: dict[str, Tensor], optimizer: dict[str, Tensor], meta: dict[str, Any]
) -> Path:
    """Write a checkpoint into `folder` and return its path; `meta` must hold `global_step`.

    Returns when it is durable. On failure (OSError, a full disk for example) nothing is left but what was
    there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _free_path(folder, meta["global_step"])
    temporary = folder / (TEMPORARY_PREFIX + path.name)
    try:
        temporary.mkdir()
        for name, tensors in ((MODEL_FILE, model), (OPTIMIZER_FILE, optimizer)):
            on_cpu = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
            safetensors.torch.save_file(on_cpu, temporary / name, metadata={"format": "pt"})
            _sync(temporary / name)
        files = {name: _fingerprint(temporary / name) for name in (MODEL_FILE, OPTIMIZER_FILE)}
        (temporary / META_FILE).write_text(
            json.dumps(meta | {"files": files}, indent=1, allow_nan=False), encoding="utf-8"
        )
        _sync(temporary / META_FILE)
        _sync(temporary)
        temporary.rename(path)
        _sync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            raise OSError(f"{path}: could not be saved: {error}") from error
        raise
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a whole checkpoint. Raises InputError, naming the file, if it is damaged or half there."""
    meta = read_json_object(path / META_FILE)
    missing = REQUIRED_META - meta.keys()
    require(
        not missing,
        f"{path / META_FILE}: is no checkpoint's meta.json: it has no {', '.join(sorted(missing))}",
    )
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        try:
            found = _fingerprint(path / name)
        except OSError:
            raise InputError(f"{path / name}: missing or unreadable") from None
        require(
            found == meta["files"].get(name),
            f"{path / name}: damaged (its size or SHA-256 is not meta.json's)",
        )
    model, optimizer = (safetensors.torch.load_file(path / name) for name in (MODEL_FILE, OPTIMIZER_FILE))
    return Checkpoint(path, model, optimizer, meta)


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest good checkpoint in `folder`, None where there is none; each bad one passed over is said."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path)
        except InputError as error:
            say(f"Passing over {path.name}: {error}")
    return None


def named_checkpoint(folder: Path, name: str) -> Checkpoint:
    """The checkpoint that a user named: `latest`, `best` or a folder's name. Raises InputError."""
    require_plain_name(name, "checkpoint")
    link = folder / name
    if name in ("latest", "best"):
        require(link.is_symlink(), f"{link}: no such link; --resume looks for the newest good checkpoint")
        name = require_plain_name(str(link.readlink()), f"{link}: the target")
    if not (folder / name).is_dir():
        have = ", ".join(path.name for path in list_checkpoints(folder)) or "none"
        raise InputError(f"{folder / name}: no such checkpoint; there are: {have}")
    return load_checkpoint(folder / name)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first. Other files and folders are left out."""
    found = [path for path in folder.glob("*-iteration-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (path.name.split("-")[0], int(NAME.fullmatch(path.name)[1])))


def point_link(folder: Path, name: str, target: Path) -> None:
    """Make `folder/name` a relative link to `target`, in one step: it is never missing or half there."""
    if (folder / name).is_dir() and not (folder / name).is_symlink():  # copied by a tool that follows links
        (folder / name).rename(folder / f"{name}-copy-{int(time.time())}")
    temporary = folder / f"{TEMPORARY_PREFIX}{name}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(folder / name)
    _sync(folder)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the one that `best` names."""
    best = (folder / "best").resolve()
    for path in list_checkpoints(folder)[:-keep]:
        if path.resolve() != best:
            shutil.rmtree(path)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors named PARAMETER.STATE, whatever the order of parameters."""
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Undo `optimizer_tensors`. Raises InputError when a tensor belongs to no parameter of the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layout = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    rest = dict(tensors)
    for index, parameter in enumerate(parameters):
        prefix = names[id(parameter)] + "."
        mine = [key for key in rest if key.startswith(prefix) and "." not in key[len(prefix) :]]
        state[index] = {key[len(prefix) :]: rest.pop(key) for key in mine}
    require(not rest, f"the optimiser has no place for '{next(iter(rest), '')}'; it is configured otherwise")
    optimizer.load_state_dict(
        layout | {"state": {index: values for index, values in state.items() if values}}
    )


def rng_state(device: torch.device) -> dict[str, str]:
    """The state of the random number generators that dropout draws from, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_rng_state(states: dict[str, str], device: torch.device) -> None:
    """Undo `rng_state`; on another kind of device the data stay exact, dropout masks do not."""
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == device.type:
            torch.get_device_module(device).set_rng_state(state)


# Keys of train.json that may change when a run goes on: they say how the same work is split, kept, checked or
# shown.
FREE_ON_RESUME = {
    *("microbatch_size", "gradient_accumulation_steps", "global_batch_size", "compile", "usd_per_hour"),
    *(
        "checkpoint_interval",
        "keep_checkpoints",
        "validation_interval",
        "validation_batches",
        "start_val_token",
    ),
}


def check_resumable(
    checkpoint: Checkpoint, model_config: GPTConfig, train_config: TrainConfig, global_batch: int
) -> None:
    """Raise InputError, naming the keys, if going on would not continue the run that was saved."""
    meta = checkpoint.meta
    for theirs, ours, name in (
        (meta["model_config"], model_config, "model.json"),
        (meta["train_config"], train_config, "train.json"),
    ):
        # A key that the checkpoint's version did not know had the effect of its default. Tuples become lists.
        theirs = {field.name: field.default for field in dataclasses.fields(ours)} | theirs
        theirs, ours = json.loads(json.dumps((theirs, dataclasses.asdict(ours)), default=str))
        changed = [key for key in ours if key not in FREE_ON_RESUME and theirs.get(key) != ours[key]]
        values = "; ".join(
            f"{key} was {json.dumps(theirs.get(key))}, is {json.dumps(ours[key])}" for key in changed
        )
        require(
            not changed,
            f"{checkpoint.path.name} is of another run than {name}: {values}; set it back or start afresh",
        )
    require(
        meta["global_batch"] == global_batch,
        f"{checkpoint.path.name} was trained with global batches of {meta['global_batch']} sequences, not "
        f"{global_batch}; set global_batch_size to {meta['global_batch']}",
    )


@functools.cache
def git_commit() -> str | None:
    """The commit of this code, None where that is not known."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _free_path(folder: Path, step: int) -> Path:
    """A name of the contract's form for a checkpoint made now."""
    stamp = datetime.now(UTC).strftime("%Y%m%dZ%H%M%S")
    # Should a checkpoint of this very second and step be there, it stays, and the new one sorts behind it.
    while (path := folder / f"{stamp}-iteration-{step}").exists():
        date, clock = stamp.split("Z")
        stamp = f"{date}Z{int(clock) + 1:06d}"
    return path


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Have the system write a file's or a folder's contents to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
