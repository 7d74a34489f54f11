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
import fcntl
import functools
import math
import os
import platform
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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
from config import InputError, RunError, TrainConfig, read_config, require, require_plain_name, run_command
from data import (
    BatchPlan,
    RunData,
    Sequences,
    check_tokens,
    dataset_folder,
    fetch_dataset,
    open_data,
    plan_batches,
)
from distributed import World, join_world
from gpt import GPTConfig, GPTModel, load_tensors
from loss import NextTokenLoss
from memory import (
    is_out_of_memory,
    keep_freed_memory,
    limit_host_memory,
    memory_errors_explained,
    memory_in_use,
    release_memory,
)
from reporting import Reporter, print_plan, read_status, set_earlier_results_aside

# ------------------------------------------------------------------------------------------------------------
# Model, precision, optimiser
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


def make_optimizer(model: GPTModel, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW; weight decay on everything, or only on matrices that are not embeddings."""
    embeddings = {id(model.tok_emb.weight), id(model.pos_emb.weight)}
    groups: dict[float, list[nn.Parameter]] = {config.weight_decay: [], 0.0: []}
    for parameter in model.parameters():
        decays = config.decay_all_parameters or (parameter.dim() == 2 and id(parameter) not in embeddings)
        groups[config.weight_decay if decays else 0.0].append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters],
        lr=config.learning_rate,
        betas=config.betas,
        fused=device.type in ("cpu", "cuda"),
    )


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimiser make its state now, by a step that changes nothing, and not in the midst of training.

    So memory that stays does not lie scattered among what each step takes and frees, and too little shows at
    once.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        if "step" in state:  # the count of updates, which has to begin at none
            state["step"].zero_()


def learning_rate_at(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of step `step` (from 0) of `steps`: constant, or a linear warm-up that reaches its
    peak with the last of the first warmup_period_percent of the steps, then half a cosine down to a tenth at
    the last step."""
    peak = config.learning_rate
    if not config.schedule_learning_rate:
        return peak
    warmup = round(steps * config.warmup_period_percent / 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def compile_if_wanted(
    loss: NextTokenLoss, config: TrainConfig, world: World, try_out: Callable[[], None]
) -> None:
    """Compile the loss if the config says so ("auto": on CUDA) and `try_out`, one pass through it, succeeds.

    Raises RunError if the config insists and it fails; "auto" then says why and trains without.
    """
    if config.compile is False or (config.compile == "auto" and world.device.type != "cuda"):
        return
    if world.device.type == "cpu" and world.local_size > 1:
        # Two processes that write the same compiled library at a time spoil it.
        own = Path(tempfile.gettempdir()) / f"torchinductor-{os.getuid()}-{world.local_rank}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own))
    loss.compile()
    problem = None
    try:
        try_out()
    except Exception as error:  # compilers fail in many ways, all of them before training has begun
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    problem = next((found for found in world.gather(problem) if found), None)
    if problem is None:
        return
    if config.compile is True:
        raise RunError(f'torch.compile failed ({problem}); "compile": "auto" or false trains without')
    loss.uncompile()
    if world.is_first:
        tqdm.write(f"Training without torch.compile, which failed: {problem}")


# ------------------------------------------------------------------------------------------------------------
# The training step
# ------------------------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """Everything that training changes, and the modules that it goes through."""

    model: GPTModel
    loss: NextTokenLoss  # of the model
    parallel: nn.Module  # the same, averaging gradients over processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: str
    step: int = 0  # finished optimiser steps
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
    loss = NextTokenLoss(model)

    def try_out() -> None:
        tokens = torch.zeros(config.microbatch_size, model_config.context_length + 1, dtype=torch.int64)
        try:
            with autocast(precision, world.device):
                loss(tokens.to(world.device)).backward()
        finally:
            model.zero_grad()

    compile_if_wanted(loss, config, world, try_out)
    optimizer = make_optimizer(model, config, world.device)
    allocate_state(optimizer)
    torch.manual_seed(config.random_seed + 1 + world.rank)
    parallel = loss
    if world.size > 1:
        device_ids = None if world.device.type == "cpu" else [world.local_rank]
        parallel = DistributedDataParallel(loss, device_ids=device_ids, gradient_as_bucket_view=True)
    if world.device.type == "cpu":
        keep_freed_memory()
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    return TrainState(model, loss, parallel, optimizer, scaler, precision)


def to_device(sequences: Tensor, device: torch.device) -> Tensor:
    """Move uint16 sequences to the device and widen them there; on CUDA without waiting for the copy."""
    if device.type == "cuda":
        sequences = sequences.pin_memory()
    return sequences.to(device, non_blocking=True).to(torch.int64)


def train_step(
    state: TrainState, microbatches: list[Tensor], *, learning_rate: float, max_norm: float | None
) -> tuple[Tensor, Tensor]:
    """One optimiser step over this process's share of the global batch, sequences of (B, T + 1) each.

    Returns this process's mean loss and the norm of the gradient averaged over all processes (before
    clipping), two scalars on the device: nothing here waits for them.
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
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    return mean_loss, grad_norm


@torch.no_grad()
def validate(state: TrainState, sequences: Sequences, config: TrainConfig, world: World) -> float:
    """Mean loss over the first validation_batches microbatches, in nats per token, shared out."""
    state.loss.eval()
    total = torch.zeros((), device=world.device)
    for index in range(world.rank, config.validation_batches, world.size):
        microbatch = sequences.read(index * config.microbatch_size, config.microbatch_size)
        with autocast(state.precision, world.device):
            total += state.loss(to_device(microbatch, world.device))
    state.loss.train()
    return world.sum(total).item() / config.validation_batches


# ------------------------------------------------------------------------------------------------------------
# What a run writes while it trains
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """All that is fixed while a run trains."""

    directory: Path
    config: TrainConfig
    model_config: GPTConfig
    plan: BatchPlan
    data: RunData
    world: World

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.directory / "checkpoints"

    def microbatch(self, first: int) -> Tensor:
        """The microbatch that begins with training sequence `first`, on the device."""
        return to_device(self.data.train.read(first, self.plan.microbatch_size), self.world.device)

    def is_due(self, interval: int | None, step: int) -> bool:
        """Whether what is done every `interval` steps and at the end is to be done after step `step`."""
        return step == self.plan.steps or (interval is not None and step % interval == 0)


class StopSignal:
    """Remembers that SIGTERM or SIGINT asked this process to stop; a second request ends it at once.

    torchrun passes on a signal that the terminal has sent already: repeats within three seconds count as one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > 3:
            os._exit(128 + number)


def train(run: Run, state: TrainState) -> int:
    """Train to the last step, or until a signal asks to stop: then all processes checkpoint the same step.

    Returns the exit status: 0, or 128 + the signal. Raises RunError when the loss or a gradient is no number
    any more.
    """
    position = {"step": state.step, "seconds": state.seconds, "speaks": run.world.is_first}
    reporter = Reporter(run.directory, run.config, run.plan, **position)
    stop = StopSignal()
    reporter.status("running", state.step)
    try:
        train_steps(run, state, reporter, stop)
    except Exception as error:
        reporter.close("failed", state.step, error=" ".join(str(error).split()))
        raise
    if state.step < run.plan.steps:
        # torchrun ends the other processes as soon as one has left: none may before all is saved.
        run.world.gather(None)
        reporter.close("preempted", state.step)
        reporter.say(
            f"Stopped by a signal after step {state.step:,}, with a checkpoint; --resume goes on from there"
        )
        return 128 + (stop.received or signal.SIGTERM)
    reporter.close("finished", state.step)
    seconds, tokens = reporter.seconds(), state.step * run.plan.tokens_per_step
    reporter.say(f"Training complete in {seconds:,.3f} seconds")
    reporter.say(f"Tokens seen: {tokens:,}")
    reporter.say(f"Throughput: {tokens / seconds:,.0f} tokens/second")
    reporter.say(f"Final train loss: {state.train_loss:.3f}")
    reporter.say("Final val loss: " + ("not measured" if state.val_loss is None else f"{state.val_loss:.3f}"))
    return 0


class StepNumbers:
    """A step's loss, gradient norm and requests to stop, on their way from the device to the host."""

    def __init__(self, step: int, numbers: Tensor) -> None:
        self.step, self._ready = step, None
        self._numbers = numbers.to("cpu", non_blocking=True)
        if numbers.device.type != "cpu":
            self._ready = torch.get_device_module(numbers.device).Event()
            self._ready.record()

    def read(self) -> list[float]:
        """Wait for this step alone, not for what was queued after it, and return the numbers."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._numbers.tolist()


def train_steps(run: Run, state: TrainState, reporter: Reporter, stop: StopSignal) -> None:
    """The training loop: step, log, and at their intervals validation, checkpoint and chart."""
    config, plan, world = run.config, run.plan, run.world
    # The host reads a step's numbers when the next step is queued, so that the device never runs dry.
    unread: list[StepNumbers] = []
    stopping = False

    def read(done: list[StepNumbers]) -> bool:
        """Log finished steps; return whether a process was asked to stop."""
        nonlocal clock
        numbers = [each.read() for each in done]  # waits for the device
        clock, before = time.monotonic(), clock
        for each, (loss, grad_norm, _) in zip(done, numbers, strict=True):
            # In float16 the scaler passes over steps whose gradient overflows.
            if not math.isfinite(loss) or not (math.isfinite(grad_norm) or state.scaler.is_enabled()):
                what = f"the training loss is {loss}, the gradient norm {grad_norm} at step {each.step}"
                raise RunError(f"{what}; {way_back(run)}")
            state.recent_losses.append(loss)
            rate = learning_rate_at(each.step - 1, plan.steps, config)
            values = {"train_loss": loss, "grad_norm": grad_norm, "learning_rate": rate}
            reporter.step(each.step, values, step_seconds=(clock - before) / len(done))
        return any(asked for _, _, asked in numbers)

    if state.step == 0 and config.validation_interval:
        validate_and_log(run, state, reporter)
    clock = time.monotonic()
    while state.step < plan.steps and not stopping:
        loss, grad_norm = train_step(
            state,
            [run.microbatch(first) for first in plan.microbatches(state.step, world.rank)],
            learning_rate=learning_rate_at(state.step, plan.steps, config),
            max_norm=config.clipping_max_norm,
        )
        state.step += 1
        asked = torch.full_like(loss, float(stop.received is not None))
        unread.append(StepNumbers(state.step, world.sum(torch.stack([loss, grad_norm, asked])) / world.size))

        validates = config.validation_interval is not None and run.is_due(
            config.validation_interval, state.step
        )
        checkpoints = run.is_due(config.checkpoint_interval or config.validation_interval, state.step)
        if validates or checkpoints:
            stopping, unread = read(unread), []
        elif len(unread) > 1:
            stopping, unread = read(unread[:-1]), unread[-1:]
            if stopping:
                read(unread)
        if validates:
            validate_and_log(run, state, reporter)
        if checkpoints:
            checkpoint(run, state, reporter)
        elif stopping:
            checkpoint(run, state, reporter, scheduled=False)
        if validates or checkpoints:
            reporter.chart()
            clock = time.monotonic()


def validate_and_log(run: Run, state: TrainState, reporter: Reporter) -> None:
    """Validate, and write the loss to state, progress and metrics."""
    state.val_loss = validate(state, run.data.validation, run.config, run.world)
    if not math.isfinite(state.val_loss):
        raise RunError(f"the validation loss is {state.val_loss} at step {state.step}; {way_back(run)}")
    reporter.log(state.step, {"val_loss": state.val_loss})
    reporter.say(f"step {state.step:,}: val loss {state.val_loss:.4f}")


def checkpoint(run: Run, state: TrainState, reporter: Reporter, *, scheduled: bool = True) -> None:
    """Save where training stands and point `latest` at it, and `best` if it is.

    A checkpoint off schedule (before a stop) is never the best and closes no interval, so that a run that is
    stopped and resumed makes the same decisions as one that is not.
    """
    if scheduled:
        state.train_loss = float(np.mean(state.recent_losses))
        state.recent_losses.clear()
        validated = run.config.validation_interval is None or run.is_due(
            run.config.validation_interval, state.step
        )
        candidate = state.train_loss if run.config.validation_interval is None else state.val_loss
        is_best = validated and candidate < state.best_loss
        state.best_loss = candidate if is_best else state.best_loss
    if not nn.utils.get_total_norm(state.model.tensors().values(), math.inf).isfinite():
        raise RunError(f"the weights are no numbers after step {state.step}; {way_back(run)}")
    rng = run.world.gather(checkpointing.rng_state(run.world.device))
    reporter.flush()
    if not run.world.is_first:
        return
    meta = {
        "global_step": state.step,
        "sequences_seen": state.step * run.plan.global_batch,
        "tokens_seen": state.step * run.plan.tokens_per_step,
        "total_steps": run.plan.steps,
        "train_loss": state.train_loss,
        "val_loss": state.val_loss,
        "best_loss": state.best_loss if math.isfinite(state.best_loss) else None,
        "recent_losses": state.recent_losses,
        "learning_rate": learning_rate_at(state.step - 1, run.plan.steps, run.config),
        "seconds": reporter.seconds(),
        "scaler": state.scaler.state_dict(),
        "rng": rng,
        "global_batch": run.plan.global_batch,
        "processes": run.plan.processes,
        "precision": state.precision,
        "model_config": dataclasses.asdict(run.model_config),
        "train_config": dataclasses.asdict(run.config),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": run.world.device_name,
        "git_commit": checkpointing.git_commit(),
    }
    optimizer = checkpointing.optimizer_tensors(state.model, state.optimizer)
    path = checkpointing.save_checkpoint(run.checkpoints, state.model.tensors(), optimizer, meta)
    checkpointing.point_link(run.checkpoints, "latest", path)
    if scheduled and is_best:
        checkpointing.point_link(run.checkpoints, "best", path)
    if run.config.keep_checkpoints is not None:
        checkpointing.prune_checkpoints(run.checkpoints, run.config.keep_checkpoints)
    reporter.status("running", state.step, checkpoint=path.name)


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
    if world.is_first:
        tqdm.write(f"Going on after step {state.step:,}, from {found.path.name}")
    state.train_loss, state.val_loss, state.recent_losses = (
        meta["train_loss"],
        meta["val_loss"],
        meta["recent_losses"],
    )
    state.best_loss = math.inf if meta["best_loss"] is None else meta["best_loss"]
    if len(meta["rng"]) == world.size:
        checkpointing.set_rng_state(meta["rng"][world.rank], world.device)
    else:
        seed = np.random.SeedSequence((run.config.random_seed, state.step, world.rank))
        torch.manual_seed(int(seed.generate_state(1)[0]))
        if world.is_first:
            tqdm.write(
                f"Saved by {len(meta['rng'])} processes, resumed by {world.size}: the data go on exactly "
                "where they "
                "were; dropout masks differ"
            )


def way_back(run: Run) -> str:
    """What to do about a run that has diverged."""
    last = checkpointing.list_checkpoints(run.checkpoints)[-1:]
    where = f"the last checkpoint is {last[0].name}" if last else "there is no checkpoint yet"
    return f"{where}; a lower learning_rate, a warm-up or clipping_max_norm may help"


# ------------------------------------------------------------------------------------------------------------
# The largest microbatch that fits
# ------------------------------------------------------------------------------------------------------------


def find_max_microbatch(config: TrainConfig, model_config: GPTConfig, world: World) -> int:
    """The largest microbatch_size whose training step fits into memory on every process, by doubling, then
    bisecting.

    Steps are real, on synthetic tokens, but for the exchange of gradients; an accumulating run is tried with
    two microbatches, because from the second on gradients are held besides activations. Raises RunError if 1
    is too many.
    """
    # What communication needs is taken before anything is measured.
    world.sum(torch.zeros(1, device=world.device))
    if world.device.type == "cpu":
        limit_host_memory(world.local_size)
    # Steps exchange nothing, so that no process waits for one that has run out of memory.
    alone = dataclasses.replace(world, size=1, control=None)
    state = make_state(dataclasses.replace(config, microbatch_size=1), model_config, alone)
    # DDP, and accumulation from the second microbatch on, hold gradients besides activations.
    holds = (
        world.size > 1
        or config.global_batch_size is not None
        or config.gradient_accumulation_steps not in (None, 1)
    )

    def try_step(size: int) -> str | None:
        """Take two steps at a size and say what they took; None where memory ran out."""
        try:
            if state.loss.is_compiled:
                torch.compiler.reset()  # it would stop compiling after a few sizes
            tokens = torch.randint(model_config.vocab_size, (size, model_config.context_length + 1))
            microbatches = [tokens.to(world.device)] * (2 if holds else 1)
            for _ in range(2):
                start = time.perf_counter()
                _, norm = train_step(
                    state, microbatches, learning_rate=0.0, max_norm=config.clipping_max_norm
                )
                norm.item()  # waits for the device
            speed = len(microbatches) * size * model_config.context_length / (time.perf_counter() - start)
            return f"{memory_in_use(world.device):.2f} GiB, {speed:,.0f} tokens/s per process"
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Only here, with the exception and its traceback gone, is the memory of the failed step free.
        return None

    def fits(size: int) -> bool:
        taken = try_step(size)
        state.optimizer.zero_grad()
        release_memory(world.device)
        everywhere = all(each is not None for each in world.gather(taken))
        if world.is_first:
            tqdm.write(f"microbatch {size}: " + (f"fits, {taken}" if everywhere else "too large"))
        return everywhere

    if not fits(1):
        raise RunError(
            "not even a microbatch of 1 fits; a smaller model, context_length or number of processes would"
        )
    fitting, too_large = 1, 2
    while fits(too_large):
        fitting, too_large = too_large, 2 * too_large
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        fitting, too_large = (middle, too_large) if fits(middle) else (fitting, middle)
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
def main(
    run: str,
    datasets_dir: Path | None,
    checkpoint: str | None,
    *,
    resume: bool,
    find_max_microbatch_size: bool,
    only_plan: bool,
    runs_dir: Path,
) -> int:
    """Train the run RUN, a folder of runs/ with model.json and train.json, on a data set kept in
    DATASETS_DIR.

    CHECKPOINT (latest, best, or a checkpoint folder's name) goes on from there.
    """
    run_dir = runs_dir / require_plain_name(run, "run")
    if not run_dir.is_dir():
        have = ", ".join(sorted(path.parent.name for path in runs_dir.glob("*/train.json"))) or "none"
        raise InputError(f"{run_dir}: no such run; there are: {have}")
    model_config = read_config(GPTConfig, run_dir / "model.json")
    config = read_config(TrainConfig, run_dir / "train.json")
    require(not (find_max_microbatch_size and only_plan), "give either -f or --plan")
    require(
        not (checkpoint and resume), "give either a checkpoint's name or --resume, which finds the newest"
    )
    require(
        bool(datasets_dir or find_max_microbatch_size), "DATASETS_DIR is missing: the folder of the data sets"
    )

    world, status = join_world(), 0
    if find_max_microbatch_size:
        size = find_max_microbatch(config, model_config, world)
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
        prepared = prepare_run(run_dir, config, model_config, datasets_dir, world)
        with memory_errors_explained(config.microbatch_size):
            state = begin(prepared, "newest" if resume else checkpoint)
            if state is not None:
                status = train(prepared, state)
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def prepare_run(
    run_dir: Path, config: TrainConfig, model_config: GPTConfig, datasets_dir: Path, world: World
) -> Run:
    """Fetch the data where they are missing, once per node, and check all that the run will use of them."""
    config.accumulation_for(world.size)  # before anything slow
    world.agree(lambda: lock(run_dir), on=world.is_first)
    fetch = functools.partial(
        fetch_dataset, datasets_dir, config.dataset, config.dataset_revision, config.splits
    )
    world.agree(fetch, on=world.local_rank == 0)
    data = world.agree(lambda: open_data(config, model_config, datasets_dir))
    plan = plan_batches(config, model_config.context_length, world.size, data.train.count)
    used = plan.steps * plan.global_batch, config.validation_batches * config.microbatch_size
    share = world.local_rank, world.local_size
    world.agree(lambda: check_tokens(data, *used, model_config.vocab_size, share=share))
    return Run(run_dir, config, model_config, plan, data, world)


def lock(run_dir: Path) -> None:
    """Keep other trainings out of a run's folder while this one lives. Raises InputError if one is in."""
    require(
        os.access(run_dir, os.W_OK), f"{run_dir}: cannot be written to; training writes its results there"
    )
    try:
        fcntl.flock(os.open(run_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = read_status(run_dir).get("pid", "unknown")
        raise InputError(
            f"{run_dir}: is being trained by another process (pid {holder}); wait for it or stop it"
        ) from None
    except OSError:  # a file system that knows no locks
        tqdm.write(f"Warning: {run_dir} cannot be locked; do not start this run twice")


def begin(run: Run, checkpoint: str | None) -> TrainState | None:
    """The state that training begins with: from a named checkpoint, from the "newest" good one, or fresh.

    None when the checkpoint is of the last step: there is nothing left to do.
    """
    world = run.world
    found = world.agree(lambda: find_checkpoint(run, checkpoint), on=world.is_first)
    step = world.from_first(found.meta["global_step"] if found else None)
    if step is not None and step >= run.plan.steps:
        if world.is_first:
            print(
                f"{run.directory.name} is finished: {found.path.name} is of the last of {run.plan.steps:,} "
                "steps"
            )
        return None
    if world.is_first:
        print_plan(
            run.directory, run.config, run.model_config, run.data, run.plan, hardware(run.config, world)
        )
    state = make_state(run.config, run.model_config, world)
    if step is not None:
        restore(run, state, found)
    elif world.is_first and (aside := set_earlier_results_aside(run.directory)):
        print(f"Starting afresh; what this run wrote before is now in {aside} (--resume would have gone on)")
    return state


def find_checkpoint(run: Run, name: str | None) -> checkpointing.Checkpoint | None:
    """The checkpoint to go on from, checked to be this run's; None for none."""
    if name is None:
        return None
    if name == "newest":
        found = checkpointing.newest_checkpoint(run.checkpoints, tqdm.write)
    else:
        found = checkpointing.named_checkpoint(run.checkpoints, name)
    if found is not None:
        checkpointing.check_resumable(found, run.model_config, run.config, run.plan.global_batch)
    return found


if __name__ == "__main__":
    # Not sys.exit: threads of a process group whose other members are gone can hold up or abort Python's end.
    run_command(main, leave=os._exit)
