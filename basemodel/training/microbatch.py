"""The search for the largest microbatch that fits (`-f`). It takes real steps on random tokens."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from basemodel.common.errors import RunError
from basemodel.model import memory
from basemodel.training.processes import World
from basemodel.training.run import Run
from basemodel.training.stopping import StopSignal

Learner = Any  # ddp_train.py's, which this package does not import


def find_max_microbatch(run: Run, world: World, make_learner: Callable[..., Learner]) -> int:
    """The largest microbatch_size with which the run fits into memory on every process. Takes real steps, but
    without all-reduce. Raises RunError if not even 1 fits, or when asked to stop."""
    # Run a collective first, so that its buffers are allocated before anything is measured.
    world.all_reduce(torch.zeros(1, device=world.device))
    if world.device.type == "cpu":
        memory.limit_host_memory(world.local_size)
    smallest = dataclasses.replace(run.config, microbatch_size=1)
    with memory.memory_errors_explained("the model alone does not fit; use a smaller one or fewer processes"):
        # One process, which never waits for another that ran out of memory
        alone = World(0, world.local_rank, 1, world.local_size, world.device, control=None)
        learner = make_learner(smallest, run.model_config, alone, any_size=True)
        # What DDP would hold
        learner.buckets = [torch.empty_like(p) for p in learner.model.parameters() if world.size > 1]
    with StopSignal() as stop:
        size = largest_that_fits(learner, world, stop)
    if learner.loss_module.is_compiled:  # for any size so far, but a run compiles for one
        torch.compiler.reset()
        learner.loss_module.compile()
        while size > 1 and not fits(learner, size, world):
            size -= 1
    return size


def largest_that_fits(learner: Learner, world: World, stop: StopSignal) -> int:
    """The largest microbatch size that fits on every process, found by doubling, then bisecting. Raises
    RunError if not even 1 fits, or when asked to stop."""
    fitting, too_large = 0, None
    while too_large is None or too_large - fitting > 1:
        size = (fitting + too_large) // 2 if too_large else max(1, 2 * fitting)
        fitting, too_large = (size, too_large) if fits(learner, size, world) else (fitting, size)
        if world.any(stop):
            raise RunError(f"stopped by a signal; the largest microbatch that fit so far was {fitting}")
    if fitting == 0:
        advice = "try a smaller model, a shorter context_length or fewer processes"
        raise RunError(f"not even a microbatch of 1 fits; {advice}")
    return fitting


def fits(learner: Learner, size: int, world: World) -> bool:
    """Whether a microbatch of `size` fits on every process; the first one prints the answer."""
    description = None
    try:
        description = rehearse(learner, size)
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
    fitting = None not in world.all_gather(description)
    if world.is_first:
        tqdm.write(f"microbatch {size}: " + (f"fits, {description}" if fitting else "too large"))
    return fitting


def rehearse(learner: Learner, size: int) -> str:
    """Take two steps with microbatches of `size` and validate one; describe memory use and speed."""
    config, shape, device = learner.config, learner.model.config, learner.world.device
    learner.optimizer.zero_grad()  # left over from a size that did not fit
    memory.release_memory(device)
    retries = memory.allocation_retries(device)
    tokens = torch.randint(shape.vocab_size, (size, shape.context_length + 1)).to(device)
    # With accumulation, the second microbatch's activations coexist with the first one's gradients.
    microbatches = [tokens] * (2 if config.may_accumulate else 1)
    for _ in range(2):
        start = time.perf_counter()
        learner.train_step(microbatches, learning_rate=0.0).tolist()  # waits for the device
    speed = len(microbatches) * size * shape.context_length / (time.perf_counter() - start)
    if config.validation_interval is not None:
        learner.validation_loss(tokens)
    if memory.allocation_retries(device) > retries:  # it would be slow, in every step
        raise torch.OutOfMemoryError("it fits only if memory is freed and allocated again")
    peak, free = memory.peak_memory(device), memory.headroom(device)
    return f"{peak:.2f} GiB, {speed:,.0f} tokens/s per process, {free:.1f} GiB free"
