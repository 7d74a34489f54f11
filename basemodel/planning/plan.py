"""What a run would do and what it would cost, here or on other machines (`--plan`, `--on`, `--budget`)."""

import math
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from basemodel.common.errors import InputError
from basemodel.common.files import free_space
from basemodel.common.output import markdown_table
from basemodel.data.hub import dataset_folder
from basemodel.data.token_files import split_files
from basemodel.planning.estimate import GIB, WORST_ERROR, Estimate, estimate
from basemodel.planning.machines import TABLE, find_machines, read_gpus
from basemodel.training.backend import choose_precision
from basemodel.training.config import optimizer_in_words
from basemodel.training.processes import World
from basemodel.training.run import Run, RunData, open_data
from basemodel.training.run_folder import read_status
from basemodel.training.schedule import SHORT_PARTS, plan_batches

PARTS = ("weights", "gradients", "buckets", "optimizer", "activations", "logits", "reserve")  # of memory


@dataclass(frozen=True)
class Elsewhere:
    """What was asked about machines that are not here."""

    on: str | None
    budget: float | None
    machines: Path | None

    def is_asked(self, only_plan: bool) -> bool:
        """Whether to plan for other machines. Raises InputError for an option without the one it needs."""
        for name, value in asdict(self).items():
            if value is not None and not only_plan:
                raise InputError(f"--{name} goes with --plan")
        asked = self.on is not None or self.budget is not None
        if self.machines is not None and not asked:
            raise InputError("--machines goes with --on or --budget")
        return asked


def open_if_here(run: Run, datasets_dir: Path | None) -> RunData | None:
    """The data of a run, if they are downloaded already."""
    if datasets_dir is None:
        return None
    folder = dataset_folder(datasets_dir, run.config.dataset)
    files = [path for split in run.config.splits for path in split_files(folder, split)]
    here = all(path.exists() for path in files)
    return open_data(run.config, run.model_config, datasets_dir) if here else None


def plan_here(run: Run, datasets_dir: Path, world: World) -> None:
    """Print what a run would do on these processes, using the data if they are already downloaded."""
    data = open_if_here(run, datasets_dir)
    plan = plan_batches(run.config, run.model_config.context_length, world.size, data and data.train.count)
    if world.is_first:
        print_plan(replace(run, data=data, plan=plan), world)


def print_plan(run: Run, world: World) -> None:
    """Print what a run does on these processes; `run.data` None: not downloaded yet."""
    config, plan, data, shape = run.config, run.plan, run.data, run.model_config
    tokens = plan.tokens(plan.steps)
    speed = read_status(run.directory).get("tokens_per_second")
    price, precision = config.usd_per_hour, choose_precision(config, world.device)
    have = f"{data.train.tokens.count:,} training tokens" if data else "not here yet"
    split = f"{plan.processes} processes x microbatch {plan.microbatch_size}"
    split += f" x accumulation {plan.accumulation}"
    free = free_space(run.directory)
    if plan.half_steps:
        split += f"; half of it in each of the first {plan.half_steps:,} steps"
    if plan.short_steps:
        split += f"; sequences of {plan.length // SHORT_PARTS} tokens in the first {plan.short_steps:,} steps"
    lines = {
        "Run": f"{run.name}, seed {config.random_seed}",
        "Model": f"{shape.parameter_count:,} parameters, context {shape.context_length:,}",
        "Data": f"{config.dataset}, {have}, tokenizer {shape.tokenizer}",
        "Hardware": f"{world.size} x {world.device_name}, precision {precision}",
        "Global batch": f"{plan.global_batch:,} sequences, {plan.tokens_per_batch:,} tokens = {split}",
        "Steps": f"{plan.steps:,}, {tokens:,} tokens" if plan.steps else "not known before the data are here",
        "Optimizer": optimizer_in_words(asdict(config)),
        "FLOPs": f"{tokens * shape.flops_per_token:.2e}, {shape.flops_per_token:,} per token",
        "Disk": checkpoints_in_words(run) + (f"; {free / 1e9:.1f} GB are free" if free < math.inf else ""),
        "ETA": "not known before a first run here; --on MACHINE estimates it for a GPU",
    }
    if config.max_seconds is not None:
        lines["Budget"] = f"ends after {config.max_seconds / 3600:.4g} hours, with the schedule at its end"
    if speed:
        seconds = min(config.max_seconds or math.inf, tokens / speed)
        lines["ETA"] = f"{timedelta(seconds=round(seconds))} at {speed:,.0f} tokens/s, as in the last run"
    if price is not None:
        cost = f"${seconds / 3600 * price:.2f} at " if speed else ""
        lines["Cost"] = f"{cost}${price:.2f} an hour"
    print_lines(lines)


