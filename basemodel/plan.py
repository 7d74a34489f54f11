"""What a run would do and what it would cost (`--plan`)."""

import dataclasses
import shutil
from datetime import timedelta

from basemodel.config import optimizer_in_words
from basemodel.distributed import World
from basemodel.precision import choose_precision
from basemodel.run import Run
from basemodel.run_folder import read_status
from gpt import GPTModel


def print_plan(run: Run, world: World) -> None:
    """Print what a run does on these processes; `run.data` None: not downloaded yet."""
    config, plan, data = run.config, run.plan, run.data
    model = GPTModel.outline(run.model_config)
    parameters = model.parameter_count()
    tokens, size = plan.steps * plan.tokens_per_step, 12 * parameters  # weights and two moments in float32
    checkpoints = run.saves_from(0)
    kept = checkpoints if config.keep_checkpoints is None else min(checkpoints, config.keep_checkpoints + 1)
    speed = read_status(run.directory).get("tokens_per_second")
    speed = speed if isinstance(speed, float) and speed > 0 else None
    price, precision = config.usd_per_hour, choose_precision(config, world.device)
    have = f"{data.train.tokens.count:,} training tokens" if data else "not here yet"
    split = (
        f"{plan.processes} processes x microbatch {plan.microbatch_size} x accumulation {plan.accumulation}"
    )
    free = shutil.disk_usage(run.directory).free
    lines = {
        "Run": f"{run.name}, seed {config.random_seed}",
        "Model": f"{parameters:,} parameters, context {run.model_config.context_length:,}",
        "Data": f"{config.dataset}, {have}, tokenizer {run.model_config.tokenizer}",
        "Hardware": f"{world.size} x {world.device_name}, precision {precision}",
        "Global batch": f"{plan.global_batch:,} sequences, {plan.tokens_per_step:,} tokens = {split}",
        "Steps": f"{plan.steps:,}, {tokens:,} tokens" if plan.steps else "not known before the data are here",
        "Optimizer": optimizer_in_words(dataclasses.asdict(config)),
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
