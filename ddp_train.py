#!/usr/bin/env python3
"""Train a GPT-2-class base model. One run is two JSON files, runs/RUN/model.json and runs/RUN/train.json.

    python ddp_train.py demo datasets                 one process, on the GPU if there is one, else on the CPU
    python ddp_train.py demo datasets --resume        go on from the newest good checkpoint
    python ddp_train.py demo datasets --plan          say what the run would do, and what it would cost
    python ddp_train.py original -f                   find the largest microbatch that fits
    torchrun --nproc_per_node=8 ddp_train.py 8xh100m80 datasets       the eight GPUs of one machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 ddp_train.py ...

Read it from top to bottom: processes, model and optimiser, the training step, the training loop, the
microbatch search, and the command that ties them together. What a run is made of stands in config.py and
gpt.py, which tokens a step takes in data.py, what is written in checkpointing.py and reporting.py.
"""

import dataclasses
import functools
import math
import os
import platform
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpointing
from basemodel.command_line import require_inside, require_plain_name, run_command
from basemodel.compilation import compile_if_wanted
from basemodel.config import TrainConfig
from basemodel.data import BatchPlan, RunData, Sequences, check_tokens, open_data, plan_batches
from basemodel.distributed import StopSignal, World, join_world, lost_processes_explained
from basemodel.errors import InputError, RunError, require
from basemodel.fetching import dataset_folder, fetch_dataset, fingerprint_files, same_on_all_nodes
from basemodel.json_config import read_config
from basemodel.loss import NextTokenLoss
from basemodel.memory import (
    is_out_of_memory,
    keep_freed_memory,
    limit_host_memory,
    memory_errors_explained,
    memory_in_use,
    release_memory,
)
from basemodel.optimizer import allocate_state, learning_rate_at, make_optimizer, set_learning_rate, step_if
from basemodel.plan import print_plan
from basemodel.reporting import Reporter
from basemodel.run_folder import read_status, set_earlier_results_aside
from basemodel.weights import load_tensors
from gpt import GPTConfig, GPTModel

# So many steps in a row may be skipped. Float16 begins with a scale of 65,536 = 2^16, halved at each.
MOST_SKIPPED_IN_A_ROW = 16

# ------------------------------------------------------------------------------------------------------------
# Model and precision
# ------------------------------------------------------------------------------------------------------------


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 matrix products; without them bf16 is slow."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_precision(config: TrainConfig, device: torch.device) -> str:
    """The precision that a run trains in on `device`; for "auto" the best that it has."""
    if not config.use_amp:
        return "fp32"
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_multiplies_bf16() else "fp32"


def hardware(config: TrainConfig, world: World) -> str:
    """What a run trains on, for people."""
    return f"{world.size} x {world.device_name}, precision {choose_precision(config, world.device)}"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which forward passes run, with matrix products in half precision if so wanted."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


# ------------------------------------------------------------------------------------------------------------
# The training step
# ------------------------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """Everything that training changes, and what it goes through."""

    world: World
    model: GPTModel
    loss: NextTokenLoss  # of the model
    parallel: nn.Module  # the same, averaging gradients over processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: str
    step: int = 0  # finished optimiser steps
    settled: bool = False  # nothing that is due after this step is still to be done
    skipped: int = 0  # steps in a row, up to this one, whose loss or gradient was not finite
    seconds: float = 0.0  # of training, over all resumed parts
    best_loss: float = math.inf
    train_loss: float | None = None  # mean over the steps between the last two checkpoints
    val_loss: float | None = None  # of the last validation
    recent_losses: list[float] = field(default_factory=list)  # of each step since the last checkpoint


