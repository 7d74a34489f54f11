"""Whether a run may go on from a checkpoint."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from basemodel.config import TrainConfig
from basemodel.errors import require
from checkpointing import Checkpoint
from gpt import GPTConfig

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
    checkpoint: Checkpoint,
    model_config: GPTConfig,
    train_config: TrainConfig,
    files: dict[str, dict[str, Any]],
    global_batch: int,
    allow: Callable[[str], None] | None,
) -> None:
    """Raise InputError, naming the keys, if going on would not continue the run that was saved.

    `files` are the data set's, with their SHA-256. With `allow`, changes of the configs and the data are only
    said to it. Another global batch would take the data from another place: that is refused always.
    """
    meta = checkpoint.meta
    changed = []
    for file, theirs, config in (
        ("model.json", meta["model_config"], model_config),
        ("train.json", meta["train_config"], train_config),
    ):
        # A key that the checkpoint's version did not know had the effect of its default. Tuples become lists.
        theirs = {field.name: field.default for field in dataclasses.fields(config)} | theirs
        theirs, ours = json.loads(json.dumps((theirs, dataclasses.asdict(config)), default=str))
        changed += [
            f"{file}: {key} was {json.dumps(theirs[key])}, is {json.dumps(ours[key])}"
            for key in ours
            if key not in FREE_ON_RESUME and theirs[key] != ours[key]
        ]
    for name, found in files.items():
        before, now = meta.get("data", {}).get(name, found)["sha256"], found["sha256"]
        if before != now:
            changed.append(
                f"{name} of {train_config.dataset} had the SHA-256 {before[:12]}..., has {now[:12]}..."
            )
    if changed and allow:
        allow(f"Going on, as allowed, although {'; '.join(changed)}")
    require(
        not changed or allow is not None,
        f"{checkpoint.path.name} is of another run: {'; '.join(changed)}; set that back, start afresh, or "
        "go on all the same with --allow-config-change",
    )
    require(
        meta["global_batch"] == global_batch,
        f"{checkpoint.path.name} was trained with global batches of {meta['global_batch']} sequences, not "
        f"{global_batch}; set global_batch_size to {meta['global_batch']}",
    )
