#!/usr/bin/env python3
"""Train a GPT-2-class base model, on one device or on many with DDP.

    python ddp_train.py demo datasets               one process, on the GPU or, without one, on the CPU
    python ddp_train.py demo datasets --resume      continue from the newest valid checkpoint
    python ddp_train.py demo datasets --plan        print what the run would do and cost, then exit
    python ddp_train.py original --plan --on all    compare time and cost on machines for rent
    python ddp_train.py original -f                 find the largest microbatch that fits
    torchrun --nproc_per_node=8 ddp_train.py 8xh100m80-best datasets  eight GPUs on one machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 ddp_train.py ...

A run is two files in runs/RUN/, model.json and train.json; their keys are in basemodel/model/config.py and
basemodel/training/config.py. Read this script from top to bottom: the learner takes one training step, the
trainer loops over steps, and the command puts the two together. The model is in gpt.py, checkpoints are in
checkpointing.py, the rest is in basemodel/.
"""

import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import checkpointing
from basemodel.common.command_line import run_command, runs_dir_option
from basemodel.common.errors import InputError, RunError
from basemodel.data.sequences import Sequences, to_device
from basemodel.model import memory
from basemodel.model.loss import NextTokenLoss
from basemodel.planning.plan import Elsewhere, plan_here, plan_on_machines, print_plan
from basemodel.results.reporting import NoReporter, Reporter, check_reporting, complete_status, say
from basemodel.training import backend, budget, microbatch, optimizer, pending, processes, resume, stopping
from basemodel.training.config import TrainConfig
from basemodel.training.run import Run, prepare_run
from basemodel.training.run_folder import set_earlier_results_aside
from basemodel.training.schedule import BatchPlan
from gpt import GPTConfig, GPTModel

# Give up after this many non-finite steps in a row. fp16 runs start with a few: the loss scale starts at 2^16
# and each skipped step halves it. In bf16 and fp32, which have no loss scale, they mean divergence.
MOST_SKIPPED_IN_A_ROW = 16

# ------------------------------------------------------------------------------------------------------------
# The training step
# ------------------------------------------------------------------------------------------------------------