def make_state(config: TrainConfig, model_config: GPTConfig, world: World) -> TrainState:
    """A fresh model with its optimiser: the same weights on every process, another dropout stream on each."""
    precision = choose_precision(config, world.device)
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.manual_seed(config.random_seed)
    model = GPTModel(model_config).to(world.device)
    loss = NextTokenLoss(model, document_masking=config.document_masking)

    def try_out(module: nn.Module) -> None:
        tokens = torch.zeros(config.microbatch_size, model_config.context_length + 1, dtype=torch.int64)
        try:
            with autocast(precision, world.device):
                module(tokens.to(world.device)).backward()
        finally:
            model.zero_grad()

    compile_if_wanted(loss, config, world, try_out)
    optimizer = make_optimizer(model, config, world, precision)
    allocate_state(optimizer)
    parallel = loss
    if world.size > 1:
        device_ids = None if world.device.type == "cpu" else [world.local_rank]
        parallel = DistributedDataParallel(loss, device_ids=device_ids, gradient_as_bucket_view=True)
        # After its first pass DDP sorts gradients into other buckets, and with three processes or more these
        # decide in which order is added: in a resumed run too they must be sorted before its first step.
        try_out(parallel)
    torch.manual_seed(config.random_seed + 1 + world.rank)
    if world.device.type == "cpu":
        keep_freed_memory()
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    return TrainState(world, model, loss, parallel, optimizer, scaler, precision)


def to_device(sequences: Tensor, device: torch.device) -> Tensor:
    """Move uint16 sequences to the device and widen them there; on CUDA without waiting for the copy."""
    if device.type == "cuda":
        sequences = sequences.pin_memory()
    return sequences.to(device, non_blocking=True).to(torch.int64)


def train_step(
    state: TrainState,
    microbatches: list[Tensor],
    *,
    learning_rate: float,
    max_norm: float | None,
    asked_to_stop: bool = False,
) -> Tensor:
    """One optimiser step over this process's share of the global batch, sequences of (B, T + 1) each.

    Returns four numbers on the device, the same on all processes: the mean loss; the norm of the averaged
    gradient before clipping; whether both are finite, for else the weights stay as they are; how many
    processes were asked to stop. Nothing here waits for them, but what `step_if` says.
    """
    device = microbatches[0].device
    mean_loss = torch.zeros((), device=device)
    for index, sequences in enumerate(microbatches):
        # Gradients are averaged over the processes once, with the last microbatch. no_sync must cover the
        # forward pass too: it is the forward pass that decides whether its backward pass communicates.
        last = index == len(microbatches) - 1
        communicate = nullcontext() if last or state.parallel is state.loss else state.parallel.no_sync()
        with communicate:
            with autocast(state.precision, device):
                loss = state.parallel(sequences) / len(microbatches)
            state.scaler.scale(loss).backward()
        mean_loss += loss.detach()
    state.scaler.unscale_(state.optimizer)
    parameters = list(state.model.parameters())
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, grad_norm)
    set_learning_rate(state.optimizer, learning_rate)
    asked = torch.full_like(mean_loss, float(asked_to_stop))
    mean_loss, asked = state.world.sum(torch.stack([mean_loss / state.world.size, asked]))
    finite = mean_loss.isfinite() & grad_norm.isfinite()
    step_if(finite, state.optimizer, state.scaler)
    state.optimizer.zero_grad()
    return torch.stack([mean_loss, grad_norm, finite.to(mean_loss), asked])


@torch.no_grad()
def validate(state: TrainState, sequences: Sequences, config: TrainConfig, stop: StopSignal) -> float | None:
    """Mean loss over the first validation_batches microbatches, in nats per token, shared out.

    None if a process is asked to stop meanwhile.
    """
    world = state.world
    state.loss.eval()
    total = torch.zeros((), device=world.device)
    stopped = False
    for first in range(0, config.validation_batches, world.size):
        if stopped := world.any(stop):
            break
        if (index := first + world.rank) < config.validation_batches:
            microbatch = sequences.read(index * config.microbatch_size, config.microbatch_size)
            with autocast(state.precision, world.device):
                total += state.loss(to_device(microbatch, world.device))
    state.loss.train()
    return None if stopped else world.sum(total).item() / config.validation_batches


