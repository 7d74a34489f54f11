"""What a run would take on machines that are not here: memory, speed, hours and dollars."""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from basemodel.common.errors import InputError
from basemodel.common.files import replace_text
from basemodel.model.config import GPTConfig
from basemodel.model.loss import DEFAULT_CHUNK_LOGITS
from basemodel.planning import roofline
from basemodel.planning.footprint import Footprint, Step, StepModel
from basemodel.planning.machines import Machine, device_memory_gib, gpu_of
from basemodel.planning.speeds import Figure, find_figure, on_machine
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from basemodel.training.run import Run
from basemodel.training.run_folder import read_json_or_nothing
from basemodel.training.schedule import plan_batches
from gpt import GPTModel

GIB = 2**30


def reserve_gib(memory_gib: float) -> float:
    """Memory that cannot hold tensors: CUDA's context and libraries, and gaps between the allocator's blocks.

    The first two figures were chosen so that the published code's largest microbatches come out, on cards of
    24 to 180 GiB; that a smaller card has less of it, at most a fifth, is a guess.
    """
    return min(3.5 + 0.03 * memory_gib, 0.2 * memory_gib)


MakeLearner = Callable[[TrainConfig, GPTConfig, World], Step]


@dataclass(frozen=True)
class Estimate:
    """A run on a machine. Where it does not fit, `short_gib` says by how much, and there is no speed."""

    machine: Machine
    run: Run  # with the batches that suit the machine
    precision: str
    largest: int  # microbatch that fits; 0: none does
    memory: dict[str, float]  # bytes of one GPU by part, with the microbatch of `run`
    short_gib: float = 0.0
    step_parts: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds, by what limits them
    between_steps: float = 0.0  # seconds of all validations and checkpoints
    figure: Figure | None = None  # a measurement, which beats the estimate

    @property
    def tokens_per_second(self) -> float | None:
        """While training; None where it does not fit, or where the precision's rate is not known."""
        if self.figure:
            return self.figure.tokens_per_second
        return self.run.plan.tokens_per_batch / sum(self.step_parts.values()) if self.step_parts else None

    @property
    def hours(self) -> float | None:
        """Of the whole run, with validations and checkpoints; without the start and the download."""
        if not self.tokens_per_second:
            return None
        seconds = self.run.plan.tokens(self.run.plan.steps) / self.tokens_per_second
        return (seconds + self.between_steps) / 3600

    @property
    def usd(self) -> float | None:
        """Of the whole run; None where hours or price are not known."""
        price = self.machine.usd_per_hour
        return None if price is None or self.hours is None else price * self.hours

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization, a share of the data sheet's rate."""
        if not self.tokens_per_second:
            return None
        flops = GPTModel.outline(self.run.model_config).flops_per_token() * self.tokens_per_second
        return flops / (self.machine.count * self.machine.gpu.tflops * 1e12)

    @property
    def limit(self) -> str:
        """What limits the machine most."""
        if self.short_gib:
            short = self.short_gib
            return f"does not fit: {f'{short:.1f} GiB' if short >= 1 else f'{1024 * short:.0f} MiB'} short"
        if not self.step_parts:
            return f"speed in {self.precision} not known"
        name = max(self.step_parts, key=self.step_parts.get)
        return f"{name} ({self.step_parts[name] / sum(self.step_parts.values()):.0%})"


