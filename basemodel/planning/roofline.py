"""How long work takes on a GPU: a roofline with two constants that were fitted to published speeds.

Time is that of the matrix products at a share of the data sheet's rate, a little per element that they yield,
because filling and draining a tile takes as long however fast it is multiplied, and that of moving all other
bytes at the memory's rate. benchmarks/roofline.py fits the constants and tests them on machines left out.
"""

from dataclasses import dataclass

from basemodel.planning.footprint import Footprint, Work
from basemodel.planning.machines import GPU, Machine

# Fitted
ATTAINABLE = 0.876  # share of the data sheet's rate that large matrix products reach
PRODUCT_SECONDS = 2.09e-12  # per element that a product yields
WORST_ERROR = 0.15  # of tokens/s, where a published machine is left out of the fit

# Not fitted: what is usual, and matters little or rarely
LAUNCH_SECONDS = 6e-6  # the host's, per kernel
LINK_SHARE = 0.7  # of the data sheet's rate between GPUs that an all-reduce reaches
COPY_BYTES_PER_SECOND = 10e9  # of a checkpoint, from the GPU to the host
RATE = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5}  # of matrix products, beside bf16's


def parts_of(work: Work, gpu: GPU, precision: str) -> dict[str, float]:
    """Seconds of `work` by what limits it; "launches" are what the host needs beyond all the rest."""
    rate = RATE[precision] * ATTAINABLE * 1e12 * gpu.tflops
    products = work.flops / rate + work.products * PRODUCT_SECONDS
    moving = work.bytes / (1e9 * gpu.bandwidth_gbs)
    launches = max(0.0, work.kernels * LAUNCH_SECONDS - products - moving)
    return {"matrix products": products, "memory bandwidth": moving, "launches": launches}


@dataclass(frozen=True)
class Batch:
    """An optimizer step: how often a process accumulates, and what it exchanges."""

    microbatches: int
    gradient_bytes: float  # of all gradients, float32
    late_bytes: float  # of those that are there last, when nothing is left to do meanwhile
    shared_bytes: float = 0.0  # of updates that each process makes a share of, and sends


def step_seconds(footprint: Footprint, batch: Batch, machine: Machine, precision: str) -> dict[str, float]:
    """Seconds of an optimizer step, by what limits it."""
    parts = parts_of(footprint.microbatch, machine.gpu, precision)
    backward = 2 / 3 * sum(parts.values())
    parts = {name: batch.microbatches * seconds for name, seconds in parts.items()}
    update = footprint.update
    if batch.shared_bytes:
        update = Work(
            update.flops / machine.count, update.products / machine.count, update.bytes, update.kernels
        )
    parts["optimizer"] = sum(parts_of(update, machine.gpu, precision).values())
    if machine.count > 1:
        link = LINK_SHARE * 1e9 * machine.gpu.link_gbs
        ring = 2 * (machine.count - 1) / machine.count / link
        hidden = min(backward, ring * (batch.gradient_bytes - batch.late_bytes))
        parts["exchange between GPUs"] = ring * batch.gradient_bytes - hidden + batch.shared_bytes / link
    return parts


def validation_seconds(footprint: Footprint, microbatches: int, machine: Machine, precision: str) -> float:
    """Seconds of a validation on `microbatches`, shared out over the GPUs."""
    each = sum(parts_of(footprint.validation, machine.gpu, precision).values())
    return -(-microbatches // machine.count) * each