# ------------------------------------------------------------------------------------------------------------
# The training loop
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """All that is fixed while a run trains."""

    directory: Path
    config: TrainConfig
    model_config: GPTConfig
    plan: BatchPlan
    data: RunData
    files: dict[str, dict[str, Any]]  # what the data are read from: size, SHA-256, revision
    world: World

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.directory / "checkpoints"

    def microbatch(self, first: int) -> Tensor:
        """The microbatch that begins with training sequence `first`, on the device."""
        return to_device(self.data.train.read(first, self.plan.microbatch_size), self.world.device)

    def validates_after(self, step: int) -> bool:
        """Whether to validate after `step` steps: before the first, at the interval, and at the end."""
        interval = self.config.validation_interval
        return interval is not None and (step % interval == 0 or step == self.plan.steps)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps: at its interval and at the end."""
        interval = self.config.checkpoint_interval or self.config.validation_interval
        return step == self.plan.steps or (step > 0 and interval is not None and step % interval == 0)


class Diverged(RunError):
    """The loss, a gradient or a weight became NaN or infinite; `way_back` says what is left."""


def train(run: Run, state: TrainState) -> int:
    """Train to the last step, or until a signal asks to stop: then all processes checkpoint the same step.

    Returns the exit status: 0, or 128 + the signal. Raises RunError when the loss or the gradient stays no
    number, or a checkpoint cannot be saved.
    """
    position = {"step": state.step, "seconds": state.seconds, "speaks": run.world.is_first}
    reporter = Reporter(run.directory, run.config, run.plan, **position)
    saver = checkpointing.Saver(run.checkpoints, run.config.keep_checkpoints, run.directory / "metrics.jsonl")
    reporter.status("running", state.step)
    with StopSignal() as stop:
        try:
            with saver:
                train_steps(run, state, reporter, saver, stop)
                finished = state.settled and state.step == run.plan.steps
                if not finished:
                    checkpoint(run, state, reporter, saver, scheduled=False)
                saver.finish()
        except Exception as error:
            if isinstance(error, Diverged):  # now that the last save has come to its end
                error = RunError(f"{error}; {way_back(run)}")
            reporter.close("failed", state.step, error=" ".join(str(error).split()))
            raise error
        reporter.checkpoint = saver.saved
        # torchrun ends the other processes as soon as one has left: none may before all is saved.
        run.world.gather(None)
        if not finished:
            reporter.close("preempted", state.step)
            where = f"after step {state.step:,}, with a checkpoint; --resume goes on from there"
            reporter.say(f"Stopped by a signal {where}")
            return 128 + (stop.received or signal.SIGTERM)
    reporter.chart(final=True)
    reporter.close("finished", state.step)
    seconds, tokens = reporter.seconds(), state.step * run.plan.tokens_per_step
    reporter.say(f"Training complete in {seconds:,.3f} seconds")
    reporter.say(f"Tokens seen: {tokens:,}")
    reporter.say(f"Throughput: {tokens / seconds:,.0f} tokens/second")
    reporter.say(f"Final train loss: {number(state.train_loss)}")
    reporter.say(f"Final val loss: {number(state.val_loss)}")
    return 0


def number(loss: float | None) -> str:
    """A loss for people."""
    return "not measured" if loss is None else f"{loss:.3f}"


def train_steps(
    run: Run, state: TrainState, reporter: Reporter, saver: checkpointing.Saver, stop: StopSignal
) -> None:
    """The training loop: until the last step is taken and all that is due is done, or a signal came."""
    config, plan, world = run.config, run.plan, run.world
    queued = QueuedSteps(run, state, reporter)
    behind = 0 if world.device.type == "cpu" else 1
    while True:
        if not state.settled:
            queued.read()
            if not settle(run, state, reporter, saver, stop):
                return
            queued.restart_clock()
        if state.step == plan.steps:
            return
        numbers = train_step(
            state,
            [run.microbatch(first) for first in plan.microbatches(state.step, world.rank)],
            learning_rate=learning_rate_at(state.step, plan.steps, config),
            max_norm=config.clipping_max_norm,
            asked_to_stop=bool(stop),
        )
        state.step += 1
        state.settled = not (run.validates_after(state.step) or run.saves_after(state.step))
        queued.add(state.step, numbers)
        if queued.read(but=behind):
            queued.read()
            return
        saver.check()
        reporter.checkpoint = saver.saved


class QueuedSteps:
    """Steps that are on their way through the device. The host may read the numbers of one when the next is
    queued, so that the device never runs dry."""

    def __init__(self, run: Run, state: TrainState, reporter: Reporter) -> None:
        self.run, self.state, self.reporter = run, state, reporter
        self._queue: list[tuple[int, Tensor, torch.Event | None]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Time the next step from now on."""
        self._clock = time.monotonic()

    def add(self, step: int, numbers: Tensor) -> None:
        """Begin to copy what train_step returned to the host."""
        on_host, event = numbers.to("cpu", non_blocking=True), None
        if numbers.device.type != "cpu":
            event = torch.get_device_module(numbers.device).Event()
            event.record()
        self._queue.append((step, on_host, event))

    def read(self, *, but: int = 0) -> bool:
        """Wait for all queued steps but the last `but` and log them; return whether one was asked to stop.

        Raises RunError after too many steps in a row whose loss or gradient is not finite.
        """
        done, self._queue = self._queue[: len(self._queue) - but], self._queue[len(self._queue) - but :]
        asked = False
        for step, numbers, event in done:
            if event is not None:
                event.synchronize()
            loss, grad_norm, finite, stops = numbers.tolist()
            asked = asked or stops > 0
            now, before = time.monotonic(), self._clock
            self._clock = now
            rate = learning_rate_at(step - 1, self.run.plan.steps, self.run.config)
            values = {"train_loss": loss, "grad_norm": grad_norm, "learning_rate": rate}
            self.reporter.step(step, values, step_seconds=now - before)
            if math.isfinite(loss):
                self.state.recent_losses.append(loss)
            self._count_skipped(step, loss, grad_norm, skipped=not finite)
        return asked

    def _count_skipped(self, step: int, loss: float, grad_norm: float, *, skipped: bool) -> None:
        self.state.skipped = self.state.skipped + 1 if skipped else 0
        if not skipped:
            return
        what = f"the training loss is {loss}, the gradient norm {grad_norm} at step {step}"
        if self.state.skipped >= MOST_SKIPPED_IN_A_ROW:
            raise Diverged(f"{what}, and {self.state.skipped} steps in a row were skipped")
        self.reporter.say(f"Skipped: {what}; the weights stay as they were")


