"""How fast and how large a run's training step is, beside the plain step of reference.py and the machine's
own limit.

    python benchmarks/throughput.py original --microbatch 2 --dropout 0
    torchrun --nproc_per_node=8 benchmarks/throughput.py 8xh100m80 --reference-microbatch 27 --json h100.json

Both sides run in one process group and in turns, warm, on the same synthetic tokens; the ratio is that of
neighbouring turns. Peak memory and the time from launch to the first finished step are taken by a process of
its own for each side. MFU is model FLOPs (6 per parameter of a matrix product and token, plus attention's)
over the best rate that a plain matrix product in the same precision reaches on this machine.
"""

import ctypes
import dataclasses
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from common import run_python, runs_dir_option, spread
from reference import PlainTrainer
from torch.nn.parallel import DistributedDataParallel

from basemodel.common.command_line import run_command
from basemodel.common.json_config import read_config
from basemodel.model.config import GPTConfig
from basemodel.model.memory import keep_freed_memory
from basemodel.training.backend import choose_precision
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World, join_world
from ddp_train import Learner

STARTED = time.time()
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
Step = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@functools.cache
def gemm_ceiling(precision: str, device: torch.device, tries: int) -> float:
    """The best rate of a plain matrix product in a precision, in FLOP/s, over a few shapes."""
    best, dtype = 0.0, DTYPES[precision]
    sizes = [8192, 4096] if device.type == "cuda" else [2048, 1024]
    for m, k, n in [(size, size, size) for size in sizes] + [(sizes[0], 768, 3072)]:
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        for _ in range(tries):
            synchronize(device)
            start = time.perf_counter()
            a @ b
            synchronize(device)
            best = max(best, 2 * m * k * n / (time.perf_counter() - start))
    return best


def make_side(side: str, config: TrainConfig, model_config: GPTConfig, world: World) -> Step:
    """A function that takes one optimiser step: "plain", or ours, "eager" or "compiled"."""
    shape = config.microbatch_size, model_config.context_length + 1
    generator = torch.Generator().manual_seed(world.rank)
    sequences = torch.randint(model_config.vocab_size, shape, generator=generator).to(world.device)
    microbatches = [sequences] * (config.gradient_accumulation_steps or 1)
    if side == "plain":
        trainer = PlainTrainer(model_config, config, world.device)
        if world.size > 1:
            device_ids = None if world.device.type == "cpu" else [world.local_rank]
            trainer.model = DistributedDataParallel(trainer.model, device_ids=device_ids)
        return lambda: trainer.step(microbatches)
    config = dataclasses.replace(config, compile=side == "compiled")
    return functools.partial(
        Learner(config, model_config, world).train_step, microbatches, config.learning_rate
    )


def measure_alone(
    side: str, config: TrainConfig, model_config: GPTConfig, started: float
) -> dict[str, float]:
    """Peak memory in GiB, and seconds from launch to the first finished step, of this process with one
    side."""
    world = join_world()
    step = make_side(side, config, model_config, world)
    step()
    synchronize(world.device)
    seconds = time.time() - started
    for _ in range(2):
        step()
    synchronize(world.device)
    if world.device.type == "cuda":
        return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, "first_step_seconds": seconds}
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_gib": kilobytes / 2**20, "first_step_seconds": seconds}


def alone(side: str, arguments: list[str], config: TrainConfig) -> dict[str, float]:
    """`measure_alone` in a process of its own."""
    command = [__file__, *arguments, "--alone", side, "--microbatch", str(config.microbatch_size)]
    env = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    env["BENCHMARK_STARTED"] = str(time.time())
    return json.loads(run_python(*command, env=env).splitlines()[-1])


