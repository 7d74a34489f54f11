#!/usr/bin/env python3
"""Train a GPT-2-class base model. A run is two JSON files, runs/RUN/model.json and runs/RUN/train.json; their
keys are those of GPTConfig (basemodel/model/config.py) and TrainConfig (basemodel/training/config.py).

    python ddp_train.py demo datasets                 one process, on the GPU if there is one, else on the CPU
    python ddp_train.py demo datasets --resume        continue from the newest valid checkpoint
    python ddp_train.py demo datasets --plan          say what the run would do, and what it would cost
    python ddp_train.py original --plan --on all      which machine to rent: what each would take and cost
    python ddp_train.py original -f                   find the largest microbatch that fits
    torchrun --nproc_per_node=8 ddp_train.py 8xh100m80 datasets       the eight GPUs of one machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 ddp_train.py ...

Read it from top to bottom: the learner takes one training step, the trainer loops over steps, the command
puts both together. The model is in gpt.py, checkpoints are in checkpointing.py, the rest is in basemodel/.
"""

import dataclasses
import functools
import math
import os
import signal
import time
from contextlib import nullcontext
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
from basemodel.common.command_line import run_command
from basemodel.common.errors import InputError, RunError
from basemodel.data import hub
from basemodel.data.sequences import Sequences, to_device
from basemodel.model import memory
from basemodel.model.config import GPTConfig
from basemodel.model.loss import NextTokenLoss
from basemodel.model.weights import load_tensors
from basemodel.planning.plan import Elsewhere, open_if_here, plan_on_machines, plan_options, print_plan
from basemodel.results.reporting import Reporter, check_reporting, complete_status
from basemodel.training import microbatch, run_folder
from basemodel.training.backend import autocast, choose_precision, compile_if_wanted, set_up_arithmetic
from basemodel.training.batches import check_tokens, open_data, plan_batches
from basemodel.training.budget import Budget, has_ended
from basemodel.training.config import TrainConfig
from basemodel.training.optimizer import allocate_state, make_optimizer, set_learning_rate, step_if
from basemodel.training.pending import PendingSteps, StepResult
from basemodel.training.processes import World, join_world, lost_processes_explained
from basemodel.training.resume import (
    check_space,
    find_checkpoint,
    provenance,
    rng_state,
    set_rng_state,
    was_started_before,
)
from basemodel.training.run import Run
from basemodel.training.stopping import StopSignal, hung_steps_ended
from gpt import GPTModel

# A run gives up after this many non-finite steps in a row. In fp16 they are normal at first: the loss scale
# starts at 2^16, and each one halves it. In bf16 and fp32, which need no scale, they mean divergence.
MOST_SKIPPED_IN_A_ROW = 16

# ------------------------------------------------------------------------------------------------------------
# The training step
# ------------------------------------------------------------------------------------------------------------