class Estimator:
    """Counts a run's step once, and estimates from that what it takes on any machine."""

    def __init__(self, run: Run, train_count: int | None, make_learner: MakeLearner) -> None:
        """`train_count`: sequences of the data, where they are here."""
        self.run, self._train_count, self._make_learner = run, train_count, make_learner
        shape = run.model_config
        chunk = DEFAULT_CHUNK_LOGITS // (shape.vocab_size * shape.context_length)
        self._size = min(16, max(1, chunk))  # from this microbatch on, the logits of a chunk stay as many

    def precision_on(self, machine: Machine) -> str:
        """The precision that a run would choose on a machine."""
        return self.run.config.precision_on("cuda", has_bf16=machine.gpu.bf16)

    @functools.cached_property
    def _footprints(self) -> list[Footprint]:
        length = self.run.model_config.context_length
        with self._step_model as step:
            large = step.count(4 * self._size, length, validates=False)
            small = step.count(self._size, length)
        # Validation, a small part of any run, is only counted once.
        return [small, dataclasses.replace(large, validation=small.validation * 4)]

    @functools.cached_property
    def _step_model(self) -> StepModel:
        config, world = self.run.config, World(0, 0, 1, 1, torch.device("cpu"), control=None)
        precision = "bf16" if config.precision == "auto" else config.precision  # fp16 takes as much
        still = dataclasses.replace(config, compile=False, precision=precision)
        make = functools.partial(self._make_learner, still, self.run.model_config, world)
        return StepModel(make, compiled=config.compile is not False)

    def footprint(self, microbatch: int) -> Footprint:
        """What a microbatch takes, from the two that were counted."""
        low, high = self._footprints
        return low.towards(high, (microbatch - self._size) / (3 * self._size))

    def memory(self, machine: Machine, microbatch: int) -> dict[str, float]:
        """Bytes of one GPU by part."""
        config, memory = self.run.config, dict(self.footprint(microbatch).memory)
        accumulates = config.global_batch_size is not None or config.gradient_accumulation_steps not in (
            None,
            1,
        )
        if machine.count > 1:  # DDP rebuilds its buckets once, and then has gradients in old and new ones
            memory["buckets"] = memory["gradients"]
        elif not accumulates:  # gradients come as activations go
            memory["gradients"] = 0.0
        memory["reserve"] = GIB * reserve_gib(machine.gpu.memory_gib)
        return memory

    def largest(self, machine: Machine) -> int:
        """The largest microbatch that fits; 0 if not even one sequence does."""
        sizes = [sum(self.memory(machine, size).values()) for size in (self._size, 4 * self._size)]
        slope = (sizes[1] - sizes[0]) / (3 * self._size)
        return max(0, self._size + math.floor((GIB * machine.gpu.memory_gib - sizes[0]) / slope))

    def on(self, machine: Machine) -> Estimate:
        """Estimate the run on a machine. Raises InputError if its batch cannot be split among the GPUs."""
        config, count, precision = self.run.config, machine.count, self.precision_on(machine)
        largest = self.largest(machine)
        batch = config.global_batch_size
        share = (
            config.microbatch_size * (config.gradient_accumulation_steps or 1)
            if batch is None
            else batch // count
        )
        if batch is not None and batch % count:
            raise InputError(
                f"global_batch_size {batch} is not a multiple of the {count} GPUs of {machine.name}"
            )
        sizes = (size for size in range(min(share, max(1, largest)), 0, -1) if share % size == 0)
        size = next(sizes)
        config = dataclasses.replace(
            config, microbatch_size=size, gradient_accumulation_steps=None, global_batch_size=share * count
        )
        plan = plan_batches(config, self.run.model_config.context_length, count, self._train_count)
        run, memory = dataclasses.replace(self.run, config=config, plan=plan), self.memory(machine, size)
        found = Estimate(machine, run, precision, largest, memory)
        if largest == 0:
            short = sum(memory.values()) / GIB - machine.gpu.memory_gib
            return dataclasses.replace(found, short_gib=short)
        if precision not in roofline.RATE:
            return dataclasses.replace(found, figure=find_figure(run, machine.count, on_machine(machine)))
        parts, between = self._seconds(run, machine, precision)
        return dataclasses.replace(
            found,
            step_parts=parts,
            between_steps=between,
            figure=find_figure(run, machine.count, on_machine(machine)),
        )

    def _seconds(self, run: Run, machine: Machine, precision: str) -> tuple[dict[str, float], float]:
        """Seconds of a step by part, and of all that lies between steps."""
        plan, config, shape = run.plan, run.config, run.model_config
        footprint = self.footprint(plan.microbatch_size)
        outline = GPTModel.outline(shape)
        hidden = sum(p.numel() for p in outline.trf_blocks.parameters() if p.dim() == 2)
        batch = roofline.Batch(
            plan.accumulation,
            footprint.memory["gradients"],
            late_bytes=4 * shape.vocab_size * shape.emb_dim,  # the token embedding's gradient comes last
            shared_bytes=4 * hidden if config.optimizer == "muon" and machine.count > 1 else 0,
        )
        parts = roofline.step_seconds(footprint, batch, machine, precision)
        validations = sum(run.validates_after(step) for step in range(plan.steps + 1))
        sequences = config.validation_batches * self.run.config.microbatch_size
        microbatches = -(-sequences // plan.microbatch_size)
        each = roofline.validation_seconds(footprint, microbatches, machine, precision)
        saving = checkpoint_bytes(outline, config) / roofline.COPY_BYTES_PER_SECOND
        return parts, validations * each + run.saves_from(0) * saving


def checkpoint_bytes(model: GPTModel, config: TrainConfig) -> int:
    """Bytes of a checkpoint: weights and the optimizer's moments, one of them for Muon's matrices."""
    hidden = sum(p.numel() for p in model.trf_blocks.parameters() if p.dim() == 2)
    return 12 * model.parameter_count() - (4 * hidden if config.optimizer == "muon" else 0)


# ------------------------------------------------------------------------------------------------------------
# What a run will be compared with
# ------------------------------------------------------------------------------------------------------------

PLAN = "plan.json"  # in the run's folder: the last estimate for each machine


def keep_estimates(run: Run, found: list[Estimate]) -> None:
    """Keep the estimated speeds for when the run trains; where they cannot be written, it does without."""
    path = run.directory / PLAN
    speeds = read_json_or_nothing(path)
    for each in found:
        if each.step_parts:
            plan = each.run.plan
            speed = plan.tokens_per_batch / sum(each.step_parts.values())
            values = {"microbatch_size": plan.microbatch_size, "tokens_per_second": speed}
            speeds[each.machine.name] = values
    with contextlib.suppress(OSError):
        replace_text(path, json.dumps(speeds, indent=1))


def machine_called(device_name: str, memory_gib: float, processes: int) -> Machine | None:
    """Devices as a machine of the tables; None where they are none of those."""
    gpu = gpu_of(device_name, memory_gib)
    return Machine(processes, gpu) if gpu else None


def planned_speed(run: Run, device_name: str) -> tuple[float | None, str]:
    """The tokens per second to expect of `run` on its devices, and how that is known."""
    machine = machine_called(device_name, device_memory_gib(), run.plan.processes)
    same = on_machine(machine) if machine else lambda figure: figure.device == device_name
    if figure := find_figure(run, run.plan.processes, same, on_gpu=machine is not None):
        return figure.tokens_per_second, f"measured by {figure.source}, {figure.date}"
    found = read_json_or_nothing(run.directory / PLAN).get(machine.name if machine else "")
    if not isinstance(found, dict) or found.get("microbatch_size") != run.plan.microbatch_size:
        return None, ""
    return found.get("tokens_per_second"), "estimated by --plan --on"