class Learner:
    """A new model and everything that trains it: loss, optimizer, gradient averaging, loss scaling."""

    def __init__(
        self,
        config: TrainConfig,
        model_config: GPTConfig,
        world: processes.World,
        *,
        plan: BatchPlan | None = None,
        any_size: bool = False,
    ) -> None:
        """`plan` has the shapes to compile for; without it, it is the config's microbatch, or `any_size`."""
        self.config, self.world = config, world
        self.full_shape = config.microbatch_size, model_config.context_length + 1
        self.shapes = plan.shapes() if plan else {self.full_shape}
        self.precision = backend.choose_precision(config, world.device)
        backend.set_up_arithmetic(self.precision, deterministic=config.deterministic)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.precision == "fp16")
        torch.manual_seed(config.random_seed)  # on all processes alike: they start with the same weights
        self.model = GPTModel(model_config).to(world.device)
        self.loss_module = NextTokenLoss(self.model, document_masking=config.document_masking)
        self.compile_problem = backend.compile_if_configured(
            self.loss_module, config, world, self._compile_all, any_size=any_size
        )
        self.optimizer = optimizer.make_optimizer(self.model, config, self.precision, world)
        optimizer.allocate_state(self.optimizer)
        self.ddp_module = self._wrapped_in_ddp()
        torch.manual_seed(config.random_seed + 1 + world.rank)  # dropout masks differ between processes
        memory.keep_freed_memory(world.device)

    def _wrapped_in_ddp(self) -> nn.Module:
        """The loss module; with several processes, wrapped in DDP, whose backward pass averages gradients."""
        if self.world.size == 1:
            return self.loss_module
        device_ids = None if self.world.device.type == "cpu" else [self.world.local_rank]
        ddp = DistributedDataParallel(self.loss_module, device_ids=device_ids, gradient_as_bucket_view=True)
        # The first pass makes DDP rebuild its buckets, the second moves gradients there. Both change how sums
        # over three or more processes round, so a resumed run must do the same before its first step.
        self._warm_up(ddp, self.full_shape)
        self._warm_up(ddp, self.full_shape)
        return ddp

    def _compile_all(self, module: nn.Module) -> None:
        """Run each kind of pass once, so that nothing is left to compile, or to fail, while training."""
        for shape in self.shapes:
            self._warm_up(module, shape)
        if self.config.validation_interval is not None:
            self.validation_loss(torch.zeros(self.full_shape, dtype=torch.int64, device=self.world.device))

    def _warm_up(self, module: nn.Module, shape: tuple[int, ...]) -> None:
        """Run one pass without an update, to trigger compilation and DDP's one-time setup."""
        try:
            with backend.autocast(self.precision, self.world.device):
                zeros = torch.zeros(shape, dtype=torch.int64, device=self.world.device)
                module(zeros, self._loss_scale()).backward()
        finally:
            self.model.zero_grad()

    def train_step(self, microbatches: list[Tensor], learning_rate: float, *, stop: bool = False) -> Tensor:
        """Take an optimizer step on this process's share of the global batch: microbatches of (B, T + 1).

        Returns the fields of StepResult as a tensor of shape (4,) on the device. A step with a non-finite
        loss or gradient on any process is skipped on all. No host synchronization but GradScaler's, in fp16.
        """
        loss = self._accumulate_gradients(microbatches)
        grad_norm = self._clip_gradients()
        stops = torch.full_like(loss, float(stop))
        # One all-reduce for both: at this size only latency counts.
        loss, stops = self.world.all_reduce(torch.stack([loss / self.world.size, stops]))
        finite = loss.isfinite() & grad_norm.isfinite()
        optimizer.set_learning_rate(self.optimizer, learning_rate)
        optimizer.step_if(finite, self.optimizer, self.scaler)
        self.optimizer.zero_grad()  # to None: DDP averages new gradients as it copies them to its buckets
        return torch.stack([loss, grad_norm, finite.to(loss), stops])

    def _accumulate_gradients(self, microbatches: list[Tensor]) -> Tensor:
        """Accumulate gradients over the microbatches; return this process's mean loss.

        Each microbatch's mean loss is divided by the number of microbatches, and DDP averages the gradients
        over the processes in the last backward pass, so they are those of the global batch's mean loss.
        """
        mean_loss = torch.zeros((), device=self.world.device)
        loss_scale = self._loss_scale()
        for index, sequences in enumerate(microbatches):
            # no_sync must cover the forward pass too: it decides whether the backward pass all-reduces.
            accumulating = self.world.size > 1 and index < len(microbatches) - 1
            with self.ddp_module.no_sync() if accumulating else nullcontext():
                with backend.autocast(self.precision, self.world.device):
                    loss = self.ddp_module(sequences, loss_scale) / len(microbatches)
                self.scaler.scale(loss).backward()
            mean_loss += loss.detach()
        return mean_loss

    def _loss_scale(self) -> Tensor | None:
        """In fp16, the loss's scale, which its forward pass needs: it rounds the head's gradients there."""
        one = torch.ones((), device=self.world.device)
        return self.scaler.scale(one) if self.scaler.is_enabled() else None

    def _clip_gradients(self) -> Tensor:
        """Clip gradients to clipping_max_norm, if it is set; return their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.model.parameters())
        grad_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.config.clipping_max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clipping_max_norm, grad_norm)
        return grad_norm

    def validate(self, sequences: Sequences, stop: stopping.StopSignal) -> float | None:
        """The mean loss over the first validation_batches microbatches, divided among the processes.

        Returns None if any process is asked to stop before the end.
        """
        config, world = self.config, self.world
        total = torch.zeros((), device=world.device)
        for first in range(0, config.validation_batches, world.size):
            if world.any(stop):
                return None
            if (index := first + world.rank) < config.validation_batches:
                microbatch = sequences.read(index * config.microbatch_size, config.microbatch_size)
                total += self.validation_loss(to_device(microbatch, world.device))
        # Not all_reduce: on a GPU it would wait forever for a process that has died or hangs.
        return sum(world.all_gather(total.item())) / config.validation_batches

    @torch.no_grad()
    def validation_loss(self, sequences: Tensor) -> Tensor:
        """The mean loss of sequences (B, T + 1), without dropout."""
        self.loss_module.eval()
        with backend.autocast(self.precision, self.world.device):
            loss = self.loss_module(sequences)
        self.loss_module.train()
        return loss


# ------------------------------------------------------------------------------------------------------------
# The training loop
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Progress:
    """How far a run has come, as each checkpoint's meta.json records it."""

    global_step: int = 0  # finished optimizer steps
    settled: bool = False  # whether the validation and checkpoint due after this step are done
    skipped: int = 0  # consecutive non-finite steps, up to this one
    seconds: float = 0.0  # of training, including before a resume
    best_loss: float | None = None
    train_loss: float | None = None  # mean over the steps between the last two checkpoints
    val_loss: float | None = None  # of the last validation
    recent_losses: list[float] = dataclasses.field(default_factory=list)  # since the last checkpoint


