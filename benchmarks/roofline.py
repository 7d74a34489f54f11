"""How well does the plan's estimate of speed hold? It is fitted to published speeds, each time without one.

    python benchmarks/roofline.py

All published figures are of GPT-2 small (124M parameters, context 1024) in bf16, compiled or hand-written,
with a global batch of 524,288 tokens. The table shows, for each, what the constants say that were fitted to
the others. The last line has those fitted to all, which basemodel/planning/roofline.py holds.
"""

import dataclasses
import statistics
from typing import NamedTuple

import click
import numpy as np
import torch
from common import ROOT

from basemodel.common.command_line import run_command
from basemodel.common.json_config import read_config
from basemodel.model.config import GPTConfig
from basemodel.planning import roofline
from basemodel.planning.footprint import Footprint, StepModel
from basemodel.planning.machines import Machine, find_machines, read_gpus
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from ddp_train import Learner

SEQUENCES = 512  # of 1024 tokens, per optimizer step
MICROBATCH = 16


class Published(NamedTuple):
    """A speed that somebody measured."""

    machine: str
    tokens_per_second: float  # per GPU
    source: str


PUBLISHED = [
    Published("1xA5000", 73_700, "one GPU, torch.compile"),
    Published("1xA100-80", 209_000, "one GPU, torch.compile"),
    Published("8xA100-80", 218_000, "llm.c"),
    Published("1xH100", 466_000, "one GPU, torch.compile"),
    Published("8xH100", 468_000, "llm.c"),
    Published("1xH200", 498_000, "one GPU, torch.compile"),
    Published("1xB200", 794_000, "one GPU, torch.compile"),
]


def gpt2_small(compiled: bool = True) -> Footprint:
    """The footprint of a microbatch of GPT-2 small with AdamW, as those measured trained it."""
    model = read_config(GPTConfig, ROOT / "runs/original/model.json")
    model = dataclasses.replace(model, drop_rate=0.0, tie_weights=True)
    config = read_config(TrainConfig, ROOT / "runs/original/train.json")
    config = dataclasses.replace(config, compile=False, precision="bf16")
    world = World(0, 0, 1, 1, torch.device("cpu"), control=None)
    with (
        StepModel(lambda: Learner(config, model, world), compiled=compiled) as step,
    ):
        return step.count(MICROBATCH, model.context_length)


def estimate(footprint: Footprint, machine: Machine) -> float:
    """Tokens per second and GPU."""
    microbatches = SEQUENCES // MICROBATCH // machine.count
    gradients = footprint.memory["gradients"]
    batch = roofline.Batch(microbatches, gradients, late_bytes=4 * 50257 * 768)
    seconds = sum(roofline.step_seconds(footprint, batch, machine, "bf16").values())
    return SEQUENCES * 1024 / seconds / machine.count


def fit(footprint: Footprint, published: list[tuple[Machine, float]]) -> tuple[float, float]:
    """ATTAINABLE and PRODUCT_SECONDS with the least squares of relative errors of the time per token."""
    rows, wanted = [], []
    for machine, speed in published:
        # The time is linear in 1 / ATTAINABLE and PRODUCT_SECONDS; three points give its plane.
        time = [
            _seconds_per_token(footprint, machine, *constants) for constants in ((1, 0), (0.5, 0), (1, 1e-12))
        ]
        rows.append([(time[1] - time[0]) * speed, (time[2] - time[0]) * speed])
        wanted.append(1 - (2 * time[0] - time[1]) * speed)
    inverse, product = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
    return 1 / inverse, product * 1e-12


def _seconds_per_token(footprint: Footprint, machine: Machine, attainable: float, product: float) -> float:
    before = roofline.ATTAINABLE, roofline.PRODUCT_SECONDS
    roofline.ATTAINABLE, roofline.PRODUCT_SECONDS = attainable, product
    try:
        return 1 / estimate(footprint, machine)
    finally:
        roofline.ATTAINABLE, roofline.PRODUCT_SECONDS = before


def leave_one_out(footprint: Footprint, *, whole_gpu: bool = False) -> list[float]:
    """The relative error of the estimate of each published speed by the constants of the others; `whole_gpu`:
    of those of other GPUs."""
    gpus = read_gpus()
    known = [(find_machines(each.machine, gpus)[0], each.tokens_per_second) for each in PUBLISHED]
    errors = []
    for machine, speed in known:
        others = [each for each in known if each[0].gpu != machine.gpu or not whole_gpu]
        constants = fit(footprint, [each for each in others if each[0] != machine])
        errors.append(1 / _seconds_per_token(footprint, machine, *constants) / speed - 1)
    return errors


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Print, as a Markdown table, how far each published speed is from its estimate by the others."""
    footprint, gpus = gpt2_small(), read_gpus()
    errors = leave_one_out(footprint)
    columns = "machine", "source", "published tokens/s and GPU", "estimated without it", "error"
    columns += ("error without all of this GPU",)
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for each, error, other in zip(PUBLISHED, errors, leave_one_out(footprint, whole_gpu=True), strict=True):
        speed, guess = each.tokens_per_second, each.tokens_per_second * (1 + error)
        cells = each.machine, each.source, f"{speed:,.0f}", f"{guess:,.0f}", f"{error:+.1%}", f"{other:+.1%}"
        print(f"| {' | '.join(cells)} |")
    sizes = [abs(error) for error in errors]
    print(f"\nAt most {max(sizes):.1%}, in the median {statistics.median(sizes):.1%}")
    known = [(find_machines(each.machine, gpus)[0], each.tokens_per_second) for each in PUBLISHED]
    attainable, product = fit(footprint, known)
    print(f"Fitted to all: ATTAINABLE {attainable:.3f}, PRODUCT_SECONDS {product:.2e}")


if __name__ == "__main__":
    run_command(main)
