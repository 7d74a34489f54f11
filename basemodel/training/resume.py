"""Resuming: whether a run should continue, whether it may, and what makes it the same run."""

import base64
import dataclasses
import functools
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import checkpointing
from basemodel.common.errors import InputError
from basemodel.common.json_config import with_defaults
from basemodel.common.names import MODEL_JSON, TRAIN_JSON
from basemodel.data.token_files import whole_set
from basemodel.model.weights import load_tensors
from basemodel.training import run_folder
from basemodel.training.processes import World
from basemodel.training.run import Run
from gpt import GPTModel

# Keys of train.json that may change when a run resumes: they say how the same work is ...
FREE_ON_RESUME = {
    *("microbatch_size", "gradient_accumulation_steps", "global_batch_size", "compile"),  # computed
    *("usd_per_hour", "max_hours", "max_usd"),  # paid for
    *("checkpoint_interval", "checkpoint_minutes", "keep_checkpoints"),  # saved
    *("validation_interval", "validation_batches", "start_val_token"),  # checked
    *("sample_interval", "sample_prompts", "report_to"),  # shown
}


def advice_after_divergence(run: Run) -> str:
    """What to do about a run that has diverged."""
    last = checkpointing.list_checkpoints(run.checkpoints)[-1:]
    where = f"the last checkpoint is {last[0].name}" if last else "there is no checkpoint yet"
    return f"{where}; try a lower learning_rate, a warm-up or clipping_max_norm"


def was_started_before(run: Run) -> bool:
    """Whether torchrun has restarted the run's processes, after a failure or because a node joined or left.

    TORCHELASTIC_RESTART_COUNT counts only the failures that this node's launcher has seen. But at least one
    launcher survives every restart, and status.json names the previous ones.
    """
    known = run_folder.read_status(run.directory).get("launchers") or []
    failed_before = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return failed_before or any(launcher in known for launcher in run.launchers)


def find_checkpoint(run: Run, name: str | None, allow_change: bool) -> checkpointing.Checkpoint | None:
    """The checkpoint to continue from, after a check that it is this run's; None if there is none."""
    if name is None:
        return None
    if name == "newest":
        checkpoint = checkpointing.newest_checkpoint(run.checkpoints, tqdm.write)
    else:
        checkpoint = checkpointing.named_checkpoint(run.checkpoints, name, tqdm.write)
    if checkpoint is None:
        return None
    check_resumable(checkpoint.path.name, checkpoint.meta, run, tqdm.write if allow_change else None)
    if checkpoint.meta["global_step"] > run.plan.steps:
        raise InputError(
            f"{checkpoint.path.name} is past the run's last step, {run.plan.steps:,}; raise "
            "min_train_tokens, or name an earlier checkpoint"
        )
    return checkpoint


def check_space(run: Run, step: int) -> None:
    """Raise InputError if the disk has no room for the checkpoints still to be written after step `step`."""
    to_come, keep = run.saves_from(step), run.config.keep_checkpoints
    if run.config.checkpoint_minutes and keep:  # nobody knows how many, but no more exist at a time
        to_come = keep + 2
    checkpointing.require_space(run.checkpoints, to_come, keep, run.checkpoint_bytes)


def rng_state(device: torch.device) -> dict[str, str]:
    """The state of the random number generators that dropout draws from, as text for meta.json."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def restore_tensors(
    model: GPTModel,
    optimizer: torch.optim.Optimizer,
    checkpoint: checkpointing.Checkpoint | None,
    world: World,
) -> dict[str, Any]:
    """Load on all processes a checkpoint that only the first one holds; return its meta."""
    meta, source = world.broadcast((checkpoint.meta, str(checkpoint.path)) if checkpoint else None)
    load_tensors(model, world.broadcast_tensors(checkpoint.model if checkpoint else {}), source)
    tensors = world.broadcast_tensors(checkpoint.optimizer if checkpoint else {})
    checkpointing.load_optimizer_tensors(model, optimizer, tensors)
    return meta


def set_rng_state(meta: dict[str, Any], world: World, seed: int) -> str:
    """Restore the `rng_state` of each process; return a message for the user, or an empty string. With
    another type of device or number of processes, dropout masks will differ."""
    states = meta["rng"]
    if len(states) != world.size:
        fresh = np.random.SeedSequence((seed, meta["global_step"], world.rank))
        torch.manual_seed(int(fresh.generate_state(1)[0]))
        return (
            f"The number of processes changed from {len(states)} to {world.size}: same data order, different "
            "dropout masks"
        )
    for name, text in states[world.rank].items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == world.device.type:
            torch.get_device_module(world.device).set_rng_state(state)
    return ""


@functools.cache
def provenance() -> dict[str, Any]:
    """The versions of Python and its packages, and this code's commit (None if unknown)."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"versions": versions, "git_commit": commit}


def check_resumable(name: str, meta: dict[str, Any], run: Run, allow: Callable[[str], None] | None) -> None:
    """Raise InputError, naming the changes, unless checkpoint `name` belongs to the same run. With `allow`,
    changes to the configs or the data are only reported to it, but a different global batch, which would
    read different data, is always refused."""
    changed = _changed_keys(MODEL_JSON, meta["model_config"], run.model_config)
    changed += _changed_keys(TRAIN_JSON, meta["train_config"], run.config)
    changed += _changed_data(meta.get("data", {}), run)
    if changed and allow is None:
        raise InputError(
            f"{name} belongs to another run: {'; '.join(changed)}; undo the changes, start from scratch, or "
            "continue anyway with --allow-config-change"
        )
    if changed:
        allow(f"Continuing despite changes, as requested: {'; '.join(changed)}")
    if meta["global_batch"] != run.plan.global_batch:
        raise InputError(
            f"{name} was trained with global batches of {meta['global_batch']} sequences, not "
            f"{run.plan.global_batch}; set global_batch_size to {meta['global_batch']}"
        )
    seen, step = meta["sequences_seen"], meta["global_step"]
    if seen != run.plan.sequences(step):
        raise InputError(
            f"{name} had read {seen:,} sequences after {step:,} steps, but this run would have read "
            f"{run.plan.sequences(step):,}; half_batch_percent x min_train_tokens must come to the same "
            "number of tokens as before"
        )


def _changed_data(theirs: dict[str, dict[str, Any]], run: Run) -> list[str]:
    dataset, changed = run.config.dataset, []
    for split in run.config.splits:
        before, now = (whole_set(files, split, dataset) for files in (theirs, run.files))
        if before and now and before != now:  # without validation before, there is nothing to compare
            changed.append(f"the {split} tokens of {dataset} were in {before[-1]} and are now in {now[-1]}")
    for name in sorted(run.files.keys() & theirs.keys()):
        before, now = theirs[name]["sha256"], run.files[name]["sha256"]
        if before != now:
            changed.append(f"the SHA-256 of {name} in {dataset} was {before[:12]}..., now {now[:12]}...")
    return changed


def _changed_keys(file: str, theirs: dict[str, Any], config: Any) -> list[str]:
    # A key that the checkpoint's version did not have acts as its default. Tuples become lists.
    theirs = with_defaults(type(config), theirs)
    theirs, ours = json.loads(json.dumps((theirs, dataclasses.asdict(config)), default=str))
    return [
        f"{file}: {key} was {json.dumps(theirs[key])}, now {json.dumps(ours[key])}"
        for key in ours
        if key not in FREE_ON_RESUME and theirs[key] != ours[key]
    ]