class Diverged(RunError):
    """The loss, a gradient or a weight became NaN or infinite."""


class Trainer:
    """Runs the training loop: steps, logs, validates and saves."""

    def __init__(self, run: Run, world: processes.World) -> None:
        self.run, self.world = run, world
        self.learner = Learner(run.config, run.model_config, world, plan=run.plan)
        self.progress, self.budget = Progress(), budget.Budget(run, world)

    def train(self) -> int:
        """Train to the last step, or until a signal arrives: then all processes stop after the same step.

        Returns the exit status: 0, or 128 + the signal. Raises RunError when the run diverges or a checkpoint
        cannot be saved.
        """
        run, progress, world = self.run, self.progress, self.world
        self.saver = checkpointing.Saver(
            run.checkpoints, run.config.keep_checkpoints, run.metrics, run.data.tokenizer
        )
        if world.is_first:
            self.saver.reserve(*self._tensors())
        self.clock = budget.Clock(run, progress.global_step, progress.seconds)
        # The other processes wait, because a tracker may take long to reach its server.
        self.reporter = world.agree(self._make_reporter, on=world.is_first) or NoReporter()
        with stopping.StopSignal() as stop:
            finished = self._train_and_report_failure(stop)
            # torchrun ends the other processes as soon as one exits, so all wait until everything is saved.
            world.all_gather(None)
            if not finished:
                self.reporter.close("preempted", progress.global_step)
                self.reporter.say(
                    f"Stopped by a signal after step {progress.global_step:,} and saved a checkpoint; "
                    "--resume continues from there"
                )
                return stop.exit_status
        self.reporter.finish(progress.global_step, progress.train_loss, progress.val_loss)
        return 0

    def _make_reporter(self) -> Reporter:
        step, problem = self.progress.global_step, self.learner.compile_problem
        return Reporter(self.run, self.clock, step, self.world.device_name, problem)

    def _train_and_report_failure(self, stop: stopping.StopSignal) -> bool:
        """Train and save, even after a signal. Returns False if one arrived before all work was done."""
        steps = pending.PendingSteps(self.world.device)
        try:
            with self.saver:
                with stopping.hung_steps_ended(self.world, stop, steps.overdue, self._give_up):
                    finished = self._loop(stop, steps)
                if not finished:
                    self._save(scheduled=False)
                self._await_save()
                self.saver.finish()
        except Exception as error:
            if isinstance(error, Diverged):  # the last save has finished, so the advice can name it
                error = RunError(f"{error}; {resume.advice_after_divergence(self.run)}")
            message = " ".join(str(error).split())
            self.reporter.close("failed", self.progress.global_step, error=message)
            raise error
        self.reporter.saved(self.saver.saved)
        return finished

    def _loop(self, stop: stopping.StopSignal, steps: pending.PendingSteps) -> bool:
        """The training loop: read, step, log, stop if asked to, validate and save when due.

        Returns False if a signal arrived before all work was done.
        """
        run, progress = self.run, self.progress
        # Validate and save before the first step, or where a stop interrupted that.
        if not progress.settled and not self._validate_and_save(stop):
            return False
        steps.restart_clock()
        while progress.global_step < run.plan.steps:
            step = progress.global_step
            microbatches = [
                run.plan.cut(self._read(first, count), step)
                for first, count in run.plan.microbatches(step, self.world.rank)
            ]
            result = self.learner.train_step(microbatches, run.learning_rate_at(step), stop=bool(stop))
            progress.global_step += 1
            self.budget.move_end(progress.global_step, self.clock)
            late = self._checkpoint_minutes_are_up()
            due = late or run.has_work_after(progress.global_step)  # a validation, samples or a checkpoint
            progress.settled = not due

            # A GPU's results are read one step late, or it would wait for Python; before such work, at once.
            steps.add(progress.global_step, result)
            results = steps.read_all() if due else steps.read_due()
            self._log(results)
            # The count is summed over the processes, so all of them stop after the same step.
            if any(result.stops for _, result, _ in results):
                self._log(steps.read_all())
                return False

            if due:
                if not self._validate_and_save(stop, late=late):
                    return False
                steps.restart_clock()
            self.saver.check()  # raises the error of a save that failed in the background
            self.reporter.saved(self.saver.saved)
        return True

    def _read(self, first: int, count: int) -> Tensor:
        """Read a microbatch of `count` sequences, from number `first` on, as (B, T + 1) on the device."""
        return to_device(self.run.data.train.read(first, count), self.world.device)

    def _log(self, results: list[tuple[int, pending.StepResult, float]]) -> None:
        """Log finished steps, given as (step, result, seconds).

        Raises Diverged after too many non-finite steps in a row.
        """
        for step, result, seconds in results:
            speed, rate = self.clock.count(step, seconds), self.run.learning_rate_at(step - 1)
            values = {"train_loss": result.loss, "grad_norm": result.grad_norm, "learning_rate": rate}
            self.reporter.step(step, values, speed)
            if math.isfinite(result.loss):
                self.progress.recent_losses.append(result.loss)
            self.progress.skipped = 0 if result.finite else self.progress.skipped + 1
            if not result.finite:
                loss, norm = result.loss, result.grad_norm
                problem = f"the training loss is {loss} and the gradient norm {norm} at step {step}"
                if self.progress.skipped >= MOST_SKIPPED_IN_A_ROW:
                    raise Diverged(f"{problem}; {self.progress.skipped} steps in a row were skipped")
                self.reporter.say(f"Skipped the update: {problem}")

    def _checkpoint_minutes_are_up(self) -> bool:
        """Whether a checkpoint is due by checkpoint_minutes and the first process's clock."""
        minutes = self.run.config.checkpoint_minutes
        return minutes is not None and self.world.broadcast(self.clock.minutes_unsaved() >= minutes)

    def _validate_and_save(self, stop: stopping.StopSignal, *, late: bool = False) -> bool:
        """Validate, sample and save, each if due after this step or, a checkpoint, `late`; redraw the chart.

        Returns False if a signal arrives during validation. The resumed run repeats the validation, so that
        it picks the same best checkpoint as an uninterrupted run.
        """
        run, progress, world = self.run, self.progress, self.world
        step = progress.global_step
        if run.validates_after(step) and not self._validate(stop):
            return False
        if run.samples_after(step):
            world.agree(lambda: self.reporter.sample(self.learner.model, step), on=world.is_first)
        progress.settled = True
        if late or run.saves_after(step):
            self._save()
        if step < run.plan.steps:  # the final chart is drawn when the run finishes
            self.reporter.chart()
        return True

    def _validate(self, stop: stopping.StopSignal) -> bool:
        step = self.progress.global_step
        with self.clock.pause("validation"):
            loss = self.learner.validate(self.run.data.validation, stop)
        if loss is None:
            return False
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss} at step {step}")
        self.progress.val_loss = loss
        seconds = round(self.clock.pauses["validation"], 3)
        self.reporter.log(step, {"val_loss": loss, "validation_seconds": seconds})
        self.reporter.say(f"step {step:,}: val loss {loss:.4f}")
        return True

    # --------------------------------------------------------------------------------------------------------
    # Checkpoints
    # --------------------------------------------------------------------------------------------------------

    def _save(self, *, scheduled: bool = True) -> None:
        """Start saving a checkpoint. `latest` will point to it, and so will `best` if it is the best so far.

        A checkpoint of an early stop is never marked best and leaves recent_losses alone, so that a resumed
        run picks the same best checkpoint as an uninterrupted one.
        """
        model, step = self.learner.model, self.progress.global_step
        with self.clock.pause("checkpoint"):
            is_best = scheduled and self._update_best_loss()
            if not nn.utils.get_total_norm(model.tensors().values(), math.inf).isfinite():
                raise Diverged(f"the weights are NaN or infinite after step {step}")
            self._await_save()
            rng = self.world.all_gather(resume.rng_state(self.world.device))
            if not self.world.is_first:
                return
            self.saver.copy(*self._tensors())
        self.reporter.log(step, {"checkpoint_seconds": round(self.clock.pauses["checkpoint"], 3)})
        self.reporter.flush()
        self.saver.write(self._meta() | {"is_best": is_best, "rng": rng})

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a checkpoint holds, of the model and of the optimizer."""
        model = self.learner.model
        return model.tensors(), checkpointing.optimizer_tensors(model, self.learner.optimizer)

    def _await_save(self) -> None:
        """Make all processes wait for the save in progress, however long it takes, so that none times out
        waiting for the first. A process that dies or hangs meanwhile is noticed."""
        while self.world.any(self.saver.busy(0.3)):
            pass

    def _give_up(self, reason: str) -> None:
        """Finish the save in progress and report, from another thread, that the main thread hangs."""
        self.saver.busy()
        self.reporter.close("failed", self.progress.global_step, error=reason)

    def _update_best_loss(self) -> bool:
        """Average the loss since the last checkpoint; return whether this checkpoint is the best so far."""
        progress, validates = self.progress, self.run.config.validation_interval is not None
        if progress.recent_losses:
            progress.train_loss = math.fsum(progress.recent_losses) / len(progress.recent_losses)
        progress.recent_losses.clear()
        if validates and not self.run.validates_after(progress.global_step):
            return False
        measured, best = progress.val_loss if validates else progress.train_loss, progress.best_loss
        is_best = measured is not None and (best is None or measured < best)
        progress.best_loss = measured if is_best else best
        return is_best

    def _meta(self) -> dict[str, object]:
        """The contents of a checkpoint's meta.json."""
        run, step = self.run, self.progress.global_step
        self.progress.seconds = self.clock.seconds()
        return {
            **dataclasses.asdict(self.progress),
            "sequences_seen": run.plan.sequences(step),
            "tokens_seen": run.plan.tokens(step),
            "total_steps": run.plan.steps,
            "learning_rate": run.learning_rate_at(step - 1),
            "scaler": self.learner.scaler.state_dict(),
            "global_batch": run.plan.global_batch,
            "processes": run.plan.processes,
            "precision": self.learner.precision,
            "model_config": dataclasses.asdict(run.model_config),
            "train_config": dataclasses.asdict(run.config),
            "data": run.files,
            "device": self.world.device_name,
            **resume.provenance(),
        }

    def restore(self, checkpoint: checkpointing.Checkpoint | None) -> None:
        """Continue on all processes from a checkpoint that only the first one has loaded."""
        learner, world = self.learner, self.world
        meta = resume.restore_tensors(learner.model, learner.optimizer, checkpoint, world)
        if learner.scaler.is_enabled() and meta["scaler"]:  # empty if it was trained in another precision
            learner.scaler.load_state_dict(meta["scaler"])
        self.progress = Progress(**{field.name: meta[field.name] for field in dataclasses.fields(Progress)})
        self.budget.resume(meta)
        changes = [resume.set_rng_state(meta, world, self.run.config.random_seed)]
        if meta["precision"] != learner.precision:
            changes.append(
                f"The checkpoint was trained in {meta['precision']}, this run uses {learner.precision}: "
                "rounding will differ"
            )
        if world.is_first:
            say(f"Resuming after step {self.progress.global_step:,}, from {checkpoint.path.name}")
            for change in filter(None, changes):
                say(change)


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run_name", metavar="RUN")
@click.argument("datasets_dir", type=click.Path(path_type=Path), required=False)
@click.argument("checkpoint", required=False)
@click.option(
    "--resume",
    "resume_newest",
    is_flag=True,
    help="Continue from the newest valid checkpoint; start from scratch if there is none.",
)
@click.option("-f", "--find-max-microbatch-size", is_flag=True, help="Find the largest microbatch that fits.")
@click.option("--plan", "only_plan", is_flag=True, help="Print what the run would do and cost, then exit.")
@click.option(
    "--on", metavar="MACHINE", help="With --plan: estimate for a machine such as 8xA100-40, or for all."
)
@click.option(
    "--budget",
    "budget_usd",
    type=click.FloatRange(0, min_open=True),
    metavar="USD",
    help="With --plan: print what this many dollars buy on each machine.",
)
@click.option(
    "--machines",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --on or --budget: read GPUs and prices from this file in place of machines.toml.",
)
@runs_dir_option
@click.option("--allow-config-change", is_flag=True, help="Continue even if a config or the data changed.")
@click.option(
    "--collective-timeout",
    type=click.FloatRange(min=1),
    default=600,
    show_default=True,
    help="Seconds that processes wait for one another in a step before giving up.",
)
def main(
    run_name: str,
    datasets_dir: Path | None,
    checkpoint: str | None,
    resume_newest: bool,
    find_max_microbatch_size: bool,
    only_plan: bool,
    runs_dir: Path,
    allow_config_change: bool,
    collective_timeout: float,
    on: str | None,
    budget_usd: float | None,
    machines: Path | None,
) -> int:
    """Train RUN, a folder in runs/ with a model.json and a train.json, on a data set in DATASETS_DIR.

    With CHECKPOINT (latest, best, or the name of a checkpoint folder), continue from that checkpoint.
    """
    run = Run.read(runs_dir, run_name)
    if find_max_microbatch_size and only_plan:
        raise InputError("use either -f or --plan, not both")
    if checkpoint and resume_newest:
        raise InputError("use either a checkpoint's name or --resume, not both")
    elsewhere = Elsewhere(on, budget_usd, machines)
    plans_elsewhere = elsewhere.is_asked(only_plan)
    if not datasets_dir and not find_max_microbatch_size and not plans_elsewhere:
        raise InputError("DATASETS_DIR is missing: the folder that holds the data sets")
    with processes.joined_world(collective_timeout) as world:
        if find_max_microbatch_size:
            size = microbatch.find_max_microbatch(run, world, Learner)
            if world.is_first:
                print(f"Max microbatch size was {size}")
        elif plans_elsewhere:
            if world.is_first:
                plan_on_machines(run, datasets_dir, elsewhere)
        elif only_plan:
            plan_here(run, datasets_dir, world)
        else:
            world.agree(lambda: check_reporting(run), on=world.is_first)
            run.launchers = world.launchers()
            resume_newest = world.any(resume_newest or resume.was_started_before(run))  # by torchrun
            run = prepare_run(run, datasets_dir, world, checkpoint, resume=resume_newest)
            hint = f"microbatch_size is {run.config.microbatch_size}; -f finds the largest that fits"
            with memory.memory_errors_explained(hint):
                start = "newest" if resume_newest else checkpoint
                trainer = make_trainer(run, world, start, allow_config_change)
                return trainer.train() if trainer else 0
    return 0