class Learner:
    """A new model and what a training step needs besides: loss, optimizer, gradient averaging, loss scaling.

    Every process starts with the same weights, and with a dropout stream of its own.
    """

    def __init__(
        self, config: TrainConfig, model_config: GPTConfig, world: World, *, any_size: bool = False
    ) -> None:
        """`any_size`: compile for any microbatch, not for the config's alone."""
        self.config, self.world = config, world
        # DDP sends gradients from its buckets, where they stay. One process alone frees them after each step.
        self.keeps_gradients = world.size > 1
        self.precision = choose_precision(config, world.device)
        set_up_arithmetic(self.precision, deterministic=config.deterministic)
        torch.manual_seed(config.random_seed)
        self.model = GPTModel(model_config)
        if world.device.type != "cpu":
            self.model.to(world.device)
        self.loss_module = NextTokenLoss(self.model, document_masking=config.document_masking)
        compile_if_wanted(self.loss_module, config, world, self._warm_up, any_size=any_size)
        self.optimizer = make_optimizer(self.model, config, self.precision, peers=world)
        allocate_state(self.optimizer)
        # With several processes, DDP's wrapper of the loss averages gradients in its backward pass.
        self.ddp_module: nn.Module = self.loss_module
        if world.size > 1:
            device_ids = None if world.device.type == "cpu" else [world.local_rank]
            self.ddp_module = DistributedDataParallel(
                self.loss_module, device_ids=device_ids, gradient_as_bucket_view=True
            )
            # The first pass lets DDP rebuild its buckets, the second moves gradients there. Both change how
            # sums of three or more processes round, so a resumed run must do it before its first step too.
            self._warm_up(self.ddp_module)
            self._warm_up(self.ddp_module)
        torch.manual_seed(config.random_seed + 1 + world.rank)
        if world.device.type == "cpu":
            memory.keep_freed_memory()
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.precision == "fp16")

    def _warm_up(self, module: nn.Module) -> None:
        """One pass without an update, to trigger compilation and what DDP does in its first passes."""
        size = self.config.microbatch_size, self.model.config.context_length + 1
        try:
            with autocast(self.precision, self.world.device):
                module(torch.zeros(size, dtype=torch.int64, device=self.world.device)).backward()
        finally:
            self.model.zero_grad(set_to_none=not self.keeps_gradients)

    def train_step(self, microbatches: list[Tensor], learning_rate: float, *, stop: bool = False) -> Tensor:
        """One optimizer step over this process's share of the global batch, sequences of (B, T + 1) each.

        Returns the fields of StepResult as a tensor of shape (4,) on the device. A step whose loss or
        gradient is not finite on one process is skipped on all. No host synchronization except in `step_if`.
        """
        loss = self._accumulate_gradients(microbatches)
        grad_norm = self._clip_gradients()
        stops = torch.full_like(loss, float(stop))
        # Both in one all-reduce: tiny ones cost latency only.
        loss, stops = self.world.all_reduce(torch.stack([loss / self.world.size, stops]))
        finite = loss.isfinite() & grad_norm.isfinite()
        set_learning_rate(self.optimizer, learning_rate)
        step_if(finite, self.optimizer, self.scaler)
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        return torch.stack([loss, grad_norm, finite.to(loss), stops])

    def _accumulate_gradients(self, microbatches: list[Tensor]) -> Tensor:
        """Accumulate gradients over the microbatches; return this process's mean loss.

        Each loss is a mean, divided by the number of microbatches; in the last backward pass DDP all-reduces
        the gradients to their average over the processes. So they are those of the global batch's mean loss.
        """
        mean_loss = torch.zeros((), device=self.world.device)
        loss_scale = self.scaler.scale(torch.ones_like(mean_loss)) if self.scaler.is_enabled() else None
        for index, sequences in enumerate(microbatches):
            # no_sync must cover the forward pass too: it decides whether the backward pass all-reduces.
            accumulating = self.world.size > 1 and index < len(microbatches) - 1
            with self.ddp_module.no_sync() if accumulating else nullcontext():
                with autocast(self.precision, self.world.device):
                    loss = self.ddp_module(sequences, loss_scale) / len(microbatches)
                self.scaler.scale(loss).backward()
            mean_loss += loss.detach()
        return mean_loss

    def _clip_gradients(self) -> Tensor:
        """Clip gradients to clipping_max_norm, if it is set; return their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.model.parameters())
        grad_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.config.clipping_max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clipping_max_norm, grad_norm)
        return grad_norm

    def validate(self, sequences: Sequences, stop: StopSignal) -> float | None:
        """Mean loss over the first validation_batches microbatches, shared out over the processes.

        Returns None if any process is asked to stop before it finishes.
        """
        config, world = self.config, self.world
        total = torch.zeros((), device=world.device)
        for first in range(0, config.validation_batches, world.size):
            if world.any(stop):
                return None
            if (index := first + world.rank) < config.validation_batches:
                found = sequences.read(index * config.microbatch_size, config.microbatch_size)
                total += self.validation_loss(to_device(found, world.device))
        # Not all_reduce: on a GPU it would wait without end for a process that has died or hangs.
        return sum(world.all_gather(total.item())) / config.validation_batches

    @torch.no_grad()
    def validation_loss(self, sequences: Tensor) -> Tensor:
        """The mean loss of sequences (B, T + 1), without dropout."""
        self.loss_module.eval()
        with autocast(self.precision, self.world.device):
            loss = self.loss_module(sequences)
        self.loss_module.train()
        return loss


# ------------------------------------------------------------------------------------------------------------
# The training loop
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """The progress of a run: what a checkpoint keeps besides tensors."""

    step: int = 0  # finished optimizer steps
    work_due: bool = True  # the validation and checkpoint due after this step are still to be done
    skipped: int = 0  # steps in a row, up to this one, that were not finite
    seconds: float = 0.0  # of training, over all resumed parts
    best_loss: float = math.inf
    train_loss: float | None = None  # mean over the steps between the last two checkpoints
    val_loss: float | None = None  # of the last validation
    recent_losses: list[float] = field(default_factory=list)  # of each step since the last checkpoint


class Diverged(RunError):
    """The loss, a gradient or a weight became NaN or infinite."""


class Trainer:
    """Runs the training loop: steps, logs, validates and saves."""

    def __init__(self, run: Run, world: World) -> None:
        self.run, self.world = run, world
        self.learner = Learner(run.config, run.model_config, world)
        self.progress, self.budget = Progress(), Budget(run, world)

    def train(self) -> int:
        """Train to the last step, or until a signal arrives: then all processes stop after the same step.

        Returns the exit status: 0, or 128 + the signal. Raises RunError when the run diverges or a checkpoint
        cannot be saved.
        """
        run, progress, pending = self.run, self.progress, PendingSteps(self.world.device)
        # The others wait: a tracker may take long to reach its server.
        self.reporter = self.world.agree(
            lambda: Reporter(run, progress.step, progress.seconds, enabled=self.world.is_first)
        )
        self.reporter.watch(self.world, compiled=self.learner.loss_module.is_compiled)
        keep, tokenizer = run.config.keep_checkpoints, run.data.tokenizer
        self.saver = checkpointing.Saver(run.checkpoints, keep, run.metrics, tokenizer)
        self.reporter.status("running", progress.step)
        with StopSignal() as stop:
            try:
                with self.saver:
                    with hung_steps_ended(self.world, stop, pending.overdue, self._give_up):
                        finished = self._loop(stop, pending)
                    if not finished:
                        self._save(scheduled=False)
                    self._await_save()
                    self.saver.finish()
            except Exception as error:
                if isinstance(error, Diverged):  # the last save has finished, so the advice can name it
                    error = RunError(f"{error}; {advice_after_divergence(run)}")
                self.reporter.close("failed", progress.step, error=" ".join(str(error).split()))
                raise error
            self.reporter.checkpoint = self.saver.saved
            # torchrun ends the other processes as soon as one exits, so none may before everything is saved.
            self.world.all_gather(None)
            if not finished:
                self.reporter.close("preempted", progress.step)
                where = f"after step {progress.step:,}, with a checkpoint; --resume continues from there"
                self.reporter.say(f"Stopped by a signal {where}")
                return 128 + (stop.received or signal.SIGTERM)
        self.reporter.finish(progress.step, progress.train_loss, progress.val_loss)
        return 0

    def _loop(self, stop: StopSignal, pending: PendingSteps) -> bool:
        """The training loop: read, step, log, stop if asked to, validate and save where due.

        Returns False if a signal arrived before all work was done.
        """
        progress = self.progress
        # Before the first step, and where a stop left it undone.
        if progress.work_due and not self._validate_and_save(stop):
            return False
        pending.restart_clock()
        while progress.step < self.run.plan.steps:
            plan, step = self.run.plan, progress.step
            places = plan.microbatches(step, self.world.rank)
            microbatches = [plan.cut(self._read(*place), step) for place in places]
            learning_rate = self.run.learning_rate_at(step)
            result = self.learner.train_step(microbatches, learning_rate, stop=bool(stop))
            progress.step += 1
            self.run = self.budget.kept(self.run, progress.step, self.reporter)
            progress.work_due = self.run.has_work_after(progress.step)

            # A GPU's results are read one step late, so that it never waits for Python.
            pending.add(progress.step, result)
            results = pending.read_all() if progress.work_due else pending.read_due()
            self._log(results)
            # The count is summed over the processes, so all of them stop after the same step.
            if any(result.stops for _, result, _ in results):
                self._log(pending.read_all())
                return False

            if progress.work_due:
                if not self._validate_and_save(stop):
                    return False
                pending.restart_clock()
            self.saver.check()  # raises the error of a save that failed in the background
            self.reporter.checkpoint = self.saver.saved
        return True

    def _read(self, first: int, count: int) -> Tensor:
        """The microbatch of `count` sequences from number `first` on, (B, T + 1), on the device."""
        return to_device(self.run.data.train.read(first, count), self.world.device)

    def _log(self, results: list[tuple[int, StepResult, float]]) -> None:
        """Log finished steps, each with its result and its seconds.

        Raises Diverged after too many steps in a row whose loss or gradient is not finite.
        """
        for step, result, seconds in results:
            rate = self.run.learning_rate_at(step - 1)
            values = {"train_loss": result.loss, "grad_norm": result.grad_norm, "learning_rate": rate}
            self.reporter.step(step, values, step_seconds=seconds)
            if math.isfinite(result.loss):
                self.progress.recent_losses.append(result.loss)
            self.progress.skipped = 0 if result.finite else self.progress.skipped + 1
            if not result.finite:
                loss, norm = result.loss, result.grad_norm
                what = f"the training loss is {loss}, the gradient norm {norm} at step {step}"
                if self.progress.skipped >= MOST_SKIPPED_IN_A_ROW:
                    raise Diverged(f"{what}, and {self.progress.skipped} steps in a row were skipped")
                self.reporter.say(f"Skipped: {what}; the weights stay as they were")

    def _validate_and_save(self, stop: StopSignal) -> bool:
        """Validate, sample and save where that is due after this step, and redraw the chart.

        Returns False if a signal arrives during validation; the resumed run then repeats it, and decides as
        an uninterrupted run would.
        """
        run, progress, world = self.run, self.progress, self.world
        if run.validates_after(progress.step) and not self._validate(stop):
            return False
        if run.samples_after(progress.step):
            world.agree(lambda: self.reporter.sample(self.learner.model, progress.step), on=world.is_first)
        progress.work_due = False
        if run.saves_after(progress.step):
            self._save()
        if progress.step < run.plan.steps:  # the last is drawn as the run finishes
            self.reporter.chart()
        return True

    def _validate(self, stop: StopSignal) -> bool:
        start, step = time.monotonic(), self.progress.step
        loss = self.learner.validate(self.run.data.validation, stop)
        if loss is None:
            return False
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss} at step {step}")
        self.progress.val_loss = loss
        self.reporter.log(step, {"val_loss": loss, "validation_seconds": round(time.monotonic() - start, 3)})
        self.reporter.say(f"step {step:,}: val loss {loss:.4f}")
        return True

    # --------------------------------------------------------------------------------------------------------
    # Checkpoints
    # --------------------------------------------------------------------------------------------------------

    def _save(self, *, scheduled: bool = True) -> None:
        """Start saving a checkpoint. `latest` will point to it; so will `best`, if it is the best so far.

        One saved because of a stop is never marked best and leaves recent_losses alone, so that a resumed run
        picks the same best checkpoint as an uninterrupted one.
        """
        start, learner = time.monotonic(), self.learner
        is_best = scheduled and self._close_interval()
        if not nn.utils.get_total_norm(learner.model.tensors().values(), math.inf).isfinite():
            raise Diverged(f"the weights are NaN or infinite after step {self.progress.step}")
        self._await_save()
        rng = self.world.all_gather(rng_state(self.world.device))
        if not self.world.is_first:
            return
        optimizer = checkpointing.optimizer_tensors(learner.model, learner.optimizer)
        self.saver.copy(learner.model.tensors(), optimizer)
        self.reporter.log(self.progress.step, {"checkpoint_seconds": round(time.monotonic() - start, 3)})
        self.reporter.flush()
        self.saver.write(self._meta() | {"is_best": is_best, "rng": rng})

    def _await_save(self) -> None:
        """Wait on all processes for the save in progress, however long it takes, so that none of them times
        out waiting for the first; a process that dies or hangs meanwhile is noticed."""
        while self.world.any(self.saver.busy(0.3)):
            pass

    def _give_up(self, reason: str) -> None:
        """Report that the main thread hangs, from another one. What is being saved is saved first."""
        self.saver.busy()
        self.reporter.close("failed", self.progress.step, error=reason)

    def _close_interval(self) -> bool:
        """Take the mean loss since the last checkpoint; return whether this checkpoint is the best so far."""
        progress, validates = self.progress, self.run.config.validation_interval is not None
        if progress.recent_losses:
            progress.train_loss = float(np.mean(progress.recent_losses))
        progress.recent_losses.clear()
        if validates and not self.run.validates_after(progress.step):
            return False
        measured = progress.val_loss if validates else progress.train_loss
        is_best = measured is not None and measured < progress.best_loss
        progress.best_loss = measured if is_best else progress.best_loss
        return is_best

    def _meta(self) -> dict[str, Any]:
        """The contents of a checkpoint's meta.json."""
        run, progress = self.run, self.progress
        return {
            "global_step": progress.step,
            "settled": not progress.work_due,
            "skipped": progress.skipped,
            "sequences_seen": run.plan.sequences(progress.step),
            "tokens_seen": run.plan.tokens(progress.step),
            "total_steps": run.plan.steps,
            "train_loss": progress.train_loss,
            "val_loss": progress.val_loss,
            "best_loss": progress.best_loss if math.isfinite(progress.best_loss) else None,
            "recent_losses": list(progress.recent_losses),
            "learning_rate": run.learning_rate_at(progress.step - 1),
            "seconds": self.reporter.seconds(),
            "scaler": self.learner.scaler.state_dict(),
            "global_batch": run.plan.global_batch,
            "processes": run.plan.processes,
            "precision": self.learner.precision,
            "model_config": dataclasses.asdict(run.model_config),
            "train_config": dataclasses.asdict(run.config),
            "data": run.files,
            "device": self.world.device_name,
            **provenance(),
        }

    def restore(self, checkpoint: checkpointing.Checkpoint | None) -> None:
        """Continue from a checkpoint, which only the first process holds, on all processes."""
        world, learner = self.world, self.learner
        meta = world.broadcast(checkpoint.meta if checkpoint else None)
        source = world.broadcast(str(checkpoint.path) if checkpoint else None)
        load_tensors(learner.model, world.broadcast_tensors(checkpoint.model if checkpoint else {}), source)
        optimizer = world.broadcast_tensors(checkpoint.optimizer if checkpoint else {})
        checkpointing.load_optimizer_tensors(learner.model, learner.optimizer, optimizer)
        if learner.scaler.is_enabled() and meta["scaler"]:  # empty where it was trained in another precision
            learner.scaler.load_state_dict(meta["scaler"])
        self.progress = Progress(
            step=meta["global_step"],
            work_due=not meta["settled"],
            best_loss=math.inf if meta["best_loss"] is None else meta["best_loss"],
            **{key: meta[key] for key in ("skipped", "seconds", "train_loss", "val_loss", "recent_losses")},
        )
        self.run = self.budget.resumed(self.run, meta)
        lines = [f"Resuming after step {self.progress.step:,}, from {Path(source).name}"]
        if len(meta["rng"]) == world.size:
            set_rng_state(meta["rng"][world.rank], world.device)
        else:
            seed = np.random.SeedSequence((self.run.config.random_seed, self.progress.step, world.rank))
            torch.manual_seed(int(seed.generate_state(1)[0]))
            lines.append(
                f"Saved by {len(meta['rng'])} processes, resumed by {world.size}: the data continue exactly "
                "where they were; dropout masks differ"
            )
        if meta["precision"] != learner.precision:
            lines.append(f"Saved in {meta['precision']}, resumed in {learner.precision}: rounding differs")
        if world.is_first:
            tqdm.write("\n".join(lines))


