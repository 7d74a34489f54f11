"""How long work takes on a GPU: a roofline with two constants that were fitted to published speeds.

Matrix products take their FLOPs at a share of the data sheet's rate, plus a little time per element of their
results, because filling and draining a tile takes equally long however fast it is multiplied. All other bytes
move at the memory's rate. benchmarks/roofline.py fits the constants and tests them on machines left out.
"""

from dataclasses import dataclass

from basemodel.planning.footprint import Step, Work
from basemodel.planning.machines import GPU, Machine

WORST_ERROR = 0.15  # of tokens/s, where a published machine is left out of the fit
# Not fitted: usual values, which matter little or rarely
LAUNCH_SECONDS = 6e-6  # the host's, per kernel
LINK_SHARE = 0.7  # of the data sheet's rate between GPUs that an all-reduce reaches
RATE = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5}  # of matrix products, relative to bf16


@dataclass(frozen=True)
class Roofline:
    """The two constants, as fitted to all published speeds."""

    attainable: float = 0.876  # share of the data sheet's rate that large matrix products reach
    product_seconds: float = 2.09e-12  # per element of a product's result

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
        shares_update = step.config.optimizer == "muon" and count > 1  # each GPU orthogonalizes some matrices
        update = step.update_work(shared_by=count)
        parts["optimizer"] = sum(self.parts(update, machine.gpu, precision).values())
        if count > 1:
            link = LINK_SHARE * 1e9 * machine.gpu.link_gbs
            ring = 2 * (count - 1) / count / link
            gradients, last = 4 * shape.parameter_count, 4 * shape.vocab_size * shape.emb_dim
            # The token embedding's gradient comes last, when there is nothing left to compute meanwhile.
            hidden = min(backward, ring * (gradients - last))
            updates = 4 * shape.hidden_parameters / link if shares_update else 0.0
            parts["exchange between GPUs"] = ring * gradients - hidden + updates
        return parts

    def validation(self, step: Step, microbatches: int, machine: Machine, precision: str) -> float:
        """Seconds of a validation on `microbatches`, shared out over the GPUs."""
        seconds = sum(self.parts(step.validation_work(), machine.gpu, precision).values())
        return -(-microbatches // machine.count) * seconds
