"""What a run would do and what it would cost, here or on other machines (`--plan`, `--on`, `--budget`)."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from basemodel.common.errors import InputError
from basemodel.data import hub, token_files
from basemodel.planning import roofline
from basemodel.planning.estimate import (
    GIB,
    Estimate,
    Estimator,
    MakeLearner,
    checkpoint_bytes,
    keep_estimates,
    planned_speed,
)
from basemodel.planning.machines import find_machines, read_gpus
from basemodel.training.backend import choose_precision
from basemodel.training.config import optimizer_in_words
from basemodel.training.processes import World
from basemodel.training.run import Run, RunData, open_data
from basemodel.training.run_folder import read_status
from basemodel.training.schedule import SHORT_PARTS, plan_batches
from gpt import GPTModel

PARTS = ("weights", "gradients", "buckets", "optimizer", "activations", "logits", "reserve")  # of memory
OPTIONS = (
    click.option("--on", metavar="MACHINE", help="With --plan: on 8xA100-40, 1xRTX3090 or such, or on all."),
    click.option(
        "--budget", type=click.FloatRange(0, min_open=True), help="With --plan: what so many dollars buy."
    ),
    click.option(
        "--machines", type=click.Path(path_type=Path), help="Your own table of machines and prices, for --on."
    ),
    click.option(
        "--download-gbits",
        type=click.FloatRange(0, min_open=True),
        default=1.0,
        show_default=True,
        help="The link's speed in Gbit/s, for --on.",
    ),
)


def plan_options(command: Callable) -> Callable:
    """Give a click command the options of plans for other machines."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def is_for_machines(only_plan: bool, options: dict[str, Any]) -> bool:
    """Whether the options ask for a plan for other machines. Raises InputError if that needs --plan."""
    for name in ("on", "budget", "machines"):
        if options[name] is not None and not only_plan:
            raise InputError(f"--{name} goes with --plan")
    if options["machines"] is not None and options["on"] is None and options["budget"] is None:
        raise InputError("--machines goes with --on MACHINE or --on all")
    return options["on"] is not None or options["budget"] is not None


def open_if_here(run: Run, datasets_dir: Path | None) -> RunData | None:
    """The data of a run, if they are downloaded already."""
    if datasets_dir is None:
        return None
    folder = hub.dataset_folder(datasets_dir, run.config.dataset)
    here = not token_files.missing_files(folder, run.config.splits)
    return open_data(run.config, run.model_config, datasets_dir) if here else None


# ------------------------------------------------------------------------------------------------------------
# Here
# ------------------------------------------------------------------------------------------------------------


def plan_here(run: Run, datasets_dir: Path, world: World) -> None:
    """Print what a run would do on these processes, using the data if they are already downloaded."""
    data = open_if_here(run, datasets_dir)
    plan = plan_batches(run.config, run.model_config.context_length, world.size, data and data.train.count)
    if world.is_first:
        print_plan(dataclasses.replace(run, data=data, plan=plan), world)


def print_plan(run: Run, world: World) -> None:
    """Print what a run does on these processes; `run.data` None: not downloaded yet."""
    config, plan, data = run.config, run.plan, run.data
    model = GPTModel.outline(run.model_config)
    tokens, size = plan.tokens(plan.steps), checkpoint_bytes(model, config)
    speed, source = speed_here(run, world)
    price, precision = config.usd_per_hour, choose_precision(config, world.device)
    have = f"{data.train.tokens.count:,} training tokens" if data else "not here yet"
    split = (
        f"{plan.processes} processes x microbatch {plan.microbatch_size} x accumulation {plan.accumulation}"
    )
    free = shutil.disk_usage(run.directory).free
    if plan.half_steps:
        split += f"; half of it in each of the first {plan.half_steps:,} steps"
    if plan.short_steps:
        split += f"; sequences of {plan.length // SHORT_PARTS} tokens in the first {plan.short_steps:,} steps"
    lines = {
        "Run": f"{run.name}, seed {config.random_seed}",
        "Model": f"{model.parameter_count():,} parameters, context {run.model_config.context_length:,}",
        "Data": f"{config.dataset}, {have}, tokenizer {run.model_config.tokenizer}",
        "Hardware": f"{world.size} x {world.device_name}, precision {precision}",
        "Global batch": f"{plan.global_batch:,} sequences, {plan.tokens_per_batch:,} tokens = {split}",
        "Steps": f"{plan.steps:,}, {tokens:,} tokens" if plan.steps else "not known before the data are here",
        "Optimizer": optimizer_in_words(dataclasses.asdict(config)),
        "FLOPs": f"{tokens * model.flops_per_token():.2e}, {model.flops_per_token():,} per token",
        "Disk": f"{checkpoints_in_words(run, size)}; {free / 1e9:.1f} GB are free",
        "ETA": "not known before a first run here; --on MACHINE estimates it for a GPU",
    }
    most = math.inf
    if config.max_seconds is not None:
        most = config.max_seconds
        lines["Budget"] = f"ends after {most / 3600:.4g} hours, with the schedule at its end"
    if speed:
        seconds = min(most, tokens / speed)
        lines["ETA"] = f"{timedelta(seconds=round(seconds))} at {speed:,.0f} tokens/s, {source}"
    if price is not None:
        cost = f"${seconds / 3600 * price:.2f} at " if speed else ""
        lines["Cost"] = f"{cost}${price:.2f} an hour"
    print_lines(lines)


