"""What an update of all weights costs: AdamW, torch's Muon, and ours, alone and shared out over processes.

    python benchmarks/optimizers.py demo original
    torchrun --nproc_per_node=2 benchmarks/optimizers.py original --microbatch 1

On random gradients, in turns, warm; medians in milliseconds. In the last column the same as a share of what a
training step of one microbatch takes without it.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.distributed as dist
from common import runs_dir_option, spread
from reference import plain_optimizers

from basemodel.command_line import run_command
from basemodel.config import TrainConfig
from basemodel.distributed import World, join_world
from basemodel.json_config import read_config
from basemodel.optimizer import make_optimizer
from basemodel.precision import choose_precision
from ddp_train import Learner
from gpt import GPTConfig, GPTModel


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(run_dir: Path, world: World, rounds: int, microbatch: int | None) -> dict[str, list[float]]:
    """The milliseconds of each side's updates of a run's model, and of a step without one, by round."""
    model_config = read_config(GPTConfig, run_dir / "model.json")
    config = read_config(TrainConfig, run_dir / "train.json")
    precision, alone = choose_precision(config, world.device), dataclasses.replace(world, rank=0, size=1)
    muon = dataclasses.replace(config, optimizer="muon")
    no_rate = TrainConfig.muon_learning_rate  # the default, for AdamW has no use for another
    adamw = dataclasses.replace(config, optimizer="adamw", muon_learning_rate=no_rate)
    model = GPTModel(model_config).to(world.device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    fused = world.device.type in ("cpu", "cuda")
    plain = plain_optimizers(model, muon, fused=fused)
    sides: dict[str, Callable[[], object]] = {
        "AdamW": make_optimizer(model, adamw, precision, alone).step,
        "torch's Muon": lambda: [optimizer.step() for optimizer in plain],
        "Muon": make_optimizer(model, muon, precision, alone).step,
    }
    if world.size > 1:
        sides[f"Muon, shared by {world.size}"] = make_optimizer(model, muon, precision, world).step
    eager = dataclasses.replace(config, compile=False, clipping_max_norm=None)
    learner = Learner(eager, model_config, alone)
    learner.optimizer.step = lambda: None
    shape = microbatch or config.microbatch_size, model_config.context_length + 1
    tokens = torch.randint(model_config.vocab_size, shape, device=world.device)
    sides["step without"] = lambda: learner.train_step([tokens], 0.0)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, step in sides.items():
            world.all_gather(None)
            taken = milliseconds(step, world.device)
            if turn:
                times[name].append(taken)
    return times


@click.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--rounds", type=click.IntRange(min=1), default=11, show_default=True)
@click.option(
    "--microbatch", type=click.IntRange(min=1), help="Sequences of the step; default: the run's own."
)
@runs_dir_option
def main(runs: tuple[str, ...], rounds: int, microbatch: int | None, runs_dir: Path) -> None:
    """Measure the optimisers on the models of RUNS."""
    world = join_world()
    for run in runs:
        times = measure(runs_dir / run, world, rounds, microbatch)
        without = statistics.median(times.pop("step without"))
        if world.is_first:
            print(f"\n{run}: {world.size} x {world.device_name}, {torch.get_num_threads()} threads each")
            print(
                f"a step of one microbatch without its update: {without:.1f} ms; torch's Muon multiplies in"
            )
            print("bf16, ours in bf16 too, or in float32 where the run's precision is fp32\n")
            print("| update by | ms (min to max) | of the step |")
            print("| --- | --- | --- |")
            for name, each in times.items():
                middle = statistics.median(each)
                print(f"| {name} | {spread(each, '.1f')} | {middle / without:.0%} |")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