def advice_after_divergence(run: Run) -> str:
    """What to do about a run that has diverged."""
    last = checkpointing.list_checkpoints(run.checkpoints)[-1:]
    where = f"the last checkpoint is {last[0].name}" if last else "there is no checkpoint yet"
    return f"{where}; a lower learning_rate, a warm-up or clipping_max_norm may help"


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run_name", metavar="RUN")
@click.argument("datasets_dir", type=click.Path(path_type=Path), required=False)
@click.argument("checkpoint", required=False)
@click.option("--resume", is_flag=True, help="Continue from the newest valid checkpoint, if there is one.")
@click.option("-f", "--find-max-microbatch-size", is_flag=True, help="Find the largest microbatch that fits.")
@click.option("--plan", "only_plan", is_flag=True, help="Print what the run would do, and exit.")
@plan_options
@click.option("--runs-dir", type=click.Path(path_type=Path), default=Path(__file__).parent / "runs")
@click.option(
    "--allow-config-change", is_flag=True, help="Continue although the configs or the data set have changed."
)
@click.option(
    "--collective-timeout",
    type=click.FloatRange(min=1),
    default=600,
    show_default=True,
    help="Seconds that processes wait for one another in a step before they give up.",
)
def main(
    run_name: str,
    datasets_dir: Path | None,
    checkpoint: str | None,
    *,
    resume: bool,
    find_max_microbatch_size: bool,
    only_plan: bool,
    runs_dir: Path,
    allow_config_change: bool,
    collective_timeout: float,
    on: str | None,
    budget: float | None,
    machines: Path | None,
) -> int:
    """Train the run RUN, a folder of runs/ with model.json and train.json, on a data set kept in
    DATASETS_DIR.

    With CHECKPOINT (latest, best, or a checkpoint folder's name), continue from there.
    """
    run = Run.read(runs_dir, run_name)
    if find_max_microbatch_size and only_plan:
        raise InputError("give either -f or --plan")
    if checkpoint and resume:
        raise InputError("give either a checkpoint's name or --resume, which finds the newest")
    elsewhere = Elsewhere(on, budget, machines)
    plans_elsewhere = elsewhere.is_asked(only_plan)
    if not datasets_dir and not find_max_microbatch_size and not plans_elsewhere:
        raise InputError("DATASETS_DIR is missing: the folder of the data sets")
    status = 0
    with lost_processes_explained():
        world = join_world(timedelta(seconds=collective_timeout))
        if find_max_microbatch_size:
            with StopSignal() as stop:
                size = find_max_microbatch(run, world, stop)
            if world.is_first:
                print(f"Max microbatch size was {size}")
        elif plans_elsewhere:
            if world.is_first:
                plan_on_machines(run, datasets_dir, elsewhere)
        elif only_plan:
            show_plan(run, datasets_dir, world)
        else:
            run = dataclasses.replace(run, launchers=world.launchers())
            resume = world.any(resume or was_started_before(run))
            run = prepare(run, datasets_dir, world, checkpoint, resume)
            hint = f"microbatch_size is {run.config.microbatch_size}; -f finds the largest that fits"
            with memory.memory_errors_explained(hint):
                trainer = make_trainer(run, world, "newest" if resume else checkpoint, allow_config_change)
                status = trainer.train() if trainer else 0
        if dist.is_initialized():
            dist.destroy_process_group()
    return status