def print_lines(lines: dict[str, str]) -> None:
    """Print facts, one a line."""
    for name, text in lines.items():
        print(f"{name + ':':14}{text}", flush=True)


def checkpoints_in_words(run: Run, size: int) -> str:
    """How many checkpoints of `size` bytes the run keeps."""
    count, keep = run.saves_from(0), run.config.keep_checkpoints
    kept = count if keep is None else min(count, keep + 1)
    return f"{kept} checkpoints, {kept * size / 1e9:.2f} GB"


def speed_here(run: Run, world: World) -> tuple[float | None, str]:
    """Tokens per second to expect of a run here, and where that comes from; None: nobody knows."""
    speed = read_status(run.directory).get("tokens_per_second")
    if isinstance(speed, float) and speed > 0:
        return speed, "as the last run went"
    return planned_speed(run, world.device_name)


# ------------------------------------------------------------------------------------------------------------
# On other machines
# ------------------------------------------------------------------------------------------------------------


def plan_on_machines(
    run: Run, datasets_dir: Path | None, make_learner: MakeLearner, options: dict[str, Any]
) -> None:
    """Print what a run would take on one machine or all, and what a budget buys.

    Raises InputError for an unknown machine, a malformed table, or a run of unknown length.
    """
    machines = find_machines(options["on"] or "all", read_gpus(options["machines"]))
    run_data = open_if_here(run, datasets_dir)
    if run_data is None and run.config.min_train_tokens == -1:
        raise InputError(
            "min_train_tokens is -1, all there are, and the data are not here; set a number, or fetch them"
        )
    run = dataclasses.replace(run, data=run_data)
    estimator = Estimator(run, run_data and run_data.train.count, make_learner)
    found, refused = [], []
    for machine in machines:
        try:
            found.append(estimator.on(machine))
        except InputError as error:
            if len(machines) == 1:
                raise
            refused.append(str(error))
    keep_estimates(run, found)
    found.sort(key=lambda each: (each.usd is None, each.usd or 0.0, each.hours is None, each.hours or 0.0))
    if options["budget"] is not None:
        print_budget(found, options["budget"])
    elif len(found) == 1:
        print_estimate(found[0], options["download_gbits"])
    else:
        print_table(found)
        print()
        print_lines(files_in_words(found[0].run, options["download_gbits"]))
    print_notes(found, refused)


def in_dollars(usd: float | None) -> str:
    """A price, or that it is not known."""
    return "not known" if usd is None else f"${usd:,.2f}"


def print_table(found: list[Estimate]) -> None:
    """Print a Markdown table of estimates, a row per machine."""
    run = found[0].run
    tokens = run.plan.tokens(run.plan.steps)
    print(f"{run.name}: {tokens:,} tokens\n")
    columns = (
        "machine",
        "largest microbatch",
        "used",
        "GiB of",
        "tokens/s",
        "MFU",
        "hours",
        "cost",
        "limited by",
    )
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for each in found:
        speed, mark = each.tokens_per_second, "" if each.figure else "~"
        cells = [
            each.machine.name,
            each.largest or "none",
            f"{each.run.plan.microbatch_size} x {each.run.plan.accumulation}",
            f"{sum(each.memory.values()) / GIB:.1f} of {each.machine.gpu.memory_gib:g}",
            f"{mark}{speed:,.0f}" if speed else "",
            f"{each.mfu:.0%}" if speed else "",
            f"{mark}{each.hours:,.1f}" if speed else "",
            f"{mark}{in_dollars(each.usd)}" if each.usd is not None else in_dollars(None),
            each.limit,
        ]
        print(f"| {' | '.join(map(str, cells))} |")


