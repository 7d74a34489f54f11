"""What a run would take on machines that are not here: memory, speed, hours and dollars."""

import bisect
import dataclasses
from dataclasses import dataclass, field

from basemodel.common.errors import InputError
from basemodel.planning.footprint import Step, Work
from basemodel.planning.machines import GPU, Machine, device_memory_gib, gpu_of
from basemodel.training.run import Run
from basemodel.training.run_folder import read_status
from basemodel.training.schedule import plan_batches

WORST_ERROR = 0.15  # of tokens/s, where a published machine is left out of the fit
# Not fitted: usual values, which matter little or rarely
LAUNCH_SECONDS = 6e-6  # the host's, per kernel
LINK_SHARE = 0.7  # of the data sheet's rate between GPUs that an all-reduce reaches
RATE = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5}  # of matrix products, relative to bf16


@dataclass(frozen=True)
class Roofline:
    """The two constants, as fitted to all published speeds."""

    attainable: float = 0.848  # share of the data sheet's rate that large matrix products reach
    product_seconds: float = 2.19e-12  # per element of a product's result

    def parts(self, work: Work, gpu: GPU, precision: str) -> dict[str, float]:
        """Seconds of `work` by what limits it; "launches" are what the host needs beyond all the rest."""
        rate = RATE[precision] * self.attainable * 1e12 * gpu.tflops
        products = work.flops / rate + work.products * self.product_seconds
        moving = work.bytes / (1e9 * gpu.bandwidth_gbs)
        launches = max(0.0, work.kernels * LAUNCH_SECONDS - products - moving)
        return {"matrix products": products, "memory bandwidth": moving, "launches": launches}

    def step(self, step: Step, accumulation: int, machine: Machine, precision: str) -> dict[str, float]:
        """Seconds of an optimizer step of `accumulation` microbatches on each GPU, by what limits them."""
        shape, count = step.model, machine.count
        parts = self.parts(step.microbatch_work(), machine.gpu, precision)
        backward = 2 / 3 * sum(parts.values())
        parts = {name: accumulation * seconds for name, seconds in parts.items()}
        update = step.update_work(shared_by=count)
        parts["optimizer"] = sum(self.parts(update, machine.gpu, precision).values())
        if count > 1:
            link = LINK_SHARE * 1e9 * machine.gpu.link_gbs
            ring = 2 * (count - 1) / count / link
            gradients, last = 4 * shape.parameter_count, 4 * shape.vocab_size * shape.emb_dim
            # The token embedding's gradient comes last, when there is nothing left to compute meanwhile.
            hidden = min(backward, ring * (gradients - last))
            # Each GPU orthogonalizes some of Muon's matrices, and sends the updates, in bf16, to the others.
            updates = 2 * shape.hidden_parameters / link if step.config.optimizer == "muon" else 0.0
            parts["exchange between GPUs"] = ring * gradients - hidden + updates
        return parts

    def validation(self, step: Step, microbatches: int, machine: Machine, precision: str) -> float:
        """Seconds of a validation on `microbatches`, shared out over the GPUs."""
        seconds = sum(self.parts(step.validation_work(), machine.gpu, precision).values())
        return -(-microbatches // machine.count) * seconds


GIB = 2**30
COPY_BYTES_PER_SECOND = 10e9  # of a checkpoint, from the GPU to the host
MOST_SEQUENCES = 2**24  # in a microbatch, for the search
MUCH_SLOWER = 0.7  # of the estimated speed, below which a run says so


def reserve_gib(memory_gib: float) -> float:
    """Memory that cannot hold tensors: CUDA's context and libraries, and gaps between the allocator's blocks.

    The first two figures were chosen so that the published code's largest microbatches come out, on cards of
    24 to 180 GiB; that a smaller card needs less, at most a fifth, is a guess.
    """
    return min(3.5 + 0.03 * memory_gib, 0.2 * memory_gib)


@dataclass(frozen=True)
class Estimate:
    """A run on a machine. Where it does not fit, there is no speed."""

    machine: Machine
    run: Run  # with the batches that suit the machine
    precision: str
    largest: int  # microbatch that fits; 0: none does
    memory: dict[str, float]  # bytes of one GPU by part, with the microbatch of `run`
    step_parts: dict[str, float] = field(default_factory=dict)  # seconds, by what limits them
    between_steps: float = 0.0  # seconds of all validations and checkpoints
    measured: float | None = None  # tokens per second of the run on such a machine, which beat the estimate

    @property
    def tokens_per_second(self) -> float | None:
        """While training; None where it does not fit, or where the precision's rate is unknown."""
        if self.measured or not self.step_parts:
            return self.measured
        return self.run.plan.tokens_per_batch / sum(self.step_parts.values())

    @property
    def hours(self) -> float | None:
        """Of the whole run, with validations and checkpoints; without the start and the download."""
        if not self.tokens_per_second:
            return None
        seconds = self.run.plan.tokens(self.run.plan.steps) / self.tokens_per_second
        return (seconds + self.between_steps) / 3600

    @property
    def usd(self) -> float | None:
        """Of the whole run; None where hours or price are unknown."""
        price = self.machine.usd_per_hour
        return None if price is None or self.hours is None else price * self.hours

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization, a share of the data sheet's rate."""
        if not self.tokens_per_second:
            return None
        flops = self.run.model_config.flops_per_token * self.tokens_per_second
        return flops / (self.machine.count * self.machine.gpu.tflops * 1e12)

    @property
    def limit(self) -> str:
        if self.largest == 0:
            short = sum(self.memory.values()) / GIB - self.machine.gpu.memory_gib
            return f"does not fit: {f'{short:.1f} GiB' if short >= 1 else f'{1024 * short:.0f} MiB'} short"
        if not self.step_parts:
            return f"speed in {self.precision} unknown"
        name = max(self.step_parts, key=self.step_parts.get)
        return f"{name} ({self.step_parts[name] / sum(self.step_parts.values()):.0%})"


def estimate(run: Run, machine: Machine, train_count: int | None) -> Estimate:
    """Estimate a run on a machine. `train_count`: sequences of the data, where they are here. Raises
    InputError if the global batch cannot be split among the GPUs."""
    config, count, batch = run.config, machine.count, run.config.global_batch_size
    if batch is not None and batch % count:
        raise InputError(f"global_batch_size {batch} is not a multiple of the {count} GPUs of {machine.name}")
    # Sequences of a GPU in each step
    share = batch // count if batch else config.microbatch_size * (config.gradient_accumulation_steps or 1)
    largest = largest_microbatch(run, machine)
    size = next(size for size in range(min(share, max(1, largest)), 0, -1) if share % size == 0)
    config = dataclasses.replace(
        config, microbatch_size=size, gradient_accumulation_steps=None, global_batch_size=share * count
    )
    plan = plan_batches(config, run.model_config.context_length, count, train_count)
    memory = memory_by_part(run, machine, size)
    precision = config.precision_on("cuda", has_bf16=machine.gpu.bf16)
    validation_sequences = run.config.validation_batches * run.config.microbatch_size
    run = dataclasses.replace(run, config=config, plan=plan)
    result = Estimate(machine, run, precision, largest, memory, measured=measured_speed(run, machine))
    if largest == 0 or precision not in RATE:
        return result
    step, roofline = step_on(machine, run, size), Roofline()
    validation = roofline.validation(step, -(-validation_sequences // size), machine, precision)
    saving = run.saves_from(0) * run.checkpoint_bytes / COPY_BYTES_PER_SECOND
    parts = roofline.step(step, plan.accumulation, machine, precision)
    return dataclasses.replace(result, step_parts=parts, between_steps=run.validations * validation + saving)


def step_on(machine: Machine, run: Run, microbatch: int) -> Step:
    """A step of the run on one GPU of a machine, in the precision that "auto" means there."""
    precision = run.config.precision_on("cuda", has_bf16=machine.gpu.bf16)
    return Step(run.model_config, dataclasses.replace(run.config, precision=precision), microbatch)


def memory_by_part(run: Run, machine: Machine, microbatch: int) -> dict[str, float]:
    """Bytes of one GPU."""
    memory = step_on(machine, run, microbatch).memory(
        processes=machine.count, accumulates=run.config.may_accumulate
    )
    return memory | {"reserve": GIB * reserve_gib(machine.gpu.memory_gib)}


def largest_microbatch(run: Run, machine: Machine) -> int:
    """The largest microbatch that fits; 0 if not even one sequence does."""
    sizes, limit = range(1, MOST_SEQUENCES), GIB * machine.gpu.memory_gib
    return bisect.bisect_right(sizes, limit, key=lambda x: sum(memory_by_part(run, machine, x).values()))


def measured_speed(run: Run, machine: Machine) -> float | None:
    """Tokens per second of the run itself, if it last trained on such a machine with this microbatch."""
    status = read_status(run.directory)
    gpu = gpu_of(str(status.get("device")), status.get("device_gib") or 0.0)
    last = gpu, status.get("processes"), status.get("microbatch_size")
    same = last == (machine.gpu, machine.count, run.config.microbatch_size)
    return status.get("tokens_per_second") if same else None


def slower_than_planned(run: Run, device: str, speed: float, *, compiled: bool = True) -> str | None:
    """A line about a run that is much slower than estimated, at `speed` tokens per second on the CUDA device
    of this name; None if it is not, or on an unknown device."""
    plan, gpu = run.plan, gpu_of(device, device_memory_gib())
    precision = gpu and run.config.precision_on("cuda", has_bf16=gpu.bf16)
    if precision not in RATE:
        return None
    machine = Machine(plan.processes, gpu)
    step = step_on(machine, run, plan.microbatch_size)
    parts = Roofline().step(step, plan.accumulation, machine, precision)
    planned = plan.tokens_per_batch / sum(parts.values())
    if speed >= MUCH_SLOWER * planned:
        return None
    share = f"{1 - speed / planned:.0%} below the estimated {planned:,.0f}"
    line = f"Slower than planned: {speed:,.0f} tokens/s, {share}"
    return line if compiled else f"{line}; it is not compiled"