def settle(
    run: Run, state: TrainState, reporter: Reporter, saver: checkpointing.Saver, stop: StopSignal
) -> bool:
    """Do what is due after a step: validation, checkpoint, chart.

    False if a signal came before: then all of it is left for the resumed run, which so makes the same
    decisions as one that was not stopped.
    """
    if run.validates_after(state.step):
        start = time.monotonic()
        loss = validate(state, run.data.validation, run.config, stop)
        if loss is None:
            return False
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss} at step {state.step}")
        state.val_loss = loss
        reporter.log(state.step, {"val_loss": loss, "validation_seconds": round(time.monotonic() - start, 3)})
        reporter.say(f"step {state.step:,}: val loss {loss:.4f}")
    state.settled = True
    if run.saves_after(state.step):
        checkpoint(run, state, reporter, saver)
    reporter.chart()
    return True


def checkpoint(
    run: Run, state: TrainState, reporter: Reporter, saver: checkpointing.Saver, *, scheduled: bool = True
) -> None:
    """Begin to save where training stands; `latest` will point at it, and `best` if it is.

    A checkpoint off schedule (before a stop) is never the best and closes no interval, so that a run that is
    stopped and resumed makes the same decisions as one that is not.
    """
    start = time.monotonic()
    is_best = False
    if scheduled:
        state.train_loss = float(np.mean(state.recent_losses)) if state.recent_losses else state.train_loss
        state.recent_losses.clear()
        validates = run.config.validation_interval is not None
        measured = state.val_loss if validates else state.train_loss
        is_best = measured is not None and measured < state.best_loss
        is_best = is_best and (not validates or run.validates_after(state.step))
        state.best_loss = measured if is_best else state.best_loss
    if not nn.utils.get_total_norm(state.model.tensors().values(), math.inf).isfinite():
        raise Diverged(f"the weights are no numbers after step {state.step}")
    rng = run.world.gather(checkpointing.rng_state(run.world.device))
    if not run.world.is_first:
        return
    saver.copy(state.model.tensors(), checkpointing.optimizer_tensors(state.model, state.optimizer))
    reporter.log(state.step, {"checkpoint_seconds": round(time.monotonic() - start, 3)})
    reporter.flush()
    saver.write(describe(run, state, reporter.seconds()) | {"is_best": is_best, "rng": rng})