def as_if_untuned() -> None:
    """Undo `keep_freed_memory` for a turn of the plain side: what glibc does by itself after a few large
    frees."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 65_536)  # M_MMAP_MAX
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)


def in_turns(sides: dict[str, Step], rounds: int, least: float, world: World) -> dict[str, list[float]]:
    """Seconds per step of each side in each round; sides take turns of at least `least` seconds."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, step in sides.items():
            if world.device.type == "cpu":
                as_if_untuned() if side == "plain" else keep_freed_memory(world.device)
                step()  # whatever the allocator has to get anew
            synchronize(world.device)
            start, steps = time.perf_counter(), 0
            while True:
                step()
                steps += 1
                synchronize(world.device)
                elapsed = world.broadcast(time.perf_counter() - start)
                if elapsed > least:
                    break
            if number:  # the first round warms up
                seconds[side].append(elapsed / steps)
    return seconds


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run")
@click.option("--microbatch", type=int, help="In place of the run's.")
@click.option("--reference-microbatch", type=int, help="Of the plain side; the same where not given.")
@click.option("--accumulation", type=int, default=1, show_default=True)
@click.option("--dropout", type=float, help="In place of the run's, for both sides.")
@click.option("--precision", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--turn", type=float, default=1.0, show_default=True, help="Least seconds of a side's turn.")
@click.option("--without", multiple=True, help="Leave a side out: plain, eager or compiled.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Keep the numbers in a file.")
@click.option("--alone", "only", hidden=True)
@runs_dir_option
def main(
    run: str,
    microbatch: int | None,
    reference_microbatch: int | None,
    accumulation: int,
    dropout: float | None,
    precision: str,
    rounds: int,
    turn: float,
    without: tuple[str, ...],
    json_file: Path | None,
    only: str | None,
    runs_dir: Path,
) -> None:
    """Measure the training step of RUN, a folder of runs/."""
    model_config = read_config(GPTConfig, runs_dir / run / "model.json")
    drop_rate = model_config.drop_rate if dropout is None else dropout
    model_config = dataclasses.replace(model_config, drop_rate=drop_rate)
    config = read_config(TrainConfig, runs_dir / run / "train.json")
    config = dataclasses.replace(
        config,
        microbatch_size=microbatch or config.microbatch_size,
        gradient_accumulation_steps=accumulation,
        global_batch_size=None,
        precision=precision,
    )
    plain_config = dataclasses.replace(config, microbatch_size=reference_microbatch or config.microbatch_size)
    configs = {"plain": plain_config, "eager": config, "compiled": config}
    configs = {side: values for side, values in configs.items() if side not in without}
    if only:
        print(
            json.dumps(
                measure_alone(only, configs[only], model_config, float(os.environ["BENCHMARK_STARTED"]))
            )
        )
        return

    arguments = [
        run,
        "--runs-dir",
        str(runs_dir),
        "--accumulation",
        str(accumulation),
        "--precision",
        precision,
    ]
    arguments += [] if dropout is None else ["--dropout", str(dropout)]
    rank = int(os.environ.get("RANK", 0))
    single = {side: alone(side, arguments, values) for side, values in configs.items()} if rank == 0 else {}
    world = join_world()
    sides = {side: make_side(side, values, model_config, world) for side, values in configs.items()}
    seconds = in_turns(sides, rounds, turn, world)
    if world.is_first:
        results = summarise(configs, model_config, seconds, single, world)
        show(results)
        if json_file:
            json_file.write_text(json.dumps(results, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


def summarise(
    configs: dict[str, TrainConfig],
    model_config: GPTConfig,
    seconds: dict[str, list[float]],
    single: dict[str, dict[str, float]],
    world: World,
) -> dict[str, Any]:
    """All numbers of one measurement, by side."""
    flops = model_config.flops_per_token
    results: dict[str, Any] = {
        "device": world.device_name,
        "processes": world.size,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
        "work": in_words(next(iter(configs.values()))),
        "sides": {},
    }
    for side, config in configs.items():
        plain = "fp16" if world.device.type == "cuda" else "fp32"
        precision = plain if side == "plain" else choose_precision(config, world.device)
        tokens = (
            config.microbatch_size * (config.gradient_accumulation_steps or 1) * model_config.context_length
        )
        speeds = [tokens * world.size / value for value in seconds[side]]
        ceiling = gemm_ceiling(precision, world.device, 2 * len(seconds[side]))
        results["sides"][side] = {
            "precision": precision,
            "microbatch": config.microbatch_size,
            "tokens_per_second": speeds,
            "step_seconds": seconds[side],
            "gemm_ceiling": ceiling,
            "mfu": statistics.median(speeds) * flops / (ceiling * world.size),
            **single[side],
        }
        if "plain" in configs:
            base = results["sides"]["plain"]["tokens_per_second"]
            results["sides"][side]["ratio"] = [ours / one for ours, one in zip(speeds, base, strict=True)]
    return results


def in_words(config: TrainConfig) -> str:
    """What a step does on both sides, and what it does on ours alone."""
    norm = config.clipping_max_norm
    both = f"{config.optimizer}, {f'clipping to {norm:g}' if norm else 'no clipping'}"
    ours = "the norm of the gradient and a check that it is finite"
    return f"on both sides {both}; on ours alone {'document masks, ' * config.document_masking}{ours}"


def show(results: dict[str, Any]) -> None:
    """Print the numbers as a Markdown table."""
    print(f"{results['processes']} x {results['device']}, torch {results['torch']}: {results['command']}")
    print(f"{results['work']}\n")
    print(
        "| side | precision, microbatch | tokens/s (min to max) | MFU of GEMM ceiling | peak GiB | first "
        "step | ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for side, row in results["sides"].items():
        speeds, ratio = row["tokens_per_second"], row.get("ratio")
        speed = spread(speeds, ",.0f")
        mfu = f"{row['mfu']:.0%} of {row['gemm_ceiling'] / 1e12:.2f} TFLOP/s"
        shown = spread(ratio) if ratio else ""
        print(
            f"| {side} | {row['precision']}, {row['microbatch']} | {speed} | {mfu} | {row['peak_gib']:.2f} | "
            f"{row['first_step_seconds']:.1f} s | {shown} |"
        )


if __name__ == "__main__":
    run_command(main)
