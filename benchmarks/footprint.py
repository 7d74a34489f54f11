"""How well do plans estimate memory? On this CPU, and by the microbatches that the published code could hold.

    python benchmarks/footprint.py

The first table compares the formulas' peak with the one that PyTorch's allocator reports of a real step, for
models from 1M to 163M parameters. The second compares the estimated largest microbatches of the published
code with those that its author found on five machines.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from common import ROOT, run_python
from torch.profiler import ProfilerActivity, profile

from basemodel.common.command_line import run_command
from basemodel.common.json_config import read_config
from basemodel.common.output import markdown_table
from basemodel.model.config import GPTConfig
from basemodel.planning.estimate import GIB, reserve_gib
from basemodel.planning.footprint import Step
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from ddp_train import Learner

BYTES = {"vocab_size": 257, "tokenizer": "bytes"}
GPT2 = {"vocab_size": 50257, "tokenizer": "gpt2"}
# vocabulary, context, width, heads, layers; then what else differs, and the microbatch.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1M": (BYTES | {"shape": (128, 128, 4, 5)}, {"microbatch_size": 16}),
    "1M, dropout": (BYTES | {"shape": (128, 128, 4, 5), "drop_rate": 0.1}, {"microbatch_size": 16}),
    "5M, dropout": (BYTES | {"shape": (256, 256, 8, 6), "drop_rate": 0.1}, {"microbatch_size": 8}),
    "13M, Muon": (BYTES | {"shape": (256, 384, 6, 7)}, {"microbatch_size": 8, "optimizer": "muon"}),
    "29M, tied": (GPT2 | {"shape": (256, 384, 6, 5), "tie_weights": True}, {"microbatch_size": 4}),
    "76M, masking": (GPT2 | {"shape": (512, 512, 8, 8)}, {"microbatch_size": 2, "document_masking": True}),
    "163M": (GPT2 | {"shape": (512, 768, 12, 12)}, {"microbatch_size": 2}),
}


def configs(name: str) -> tuple[GPTConfig, TrainConfig]:
    """The two configs of one of MODELS."""
    values, changes = MODELS[name]
    names = ("context_length", "emb_dim", "n_heads", "n_layers")
    shape = {"drop_rate": 0.0, "qkv_bias": False} | values
    model = GPTConfig(**dict(zip(names, shape.pop("shape"), strict=True)), **shape)
    return model, TrainConfig("local/none", min_train_tokens=1, precision="fp32", **changes)


def estimated(name: str, *, compiled: bool) -> float:
    """The estimated peak of a step on a CPU, in bytes."""
    model, config = configs(name)
    step = Step(model, dataclasses.replace(config, compile=compiled), config.microbatch_size, "cpu")
    return sum(step.memory(accumulates=False).values())


def measured(name: str, *, compiled: bool) -> float:
    """The peak of a real step, in bytes, by the reports of PyTorch's allocator."""
    model, config = configs(name)
    world = World(0, 0, 1, 1, torch.device("cpu"), control=None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        learner = Learner(dataclasses.replace(config, compile=compiled), model, world)
        tokens = torch.randint(model.vocab_size, (config.microbatch_size, model.context_length + 1))
        for _ in range(2):
            learner.train_step([tokens], 0.0)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# ------------------------------------------------------------------------------------------------------------
# The published code
# ------------------------------------------------------------------------------------------------------------


class Published(NamedTuple):
    """The largest microbatch that somebody found."""

    machine: str
    memory_gib: float
    processes: int
    microbatch: int


PUBLISHED = [
    Published("1xRTX3090", 24, 1, 6),
    Published("8xA100-40", 40, 8, 13),
    Published("8xA100-80", 80, 8, 28),
    Published("8xH100-80", 80, 8, 27),
    Published("8xB200", 180, 8, 64),
]


def published_peak(microbatch: int) -> float:
    """The estimated peak of the published code's step for GPT-2 small, in bytes, as the loss is computed.

    It runs eagerly in fp16 autocast, keeps three forms of the attention matrix (7 bytes an element), and
    writes out LayerNorm and GELU; logits are whole, in four forms.
    """
    shape = read_config(GPTConfig, ROOT / "runs/original/model.json")
    C, H, L, T, V = shape.emb_dim, shape.n_heads, shape.n_layers, shape.context_length, shape.vocab_size
    per_token = L * (106 * C + 7 * H * T) + 14 * V + 14 * C
    cast_weights = 2 * (shape.hidden_parameters + V * C)
    return 12 * shape.parameter_count + cast_weights + microbatch * T * per_token


def published_largest(machine: Published) -> int:
    """The largest microbatch of the published code in a machine's memory, less the plan's reserve."""
    room = GIB * (machine.memory_gib - reserve_gib(machine.memory_gib))
    room -= 4 * 163_009_536 if machine.processes > 1 else 0  # DDP's copy of the gradients
    per_sequence = published_peak(1) - published_peak(0)
    return math.floor((room - published_peak(0)) / per_sequence)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--measure", hidden=True, nargs=2)
def main(models: tuple[str, ...], measure: tuple[str, str] | None) -> None:
    """Print both tables, the first of MODELS, or of all."""
    if measure:
        print(json.dumps(measured(measure[0], compiled=measure[1] == "compiled")))
        return
    rows = []
    for name in models or MODELS:
        for kind in ("eager", "compiled"):
            ours = estimated(name, compiled=kind == "compiled")
            theirs = json.loads(run_python(Path(__file__), "--measure", name, kind).splitlines()[-1])
            sizes = f"{ours / 2**20:,.1f}", f"{theirs / 2**20:,.1f}", f"{ours / theirs - 1:+.1%}"
            rows.append((name, kind, *sizes))
    print(markdown_table(("model", "step", "estimated, MiB", "measured, MiB", "error"), rows))
    print(f"\nThe published code: {(published_peak(1) - published_peak(0)) / GIB:.2f} GiB per sequence\n")
    rows = []
    for machine in PUBLISHED:
        largest = published_largest(machine)
        error = f"{largest / machine.microbatch - 1:+.1%}"
        rows.append((machine.machine, machine.memory_gib, machine.microbatch, largest, error))
    print(markdown_table(("machine", "GiB", "largest microbatch, published", "estimated", "error"), rows))


if __name__ == "__main__":
    run_command(main)
