"""The search for the largest microbatch that fits (`-f`)."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from basemodel.common.errors import RunError
from basemodel.model import memory
from basemodel.training.processes import World
from basemodel.training.stopping import StopSignal


class Rehearsal(World):
    """One process with the buffers of several, which never waits for one that ran out of memory."""

    def broadcast_shards(self, shares: list[list[Tensor]]) -> None:
        """Allocate what sharing out the updates of `shares` takes."""
        _ = [torch.cat([tensor.flatten() for tensor in share]) for share in shares]


def rehearsal_of(world: World) -> World:
    """The world in which to try sizes: without communication, but with its buffers."""
    if world.size == 1:
        return world
    return Rehearsal(0, world.local_rank, 1, world.local_size, world.device, control=None)


def largest_that_fits(try_size: Callable[[int], str], world: World, stop: StopSignal) -> int:
    """The largest microbatch size that fits on every process, found by doubling, then bisecting.

    `try_size` takes real steps at a size and describes them. Raises RunError if not even 1 fits, or when
    asked to stop.
    """
    fitting, too_large = 0, None
    while too_large is None or too_large - fitting > 1:
        size = (fitting + too_large) // 2 if too_large else max(1, 2 * fitting)
        fitting, too_large = (size, too_large) if fits(try_size, size, world) else (fitting, size)
        if world.any(stop):
            raise RunError(f"stopped by a signal; the largest microbatch that fit so far is {fitting}")
    if fitting == 0:
        raise RunError(
            "not even a microbatch of 1 fits; a smaller model, context_length or number of processes would"
        )
    return fitting


def fits(try_size: Callable[[int], str], size: int, world: World) -> bool:
    """Whether a microbatch of `size` fits on every process; the first one prints the answer."""
    description = None
    try:
        description = try_size(size)
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
    fitting = all(each is not None for each in world.all_gather(description))
    if world.is_first:
        tqdm.write(f"microbatch {size}: " + (f"fits, {description}" if fitting else "too large"))
    return fitting


def rehearse(learner: Any, size: int) -> str:
    """Let a Learner take two steps with microbatches of `size`, validate one; describe memory and speed."""
    config, shape, device = learner.config, learner.model.config, learner.world.device
    learner.optimizer.zero_grad()  # left by a size that did not fit
    memory.release_memory(device)
    tokens = torch.randint(shape.vocab_size, (size, shape.context_length + 1)).to(device)
    # With accumulation, gradients exist beside the activations of the second microbatch.
    accumulates = config.global_batch_size is not None or config.gradient_accumulation_steps not in (None, 1)
    microbatches = [tokens] * (2 if accumulates else 1)
    for _ in range(2):
        start = time.perf_counter()
        learner.train_step(microbatches, learning_rate=0.0).tolist()  # waits for the device
    speed = len(microbatches) * size * shape.context_length / (time.perf_counter() - start)
    if config.validation_interval is not None:
        learner.validation_loss(tokens)
    peak, left = memory.peak_memory(device), memory.headroom(device)
    return f"{peak:.2f} GiB, {speed:,.0f} tokens/s per process, {left:.1f} GiB left"