def describe(run: Run, state: TrainState, seconds: float) -> dict[str, Any]:
    """What a checkpoint's meta.json says of where the run stands and what it is."""
    return {
        "global_step": state.step,
        "settled": state.settled,
        "skipped": state.skipped,
        "sequences_seen": state.step * run.plan.global_batch,
        "tokens_seen": state.step * run.plan.tokens_per_step,
        "total_steps": run.plan.steps,
        "train_loss": state.train_loss,
        "val_loss": state.val_loss,
        "best_loss": state.best_loss if math.isfinite(state.best_loss) else None,
        "recent_losses": list(state.recent_losses),
        "learning_rate": learning_rate_at(state.step - 1, run.plan.steps, run.config),
        "seconds": seconds,
        "scaler": state.scaler.state_dict(),
        "global_batch": run.plan.global_batch,
        "processes": run.plan.processes,
        "precision": state.precision,
        "model_config": dataclasses.asdict(run.model_config),
        "train_config": dataclasses.asdict(run.config),
        "data": run.files,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": run.world.device_name,
        "git_commit": checkpointing.git_commit(),
    }


def restore(run: Run, state: TrainState, found: checkpointing.Checkpoint | None) -> None:
    """Put a checkpoint, which only the first process holds, into the state of all processes."""
    world = run.world
    meta = world.from_first(found.meta if found else None)
    source = world.from_first(str(found.path) if found else None)
    load_tensors(state.model, world.tensors_from_first(found.model if found else {}), source)
    optimizer = world.tensors_from_first(found.optimizer if found else {})
    checkpointing.load_optimizer_tensors(state.model, state.optimizer, optimizer)
    if state.scaler.is_enabled() and meta["scaler"]:  # empty where it was trained in another precision
        state.scaler.load_state_dict(meta["scaler"])
    state.step, state.seconds = meta["global_step"], meta["seconds"]
    state.settled, state.skipped = meta["settled"], meta["skipped"]
    state.train_loss, state.val_loss = meta["train_loss"], meta["val_loss"]
    state.recent_losses = meta["recent_losses"]
    state.best_loss = math.inf if meta["best_loss"] is None else meta["best_loss"]
    said = [f"Going on after step {state.step:,}, from {Path(source).name}"]
    if len(meta["rng"]) == world.size:
        checkpointing.set_rng_state(meta["rng"][world.rank], world.device)
    else:
        seed = np.random.SeedSequence((run.config.random_seed, state.step, world.rank))
        torch.manual_seed(int(seed.generate_state(1)[0]))
        said.append(
            f"Saved by {len(meta['rng'])} processes, resumed by {world.size}: the data go on exactly where "
            "they were; dropout masks differ"
        )
    if meta["precision"] != state.precision:
        said.append(f"Saved in {meta['precision']}, resumed in {state.precision}: rounding differs")
    if world.is_first:
        tqdm.write("\n".join(said))