def show_plan(run: Run, datasets_dir: Path, world: World) -> None:
    """Print what the run would do, using the data if they are already downloaded."""
    run_data = open_if_here(run, datasets_dir)
    plan = plan_batches(
        run.config, run.model_config.context_length, world.size, run_data and run_data.train.count
    )
    if world.is_first:
        print_plan(dataclasses.replace(run, data=run_data, plan=plan), world)


def find_max_microbatch(run: Run, world: World, stop: StopSignal) -> int:
    """The largest microbatch_size with which the run fits into memory on every process.

    Takes real steps on random tokens, but without all-reduce. Raises RunError if not even 1 fits, or when
    asked to stop.
    """
    # The first collective allocates its buffers before anything is measured.
    world.all_reduce(torch.zeros(1, device=world.device))
    if world.device.type == "cpu":
        memory.limit_host_memory(world.local_size)
    alone, smallest = microbatch.rehearsal_of(world), dataclasses.replace(run.config, microbatch_size=1)
    with memory.memory_errors_explained("the model alone does not fit; use a smaller one or fewer processes"):
        learner = Learner(smallest, run.model_config, alone, any_size=True)
    learner.keeps_gradients = world.size > 1
    try_size = functools.partial(microbatch.rehearse, learner)
    size = microbatch.largest_that_fits(try_size, world, stop)
    if learner.loss_module.is_compiled:  # until now for any size, but a run compiles for its own
        torch.compiler.reset()
        learner.loss_module.compile()
        while size > 1 and not microbatch.fits(try_size, size, world):
            size -= 1
    return size


