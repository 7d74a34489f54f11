"""How well does the plan's estimate of speed hold? It is fitted to published speeds, each time without one.

    python benchmarks/roofline.py

All published figures are of GPT-2 small (124M parameters, context 1024) in bf16, compiled or hand-written,
with a global batch of 524,288 tokens. The table shows, for each, what the constants say that were fitted to
the others. The last line has those fitted to all, as basemodel/planning/estimate.py has them.
"""

import dataclasses
import statistics
from typing import NamedTuple

import click
import numpy as np
from common import ROOT

from basemodel.common.command_line import run_command
from basemodel.common.json_config import read_config
from basemodel.common.output import markdown_table
from basemodel.model.config import GPTConfig
from basemodel.planning.estimate import Roofline
from basemodel.planning.footprint import Step
from basemodel.planning.machines import Machine, find_machines, read_gpus
from basemodel.training.config import TrainConfig

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
    Published("1xH100-80", 466_000, "one GPU, torch.compile"),
    Published("8xH100-80", 468_000, "llm.c"),
    Published("1xH200", 498_000, "one GPU, torch.compile"),
    Published("1xB200", 794_000, "one GPU, torch.compile"),
]


def gpt2_small() -> Step:
    """A step of GPT-2 small with AdamW, as those measured trained it: their residual stream is in float32, as
    ours is with fp16, which otherwise costs what bf16 does."""
    model = read_config(GPTConfig, ROOT / "runs/original/model.json")
    config = read_config(TrainConfig, ROOT / "runs/original/train.json")
    model = dataclasses.replace(model, drop_rate=0.0, tie_weights=True)
    return Step(model, dataclasses.replace(config, precision="fp16"), MICROBATCH)


def known_speeds() -> list[tuple[Machine, float]]:
    """The published machines, with their tokens per second and GPU."""
    gpus = read_gpus()
    return [(find_machines(row.machine, gpus)[0], row.tokens_per_second) for row in PUBLISHED]


def seconds_per_token(machine: Machine, roofline: Roofline) -> float:
    """The estimated GPU seconds that a token takes."""
    accumulation = SEQUENCES // MICROBATCH // machine.count
    seconds = sum(roofline.step(gpt2_small(), accumulation, machine, "bf16").values())
    return seconds * machine.count / (SEQUENCES * 1024)


def fit(published: list[tuple[Machine, float]]) -> Roofline:
    """The constants with the least squares of relative errors of the time per token."""
    rows, targets = [], []
    for machine, speed in published:
        # The time is linear in 1 / attainable and product_seconds; three points give its plane.
        points = Roofline(1, 0), Roofline(0.5, 0), Roofline(1, 1e-12)
        base, half_rate, slow_products = (seconds_per_token(machine, point) for point in points)
        rows.append([(half_rate - base) * speed, (slow_products - base) * speed])
        targets.append(1 - (2 * base - half_rate) * speed)
    inverse, product = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    return Roofline(1 / inverse, product * 1e-12)


def leave_one_out(*, whole_gpu: bool = False) -> list[float]:
    """The relative error of the estimate of each published speed by the constants of the others; `whole_gpu`:
    by those of other GPUs."""
    known, errors = known_speeds(), []
    for machine, speed in known:
        others = [row for row in known if (row[0].gpu != machine.gpu if whole_gpu else row[0] != machine)]
        errors.append(1 / seconds_per_token(machine, fit(others)) / speed - 1)
    return errors


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Print, as a Markdown table, how far each published speed is from its estimate by the others."""
    errors, rows = leave_one_out(), []
    for row, error, other in zip(PUBLISHED, errors, leave_one_out(whole_gpu=True), strict=True):
        speed, guess = row.tokens_per_second, row.tokens_per_second * (1 + error)
        rows.append(
            (row.machine, row.source, f"{speed:,.0f}", f"{guess:,.0f}", f"{error:+.1%}", f"{other:+.1%}")
        )
    columns = "machine", "source", "published tokens/s and GPU", "estimated without it", "error"
    print(markdown_table((*columns, "error without all of this GPU"), rows))
    sizes = [abs(error) for error in errors]
    print(f"\nAt most {max(sizes):.1%}, in the median {statistics.median(sizes):.1%}")
    fitted = fit(known_speeds())
    print(f"Fitted to all: attainable {fitted.attainable:.3f}, product_seconds {fitted.product_seconds:.2e}")


if __name__ == "__main__":
    run_command(main)