def way_back(run: Run) -> str:
    """What to do about a run that has diverged."""
    last = checkpointing.list_checkpoints(run.checkpoints)[-1:]
    where = f"the last checkpoint is {last[0].name}" if last else "there is no checkpoint yet"
    return f"{where}; a lower learning_rate, a warm-up or clipping_max_norm may help"


# ------------------------------------------------------------------------------------------------------------
# The largest microbatch that fits
# ------------------------------------------------------------------------------------------------------------


def find_max_microbatch(config: TrainConfig, model_config: GPTConfig, world: World, stop: StopSignal) -> int:
    """The largest microbatch_size whose training step fits into memory on every process, by doubling, then
    bisecting.

    Steps are real, on synthetic tokens, but for the exchange of gradients; an accumulating run is tried with
    two microbatches, because from the second on gradients are held besides activations. Raises RunError if 1
    is too many, or when asked to stop.
    """
    # What communication needs is taken before anything is measured.
    world.sum(torch.zeros(1, device=world.device))
    if world.device.type == "cpu":
        limit_host_memory(world.local_size)
    # Steps exchange nothing, so that no process waits for one that has run out of memory.
    alone = dataclasses.replace(world, rank=0, size=1, control=None)
    with memory_errors_explained("the model itself does not fit; a smaller one or fewer processes would"):
        state = make_state(dataclasses.replace(config, microbatch_size=1), model_config, alone)
    # DDP, and accumulation from the second microbatch on, hold gradients besides activations.
    holds = (
        world.size > 1
        or config.global_batch_size is not None
        or config.gradient_accumulation_steps not in (None, 1)
    )
    fitting, too_large = 0, None  # too_large None: as long as nothing was

    def try_step(size: int) -> str | None:
        """Take two steps at a size and say what they took; None where memory ran out."""
        try:
            if state.loss.is_compiled:
                torch.compiler.reset()  # it would stop compiling after a few sizes
            tokens = torch.randint(model_config.vocab_size, (size, model_config.context_length + 1))
            microbatches = [tokens.to(world.device)] * (2 if holds else 1)
            for _ in range(2):
                start = time.perf_counter()
                numbers = train_step(
                    state, microbatches, learning_rate=0.0, max_norm=config.clipping_max_norm
                )
                numbers.tolist()  # waits for the device
            speed = len(microbatches) * size * model_config.context_length / (time.perf_counter() - start)
            return f"{memory_in_use(world.device):.2f} GiB, {speed:,.0f} tokens/s per process"
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Only here, with the exception and its traceback gone, is the memory of the failed step free.
        return None

    while too_large is None or too_large - fitting > 1:
        size = (fitting + too_large) // 2 if too_large else max(1, 2 * fitting)
        taken = try_step(size)
        state.optimizer.zero_grad()
        release_memory(world.device)
        fits = all(each is not None for each in world.gather(taken))
        fitting, too_large = (size, too_large) if fits else (fitting, size)
        if world.is_first:
            tqdm.write(f"microbatch {size}: " + (f"fits, {taken}" if fits else "too large"))
        if world.any(stop):
            raise RunError(f"stopped by a signal; the largest microbatch that fitted so far is {fitting}")
    if fitting == 0:
        raise RunError(
            "not even a microbatch of 1 fits; a smaller model, context_length or number of processes would"
        )
    return fitting


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run")
@click.argument("datasets_dir", type=click.Path(path_type=Path), required=False)
@click.argument("checkpoint", required=False)
@click.option(
    "--resume", is_flag=True, help="Go on from the newest good checkpoint; afresh where there is none."
)
@click.option("-f", "--find-max-microbatch-size", is_flag=True, help="Find the largest microbatch that fits.")
@click.option("--plan", "only_plan", is_flag=True, help="Print what the run would do, and exit.")
@click.option("--runs-dir", type=click.Path(path_type=Path), default=Path(__file__).parent / "runs")
@click.option(
    "--allow-config-change", is_flag=True, help="Go on although the configs or the data set have changed."
)
@click.option(
    "--collective-timeout",
    type=click.FloatRange(min=1),
    default=600,
    show_default=True,
    help="Seconds that processes wait for one another in a step before they give up.",
)
def main(
    run: str,
    datasets_dir: Path | None,
    checkpoint: str | None,
    *,
    resume: bool,
    find_max_microbatch_size: bool,
    only_plan: bool,
    runs_dir: Path,
    allow_config_change: bool,
    collective_timeout: float,
) -> int:
    """Train the run RUN, a folder of runs/ with model.json and train.json, on a data set kept in
    DATASETS_DIR.

    CHECKPOINT (latest, best, or a checkpoint folder's name) goes on from there.
    """
    run_dir = runs_dir / require_plain_name(run, "run")
    if not run_dir.is_dir():
        have = ", ".join(sorted(path.parent.name for path in runs_dir.glob("*/train.json"))) or "none"
        raise InputError(f"{run_dir}: no such run; there are: {have}")
    require_inside(runs_dir, run_dir)
    model_config = read_config(GPTConfig, run_dir / "model.json")
    config = read_config(TrainConfig, run_dir / "train.json")
    require(
        not config.document_masking or model_config.end_of_text < model_config.vocab_size,
        f"document_masking needs the end-of-text token, {model_config.end_of_text}, which a vocab_size of "
        f"{model_config.vocab_size} leaves out",
    )
    require(not (find_max_microbatch_size and only_plan), "give either -f or --plan")
    require(
        not (checkpoint and resume), "give either a checkpoint's name or --resume, which finds the newest"
    )
    require(
        bool(datasets_dir or find_max_microbatch_size), "DATASETS_DIR is missing: the folder of the data sets"
    )

    with lost_processes_explained():
        world, status = join_world(timedelta(seconds=collective_timeout)), 0
        if find_max_microbatch_size:
            with StopSignal() as stop:
                size = find_max_microbatch(config, model_config, world, stop)
            if world.is_first:
                print(f"Max microbatch size was {size}")
        elif only_plan:
            folder = dataset_folder(datasets_dir, config.dataset)
            here = all((folder / f"{split}.safetensors").exists() for split in config.splits)
            data = open_data(config, model_config, datasets_dir) if here else None
            plan = plan_batches(config, model_config.context_length, world.size, data and data.train.count)
            if world.is_first:
                print_plan(run_dir, config, model_config, data, plan, hardware(config, world))
        else:
            # A process that torchrun has started again goes on, whatever the first was told.
            resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
            prepared = prepare_run(run_dir, config, model_config, datasets_dir, world, checkpoint)
            hint = f"microbatch_size is {config.microbatch_size}; -f finds the largest that fits"
            with memory_errors_explained(hint):
                state = begin(prepared, "newest" if resume else checkpoint, allow_config_change)
                status = 0 if state is None else train(prepared, state)
        if dist.is_initialized():
            dist.destroy_process_group()
    return status


