"""What each change to the demo's recipe does to its loss, beside the noise of seeds, and to its step time.

    python benchmarks/ablations.py datasets /tmp/ablations      runs/demo and every runs/demo-*, three seeds

Has ablate.py train them in FOLDER, the demo-* runs as variations of the demo, and validate each on all of the
validation split. Stopped, it goes on with the same command. Steps are timed afterwards, in turns, when
nothing trains. Prints two Markdown tables.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from common import runs_dir_option
from torch import Tensor

import ablate
from basemodel.command_line import run_command
from basemodel.config import TrainConfig
from basemodel.data import plan_batches
from basemodel.distributed import World, join_world
from basemodel.hub import dataset_folder
from basemodel.json_config import read_config, read_json_object
from basemodel.token_files import TokenFiles
from ddp_train import Learner
from gpt import GPTConfig


def all_settings(run_dir: Path) -> dict[str, Any]:
    """The keys of a run's two files, with their defaults, but for those of validation."""
    configs = read_config(GPTConfig, run_dir / "model.json"), read_config(TrainConfig, run_dir / "train.json")
    values = {key: value for each in configs for key, value in dataclasses.asdict(each).items()}
    return {key: value for key, value in values.items() if not key.startswith("validation_")}


def variation(run_dir: Path, base: Path) -> str:
    """What a run changes in the base, as `--vary` has it."""
    ours, theirs = all_settings(run_dir), all_settings(base)
    return ",".join(f"{key}={json.dumps(ours[key])}" for key in ours if ours[key] != theirs[key])


def write_base(run_dir: Path, datasets: Path, own: Path, tokens: int | None) -> None:
    """Write the base's two files to `own`: validated on all there is, at the end, and trained on `tokens`."""
    model, config = (read_json_object(run_dir / f"{name}.json") for name in ("model", "train"))
    split = TokenFiles(dataset_folder(datasets, config["dataset"]), "validation")
    batches = (split.count - 1) // model["context_length"] // config["microbatch_size"]
    config |= {"validation_interval": 1_000_000, "validation_batches": batches}
    config |= {"checkpoint_interval": 500, "keep_checkpoints": 1}
    config |= {"min_train_tokens": tokens} if tokens else {}
    own.mkdir(parents=True, exist_ok=True)
    (own / "model.json").write_text(json.dumps(model))
    (own / "train.json").write_text(json.dumps(config))


HALF, WHOLE = 0, 1  # the steps of a plan whose first batch alone is a half


def steps_of(run_dir: Path, world: World) -> tuple[dict[int, Callable[[], Tensor]], float]:
    """A run's training steps with half and whole batches, and the share of the tokens in half batches."""
    model_config = read_config(GPTConfig, run_dir / "model.json")
    config = read_config(TrainConfig, run_dir / "train.json")
    learner, length = Learner(config, model_config, world), model_config.context_length
    plan = dataclasses.replace(plan_batches(config, length, 1, None), half_steps=1)
    steps: dict[int, Callable[[], Tensor]] = {}
    for kind in (HALF, WHOLE) if config.half_batch_percent else (WHOLE,):
        shapes = [(count, length + 1) for _, count in plan.microbatches(kind, 0)]
        batch = [torch.randint(model_config.vocab_size, shape) for shape in shapes]
        steps[kind] = functools.partial(learner.train_step, batch, 1e-4)
    return steps, config.half_batch_percent / 100


def step_times(runs: list[str], runs_dir: Path, rounds: int) -> dict[str, float]:
    """The median milliseconds of a training step of each run, taken in turns; with half batches those of two
    halves for their share of the tokens."""
    world = join_world()
    steps = {run: steps_of(runs_dir / run, world) for run in runs}
    taken: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 3):
        for run, (kinds, _) in steps.items():
            for kind, step in kinds.items():
                start = time.perf_counter()
                step().tolist()
                if turn >= 3:
                    taken.setdefault((run, kind), []).append(1e3 * (time.perf_counter() - start))
    times = {each: statistics.median(found) for each, found in taken.items()}
    return {
        run: (1 - halves) * times[run, WHOLE] + halves * 2 * times.get((run, HALF), 0.0)
        for run, (_, halves) in steps.items()
    }


@click.command()
@click.argument("datasets_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="From 42 on.")
@click.option("--tokens", type=click.IntRange(min=1), help="Of each training; default: the demo's own.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=30, show_default=True, help="Timed steps of each."
)
@runs_dir_option
def main(
    datasets_dir: Path, folder: Path, seeds: int, tokens: int | None, rounds: int, runs_dir: Path
) -> int | None:
    """Train runs/demo and runs/demo-* on DATASETS_DIR's data, in FOLDER, and compare them."""
    demo = runs_dir / "demo"
    # Two dashes are ablate.py's own runs.
    found = sorted(path.parent for path in runs_dir.glob("demo-*/train.json") if "--" not in path.parent.name)
    varied = {run.name: variation(run, demo) for run in found}
    write_base(demo, datasets_dir, folder / "demo", tokens)
    options = ["--seeds", seeds, "--runs-dir", folder, "--chart", folder / "ablate.png"]
    options += [word for text in varied.values() for word in ("--vary", text)]
    command = [str(word) for word in ("demo", datasets_dir, *options)]
    if status := ablate.main.main(command, standalone_mode=False):
        return status
    times = step_times(["demo", *varied], runs_dir, rounds)
    print("\n| run | change | step, ms | ratio |\n| --- | --- | --- | --- |")
    for run, taken in times.items():
        print(f"| {run} | {varied.get(run, '')} | {taken:.1f} | {taken / times['demo']:.2f} |")
    return None


if __name__ == "__main__":
    run_command(main)