def print_lines(lines: dict[str, str]) -> None:
    """Print facts, one a line."""
    for name, text in lines.items():
        print(f"{name + ':':14}{text}", flush=True)


def checkpoints_in_words(run: Run) -> str:
    """How many checkpoints the run keeps, and their size."""
    count, keep, minutes = run.saves_from(0), run.config.keep_checkpoints, run.config.checkpoint_minutes
    if keep is not None:
        count = keep + 1 if minutes else min(count, keep + 1)
    more = f", and one every {minutes:g} minutes" if minutes and keep is None else ""
    return f"{count} checkpoints, {count * run.checkpoint_bytes / 1e9:.2f} GB{more}"


def plan_on_machines(run: Run, datasets_dir: Path | None, asked: Elsewhere) -> None:
    """Print what a run would take on one machine or all, or what a budget buys. Raises InputError for an
    unknown machine, a malformed table, or a run of unknown length."""
    machines = find_machines(asked.on or "all", read_gpus(asked.machines or TABLE))
    run = replace(run, data=open_if_here(run, datasets_dir))
    if run.data is None and run.config.min_train_tokens == -1:
        problem = "min_train_tokens is -1, all there are, and the data are not here"
        raise InputError(f"{problem}; set a number, or fetch them")
    estimates, refused = [], []
    for machine in machines:
        try:
            estimates.append(estimate(run, machine, run.data and run.data.train.count))
        except InputError as error:
            refused.append(error)
    if not estimates:
        raise refused[0]
    estimates.sort(key=lambda one: (one.usd is None, one.usd or 0.0, one.hours is None, one.hours or 0.0))
    if asked.budget is not None:
        print_budget(estimates, asked.budget)
    elif len(machines) == 1:
        print_estimate(estimates[0])
    else:
        print_table(estimates)
        print()
        print_lines(files_in_words(estimates[0].run))
    print_notes(estimates, refused)


def in_dollars(usd: float | None) -> str:
    """A price, or that it is unknown."""
    return "unknown" if usd is None else f"${usd:,.2f}"


def print_table(estimates: list[Estimate]) -> None:
    """Print a Markdown table of estimates, a row per machine."""
    run = estimates[0].run
    print(f"{run.name}: {run.plan.tokens(run.plan.steps):,} tokens\n")
    columns = "machine", "largest microbatch", "used", "GiB of", "tokens/s", "MFU", "hours", "cost"
    print(markdown_table((*columns, "limited by"), map(table_row, estimates)))


def table_row(result: Estimate) -> list[object]:
    """The cells of one machine; what is not measured is marked with ~."""
    plan, mark = result.run.plan, "" if result.measured else "~"
    speed = [None, None, None]
    if result.tokens_per_second:
        speed = [f"{mark}{result.tokens_per_second:,.0f}", f"{result.mfu:.0%}", f"{mark}{result.hours:,.1f}"]
    return [
        result.machine.name,
        result.largest or "none",
        f"{plan.microbatch_size} x {plan.accumulation}",
        f"{sum(result.memory.values()) / GIB:.1f} of {result.machine.gpu.memory_gib:g}",
        *speed,
        in_dollars(None) if result.usd is None else mark + in_dollars(result.usd),
        result.limit,
    ]