def prepare_run(
    run_dir: Path,
    config: TrainConfig,
    model_config: GPTConfig,
    datasets_dir: Path,
    world: World,
    checkpoint: str | None,
) -> Run:
    """Lock the run's folder; fetch the data where they are missing, once per node; check all of them that the
    run will use. A `checkpoint` that is named but not there is noticed first."""
    config.accumulation_for(world.size)  # before anything slow
    if checkpoint is not None:
        world.agree(
            lambda: checkpointing.require_named(run_dir / "checkpoints", checkpoint), on=world.is_first
        )
    holder = read_status(run_dir).get("pid")
    locked = world.agree(lambda: checkpointing.lock_run(run_dir, holder), on=world.is_first)
    if locked:
        checkpointing.remove_leftovers(run_dir / "checkpoints")
    elif world.is_first:
        tqdm.write(f"Warning: {run_dir} cannot be locked; do not start this run twice")
    fetch = functools.partial(
        fetch_dataset, datasets_dir, config.dataset, config.dataset_revision, config.splits
    )
    folder = world.agree(fetch, on=world.local_rank == 0)
    data = world.agree(lambda: open_data(config, model_config, datasets_dir))
    plan = plan_batches(config, model_config.context_length, world.size, data.train.count)
    used = plan.steps * plan.global_batch, config.validation_batches * config.microbatch_size
    share = world.local_rank, world.local_size
    world.agree(lambda: check_tokens(data, *used, model_config.vocab_size, share=share))
    names = [f"{split}.safetensors" for split in config.splits]
    files = world.agree(lambda: fingerprint_files(folder, names), on=world.local_rank == 0)
    files = same_on_all_nodes([found for found in world.gather(files) if found is not None])
    return Run(run_dir, config, model_config, plan, data, files, world)


