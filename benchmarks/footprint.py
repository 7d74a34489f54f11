"""Does the plan count memory right? On this CPU, and by the microbatches that the published code could hold.

    python benchmarks/footprint.py

The first table compares the peak that is counted without data with the peak that PyTorch's allocator reports
of a real step, for models from 1M to 163M parameters. The second counts the published code's step, as
reference.py writes it down, and compares the largest microbatch with those that its author found.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import torch.nn.functional as F
from common import ROOT, run_python
from reference import PlainGPT, plain_optimizers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only

from basemodel.common.command_line import run_command
from basemodel.common.json_config import read_config
from basemodel.model.config import GPTConfig
from basemodel.planning.estimate import GIB, reserve_gib
from basemodel.planning.footprint import FusedDropout, StepCounter, StepModel
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from ddp_train import Learner

BYTES = {"vocab_size": 257, "tokenizer": "bytes"}
GPT2 = {"vocab_size": 50257, "tokenizer": "gpt2"}
# vocabulary, context, width, heads, layers; then what else differs, and the microbatch.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1M": (BYTES | {"shape": (128, 128, 4, 5)}, {"microbatch_size": 16}),
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


def alone() -> World:
    """This process alone, on its CPU."""
    return World(0, 0, 1, 1, torch.device("cpu"), control=None)


def counted(name: str, *, compiled: bool) -> float:
    """The counted peak of a step on a CPU, in bytes."""
    model, config = configs(name)
    with StepModel(lambda: Learner(config, model, alone()), compiled=compiled, keeps_gradients=False) as step:
        step.count(config.microbatch_size, model.context_length)
        return sum(step.count(config.microbatch_size, model.context_length).memory.values())


def measured(name: str, *, compiled: bool) -> float:
    """The peak of a real step, in bytes, by the reports of PyTorch's allocator."""
    model, config = configs(name)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        learner = Learner(dataclasses.replace(config, compile=compiled), model, alone())
        tokens = torch.randint(model.vocab_size, (config.microbatch_size, model.context_length + 1))
        for _ in range(2):
            learner.train_step([tokens], 0.0)
    events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


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
FLOAT32 = {torch.softmax, Tensor.pow, Tensor.__pow__, torch.pow}


class CudaCasts(TorchFunctionMode):
    """Computes in float32 what autocast does on CUDA, and does not on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FLOAT32:
            args = tree_map_only(Tensor, Tensor.float, args)
        return func(*args, **(kwargs or {}))


def published_peak(microbatch: int) -> float:
    """The counted peak of the published code's step for GPT-2 small, in bytes: eager, with whole logits."""
    model_config = read_config(GPTConfig, ROOT / "runs/original/model.json")
    config = read_config(TrainConfig, ROOT / "runs/original/train.json")
    with FakeTensorMode(allow_non_fake_inputs=True), StepCounter() as counter:
        model = PlainGPT(model_config)
        for module in model.modules():
            module.__class__ = FusedDropout if type(module) is nn.Dropout else type(module)
        (optimizer,) = plain_optimizers(model, config, foreach=True)
        tokens = torch.zeros(microbatch, model_config.context_length + 1, dtype=torch.int64)
        for _ in range(2):  # the optimizer's state exists from the first step on
            model.zero_grad()
            with CudaCasts(), torch.autocast("cpu", torch.float16):
                logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
        return counter.peak.total()


def published_largest(each: Published, peaks: dict[int, float]) -> int:
    """The largest microbatch of the published code in a machine's memory, less the plan's reserve."""
    (small, low), (large, high) = peaks.items()
    slope = (high - low) / (large - small)
    room = each.memory_gib - reserve_gib(each.memory_gib)
    buckets = 4 * 163_009_536 if each.processes > 1 else 0  # DDP's copy of the gradients
    return math.floor(small + (room * GIB - buckets - low) / slope)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--measure", hidden=True, nargs=2)
def main(models: tuple[str, ...], measure: tuple[str, str] | None) -> None:
    """Print both tables, the first of MODELS, or of all."""
    if measure:
        print(json.dumps(measured(measure[0], compiled=measure[1] == "compiled")))
        return
    print("| model | step | counted, MiB | measured, MiB | error |\n| --- | --- | --- | --- | --- |")
    for name in models or MODELS:
        for kind in ("eager", "compiled"):
            ours = counted(name, compiled=kind == "compiled")
            theirs = json.loads(run_python(Path(__file__), "--measure", name, kind).splitlines()[-1])
            sizes = f"{ours / 2**20:,.1f} | {theirs / 2**20:,.1f} | {ours / theirs - 1:+.1%}"
            print(f"| {name} | {kind} | {sizes} |", flush=True)
    peaks = {size: published_peak(size) for size in (2, 8)}
    (small, low), (large, high) = peaks.items()
    print(f"\nThe published code: {(high - low) / (large - small) / GIB:.2f} GiB per sequence\n")
    print(
        "| machine | GiB | largest microbatch, published | counted | error |\n| --- | --- | --- | --- | --- |"
    )
    for each in PUBLISHED:
        found = published_largest(each, peaks)
        error = found / each.microbatch - 1
        print(f"| {each.machine} | {each.memory_gib} | {each.microbatch} | {found} | {error:+.1%} |")


if __name__ == "__main__":
    run_command(main)
