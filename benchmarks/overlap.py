"""When DDP's all-reduces start, as a share of the backward pass: the earlier, the more of them it hides.

    torchrun --nproc_per_node=2 benchmarks/overlap.py                  12 layers of 512 on two CPU cores
    torchrun --nproc_per_node=8 benchmarks/overlap.py --width 768 --heads 12 --context 1024 --vocab 50257

Each side is the run's own training step, eager and compiled; medians over the rounds. The gradients of a
bucket can leave once all of them are there.
"""

import statistics
import time

import click
import torch
import torch.distributed as dist
from common import spread
from throughput import synchronize
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from basemodel.common.command_line import run_command
from basemodel.model.config import GPTConfig
from basemodel.training.config import TrainConfig
from basemodel.training.processes import join_world
from ddp_train import Learner


def measure(learner: Learner, tokens: Tensor, rounds: int) -> tuple[list[float], list[float]]:
    """The start of each bucket's all-reduce as a share of the backward pass, and the steps' milliseconds."""
    starts: list[list[float]] = []
    marks: list[float] = []

    def note(group: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        synchronize(learner.world.device)
        marks.append(time.perf_counter())
        return allreduce_hook(group, bucket)

    learner.ddp_module.register_comm_hook(None, note)
    steps = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        learner.train_step([tokens], 1e-4)
        synchronize(learner.world.device)
        steps.append(1e3 * (time.perf_counter() - begin))
        marks.clear()
        loss = learner.ddp_module(tokens)
        synchronize(learner.world.device)
        begin = time.perf_counter()
        loss.backward()
        synchronize(learner.world.device)
        end = time.perf_counter()
        learner.optimizer.zero_grad(set_to_none=False)
        starts.append([(mark - begin) / (end - begin) for mark in marks])
    return [statistics.median(column) for column in zip(*starts[1:], strict=True)], steps[1:]


@click.command()
@click.option("--layers", default=12, show_default=True)
@click.option("--width", default=512, show_default=True)
@click.option("--heads", default=8, show_default=True)
@click.option("--context", default=256, show_default=True)
@click.option("--vocab", default=257, show_default=True)
@click.option("--microbatch", default=4, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(layers: int, width: int, heads: int, context: int, vocab: int, microbatch: int, rounds: int) -> None:
    """Print a Markdown table of both sides."""
    world = join_world()
    model = GPTConfig(vocab, context, width, heads, layers, drop_rate=0.0, qkv_bias=False)
    tokens = torch.randint(vocab, (microbatch, context + 1), device=world.device)
    if world.is_first:
        print("| side | start of each all-reduce, % of the backward pass | step, ms |\n| --- | --- | --- |")
    for side, compiled in (("eager", False), ("compiled", True)):
        config = TrainConfig("a/b", microbatch, min_train_tokens=1, compile=compiled, precision="fp32")
        shares, steps = measure(Learner(config, model, world), tokens, rounds)
        if world.is_first:
            text = ", ".join(f"{100 * share:.0f}" for share in shares)
            print(f"| {side} | {text} | {spread(steps, '.0f')} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
