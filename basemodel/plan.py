"""What a run would do, in numbers that follow from its configs (`--plan`)."""

import dataclasses
import math
import shutil
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from basemodel.config import TrainConfig, optimizer_in_words
from basemodel.data import BatchPlan, RunData
from basemodel.run_folder import read_status
from gpt import GPTConfig, GPTModel

if TYPE_CHECKING:
    pass


def print_plan(
    run_dir: Path,
    config: TrainConfig,
    model_config: GPTConfig,
    data: RunData | None,
    plan: BatchPlan,
    hardware: str,
) -> None:
    """Say what a run does, in numbers that follow from its configs; `data` None: not here yet."""
    with torch.device("meta"):
        model = GPTModel(model_config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens, size = plan.steps * plan.tokens_per_step, 12 * parameters  # weights and two moments in float32
    interval = config.checkpoint_interval or config.validation_interval
    checkpoints = math.ceil(plan.steps / interval) if interval else 1
    kept = checkpoints if config.keep_checkpoints is None else min(checkpoints, config.keep_checkpoints + 1)
    speed = read_status(run_dir).get("tokens_per_second")
    speed = speed if isinstance(speed, float) and speed > 0 else None
    price = config.usd_per_hour
    have = f"{data.train.tokens.count:,} training tokens" if data else "not here yet"
    split = (
        f"{plan.processes} processes x microbatch {plan.microbatch_size} x accumulation {plan.accumulation}"
    )
    free = shutil.disk_usage(run_dir).free
    lines = {
        "Run": f"{run_dir.name}, seed {config.random_seed}",
        "Model": f"{parameters:,} parameters, context {model_config.context_length:,}",
        "Data": f"{config.dataset}, {have}, tokenizer {model_config.tokenizer}",
        "Hardware": hardware,
        "Global batch": f"{plan.global_batch:,} sequences, {plan.tokens_per_step:,} tokens = {split}",
        "Steps": f"{plan.steps:,}, {tokens:,} tokens" if plan.steps else "not known before the data are here",
        "Optimiser": optimizer_in_words(dataclasses.asdict(config)),
        "FLOPs": f"{tokens * model.flops_per_token():.2e}, {model.flops_per_token():,} per token",
        "Disk": f"{kept} checkpoints, {kept * size / 1e9:.2f} GB; {free / 1e9:.1f} GB are free",
        "ETA": "not known before a first run here",
    }
    if speed:
        lines["ETA"] = (
            f"{timedelta(seconds=round(tokens / speed))} at {speed:,.0f} tokens/s, as the last run went"
        )
    if price is not None:
        cost = f"${tokens / speed / 3600 * price:.2f} at " if speed else ""
        lines["Cost"] = f"{cost}${price:.2f} an hour"
    for name, text in lines.items():
        print(f"{name + ':':14}{text}", flush=True)