def begin(run: Run, checkpoint: str | None, allow_change: bool) -> TrainState | None:
    """The state that training begins with: from a named checkpoint, from the "newest" good one, or fresh.

    None when the checkpoint is of the end: there is nothing left to do.
    """
    world = run.world
    found = world.agree(lambda: find_checkpoint(run, checkpoint, allow_change), on=world.is_first)
    step, settled, name = world.from_first(
        (found.meta["global_step"], found.meta["settled"], found.path.name) if found else (None, False, None)
    )
    if settled and step >= run.plan.steps:
        if world.is_first:
            print(f"{run.directory.name} is finished: {name} is of the last of {run.plan.steps:,} steps")
            if read_status(run.directory).get("status") != "finished":  # killed when all but this was done
                position = {"step": step, "seconds": found.meta["seconds"], "speaks": True}
                reporter = Reporter(run.directory, run.config, run.plan, **position)
                reporter.loss, reporter.checkpoint = found.meta["train_loss"], name
                reporter.chart(final=True)
                reporter.close("finished", step)
        return None
    if world.is_first:
        print_plan(
            run.directory, run.config, run.model_config, run.data, run.plan, hardware(run.config, world)
        )
        if step is None and (aside := set_earlier_results_aside(run.directory)):
            print(f"Starting afresh; the earlier results are now in {aside} (--resume would have gone on)")
    world.agree(lambda: check_space(run, step or 0), on=world.is_first)
    state = make_state(run.config, run.model_config, world)
    if step is not None:
        restore(run, state, found)
    return state


def find_checkpoint(run: Run, name: str | None, allow_change: bool) -> checkpointing.Checkpoint | None:
    """The checkpoint to go on from, checked to be this run's; None for none."""
    if name is None:
        return None
    if name == "newest":
        found = checkpointing.newest_checkpoint(run.checkpoints, tqdm.write)
    else:
        found = checkpointing.named_checkpoint(run.checkpoints, name, tqdm.write)
    if found is None:
        return None
    now = run.model_config, run.config, run.files
    checkpointing.check_resumable(
        found, *now, run.plan.global_batch, None if not allow_change else tqdm.write
    )
    require(
        found.meta["global_step"] <= run.plan.steps,
        f"{found.path.name} is past the run's end, {run.plan.steps:,} steps; raise min_train_tokens, or name "
        "an earlier checkpoint",
    )
    return found


def check_space(run: Run, step: int) -> None:
    """Raise InputError if the disk does not take the checkpoints that the run writes after step `step`."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in GPTModel(run.model_config).parameters())
    to_come = sum(run.saves_after(later) for later in range(step + 1, run.plan.steps + 1))
    checkpointing.require_space(run.checkpoints, to_come, run.config.keep_checkpoints, parameters)


if __name__ == "__main__":
    # Not sys.exit: threads of a process group whose other members are gone can hold up or abort Python's end.
    run_command(main, leave=os._exit)
