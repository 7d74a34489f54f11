"""What an update of all weights costs: AdamW, torch's Muon, and ours, alone and shared out over processes.

    python benchmarks/optimizers.py demo original
    torchrun --nproc_per_node=2 benchmarks/optimizers.py original --microbatch 1

On random gradients, in turns, warm; medians in milliseconds, the same as a share of what a training step of
one microbatch takes without it, and the memory of what the optimizer keeps.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.distributed as dist
from common import runs_dir_option, spread
from reference import plain_optimizers

from basemodel.common.command_line import run_command
from basemodel.common.json_config import read_config
from basemodel.model.config import GPTConfig
from basemodel.training.backend import choose_precision
from basemodel.training.config import TrainConfig
from basemodel.training.optimizer import make_optimizer
from basemodel.training.processes import World, join_world
from ddp_train import Learner
from gpt import GPTModel


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def optimizers_of(
    model: GPTModel, config: TrainConfig, world: World
) -> dict[str, list[torch.optim.Optimizer]]:
    """The optimizers that are compared, each for all parameters of the model."""
    precision, alone = choose_precision(config, world.device), dataclasses.replace(world, rank=0, size=1)
    muon = dataclasses.replace(config, optimizer="muon")
    no_rate = TrainConfig.muon_learning_rate  # the default, for AdamW has no use for another
    adamw = dataclasses.replace(config, optimizer="adamw", muon_learning_rate=no_rate)
    optimizers = {
        "AdamW": [make_optimizer(model, adamw, precision, alone)],
        "torch's Muon": plain_optimizers(model, muon, fused=world.device.type in ("cpu", "cuda")),
        "Muon": [make_optimizer(model, muon, precision, alone)],
    }
    if world.size > 1:
        optimizers[f"Muon, shared by {world.size}"] = [make_optimizer(model, muon, precision, world)]
    return optimizers


def step_all(optimizers: list[torch.optim.Optimizer]) -> None:
    """Update all parameters."""
    for optimizer in optimizers:
        optimizer.step()


def state_gib(optimizers: list[torch.optim.Optimizer]) -> float:
    """What optimizers keep between two steps."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return sum(tensor.nbytes for state in states for tensor in state.values()) / 2**30


def measure(
    run_dir: Path, world: World, rounds: int, microbatch: int | None
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The milliseconds of each side's updates of a run's model, and of a step without one, by round; and the
    GiB of each side's state."""
    model_config = read_config(GPTConfig, run_dir / "model.json")
    config = read_config(TrainConfig, run_dir / "train.json")
    model = GPTModel(model_config).to(world.device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers = optimizers_of(model, config, world)
    sides: dict[str, Callable[[], object]] = {
        name: functools.partial(step_all, each) for name, each in optimizers.items()
    }
    eager = dataclasses.replace(config, compile=False, clipping_max_norm=None)
    learner = Learner(eager, model_config, dataclasses.replace(world, rank=0, size=1))
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
    return times, {name: state_gib(each) for name, each in optimizers.items()}


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
        times, states = measure(runs_dir / run, world, rounds, microbatch)
        without = statistics.median(times.pop("step without"))
        if world.is_first:
            print(f"\n{run}: {world.size} x {world.device_name}, {torch.get_num_threads()} threads each")
            print(
                f"a step of one microbatch without its update: {without:.1f} ms; torch's Muon multiplies in"
            )
            print("bf16, ours in bf16 too, or in float32 where the run's precision is fp32\n")
            print("| update by | ms (min to max) | of the step | state, GiB |")
            print("| --- | --- | --- | --- |")
            for name, each in times.items():
                middle = statistics.median(each)
                cells = spread(each, ".1f"), f"{middle / without:.0%}", f"{states[name]:.3f}"
                print(f"| {name} | {' | '.join(cells)} |")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