def prepare(run: Run, datasets_dir: Path, world: World, checkpoint: str | None, resume: bool) -> Run:
    """Lock the run's folder, download missing data, once per node, and check every token the run will use.

    Raises InputError at once if `checkpoint` does not exist.
    """
    config, model_config = run.config, run.model_config
    config.accumulation_for(world.size)  # raises an error here, not after a download
    world.agree(functools.partial(check_reporting, run), on=world.is_first)
    if checkpoint is not None and not resume:
        world.agree(lambda: checkpointing.require_named(run.checkpoints, checkpoint), on=world.is_first)
    say = tqdm.write if resume else None
    locked = world.agree(lambda: run_folder.lock_run(run.directory, say), on=world.is_first)
    if locked:
        checkpointing.remove_leftovers(run.checkpoints)
    elif world.is_first:
        tqdm.write(f"Warning: {run.directory} cannot be locked; do not start this run twice")
    fetch = functools.partial(
        hub.fetch_dataset, datasets_dir, config.dataset, config.dataset_revision, config.splits
    )
    folder = world.agree(fetch, on=world.local_rank == 0)
    run_data = world.agree(lambda: open_data(config, model_config, datasets_dir))
    plan = plan_batches(config, model_config.context_length, world.size, run_data.train.count)
    used = plan.sequences(plan.steps), config.validation_batches * config.microbatch_size
    share = world.local_rank, world.local_size
    world.agree(lambda: check_tokens(run_data, *used, model_config.vocab_size, share=share))
    fingerprint = functools.partial(hub.fingerprint_files, folder, config.splits)
    files = world.agree(fingerprint, on=world.local_rank == 0)
    files = hub.same_on_all_nodes([each for each in world.all_gather(files) if each is not None])
    return dataclasses.replace(run, model_config=run_data.model_config, plan=plan, data=run_data, files=files)