def print_estimate(result: Estimate) -> None:
    """Print all that is known of a run on one machine."""
    run, gpu, plan, memory = result.run, result.machine.gpu, result.run.plan, result.memory
    used, tokens = sum(memory.values()) / GIB, plan.tokens(plan.steps)
    parts = ", ".join(f"{part} {memory[part] / GIB:.2f}" for part in PARTS if memory.get(part))
    split = f"{plan.processes} GPUs x microbatch {plan.microbatch_size} x accumulation {plan.accumulation}"
    parameters = run.model_config.parameter_count
    lines = {
        "Run": f"{run.name}, {parameters:,} parameters, {plan.steps:,} steps, {tokens:,} tokens",
        "Machine": f"{result.machine.name}, {gpu.memory_gib:g} GiB and {gpu.tflops:g} TFLOP/s each",
        "Microbatch": f"at most {result.largest}; for the global batch of {plan.global_batch:,}: {split}",
        "Memory": f"{used:.1f} of {gpu.memory_gib:g} GiB per GPU: {parts}",
        "Limited by": result.limit,
    }
    if result.tokens_per_second:
        speed = f"{result.tokens_per_second:,.0f} tokens/s in {result.precision}, {result.mfu:.0%} MFU"
        times = ", ".join(f"{part} {1000 * time:.1f} ms" for part, time in result.step_parts.items() if time)
        between = f"{result.between_steps / 60:.1f} min validation and saving"
        lines["Speed"] = f"{speed}, {'as in the last run on it' if result.measured else 'estimated'}"
        lines["Step"] = f"estimated: {times}"
        lines["Time"] = f"{result.hours:,.2f} hours, of which {between}"
    price = result.machine.usd_per_hour
    hourly = "" if price is None else f", at {in_dollars(price)} an hour"
    lines["Cost"] = f"{in_dollars(result.usd)}{hourly}"
    print_lines(lines | files_in_words(run))


def files_in_words(run: Run) -> dict[str, str]:
    """How much a machine stores and downloads."""
    here = run.data and sum(part.tokens.count for part in (run.data.train, run.data.validation) if part)
    download = 2 * (here or run.plan.tokens(run.plan.steps) / run.config.epochs)  # bytes
    least, minutes = "" if here else "at least ", download * 8 / 1e9 / 60
    return {
        "Disk": f"{checkpoints_in_words(run)} on the machine",
        "Download": f"{least}{download / 1e9:.1f} GB, {minutes:.1f} minutes at 1 Gbit/s",
    }


def print_budget(estimates: list[Estimate], usd: float) -> None:
    """Print what `usd` buys on each machine with a price, and the line of train.json for it."""
    priced = sorted((result for result in estimates if result.usd), key=lambda result: result.usd)
    if not priced:
        raise InputError("--budget needs a machine's price and speed; set usd_per_hour in machines.toml")
    rows = []
    for result in priced:
        share, plan = usd / result.usd, result.run.plan
        tokens = int(plan.steps * share) * plan.tokens_per_batch
        hours = usd / result.machine.usd_per_hour
        key = f'`"min_train_tokens": {tokens}`'
        rows.append((result.machine.name, f"~{hours:,.1f}", f"~{tokens:,}", f"{share:.0%}", key))
    print(f"What ${usd:,.2f} buys, most tokens first\n")
    print(markdown_table(("machine", "hours", "tokens", "of the run", "in train.json"), rows))
    print('\nOr set `"max_usd"` and `"usd_per_hour"` in train.json: the run then ends on budget by itself.')


def print_notes(estimates: list[Estimate], refused: list[InputError]) -> None:
    """Say which figures are estimates, and how far off estimates of published speeds were."""
    print()
    for error in refused:
        print(f"Left out: {error}")
    if any(result.measured is None for result in estimates):
        print(
            f"Estimated (~), not measured: off by at most {WORST_ERROR:.0%} for machines with published "
            "speeds (benchmarks/roofline.py). Hours are without start and download."
        )