def make_trainer(run: Run, world: processes.World, name: str | None, allow_change: bool) -> Trainer | None:
    """Make the trainer, continuing from a named checkpoint or the "newest" valid one, or from scratch.

    Returns None if the checkpoint is that of the last step, so that nothing is left to do.
    """
    checkpoint = world.agree(lambda: resume.find_checkpoint(run, name, allow_change), on=world.is_first)
    meta = checkpoint.meta if checkpoint else {}
    step, ended = world.broadcast((meta.get("global_step"), bool(meta) and budget.has_ended(run, meta)))
    if ended:
        if world.is_first:
            print(f"{run.name} is finished: {checkpoint.path.name} already has all {step:,} steps")
            complete_status(run, meta, checkpoint.path.name)
        return None
    if world.is_first:
        print_plan(run, world)
    world.agree(lambda: checkpointing.try_saving(run.checkpoints), on=world.is_first)
    if world.is_first and step is None and (aside := set_earlier_results_aside(run.directory)):
        print(f"Starting from scratch; earlier results are now in {aside} (--resume would have continued)")
    world.agree(lambda: resume.check_space(run, step or 0), on=world.is_first)
    trainer = Trainer(run, world)
    if step is not None:
        trainer.restore(checkpoint)
    return trainer


if __name__ == "__main__":
    run_command(main, abruptly=True)
