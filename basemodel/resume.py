"""Resuming: what makes a continued run the same run, and whether it may continue from a checkpoint."""

import base64
import dataclasses
import functools
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from basemodel.errors import InputError
from basemodel.run import Run

# Keys of train.json that may change when a run goes on: they say how the same work is split, kept, checked or
# shown.
FREE_ON_RESUME = {
    "microbatch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "compile",
    "usd_per_hour",
    "checkpoint_interval",
    "keep_checkpoints",
    "validation_interval",
    "validation_batches",
    "start_val_token",
}


def rng_state(device: torch.device) -> dict[str, str]:
    """The state of the random number generators that dropout draws from, as text for meta.json."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_rng_state(states: dict[str, str], device: torch.device) -> None:
    """Restore what `rng_state` returned. On another type of device, dropout masks will differ."""
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == device.type:
            torch.get_device_module(device).set_rng_state(state)


@functools.cache
def provenance() -> dict[str, Any]:
    """The versions of what computes, and this code's commit, None where that is not known."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"versions": versions, "git_commit": commit}


def check_resumable(name: str, meta: dict[str, Any], run: Run, allow: Callable[[str], None] | None) -> None:
    """Raise InputError, naming the keys, if going on from checkpoint `name` would not continue the same run.

    With `allow`, changes to the configs or the data are only reported to it. Another global batch would read
    other data, and is always refused.
    """
    changed = _changed_keys("model.json", meta["model_config"], run.model_config)
    changed += _changed_keys("train.json", meta["train_config"], run.config)
    for name, found in run.files.items():
        before, now = meta.get("data", {}).get(name, found)["sha256"], found["sha256"]
        if before != now:
            where = f"{name} of {run.config.dataset}"
            changed.append(f"{where} had the SHA-256 {before[:12]}..., has {now[:12]}...")
    if changed and allow is None:
        raise InputError(
            f"{name} belongs to another run: {'; '.join(changed)}; undo that, start from scratch, or "
            "continue anyway with --allow-config-change"
        )
    if changed:
        allow(f"Going on, as allowed, although {'; '.join(changed)}")
    if meta["global_batch"] != run.plan.global_batch:
        raise InputError(
            f"{name} was trained with global batches of {meta['global_batch']} sequences, not "
            f"{run.plan.global_batch}; set global_batch_size to {meta['global_batch']}"
        )


def _changed_keys(file: str, theirs: dict[str, Any], config: Any) -> list[str]:
    # A key that the checkpoint's version did not know had the effect of its default. Tuples become lists.
    theirs = {field.name: field.default for field in dataclasses.fields(config)} | theirs
    theirs, ours = json.loads(json.dumps((theirs, dataclasses.asdict(config)), default=str))
    return [
        f"{file}: {key} was {json.dumps(theirs[key])}, is {json.dumps(ours[key])}"
        for key in ours
        if key not in FREE_ON_RESUME and theirs[key] != ours[key]
    ]