def make_trainer(run: Run, world: World, name: str | None, allow_change: bool) -> Trainer | None:
    """The trainer to start with: from a named checkpoint, from the "newest" valid one, or from scratch.

    None if the checkpoint is from the last step: nothing is left to do.
    """
    checkpoint = world.agree(lambda: find_checkpoint(run, name, allow_change), on=world.is_first)
    found = (checkpoint.meta["global_step"], has_ended(run, checkpoint.meta)) if checkpoint else (None, False)
    step, ended = world.broadcast(found)
    if ended:
        if world.is_first:
            print(f"{run.name} is finished: {checkpoint.path.name} is from the last of {step:,} steps")
            complete_status(run, checkpoint.meta, checkpoint.path.name)
        return None
    if world.is_first:
        print_plan(run, world)
        if step is None and (aside := run_folder.set_earlier_results_aside(run.directory)):
            print(
                f"Starting from scratch; earlier results are now in {aside} (--resume would have continued)"
            )
    world.agree(lambda: check_space(run, step or 0), on=world.is_first)
    trainer = Trainer(run, world)
    if step is not None:
        trainer.restore(checkpoint)
    return trainer


if __name__ == "__main__":
    # Not sys.exit: after other processes died, the process group's threads can block or abort Python's exit.
    run_command(main, leave=os._exit)
