"""What each global step does: which sequences each process reads, and the learning rate."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from basemodel.common.errors import InputError
from basemodel.training.config import TrainConfig

SHORT_PARTS = 4


@dataclass(frozen=True)
class BatchPlan:
    """Which sequences each process reads in each step; data/sequences.py has the tokens of each sequence.

    Steps count from 0 here, and in logs from 1: what step 100 reads shows in the line of step 101.
    Pure arithmetic: the g-th global batch has the same sequences in the same order whatever the number of
    processes, the microbatch size and the accumulation. The first `half_steps` have half the size: while the
    loss falls fast, gradients agree, and many small steps get further than a few large ones (McCandlish et
    al. 2018). The first `short_steps` cut each sequence into `SHORT_PARTS`: what a model learns first depends
    on the last few tokens only (Press et al. 2021, Shortformer).
    """

    microbatch_size: int
    accumulation: int
    processes: int
    length: int
    steps: int
    half_steps: int = 0
    short_steps: int = 0

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step, after the first `half_steps`."""
        return self.microbatch_size * self.accumulation * self.processes

    @property
    def tokens_per_batch(self) -> int:
        """Training tokens in a full global batch."""
        return self.global_batch * self.length

    def batches(self, steps: int) -> float:
        """The data that the first `steps` steps read, in full global batches."""
        return steps - min(steps, self.half_steps) / 2

    def sequences(self, steps: int) -> int:
        return int(self.batches(steps) * self.global_batch)

    def tokens(self, steps: int) -> int:
        return self.sequences(steps) * self.length

    def steps_for(self, batches: float) -> int:
        """The number of steps that read at most `batches` full global batches."""
        return int(batches + min(batches, self.half_steps / 2))

    def microbatches(self, step: int, rank: int) -> Iterator[tuple[int, int]]:
        """Yield (first sequence, count) for each microbatch of process `rank` in step `step` (from 0)."""
        size, turns = self.microbatch_size, self.accumulation
        if step < self.half_steps:
            size, turns = (size, turns // 2) if turns % 2 == 0 else (size // 2, turns)
        for turn in range(turns):
            yield self.sequences(step) + (turn * self.processes + rank) * size, size

    def cut(self, sequences: Tensor, step: int) -> Tensor:
        """Cut sequences (B, T + 1) as step `step` trains on them: not at all, or into (4B, T / 4 + 1)."""
        if step >= self.short_steps:
            return sequences
        length = self.length // SHORT_PARTS
        return sequences.unfold(1, length + 1, length).flatten(0, 1)

    def shapes(self) -> set[tuple[int, ...]]:
        """The shapes, (sequences, tokens + 1), of the microbatches that the steps train on."""
        changes = (min(step, self.steps - 1) for step in (0, self.half_steps, self.short_steps))
        return {
            self.cut(torch.empty(count, self.length + 1, device="meta"), step).shape
            for step in changes
            for _, count in self.microbatches(step, rank=0)
        }


def plan_batches(config: TrainConfig, length: int, processes: int, per_epoch: int | None) -> BatchPlan:
    """Plan the steps of a run over `per_epoch` sequences of `length` tokens (None: unknown). Raises
    InputError if the global batch does not divide evenly or there are too few tokens."""
    accumulation = config.accumulation_for(processes)
    global_batch = config.microbatch_size * accumulation * processes
    available = None if per_epoch is None else per_epoch * config.epochs
    if config.min_train_tokens == -1:
        batches = (available or 0) // global_batch
    else:
        batches = -(-config.min_train_tokens // (global_batch * length))  # rounded up
    needed = max(1, batches) * global_batch
    if available is not None and needed > available:
        less = "min_train_tokens to -1 to use all of them"
        if available < global_batch:  # not enough for a single step
            less = f"a global batch of at most {available}, with global_batch_size or microbatch_size"
        raise InputError(
            f"{config.dataset} has {available:,} sequences of {length} tokens in {config.epochs} epochs "
            f"after start_train_token {config.start_train_token}, but the run needs {needed:,}; set "
            f"epochs to {math.ceil(needed / per_epoch)}, or {less}"
        )
    halved = round(batches * config.half_batch_percent / 100)
    if halved and config.microbatch_size * accumulation % 2:
        raise InputError(
            f"half_batch_percent halves the {config.microbatch_size} x {accumulation} sequences that a "
            "process reads in a step; make their number even, or set half_batch_percent to 0"
        )
    if config.short_sequence_percent and length % SHORT_PARTS:
        raise InputError(
            f"short_sequence_percent cuts sequences into {SHORT_PARTS} parts; make context_length a multiple "
            f"of {SHORT_PARTS}, not {length}, or set short_sequence_percent to 0"
        )
    steps = batches + halved
    plan = BatchPlan(config.microbatch_size, accumulation, processes, length, steps, half_steps=2 * halved)
    short = plan.steps_for(round(batches * config.short_sequence_percent / 100))
    return dataclasses.replace(plan, short_steps=short)


def learning_rate_at(batch: float, batches: float, config: TrainConfig) -> float:
    """The learning rate of full global batch number `batch` (from 0) of `batches`.

    "constant" never changes. The others start with a linear warm-up over warmup_period_percent of them, which
    reaches the peak at its last. Then "cosine" falls along half a cosine to a tenth of the peak at the
    last batch; "wsd" stays at the peak and falls linearly over the last decay_period_percent of the batches,
    reaching zero one batch after the last (Hägele et al. 2024).
    """
    peak = config.learning_rate
    if config.lr_schedule in (None, "constant"):
        return peak
    warmup = round(batches * config.warmup_period_percent / 100)
    if batch < warmup:
        return peak * (batch + 1) / warmup
    if config.lr_schedule == "wsd":
        decay = round(batches * config.decay_period_percent / 100)
        return peak * min(1.0, (batches - batch) / (decay + 1))
    progress = (batch - warmup) / max(1, batches - 1 - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
