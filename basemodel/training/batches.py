"""Which sequences each process reads in each step, and the data of a run."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from basemodel.common.errors import InputError
from basemodel.data.hub import dataset_folder
from basemodel.data.sequences import Sequences, match_tokenizer
from basemodel.data.token_files import TOKENIZER_FILE, TokenFiles
from basemodel.model.config import GPTConfig
from basemodel.training.config import TrainConfig

SHORT_PARTS = 4


@dataclass(frozen=True)
class BatchPlan:
    """Which sequences each process reads in each step.

    Pure arithmetic: the g-th global batch has the same sequences in the same order whatever the number of
    processes, the microbatch size and the accumulation. The first `half_steps` have half the size: while the
    loss falls fast, gradients agree, and many small steps get further than few large ones (McCandlish et al.
    2018). The first `short_steps` cut each sequence into `SHORT_PARTS`: what a model learns first is in the
    last few tokens (Press et al. 2021, Shortformer).
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
        """Training tokens of a whole global batch."""
        return self.global_batch * self.length

    def batches(self, steps: int) -> float:
        """What the first `steps` steps read, in whole global batches."""
        return steps - min(steps, self.half_steps) / 2

    def sequences(self, steps: int) -> int:
        """How many sequences the first `steps` steps read."""
        return int(self.batches(steps) * self.global_batch)

    def tokens(self, steps: int) -> int:
        """How many tokens the first `steps` steps train on."""
        return self.sequences(steps) * self.length

    def steps_for(self, batches: float) -> int:
        """How many steps read at most so many whole global batches."""
        return int(batches + min(batches, self.half_steps / 2))

    def microbatches(self, step: int, rank: int) -> Iterator[tuple[int, int]]:
        """Of each microbatch that process `rank` reads in step `step`, counted from 0: the first sequence and
        how many they are."""
        size, turns = self.microbatch_size, self.accumulation
        if step < self.half_steps:
            size, turns = (size, turns // 2) if turns % 2 == 0 else (size // 2, turns)
        for turn in range(turns):
            yield self.sequences(step) + (turn * self.processes + rank) * size, size

    def cut(self, sequences: Tensor, step: int) -> Tensor:
        """Sequences (B, T + 1) as step `step` trains on them: as they are, or (4B, T / 4 + 1)."""
        if step >= self.short_steps:
            return sequences
        length = self.length // SHORT_PARTS
        return sequences.unfold(1, length + 1, length).flatten(0, 1)


def plan_batches(config: TrainConfig, length: int, processes: int, per_epoch: int | None) -> BatchPlan:
    """Plan the steps of a run over `per_epoch` sequences of `length` tokens (None: not known yet).

    Raises InputError if the global batch cannot be divided up or there are too few tokens.
    """
    accumulation = config.accumulation_for(processes)
    global_batch = config.microbatch_size * accumulation * processes
    available = None if per_epoch is None else per_epoch * config.epochs
    if config.min_train_tokens == -1:
        batches = (available or 0) // global_batch
    else:
        batches = -(-config.min_train_tokens // (global_batch * length))  # rounded up
    needed = max(1, batches) * global_batch
    if available is not None and needed > available:
        raise InputError(
            f"{config.dataset} has {available:,} sequences of {length} tokens in {config.epochs} epochs "
            f"after start_train_token {config.start_train_token}, the run needs {needed:,}; set "
            f"epochs to {math.ceil(needed / per_epoch)}, or min_train_tokens to -1 to use all there are"
        )
    halved = round(batches * config.half_batch_percent / 100)
    if halved and config.microbatch_size * accumulation % 2:
        raise InputError(
            f"half_batch_percent halves what a process reads in a step, {config.microbatch_size} x "
            f"{accumulation} sequences; make that even, or half_batch_percent 0"
        )
    if config.short_sequence_percent and length % SHORT_PARTS:
        raise InputError(
            f"short_sequence_percent cuts sequences into {SHORT_PARTS} parts; make context_length {length} a "
            "multiple of that, or short_sequence_percent 0"
        )
    steps = batches + halved
    plan = BatchPlan(config.microbatch_size, accumulation, processes, length, steps, half_steps=2 * halved)
    short = plan.steps_for(round(batches * config.short_sequence_percent / 100))
    return dataclasses.replace(plan, short_steps=short)


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is validated on."""

    train: Sequences
    validation: Sequences | None
    model_config: GPTConfig  # with the data set's end-of-text token
    tokenizer: bytes | None  # the content of its tokenizer.json, if it has one of its own
    folder: Path


def open_data(config: TrainConfig, model: GPTConfig, datasets_dir: Path) -> RunData:
    """Open a run's token files. Raises InputError for a file that is missing, damaged or too short."""
    folder = dataset_folder(datasets_dir, config.dataset)
    model = match_tokenizer(folder, model)
    tokenizer = (folder / TOKENIZER_FILE).read_bytes() if model.tokenizer == "dataset" else None

    def sequences(split: str, start: int) -> Sequences:
        return Sequences(TokenFiles(folder, split), start, model.context_length, config.random_seed)

    train = sequences("train", config.start_train_token)
    if train.count <= 0:
        raise InputError(
            f"{train.tokens}: too short: {train.tokens.count} tokens do not fill one sequence of "
            f"{model.context_length} after start_train_token {config.start_train_token}"
        )
    if config.validation_interval is None:
        return RunData(train, None, model, tokenizer, folder)
    validation = sequences("validation", config.start_val_token)
    most = validation.count // config.microbatch_size
    if config.validation_batches > most:
        raise InputError(
            f"{validation.tokens}: too short: its {validation.tokens.count} tokens fill {most} "
            f"validation batches of {config.microbatch_size} x {model.context_length} after start_val_token "
            f"{config.start_val_token}, not {config.validation_batches}"
        )
    return RunData(train, validation, model, tokenizer, folder)


def check_tokens(
    data: RunData, train: int, validation: int, vocab_size: int, *, share: tuple[int, int]
) -> None:
    """Check every token of the first `train` and `validation` sequences, those that a run will use.

    `share` (which, of how many): the processes of a node each check a part. Raises InputError for a token id
    outside the vocabulary.
    """
    which, parts = share
    for sequences, count in ((data.train, min(train, data.train.count)), (data.validation, validation)):
        if sequences is not None:
            tokens = count * sequences.length + 1
            first, stop = (sequences.start + tokens * part // parts for part in (which, which + 1))
            sequences.tokens.check_vocabulary(first, stop, vocab_size)