def print_estimate(each: Estimate, gbits: float) -> None:
    """Print all that is known of a run on one machine."""
    run, gpu, plan = each.run, each.machine.gpu, each.run.plan
    model = GPTModel.outline(run.model_config)
    tokens = plan.tokens(plan.steps)
    memory = sum(each.memory.values()) / GIB
    parts = ", ".join(f"{part} {each.memory[part] / GIB:.2f}" for part in PARTS if each.memory.get(part))
    split = f"{plan.processes} GPUs x microbatch {plan.microbatch_size} x accumulation {plan.accumulation}"
    lines = {
        "Run": f"{run.name}, {model.parameter_count():,} parameters, {plan.steps:,} steps, {tokens:,} tokens",
        "Machine": f"{each.machine.name}, {gpu.memory_gib:g} GiB and {gpu.tflops:g} TFLOP/s each",
        "Microbatch": f"at most {each.largest}; for the global batch of {plan.global_batch:,}: {split}",
        "Memory": f"{memory:.1f} of {gpu.memory_gib:g} GiB per GPU: {parts}",
        "Limited by": each.limit,
    }
    if each.tokens_per_second:
        source = f"measured by {each.figure.source}, {each.figure.date}" if each.figure else "estimated"
        times = ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in each.step_parts.items() if s)
        speed = f"{each.tokens_per_second:,.0f} tokens/s in {each.precision}, {each.mfu:.0%} MFU"
        lines["Speed"] = f"{speed}, {source}"
        lines["Step"] = f"estimated: {times}"
        lines["Time"] = (
            f"{each.hours:,.2f} hours, of which {each.between_steps / 60:.1f} min validation and saving"
        )
    price = each.machine.usd_per_hour
    hourly = "" if price is None else f", at {in_dollars(price)} an hour"
    lines["Cost"] = f"{in_dollars(each.usd)}{hourly}"
    print_lines(lines | files_in_words(run, gbits))


def files_in_words(run: Run, gbits: float) -> dict[str, str]:
    """How much a machine stores and downloads."""
    size = checkpoint_bytes(GPTModel.outline(run.model_config), run.config)
    here = run.data and sum(part.tokens.count for part in (run.data.train, run.data.validation) if part)
    download = 2 * (here or run.plan.tokens(run.plan.steps) / run.config.epochs)
    least = "" if here else "at least "
    time = f"{download * 8e-9 / gbits / 3600:.2f} hours at {gbits:g} Gbit/s"
    return {
        "Disk": f"{checkpoints_in_words(run, size)} on the machine",
        "Download": f"{least}{download / 1e9:.1f} GB, {time}",
    }


def print_budget(found: list[Estimate], usd: float) -> None:
    """Print what `usd` buy on each machine with a price, and the line of train.json for it."""
    priced = [each for each in found if each.usd]
    if not priced:
        raise InputError(
            "--budget needs a machine with a price and a speed; --machines FILE can give a price"
        )
    print(f"What ${usd:,.2f} buy, most tokens first\n")
    columns = "machine", "hours", "tokens", "of the run", "in train.json"
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for each in sorted(priced, key=lambda each: each.usd):
        step = each.run.plan.tokens_per_batch
        tokens = int(each.run.plan.steps * usd / each.usd) * step
        hours, share = usd / each.machine.usd_per_hour, usd / each.usd
        cells = (
            each.machine.name,
            f"~{hours:,.1f}",
            f"~{tokens:,}",
            f"{share:.0%}",
            f'`"min_train_tokens": {tokens}`',
        )
        print(f"| {' | '.join(cells)} |")
    print('\nOr `"max_usd"` with `"usd_per_hour"` in train.json: the run then ends in time by itself.')


def print_notes(found: list[Estimate], refused: list[str]) -> None:
    """Say what is an estimate, and how far off those of published machines were."""
    print()
    for line in refused:
        print(f"Left out: {line}")
    for each in found:
        if each.figure:
            peak = f", {each.figure.peak_gib:.1f} GiB at the peak" if each.figure.peak_gib else ""
            print(f"{each.machine.name}: measured by {each.figure.source}, {each.figure.date}{peak}")
    if any(each.figure is None for each in found):
        print(
            f"Estimated (~), not measured: off by at most {roofline.WORST_ERROR:.0%} for machines with "
            "published speeds (benchmarks/roofline.py). Hours are without start and download."
        )
